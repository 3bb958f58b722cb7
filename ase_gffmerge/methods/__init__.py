"""Every way to use several specialists together, behind one signature: merges, baselines and references."""

from ase_gffmerge.methods.base import METHODS, MergeInputs, MergeOutput, Method, Requirement, method

__all__ = ["METHODS", "MergeInputs", "MergeOutput", "Method", "Requirement", "method"]
