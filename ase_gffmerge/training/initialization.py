"""Weights and reference energies per element that a training starts from."""

import json
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers

from ase_gffmerge.data.labels import energy_label
from ase_gffmerge.errors import FramesError, IncompatibleSpecialistsError, ReferenceWarning
from ase_gffmerge.forcefield.force_field import ForceField, symbols
from ase_gffmerge.models import Potential, build_potential
from ase_gffmerge.training.config import TrainConfig

OFFSET_TOLERANCE = 1.0
"""eV per atom between energies and inherited reference energies that a training may have to learn."""

DEFAULT_MODEL = "painn"
"""Architecture of a new model where none is named."""

NEW_MODELS: Mapping[str, Mapping[str, float]] = {"painn": {"norm_offset": 1e-3}}
"""Hyper-parameters of new models where they are not the defaults, which are those of old files. Forces of PaiNN are then
smooth around inversion centres on the scale of displacements for phonons (0.01 Å), not only of 1e-4 Å."""


def initial_specialist(
    frames: Sequence[Atoms],
    config: TrainConfig,
    *,
    init: ForceField | None,
    references: Mapping[int, float] | None,
    isolated: Mapping[int, float] | None = None,
) -> ForceField:
    """Weights to start from: a copy of those of ``init``, or random ones with fitted reference energies.

    Parameters
    ----------
    frames
        Labelled frames, which decide the elements and the fit.
    config
        Architecture, hyper-parameters, seed.
    init
        Force field to start from; its reference energies are kept unless ``references`` are given.
    references
        Energies per element in eV.
    isolated
        Energies of isolated atoms in eV, which a fit takes as they are.

    Raises
    ------
    IncompatibleSpecialistsError
        When ``init`` lacks an element or has another architecture or other hyper-parameters than ``config``.
    FramesError
        When ``references`` lack an element of the frames.
    """
    elements = sorted({int(z) for atoms in frames for z in atoms.numbers})
    if references is not None and (missing := set(elements) - set(references)):
        raise FramesError(
            f"the reference energies lack {symbols(sorted(missing))}, which the frames contain; add them (eV)"
        )
    theory = config.level_of_theory or (init.level_of_theory if init else "unknown")
    if init is None:
        potential = random_potential(config, tuple(elements))
        table = fit_references(frames, elements, isolated) if references is None else references
    else:
        check_parent(init, elements, config)
        potential, table = deepcopy(init.potential), references or {}
        kept = dict(zip(init.species, init.potential.references.tolist())) | dict(table)
        warn_of_offset(frames, kept)
    for z, energy in table.items():
        if z in potential.species:
            potential.references[potential.species.index(z)] = energy
    return ForceField(name="", potential=potential, level_of_theory=theory)


def random_potential(config: TrainConfig, species: tuple[int, ...]) -> Potential:
    """Weights drawn with ``config.seed``; the global random state of torch is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        name = config.model or DEFAULT_MODEL
        return build_potential(name, {**NEW_MODELS.get(name, {}), **config.hyper}, species)


def check_parent(init: ForceField, elements: Sequence[int], config: TrainConfig) -> None:
    """Raise :class:`IncompatibleSpecialistsError` when a force field cannot start a training.

    Parameters
    ----------
    init
        The force field.
    elements
        Atomic numbers of the frames.
    config
        Architecture and hyper-parameters that were asked for.
    """
    unknown = sorted(set(elements) - set(init.species))
    if unknown:
        raise IncompatibleSpecialistsError(
            f"{init.name!r} knows {symbols(init.species)}, but the frames also contain {symbols(unknown)}; "
            "train a base that knows all elements first"
        )
    architecture, hyper = init.potential.architecture, init.potential.hyper.to_dict()
    if config.model not in (None, architecture):
        raise IncompatibleSpecialistsError(
            f"{init.name!r} is a {architecture} model and cannot start a {config.model}; leave the "
            f"model out, or train a {config.model} base first"
        )
    other = {key: value for key, value in config.hyper.items() if hyper.get(key) != value}
    if other:
        had = {key: hyper.get(key) for key in other}
        raise IncompatibleSpecialistsError(
            f"{init.name!r} has hyper-parameters {had}, the configuration asks for {other}; leave `hyper` "
            "out, it comes with the parent"
        )


def _composition(frames: Sequence[Atoms], species: Sequence[int]) -> np.ndarray:
    """Count of each element in each frame, (n_frames, n_species)."""
    return np.array(
        [[np.count_nonzero(atoms.numbers == z) for z in species] for atoms in frames], dtype=float
    )


def fit_references(
    frames: Sequence[Atoms], species: Sequence[int], known: Mapping[int, float] | None = None
) -> dict[int, float]:
    """Fit energies per element by least squares (minimum norm where compositions are degenerate).

    Parameters
    ----------
    frames
        With energies.
    species
        Atomic numbers.
    known
        Energies in eV that are not fitted, those of isolated atoms.
    """
    known = {z: energy for z, energy in (known or {}).items() if z in species}
    energies = np.array([energy_label(atoms) for atoms in frames])
    unknown = [z for z in species if z not in known]
    if known:
        energies = energies - _composition(frames, list(known)) @ np.array(list(known.values()))
    solution = np.linalg.lstsq(_composition(frames, unknown), energies, rcond=1e-10)[0] if unknown else []
    return {**known, **{int(z): float(energy) for z, energy in zip(unknown, solution, strict=True)}}


def warn_of_offset(frames: Sequence[Atoms], references: Mapping[int, float]) -> None:
    """Warn when energies lie further than 1 eV per atom from the references a specialist inherits.

    A table fitted to too few compositions is not unique and may be far off for the next molecule; a training that has to
    learn such an offset drifts far from its base.
    """
    offsets = [
        (energy_label(atoms) - sum(references[z] for z in atoms.numbers.tolist())) / len(atoms)
        for atoms in frames
    ]
    mean = float(np.mean(offsets))
    if abs(mean) > OFFSET_TOLERANCE:
        warnings.warn(
            f"the energies lie {mean:.1f} eV per atom from the base's reference energies, which the training must learn "
            "as an offset; train the base on more different compositions, or give both trainings one table with "
            "--references FILE",
            ReferenceWarning,
            stacklevel=2,
        )


def load_references(path: Path) -> dict[int, float]:
    """Read ``{"H": -13.6, ...}`` (eV) from a JSON file."""
    try:
        table = {atomic_numbers[key]: float(value) for key, value in json.loads(path.read_text()).items()}
        if not table or not np.isfinite(list(table.values())).all():
            raise ValueError("no energies, or energies that are not finite")
        return table
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise FramesError(
            f"cannot read reference energies from {path} ({type(error).__name__}: {error}); write a JSON "
            'object of element symbols and energies in eV, for example {"H": -13.6}'
        ) from None
