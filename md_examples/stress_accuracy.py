"""Stress of crystals: errors of a potential, and whether virial labels mean what they are said to mean."""

from collections.abc import Sequence

import numpy as np
from ase import Atoms

from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.models import Potential


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
        For ``diagonal`` and ``off_diagonal`` components: ``correlation`` and ``slope`` of the labels' fluctuations against
        the model's, and the means over frames and components of both (eV).
    """
    model, label = strain_derivatives(base, frames), labelled_strain_derivatives(frames)
    pairs = {"diagonal": ([0, 1, 2], [0, 1, 2]), "off_diagonal": ([1, 0, 0], [2, 2, 1])}
    result = {}
    for name, (a, b) in pairs.items():
        x, y = model[:, a, b], label[:, a, b]
        dx, dy = (x - x.mean(axis=0)).ravel(), (y - y.mean(axis=0)).ravel()
        result[name] = {
            "correlation": float(np.corrcoef(dx, dy)[0, 1]),
            "slope": float(dx @ dy / (dx @ dx)),
            "mean_model": float(x.mean()),
            "mean_label": float(y.mean()),
        }
    return result


def stress_mae(potential: Potential, frames: Sequence[Atoms], *, specialist: int = 0) -> float:
    """Mean absolute error over the nine components of the stress, eV/Å^3."""
    model = strain_derivatives(potential, frames, specialist=specialist)
    volumes = np.array([atoms.get_volume() for atoms in frames])
    return float(np.abs((model - labelled_strain_derivatives(frames)) / volumes[:, None, None]).mean())
