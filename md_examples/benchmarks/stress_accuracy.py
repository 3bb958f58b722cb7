"""Stress of crystals: errors of a potential, and whether virial labels mean what they are said to mean."""

from collections.abc import Sequence

import numpy as np
from ase import Atoms, units

from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.models import Potential

COMPONENTS = {"diagonal": ([0, 1, 2], [0, 1, 2]), "off_diagonal": ([1, 0, 0], [2, 2, 1])}


def strain_derivatives(potential: Potential, frames: Sequence[Atoms], *, specialist: int = 0) -> np.ndarray:
    """dE/d(strain) by the model (n_frames, 3, 3) in eV, minus the virial."""
    values = []
    for atoms in frames:
        graph = build_graph(atoms, potential.hyper.cutoff, dtype=potential.dtype, specialist=specialist)
        prediction = predict(potential, batch_graphs([graph]).to(potential.device))
        values.append(prediction.strain_derivative[0].double().cpu().numpy())
    return np.array(values)


def labelled_strain_derivatives(frames: Sequence[Atoms]) -> np.ndarray:
    """dE/d(strain) by the labels (n_frames, 3, 3) in eV."""
    return np.array([atoms.get_stress(voigt=False) * atoms.get_volume() for atoms in frames])


def virial_check(base: Potential, frames: Sequence[Atoms]) -> dict[str, dict[str, float]]:
    """Labels against a model that never saw one: how they go together from frame to frame.

    Returns
    -------
    dict
        For ``diagonal`` and ``off_diagonal`` components of dE/d(strain) what :func:`agreement` says.
    """
    model, label = strain_derivatives(base, frames), labelled_strain_derivatives(frames)
    return {name: agreement(model[:, a, b], label[:, a, b]) for name, (a, b) in COMPONENTS.items()}


def kinetic_check(
    base: Potential, trajectory: Sequence[Atoms], *, timestep: float, n: int
) -> dict[str, dict[str, float]]:
    """Whether virial labels hold the momenta's part, minus the sum of m v v^T: the momenta against what the model leaves.

    Frames of a trajectory that was thinned out at random are one step apart here and there; their displacements are the
    velocities.

    Parameters
    ----------
    base
        A model that never saw a virial.
    trajectory
        Frames of one crystal in order of time.
    timestep
        Of the dynamics, fs.
    n
        How many pairs of neighbours in time to look at.

    Returns
    -------
    dict
        ``temperature`` (K) of the pairs, and for ``diagonal`` and ``off_diagonal`` components what :func:`agreement` says of
        labels less model (as labels) and momenta (as model): the slope is -1 if the labels hold the momenta's part, else 0.
    """
    first, kinetic = _one_step_apart(trajectory, timestep)
    frames, kinetic = [trajectory[i] for i in first[:n]], kinetic[:n]
    left = labelled_strain_derivatives(frames) - strain_derivatives(base, frames)
    thermal = np.trace(kinetic, axis1=1, axis2=2).mean() / (3 * len(frames[0]) * units.kB)
    return {
        "temperature": {"mean": float(thermal)},
        **{name: agreement(kinetic[:, a, b], left[:, a, b]) for name, (a, b) in COMPONENTS.items()},
    }


def _one_step_apart(trajectory: Sequence[Atoms], timestep: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices (n,) of frames whose successor is one step later, and the sum of m v v^T (n, 3, 3) in eV.

    Steps show as clusters of the mean squared displacement at 1, 4, 9, ... times the smallest.
    """
    cell, masses = trajectory[0].cell.array, trajectory[0].get_masses()
    scaled = np.diff([atoms.get_scaled_positions(wrap=False) for atoms in trajectory], axis=0)
    moved = (scaled - np.round(scaled)) @ cell
    moved -= np.einsum("i,tia->ta", masses / masses.sum(), moved)[:, None]
    squares = np.einsum("i,tia->t", masses, moved**2)
    found = np.flatnonzero(squares < 2.25 * np.median(np.sort(squares)[: len(squares) // 8 + 1]))
    velocities = moved[found] / (timestep * units.fs)
    return found, np.einsum("i,tia,tib->tab", masses, velocities, velocities)


def agreement(model: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """How components (n_frames, n_components) of labels follow those of a model.

    Returns
    -------
    dict
        ``correlation`` and ``slope`` of the labels' fluctuations against the model's, ``residual``: the standard deviation
        of their difference, and the means of both. In the unit of the components.
    """
    dx, dy = (model - model.mean(axis=0)).ravel(), (label - label.mean(axis=0)).ravel()
    return {
        "correlation": float(np.corrcoef(dx, dy)[0, 1]),
        "slope": float(dx @ dy / (dx @ dx)),
        "residual": float(np.std(dy - dx)),
        "mean_model": float(model.mean()),
        "mean_label": float(label.mean()),
    }


def stress_mae(potential: Potential, frames: Sequence[Atoms], *, specialist: int = 0) -> float:
    """Mean absolute error over the nine components of the stress, eV/Å^3."""
    model = strain_derivatives(potential, frames, specialist=specialist)
    volumes = np.array([atoms.get_volume() for atoms in frames])
    return float(np.abs((model - labelled_strain_derivatives(frames)) / volumes[:, None, None]).mean())
