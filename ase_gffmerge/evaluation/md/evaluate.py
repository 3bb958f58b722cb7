"""Potentials judged by their dynamics, side by side (after "Forces are not enough", arXiv 2210.07237)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from ase import Atoms

from ase_gffmerge.dynamics.trajectory import harmonic_temperature
from ase_gffmerge.errors import FramesError
from ase_gffmerge.evaluation.analysis import distribution_mae, spectral_overlap
from ase_gffmerge.evaluation.md.observables import (
    Distributions,
    ModelDynamics,
    distribution_range,
    frames_distributions,
    observe,
)
from ase_gffmerge.evaluation.md.runs import Contestant, Protocol, run_models
from ase_gffmerge.forcefield.conditioning import with_choice_of
from ase_gffmerge.inference.errors import Errors
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.runtime.progress import Progress, no_progress

UNITS = {
    "stability_time": "ps",
    "temperature": "K",
    "reference_temperature": "K",
    "h_mae": "1",
    "rdf_mae": "Å",
    "nve_drift": "eV/atom/ps",
    "diffusion": "Å²/ps",
    "force_mae": "eV/Å",
    "force_rmse": "eV/Å",
    "energy_mae": "eV/atom",
}


@dataclass(frozen=True, kw_only=True)
class MDEvaluation:
    """What the dynamics of several models look like.

    Attributes
    ----------
    protocol
        What was run.
    formula
        Of the structure.
    n_reference
        Number of reference frames.
    reference
        Their distributions: ``h`` for molecules, g(r) by pair of elements for crystals.
    reference_noise
        Error that the reference's own finite number of frames causes in each: half the difference between its even
        and odd frames (empty for a single frame).
    reference_temperatures
        How hot the reference frames are by each model's own energies, K: the temperature of its NVT runs, plus what the
        frames' higher or lower energy amounts to if all modes are harmonic. Far from the thermostat's, the reference is
        another ensemble, and the difference of distributions is that of the ensembles as well.
    models
        In the order given.
    errors
        Errors on the labelled frames, by model; empty without labels.
    """

    protocol: Protocol
    formula: str
    n_reference: int
    reference: Distributions
    reference_noise: Mapping[str, float]
    reference_temperatures: Mapping[str, float]
    models: tuple[ModelDynamics, ...]
    errors: Mapping[str, Errors]

    def distribution_maes(self, model: ModelDynamics) -> dict[str, float]:
        """Difference of every distribution from the reference; empty when no run of the model lasted."""
        return _maes(model.distributions, self.reference)

    def to_dict(self) -> dict[str, object]:
        """Summary for JSON: plain numbers, no curves."""
        return {
            "structure": self.formula,
            "protocol": asdict(self.protocol),
            "reference": {"n_frames": self.n_reference, **_named(self.reference_noise, "_noise")},
            "units": UNITS,
            "models": {model.label: self._summary(model) for model in self.models},
        }

    def _summary(self, model: ModelDynamics) -> dict[str, object]:
        first = self.models[0]
        errors = self.errors.get(model.label)
        overlap = (
            spectral_overlap(model.spectrum, first.spectrum) if model.spectrum and first.spectrum else None
        )
        return {
            **(errors.to_dict() if errors else {}),
            **model.to_dict(),
            "reference_temperature": self.reference_temperatures.get(model.label),
            **_named(self.distribution_maes(model), "_mae"),
            **_named(_maes(model.distributions, first.distributions), "_mae_to_first"),
            "vdos_overlap_with_first": overlap,
        }


def _maes(first: Distributions, second: Distributions) -> dict[str, float]:
    return {name: distribution_mae(first[name], second[name]) for name in first if name in second}


def _named(values: Mapping[str, float], suffix: str) -> dict[str, object]:
    """``h_mae`` as a number, ``rdf_mae`` by pair."""
    return {f"h{suffix}": values["h"]} if "h" in values else {f"rdf{suffix}": dict(values)} if values else {}


def evaluate_dynamics(
    models: Sequence[Contestant],
    frames: Sequence[Atoms],
    *,
    protocol: Protocol,
    reference: Sequence[Atoms] | None = None,
    errors: Mapping[str, Errors] | None = None,
    folder: Path | None = None,
    progress: Progress = no_progress,
) -> MDEvaluation:
    """Run every model from the same structures and compare what they do.

    Parameters
    ----------
    models
        The first one is what the others are compared with, beside the reference.
    frames
        Starting structures; of those with the same atoms as the first, as many as there are seeds are taken, evenly
        spread.
    protocol
        Lengths, temperature, seeds.
    reference
        Frames of the true ensemble at this temperature; default: ``frames``.
    errors
        To be passed on to the result.
    folder
        Where finished runs are kept, see :func:`~ase_gffmerge.evaluation.md.runs.run_models`.

    Raises
    ------
    FramesError
        When a model does not know an element, or no reference frame has the atoms of the first structure.
    """
    if not frames:
        raise FramesError("there are no frames to start from; give a file with at least one")
    for model in models:
        model.force_field.check_species(frames[0])
    truth = matching_frames(reference or frames, frames[0])
    runs = run_models(
        models, starting_structures(frames, protocol.seeds), protocol, folder=folder, progress=progress
    )
    r_max = distribution_range(truth)
    halves = [frames_distributions(truth[k::2], r_max=r_max) for k in (0, 1) if len(truth) > 1]
    observed = [
        observe(label, run["nvt"], run["nve"], protocol=protocol, r_max=r_max) for label, run in runs.items()
    ]
    return MDEvaluation(
        protocol=protocol,
        formula=frames[0].get_chemical_formula(),
        n_reference=len(truth),
        reference=frames_distributions(truth, r_max=r_max),
        reference_noise={name: 0.5 * mae for name, mae in _maes(*halves).items()} if halves else {},
        reference_temperatures=_reference_temperatures(models, observed, truth),
        models=tuple(observed),
        errors=errors or {},
    )


def _reference_temperatures(
    models: Sequence[Contestant], observed: Sequence[ModelDynamics], truth: Sequence[Atoms]
) -> dict[str, float]:
    """By model that lasted, for structures with vibrations, from at most 200 frames."""
    n_atoms, periodic = len(truth[0]), bool(truth[0].pbc.any())
    found = {}
    for model, seen in zip(models, observed, strict=True):
        if seen.temperature is None or seen.potential_energy is None or n_atoms < 3:
            continue
        few = truth[:: -(-len(truth) // 200)]
        energies = predict_frames(
            model.force_field.potential,
            few,
            specialist=model.specialist,
            names=model.force_field.specialist_names,
        ).energies
        difference = float(energies.mean()) - seen.potential_energy
        found[model.label] = harmonic_temperature(
            seen.temperature, difference, n_atoms=n_atoms, periodic=periodic
        )
    return found


def starting_structures(frames: Sequence[Atoms], n: int) -> list[Atoms]:
    """Give ``n`` frames with the atoms of the first one, evenly spread, repeated where there are fewer."""
    alike = matching_frames(frames, frames[0])
    chosen = [alike[int(k)] for k in np.arange(n) * max(len(alike) / n, 1) % len(alike)]
    return [
        with_choice_of(Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc), atoms)
        for atoms in chosen
    ]


def matching_frames(frames: Sequence[Atoms], first: Atoms) -> list[Atoms]:
    """Frames with the atoms of ``first``, in its order and periodicity; :class:`FramesError` when there are none."""
    found = [
        a for a in frames if np.array_equal(a.numbers, first.numbers) and np.array_equal(a.pbc, first.pbc)
    ]
    if not found:
        raise FramesError(
            f"no reference frame holds the atoms of the first structure ({first.get_chemical_formula()}) in the same "
            "order and periodicity; give frames of the same system"
        )
    return found
