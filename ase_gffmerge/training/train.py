"""From labelled frames to a specialist file."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from ase import Atoms

from ase_gffmerge.data.readers import hash_frames, read_frames, require_labels
from ase_gffmerge.data.splits import calibration_frames
from ase_gffmerge.device import resolve_device
from ase_gffmerge.errors import FramesError, IncompatibleSpecialistsError
from ase_gffmerge.evaluation.errors import Errors, evaluate
from ase_gffmerge.models import build_potential
from ase_gffmerge.specialist import Provenance, Specialist
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.loop import Callback, History, fit
from ase_gffmerge.training.references import fit_references


def train(
    sources: Sequence[Path],
    out: Path,
    config: TrainConfig,
    *,
    name: str | None = None,
    init: Specialist | None = None,
    references: dict[int, float] | None = None,
    n_calibration: int = 100,
    test: Sequence[Path] = (),
    device: str = "auto",
    callback: Callback | None = None,
) -> tuple[Specialist, History, Errors | None]:
    """Train a specialist and write it to ``out``; a killed run continues from its last epoch.

    Parameters
    ----------
    sources
        Files of labelled frames; ``config.validation`` frames of each are held out.
    out
        The specialist file; the checkpoint lies beside it until the end.
    config
        Options.
    name
        Name of the specialist; default: the stem of ``out``.
    init
        Start from these weights (same architecture; its reference energies are kept).
    references
        Energies per element in eV; default: those of ``init``, else a least-squares fit.
    n_calibration
        How many training frames are stored, unlabelled, for merging.
    test
        Files of labelled frames for the errors recorded in the file.
    device
        ``auto``, ``cpu``, ``cuda``.
    callback
        Called after every epoch.
    """
    target = resolve_device(device)
    training, validation = split_frames(sources, config)
    test_frames = [atoms for path in test for atoms in require_labels(read_frames(path), path)]
    base = initial_specialist(training, config, init=init, references=references)
    lineage = (*init.provenance.lineage, init.fingerprint) if init else ()
    data_hash = hash_frames(training)
    run = {"config": config.model_dump(), "lineage": lineage, "data": data_hash}
    checkpoint = out.with_suffix(".checkpoint.safetensors")
    base.potential.to(device=target).train().requires_grad_(True)
    potential, history = fit(
        base.potential, training, validation, config, checkpoint=checkpoint, run=run, callback=callback
    )
    errors = evaluate(potential, test_frames) if test_frames else None
    provenance = Provenance(
        data_set=", ".join(path.stem for path in sources),
        data_hash=data_hash,
        n_train=len(training),
        epochs=config.epochs,
        seed=config.seed,
        lineage=lineage,
        errors=errors.to_dict() if errors else {},
    )
    frames = calibration_frames(training, min(n_calibration, len(training)), seed=config.seed)
    specialist = replace(
        base,
        name=name or out.name.removesuffix(".safetensors"),
        potential=potential.to(device="cpu"),
        calibration=tuple(bare(atoms) for atoms in frames),
        provenance=provenance,
    )
    specialist.save(out)
    checkpoint.unlink(missing_ok=True)
    return specialist, history, errors


def split_frames(sources: Sequence[Path], config: TrainConfig) -> tuple[list[Atoms], list[Atoms]]:
    """Hold ``config.validation`` frames of every file out of training, chosen by the seed."""
    training: list[Atoms] = []
    validation: list[Atoms] = []
    for path in sources:
        frames = require_labels(read_frames(path), path)
        if len(frames) <= config.validation:
            raise FramesError(
                f"{path} has {len(frames)} frames, which leaves none beside {config.validation} for validation; "
                "give more frames or set `validation` lower in the configuration"
            )
        order = np.random.default_rng(config.seed).permutation(len(frames))
        held_out = set(order[: config.validation].tolist())
        training += [atoms for i, atoms in enumerate(frames) if i not in held_out]
        validation += [atoms for i, atoms in enumerate(frames) if i in held_out]
    return training, validation


def initial_specialist(
    frames: Sequence[Atoms],
    config: TrainConfig,
    *,
    init: Specialist | None,
    references: dict[int, float] | None,
) -> Specialist:
    """Weights to start from: those of ``init``, or random ones with fitted references."""
    elements = sorted({int(z) for atoms in frames for z in atoms.numbers})
    theory = config.level_of_theory or (init.level_of_theory if init else "unknown")
    if init is None:
        torch.manual_seed(config.seed)
        potential = build_potential(config.model, config.hyper, tuple(elements))
        table = references or fit_references(frames, elements)
    else:
        unknown = set(elements) - set(init.species)
        if unknown or init.potential.architecture != config.model:
            raise IncompatibleSpecialistsError(
                f"{init.name!r} ({init.potential.architecture}, elements {init.species}) cannot start a "
                f"{config.model} for elements {elements}; train a base that knows all of them"
            )
        potential, table = init.potential, references or {}
    for z, energy in table.items():
        if z in potential.species:
            potential.references[potential.species.index(z)] = energy
    return Specialist(name="", potential=potential, level_of_theory=theory)


def bare(atoms: Atoms) -> Atoms:
    """Species, positions, cell and periodicity alone."""
    return Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
