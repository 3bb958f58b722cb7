"""All trials, the most promising first."""

from research import calibration, copies, gauss_newton, joint_block, layerwise, readout, stages
from research.bench import Trial


def all_trials() -> list[Trial]:
    """Trials of all families in the order in which they run."""
    families = (copies, calibration, readout, stages, gauss_newton, joint_block, layerwise)
    return sorted((t for family in families for t in family.trials()), key=lambda trial: trial.order)
