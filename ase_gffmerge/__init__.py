"""Merge specialist graph-neural-network force fields in closed form and run them in ASE.

The public names are imported on first use, so that ``import ase_gffmerge`` stays instant (it does not import torch).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ase_gffmerge.dynamics.batched_md import run_replicas as run_replicas
    from ase_gffmerge.dynamics.extrapolation_monitor import ExtrapolationMonitor as ExtrapolationMonitor
    from ase_gffmerge.engines.ase.calculator import GFFMergeCalculator as GFFMergeCalculator
    from ase_gffmerge.engines.ase.many_structures import evaluate_many as evaluate_many
    from ase_gffmerge.forcefield.force_field import ForceField as ForceField
    from ase_gffmerge.integrations.load import load_force_field as load_force_field
    from ase_gffmerge.merging.compress import compress as compress
    from ase_gffmerge.merging.external_calculators import merge_calculators as merge_calculators
    from ase_gffmerge.merging.modules import merge_modules as merge_modules
    from ase_gffmerge.merging.recipe import Recipe as Recipe
    from ase_gffmerge.training.distill import distill as distill
    from ase_gffmerge.workflows.merge import merge as merge

__version__ = "0.1.0"

_HOMES = {
    "ExtrapolationMonitor": "ase_gffmerge.dynamics.extrapolation_monitor",
    "GFFMergeCalculator": "ase_gffmerge.engines.ase.calculator",
    "Recipe": "ase_gffmerge.merging.recipe",
    "ForceField": "ase_gffmerge.forcefield.force_field",
    "load_force_field": "ase_gffmerge.integrations.load",
    "compress": "ase_gffmerge.merging.compress",
    "evaluate_many": "ase_gffmerge.engines.ase.many_structures",
    "distill": "ase_gffmerge.training.distill",
    "merge_calculators": "ase_gffmerge.merging.external_calculators",
    "merge_modules": "ase_gffmerge.merging.modules",
    "merge": "ase_gffmerge.workflows.merge",
    "run_replicas": "ase_gffmerge.dynamics.batched_md",
}
__all__ = [
    "ExtrapolationMonitor",
    "ForceField",
    "GFFMergeCalculator",
    "Recipe",
    "__version__",
    "compress",
    "distill",
    "evaluate_many",
    "load_force_field",
    "merge",
    "merge_calculators",
    "merge_modules",
    "run_replicas",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ase_gffmerge' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names."""
    return __all__
