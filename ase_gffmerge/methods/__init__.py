"""Every way to use several specialists together, behind one signature: merges, baselines and references."""

from ase_gffmerge.methods.base import MergeInputs, MergeOutput, Method, Requirement, method
from ase_gffmerge.methods.registry import METHODS

__all__ = ["METHODS", "MergeInputs", "MergeOutput", "Method", "Requirement", "method"]
