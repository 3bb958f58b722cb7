"""All trials, the most promising first."""

from research import (
    calibration,
    copies,
    gauss_newton,
    hidden_width,
    joint_block,
    layerwise,
    readout,
    references,
    stages,
)
from research.bench import Trial

FAMILIES = (
    references,
    copies,
    calibration,
    readout,
    stages,
    gauss_newton,
    joint_block,
    layerwise,
    hidden_width,
)


def all_trials() -> list[Trial]:
    """Trials of all families in the order in which they run."""
    return sorted((t for family in FAMILIES for t in family.trials()), key=lambda trial: trial.order)
