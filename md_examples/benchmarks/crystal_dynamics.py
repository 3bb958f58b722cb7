"""Dynamics of crystals with a merged potential beside those with each specialist: does it hold, is it the same melt."""

from typing import Any

import numpy as np
from ase import Atoms

from ase_gffmerge.dynamics.batched_md import run_replicas
from ase_gffmerge.dynamics.trajectory import Trajectory
from ase_gffmerge.evaluation.analysis import diffusion_coefficient, radial_distributions, without_drift
from ase_gffmerge.models import Potential

TEMPERATURES = (300, 600)
"""K."""
TIMESTEP, EVERY = 1.0, 10
"""fs, and steps between two frames of a run."""


def side_by_side(start: Atoms, *, specialist: Potential, merged: Potential, steps: int) -> dict[str, Any]:
    """NVT runs of one crystal with its specialist and with the merged potential, from the same structure.

    Returns
    -------
    dict
        By temperature: for ``specialist`` and ``merged`` what :func:`summary` tells, and ``rdf_difference``.
    """
    runs = {name: nvt_runs(p, start, steps) for name, p in (("specialist", specialist), ("merged", merged))}
    return {
        f"{temperature} K": {
            **{name: summary(runs[name][i]) for name in runs},
            "rdf_difference": rdf_difference(runs["specialist"][i], runs["merged"][i]),
        }
        for i, temperature in enumerate(TEMPERATURES)
    }


def nvt_runs(potential: Potential, start: Atoms, steps: int) -> list[Trajectory]:
    """One run per temperature, all in one batch."""
    return run_replicas(
        potential,
        [start] * len(TEMPERATURES),
        ensemble="nvt",
        temperature=TEMPERATURES,
        timestep=TIMESTEP,
        steps=steps,
        every=EVERY,
    )


def second_half(run: Trajectory) -> np.ndarray:
    """Positions (n_frames, n_atoms, 3) in Å, after the crystal had time to warm up."""
    return np.array([atoms.positions for atoms in run.frames[len(run.frames) // 2 :]])


def summary(run: Trajectory) -> dict[str, Any]:
    """How a run went.

    Returns
    -------
    dict
        ``stopped``, ``stopped_at``: why and when it was stopped, ``None`` if it was not. Of its second half:
        ``mean_temperature`` (K), ``li_diffusion`` and ``li_diffusion_error`` (Å²/ps; ``None`` if it is too short).
    """
    atoms = run.frames[0]
    positions = without_drift(second_half(run), atoms.get_masses())[:, atoms.numbers == 3]
    enough = len(positions) >= 40
    diffusion = diffusion_coefficient(positions, interval=0.001 * TIMESTEP * EVERY) if enough else None
    return {
        "stopped": run.stopped,
        "stopped_at": run.stopped_at,
        "mean_temperature": float(run.temperatures[len(run.temperatures) // 2 :].mean()),
        "li_diffusion": diffusion.coefficient if diffusion else None,
        "li_diffusion_error": diffusion.standard_error if diffusion else None,
    }


def rdf_difference(first: Trajectory, second: Trajectory) -> dict[str, float]:
    """Mean absolute difference of g(r) up to 6 Å of two runs of one crystal, by pair of elements."""
    atoms = first.frames[0]
    ours, theirs = (
        radial_distributions(second_half(run), atoms.numbers, atoms.cell.array) for run in (first, second)
    )
    return {pair: float(np.abs(ours[pair].values - theirs[pair].values).mean()) for pair in ours}
