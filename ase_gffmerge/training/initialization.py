"""Weights and reference energies that a training starts from."""

from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from ase import Atoms

from ase_gffmerge.errors import FramesError, IncompatibleSpecialistsError
from ase_gffmerge.forcefield.force_field import ForceField, symbols
from ase_gffmerge.models import Potential, build_potential
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.reference_energies import fit_references, warn_of_offset

NEW_MODELS: Mapping[str, Mapping[str, float]] = {"painn": {"norm_offset": 1e-3}}
"""Hyper-parameters of new models where they are not the defaults, which are those of old files. Forces of PaiNN are then
smooth around inversion centres on the scale of displacements for phonons (0.01 Å), not only of 1e-4 Å."""


def initial_specialist(
    frames: Sequence[Atoms],
    config: TrainConfig,
    *,
    init: ForceField | None,
    references: Mapping[int, float] | None,
) -> ForceField:
    """Weights to start from: a copy of those of ``init``, or random ones with fitted references.

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
        table = fit_references(frames, elements) if references is None else references
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
        name = config.model or "painn"
        return build_potential(name, {**NEW_MODELS.get(name, {}), **config.hyper}, species)


def check_parent(init: ForceField, elements: Sequence[int], config: TrainConfig) -> None:
    """Raise :class:`IncompatibleSpecialistsError` when ``init`` cannot start this training."""
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
