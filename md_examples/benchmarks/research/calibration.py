r"""Family ``calibration``: how many frames, and how much each of them counts.

Kernel weights: frames are compared by their interatomic distances d, :math:`k_{ij}=\exp(-|d_i-d_j|^2/2h^2)` with h half
the median distance between calibration frames. With the density :math:`\rho_i=\sum_j k_{ij}` over the calibration frames,
a frame (or copy) counts :math:`\rho^{-1}` (rare conformers get the same say as typical ones) or :math:`\rho` (typical ones
even more).
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from ase import Atoms

from ase_gffmerge.merging.calibration import CalibrationSet
from ase_gffmerge.merging.recipe import Recipe
from research.bench import Bench, MergeOutput, Trial
from research.readout_fit import CHEAP, Setting, fitted, on_shared_trunk
from research.trunk import build_trunk

FAMILY = "calibration"


def density_weights(calibration_set: CalibrationSet, frames: Sequence[Atoms], *, power: float) -> np.ndarray:
    """Weights ρ^power of frames (n_frames,), with mean 1 over the calibration frames."""
    centres = np.array([a.get_all_distances().ravel() for a in calibration_set.specialist.calibration])
    between = np.linalg.norm(centres[:, None] - centres, axis=-1)
    width = 0.5 * np.median(between[np.triu_indices(len(centres), 1)])

    def density(distances: np.ndarray) -> np.ndarray:
        return np.exp(-0.5 * (distances / width) ** 2).sum(1)

    points = np.array([a.get_all_distances().ravel() for a in frames])
    own = density(np.linalg.norm(points[:, None] - centres, axis=-1))
    return own**power / (density(between) ** power).mean()


def with_frames(n: int) -> Callable[[Bench], MergeOutput]:
    """Trunk and readout calibrated on ``n`` frames per specialist."""
    return lambda bench: fitted(build_trunk(bench.calibrated(n), Recipe()), Setting())


def readout_with_frames(n: int, *, copies: int, directions: int) -> Callable[[Bench], MergeOutput]:
    """Readout fitted on ``n`` frames per specialist, trunk on the usual ones."""
    options = CHEAP.model_copy(update={"copies": copies, "directions": directions})
    return lambda bench: fitted(bench.trunk, Setting(options=options, frames=bench.pool_frames(n)))


def trials() -> list[Trial]:
    """All trials of this family."""
    found = [
        Trial(
            name=f"frames {n}",
            family=FAMILY,
            changes=f"{n} true frames per specialist, trunk and readout, 2 copies each",
            run=with_frames(n),
            order=order,
        )
        for n, order in ((25, 35), (50, 34), (100, 33), (200, 12), (400, 11))
    ]
    for n, copies, directions, order in ((400, 0, 6, 13), (800, 0, 6, 14), (800, 0, 27, 32), (400, 2, 6, 15)):
        found.append(
            Trial(
                name=f"readout frames {n} x {1 + copies}, directions {directions}",
                family=FAMILY,
                changes=f"readout on {n} true frames with {copies} copies, {directions} derivatives each; trunk on 100",
                run=readout_with_frames(n, copies=copies, directions=directions),
                order=order,
            )
        )
    for power, what in ((-1.0, "rare"), (-0.5, "rare (square root)"), (1.0, "typical")):
        found.append(
            Trial(
                name=f"kernel weights {power:+g}",
                family=FAMILY,
                changes=f"readout: {what} frames count more (density to the power {power:+g})",
                run=on_shared_trunk(Setting(frame_weights=partial(density_weights, power=power))),
                order=45,
            )
        )
    return found
