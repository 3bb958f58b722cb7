r"""Family ``copies``: which frames the readout is fitted on beside the calibration frames.

A specialist labels anything for free, so the question is where to ask it:

* every atom displaced on its own (``rattled``);
* short dynamics of the specialist starts from every calibration frame (:class:`Dynamics`);
* ``thermal`` displaces a frame along the calibration frames' own fluctuations. With the frames turned onto the displaced one
  (Kabsch) and their mean removed, :math:`D_j = R_j x_j - \bar x`, a copy is :math:`x_i + s\sum_j c_j D_j/\sqrt n` with
  standard normal c: its displacement has s² times the thermal covariance, so that stiff bonds move little and soft
  torsions much. It needs nothing but frames of one composition and order of atoms. Where groups rotate freely (methyl)
  the linear mixture of all frames tears them apart unless s is small; ``nearest`` frames only keep to one conformer.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from ase import Atoms

from ase_gffmerge.dynamics.batched_md import run_replicas
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.merging.calibration import CalibrationSet
from ase_gffmerge.merging.recipe import ReadoutOptions
from research.bench import Bench, MergeOutput, Trial
from research.readout_fit import CHEAP, Copies, Setting, fitted, on_shared_trunk, rattled
from research.trunk import Trunk

FAMILY = "copies"


def rotation_onto(positions: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Rotation R (3, 3) such that centred positions @ R are closest to the centred reference (Kabsch 1976)."""
    u, _, vt = np.linalg.svd(positions.T @ reference)
    flip = np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    return u @ flip @ vt


def thermal(
    frames: Sequence[Atoms],
    calibration_set: CalibrationSet,
    options: ReadoutOptions,
    *,
    scale: float,
    rattle: float = 0.0,
    nearest: int | None = None,
) -> list[Atoms]:
    """Copies displaced along the fluctuations of the territory's calibration frames.

    Parameters
    ----------
    frames, territory, options
        See :data:`~research.readout_fit.Copies`.
    scale
        Standard deviation in units of the thermal one.
    rattle
        Standard deviation in Å of an independent displacement of every atom on top.
    nearest
        Only so many frames, those that are closest once they are turned onto the displaced one, tell the fluctuations.
    """
    rng = np.random.default_rng(options.seed)
    centred = [a.positions - a.positions.mean(0) for a in calibration_set.specialist.calibration]
    copies = []
    for atoms in frames:
        own = atoms.positions - atoms.positions.mean(0)
        turned = np.array([x @ rotation_onto(x, own) for x in centred])
        order = np.argsort(np.square(turned - own).sum((1, 2)))[:nearest]
        deviations = (turned[order] - turned[order].mean(0)) / np.sqrt(len(order))
        for _ in range(options.copies):
            copy = atoms.copy()
            mixed = np.einsum("j,jax->ax", rng.standard_normal(len(deviations)), deviations)
            copy.positions += scale * mixed + rattle * rng.standard_normal(copy.positions.shape)
            copies.append(copy)
    return copies


@dataclass(frozen=True, kw_only=True)
class Dynamics:
    """Langevin dynamics of every specialist from all its calibration frames at once; visited frames are the copies.

    Attributes
    ----------
    copies, steps
        Frames recorded per calibration frame, and time steps from one to the next.
    timestep
        fs.
    equal_masses
        Give every atom 12 u: what is visited in the long run stays the same, light atoms no longer limit the time step.
    temperature
        K.
    directions, width
        Derivatives per frame and features in the readout's fit.
    """

    copies: int
    steps: int
    timestep: float = 0.5
    equal_masses: bool = False
    temperature: float = 500.0
    directions: int = CHEAP.directions
    width: int = CHEAP.width

    def visited(self, specialist: ForceField) -> dict[bytes, list[Atoms]]:
        """Copies of every calibration frame, by its positions."""
        starts = [atoms.copy() for atoms in specialist.calibration]
        for atoms in starts:
            if self.equal_masses:
                atoms.set_masses(np.full(len(atoms), 12.0))
        runs = run_replicas(
            specialist.potential,
            starts,
            ensemble="nvt",
            temperature=self.temperature,
            timestep=self.timestep,
            steps=self.steps * self.copies,
            every=self.steps,
            friction=0.05,
        )
        return {
            start.positions.tobytes(): [
                Atoms(a.numbers, positions=a.positions, cell=a.cell, pbc=a.pbc) for a in run.frames[1:]
            ]
            for start, run in zip(starts, runs, strict=True)
        }

    def __call__(self, bench: Bench) -> MergeOutput:
        """Sample, then fit the readout of the shared trunk."""
        return self.on(bench.trunk)

    def on(self, trunk: Trunk) -> MergeOutput:
        """Sample, then fit the readout of a trunk."""
        start = time.process_time()
        found = [self.visited(calibration_set.specialist) for calibration_set in trunk.calibration_sets]
        options = CHEAP.model_copy(update={"directions": self.directions, "width": self.width})

        def copies(
            frames: Sequence[Atoms], calibration_set: CalibrationSet, options: ReadoutOptions
        ) -> list[Atoms]:
            return [
                copy for atoms in frames for copy in found[calibration_set.index][atoms.positions.tobytes()]
            ]

        spent = time.process_time() - start
        outcome = fitted(trunk, Setting(copies=copies, options=options), extra_seconds=spent)
        return replace(outcome, note=f"{outcome.note}; dynamics {spent:.0f} s")


def _trial(name: str, changes: str, make: Copies, *, order: int, **options: float) -> Trial:
    setting = Setting(copies=make, options=CHEAP.model_copy(update=options))
    return Trial(name=name, family=FAMILY, changes=changes, run=on_shared_trunk(setting), order=order)


def trials() -> list[Trial]:
    """All trials of this family."""
    found = [
        _trial("copies 2", "cheap reference: 2 rattled copies (0.02 Å)", rattled, order=0),
        _trial("copies 0", "no copies", rattled, order=20, copies=0),
        _trial("copies 8", "8 rattled copies", rattled, order=1, copies=8),
        _trial("displacement 0.01", "2 copies rattled by 0.01 Å", rattled, order=41, displacement=0.01),
        _trial("displacement 0.05", "2 copies rattled by 0.05 Å", rattled, order=40, displacement=0.05),
    ]
    for scale, rattle, nearest, n, order in (
        (0.1, 0.0, None, 2, 2),
        (0.3, 0.0, None, 2, 2),
        (0.5, 0.0, None, 2, 2),
        (0.3, 0.0, 10, 2, 3),
        (0.1, 0.01, None, 2, 4),
        (0.1, 0.01, None, 8, 9),
    ):
        near = f" of the {nearest} nearest" if nearest else ""
        more = f" + {rattle} Å" if rattle else ""
        found.append(
            _trial(
                f"thermal {scale}{near}{more} x {n}",
                f"{n} copies along {scale} of the fluctuations{near or ' of all'} frames{more}",
                partial(thermal, scale=scale, rattle=rattle, nearest=nearest),
                order=order,
                copies=n,
            )
        )
    runs = (
        (Dynamics(copies=2, steps=40), 10),
        (Dynamics(copies=8, steps=10, timestep=2.0, equal_masses=True), 6),
        (Dynamics(copies=4, steps=10, timestep=2.0, equal_masses=True), 7),
        (Dynamics(copies=8, steps=10, timestep=2.0, equal_masses=True, directions=27), 16),
        (Dynamics(copies=16, steps=10, timestep=2.0, equal_masses=True, directions=3), 16),
        (Dynamics(copies=16, steps=10, timestep=2.0, equal_masses=True), 16),
        (Dynamics(copies=8, steps=30, timestep=2.0, equal_masses=True), 16),
        (Dynamics(copies=8, steps=10, timestep=2.0, equal_masses=True, width=2048), 16),
        (Dynamics(copies=8, steps=5, timestep=2.0, equal_masses=True), 16),
        (Dynamics(copies=8, steps=10, timestep=2.0, equal_masses=True, temperature=700.0), 16),
        (Dynamics(copies=4, steps=100), 30),
        (Dynamics(copies=8, steps=50), 31),
    )
    for run, order in runs:
        more = ", equal masses" * run.equal_masses
        more += f", {run.directions} directions" * (run.directions != CHEAP.directions)
        more += f", width {run.width}" * (run.width != CHEAP.width)
        hot = f", {run.temperature:.0f} K" * (run.temperature != 500)
        found.append(
            Trial(
                name=f"MD {run.copies} x {run.steps * run.timestep:.0f} fs{more}{hot}",
                family=FAMILY,
                changes=f"{run.copies} copies from the specialist's dynamics at {run.temperature:.0f} K, "
                f"{run.steps} steps of {run.timestep:g} fs apart{more}",
                run=run,
                order=order,
                costs=run.width != CHEAP.width,
            )
        )
    return found
