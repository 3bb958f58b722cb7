"""Every way to use several specialists together, behind one signature: merges, baselines and references.

Importing this package fills :data:`METHODS`, one module per method or family.
"""

from importlib import import_module

from ase_gffmerge.methods.base import (
    METHODS,
    MergeInputs,
    MergeOutput,
    Method,
    Requirement,
    get_method,
    register,
)

__all__ = ["METHODS", "MergeInputs", "MergeOutput", "Method", "Requirement", "get_method", "register"]

_IN_TABLE_ORDER = (
    "ensemble",
    "mean",
    "task_arithmetic",
    "ties",
    "dare",
    "fisher",
    "regmean",
    "procrustes",
    "git_rebasin",
    "emr",
    "closed_form",
    "trained",
)

for _module in _IN_TABLE_ORDER:
    import_module(f"{__name__}.{_module}")
