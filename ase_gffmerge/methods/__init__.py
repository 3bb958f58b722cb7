"""Every way to use several specialists together, behind one signature: merges, baselines and references.

Importing this package fills :data:`METHODS`, one module per method or family.
"""

from ase_gffmerge.methods.method import METHODS, Method, Mixture, Need, Outcome, get_method, register

__all__ = ["METHODS", "Method", "Mixture", "Need", "Outcome", "get_method", "register"]
