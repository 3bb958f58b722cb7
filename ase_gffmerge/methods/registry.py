"""All methods by name, in the order in which tables show them."""

from ase_gffmerge.errors import RecipeError
from ase_gffmerge.methods.base import Method
from ase_gffmerge.runtime.registry import Registry

METHODS: Registry[Method] = Registry(
    "method",
    group="ase_gffmerge.methods",
    own={
        "best_single": "ase_gffmerge.methods.ensemble:best_single",
        "ensemble": "ase_gffmerge.methods.ensemble:ensemble",
        "mean": "ase_gffmerge.methods.closed_form:mean",
        "karcher": "ase_gffmerge.methods.karcher:karcher",
        "task_arithmetic": "ase_gffmerge.methods.task_arithmetic:task_arithmetic",
        "ties": "ase_gffmerge.methods.ties:ties",
        "dare": "ase_gffmerge.methods.dare:dare",
        "fisher": "ase_gffmerge.methods.fisher:fisher",
        "regmean": "ase_gffmerge.methods.regmean:regmean",
        "regmean++": "ase_gffmerge.methods.regmean:regmean_plus_plus",
        "procrustes": "ase_gffmerge.methods.procrustes:procrustes",
        "git_rebasin": "ase_gffmerge.methods.git_rebasin:git_rebasin",
        "emr": "ase_gffmerge.methods.emr:emr",
        "paper": "ase_gffmerge.methods.closed_form:paper",
        "gffmerge": "ase_gffmerge.methods.closed_form:gffmerge",
        "distill": "ase_gffmerge.methods.trained:distill",
        "joint": "ase_gffmerge.methods.trained:joint",
    },
    name_of=lambda found: found.name if isinstance(found, Method) else None,
    error=RecipeError,
)
"""A new method is one file and one line here; other packages add theirs as entry points ``ase_gffmerge.methods``."""
