r"""Family ``copies``: which frames the readout is fitted on beside the calibration frames.

A specialist labels anything for free, so the question is where to ask it:

* the product displaces every atom on its own (``rattled``);
* short dynamics of the specialist starts from every calibration frame (``dynamics``);
* ``thermal`` displaces a frame along the calibration frames' own fluctuations. With the frames turned onto the displaced one
  (Kabsch) and their mean removed, :math:`D_j = R_j x_j - \bar x`, a copy is :math:`x_i + s\sum_j c_j D_j/\sqrt n` with
  standard normal c: its displacement has s² times the thermal covariance, so that stiff bonds move little and soft
  torsions much. It needs nothing but frames of one composition and order of atoms. Where groups rotate freely (methyl)
  the linear mixture of all frames tears them apart unless s is small; ``nearest`` frames only keep to one conformer.
"""

import time
from collections.abc import Sequence
from functools import partial

import numpy as np
from ase import Atoms

from ase_gffmerge.merging.recipe import ReadoutOptions
from ase_gffmerge.merging.territory import Territory
from ase_gffmerge.sampling.replicas import run_replicas
from research.bench import Bench, Outcome, Trial
from research.readout_fit import CHEAP, Copies, Setting, fitted, on_shared_trunk, rattled

FAMILY = "copies"


def rotation_onto(positions: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Rotation R (3, 3) such that centred positions @ R are closest to the centred reference (Kabsch 1976)."""
    u, _, vt = np.linalg.svd(positions.T @ reference)
    flip = np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    return u @ flip @ vt


def thermal(
    frames: Sequence[Atoms],
    territory: Territory,
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
    centred = [a.positions - a.positions.mean(0) for a in territory.specialist.calibration]
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


def dynamics(
    temperature: float, *, copies: int, interval: float, bench: Bench, rattle: float = 0.0
) -> Outcome:
    """Copies from each specialist's own Langevin dynamics, ``interval`` fs apart, starting at every calibration frame."""
    start = time.process_time()
    every = round(interval / 0.5)
    following: dict[bytes, list[Atoms]] = {}
    for territory in bench.trunk.territories:
        frames = territory.specialist.calibration
        runs = run_replicas(
            territory.specialist.potential,
            list(frames),
            ensemble="nvt",
            temperature=temperature,
            timestep=0.5,
            steps=every * copies,
            every=every,
            friction=0.05,
        )
        following |= {a.positions.tobytes(): list(r.frames)[1:] for a, r in zip(frames, runs, strict=True)}
    rng = np.random.default_rng(0)

    def visited(frames: Sequence[Atoms], territory: Territory, options: ReadoutOptions) -> list[Atoms]:
        found = []
        for atoms in frames:
            for visit in following[atoms.positions.tobytes()]:
                copy = atoms.copy()
                copy.positions = visit.positions + rattle * rng.standard_normal(visit.positions.shape)
                found.append(copy)
        return found

    spent = time.process_time() - start
    return fitted(bench.trunk, Setting(copies=visited), extra_seconds=spent)


def _trial(name: str, changes: str, make: Copies, *, order: int, **options: float) -> Trial:
    setting = Setting(copies=make, options=CHEAP.model_copy(update=options))
    return Trial(name=name, family=FAMILY, changes=changes, run=on_shared_trunk(setting), order=order)


def trials() -> list[Trial]:
    """All trials of this family."""
    found = [
        _trial("copies 2", "cheap reference: 2 rattled copies (0.02 Å)", rattled, order=0),
        _trial("copies 0", "no copies", rattled, order=20, copies=0),
        _trial("copies 8", "product default: 8 rattled copies", rattled, order=1, copies=8),
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
    for temperature, n, interval, order in ((500.0, 2, 20.0, 10), (500.0, 4, 50.0, 30), (500.0, 8, 25.0, 31)):
        found.append(
            Trial(
                name=f"MD {temperature:.0f} K {n} x {interval:.0f} fs",
                family=FAMILY,
                changes=f"{n} copies from the specialist's own dynamics",
                run=lambda bench, t=temperature, n=n, i=interval: dynamics(
                    t, copies=n, interval=i, bench=bench
                ),
                order=order,
            )
        )
    return found
