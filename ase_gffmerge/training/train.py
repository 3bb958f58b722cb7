"""From labelled frames to a specialist file.

Joint training: one potential for all specialists' labelled frames, the reference every merge is measured against.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from ase import Atoms

from ase_gffmerge.data.frames import (
    bare,
    calibration_frames,
    geometry_keys,
    hash_frames,
    hash_labelled,
    hold_out,
)
from ase_gffmerge.data.labels import is_isolated_atom, isolated_atom_energies, require_labels
from ase_gffmerge.data.readers import iter_frames
from ase_gffmerge.errors import FramesError
from ase_gffmerge.forcefield.force_field import ForceField, repelling
from ase_gffmerge.forcefield.provenance import Provenance
from ase_gffmerge.inference.errors import Errors, evaluate
from ase_gffmerge.integrations.load import format_of, write_force_field
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.devices import resolve_device
from ase_gffmerge.runtime.distributed import by_first
from ase_gffmerge.storage.tensor_file import require_writable
from ase_gffmerge.training.checkpoint import History, checkpoint_path
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.initialization import DEFAULT_MODEL, check_parent, initial_specialist
from ase_gffmerge.training.loop import Callback, fit
from ase_gffmerge.training.loss import labelled_graphs, weigh


def train(
    sources: Sequence[Path],
    out: Path,
    config: TrainConfig,
    *,
    name: str | None = None,
    init: ForceField | None = None,
    references: Mapping[int, float] | None = None,
    n_calibration: int = 100,
    test: Sequence[Path] = (),
    keys: Mapping[str, str | None] | None = None,
    device: str = "auto",
    callback: Callback | None = None,
) -> tuple[ForceField, History, Errors | None]:
    """Train a specialist and write it to ``out``; a killed run continues from its last epoch.

    Parameters
    ----------
    sources
        Files of labelled frames; ``config.validation`` frames of each are held out.
    out
        The specialist's file, ``.safetensors`` or, with any other ending, of the package whose force field ``init`` is; the
        checkpoint lies beside it until the end.
    config
        Options.
    name
        Name of the specialist; default: the stem of ``out``.
    init
        Start from a copy of these weights (its reference energies are kept unless ``references`` are given).
    references
        Energies per element in eV; default: those of ``init``, else those of isolated atoms among the frames and a
        least-squares fit for the other elements.
    n_calibration
        How many training frames are stored, unlabelled, for merging.
    test
        Files of labelled frames for the errors recorded in the file.
    keys
        Names of the labels in ``sources`` and ``test``, by ``energy``, ``forces`` and ``stress``; see
        :func:`~ase_gffmerge.data.labels.normalize_labels`.
    device
        ``auto``, ``cpu``, ``cuda``.
    callback
        Called after every epoch with its number and losses.

    Returns
    -------
    specialist, history, errors
        ``errors`` is None without ``test``.

    Raises
    ------
    FramesError, IncompatibleSpecialistsError, DeviceError, FileFormatError
        For bad input, before the first epoch and before anything is written.
    TrainingError
        When the loss is no longer finite.
    """
    architecture = init.potential.architecture if init else config.model or DEFAULT_MODEL
    if (adapter := format_of(out, architecture)) and init:
        adapter.require_exportable(init.potential)
    target = resolve_device(device)
    training, validation, isolated = split_frames(sources, config, keys)
    test_frames = [atoms for path in test for atoms in labelled_frames(path, keys)[0]]
    start = initial_specialist(training, config, init=init, references=references, isolated=isolated)
    for atoms in (*validation, *test_frames):
        start.check_species(atoms)
    if n_calibration < 1:
        raise FramesError(f"{n_calibration} calibration frames are too few for merging; store at least one")
    require_writable(out)
    run = _run_identity(config, start, init=init, frames=[*training, *validation])
    potential = start.potential.with_core_repulsion(None).to(device=target).train().requires_grad_(True)
    checkpoint = checkpoint_path(out)
    potential, history = fit(
        potential,
        labelled_graphs(training, potential),
        labelled_graphs(validation, potential),
        config,
        checkpoint=checkpoint,
        run=run,
        callback=callback,
    )
    errors = evaluate(potential, test_frames) if test_frames else None
    specialist = replace(
        start,
        name=name or out.name.removesuffix(".safetensors"),
        potential=potential.to(device="cpu"),
        calibration=_stored_frames(training, n_calibration, seed=config.seed),
        provenance=_provenance(
            sources,
            training,
            config,
            lineage=_lineage(init),
            seen=seen_frames([*training, *validation], init=init),
            errors=errors,
            origin=init.provenance.origin if init else "",
        ),
    )
    if config.core_repulsion == "auto" or start.potential.core_repulsion is not None:
        seen = specialist.with_calibration([*training, *validation])
        specialist = replace(specialist, potential=repelling(specialist.potential, [seen]))
    by_first(partial(write_force_field, specialist, out))
    by_first(partial(checkpoint.unlink, missing_ok=True))
    return specialist, history, errors


def labelled_frames(
    path: Path, keys: Mapping[str, str | None] | None = None
) -> tuple[list[Atoms], list[Atoms]]:
    """Read frames that must carry energies (eV) and forces (eV/Å), and those of isolated atoms, which need energies alone.

    Raises
    ------
    FramesError, FileFormatError
        For what cannot be read, or lacks labels under these keys (see :func:`~ase_gffmerge.data.readers.iter_frames`).
    """
    isolated: list[Atoms] = []
    frames: dict[int, Atoms] = {}
    for number, atoms in enumerate(iter_frames(path, keys=keys)):
        if is_isolated_atom(atoms):
            isolated.append(atoms)
        else:
            frames[number] = atoms
    require_labels(list(frames.values()), path, numbers=list(frames))
    return list(frames.values()), isolated


def split_frames(
    sources: Sequence[Path], config: TrainConfig, keys: Mapping[str, str | None] | None = None
) -> tuple[list[Atoms], list[Atoms], dict[int, float]]:
    """Read labelled frames and hold ``config.validation`` of every file out of training, chosen by the seed.

    Parameters
    ----------
    sources
        Files.
    config
        Number of frames to hold out, seed.
    keys
        Names of the labels, as for :func:`labelled_frames`.

    Returns
    -------
    training, validation
        Frames.
    isolated
        Energies of isolated atoms by atomic number, eV.
    """
    training: list[Atoms] = []
    validation: list[Atoms] = []
    alone: list[Atoms] = []
    for path in sources:
        frames, isolated = labelled_frames(path, keys)
        if len(frames) <= config.validation:
            raise FramesError(
                f"{path} has {len(frames)} frames, which leaves none beside {config.validation} for "
                "validation; give more frames or set `validation` lower in the configuration"
            )
        kept, held_out = hold_out(frames, config.validation, seed=config.seed)
        training += kept
        validation += held_out
        alone += isolated
    return training, validation, isolated_atom_energies(alone)


def _run_identity(
    config: TrainConfig, start: ForceField, *, init: ForceField | None, frames: Sequence[Atoms]
) -> dict[str, object]:
    """Everything that decides the outcome, JSON-able: only a checkpoint of the same identity is continued."""
    return {
        "config": config.model_dump(),
        "architecture": start.potential.architecture,
        "hyper": start.potential.hyper.to_dict(),
        "references": start.potential.references.tolist(),
        "lineage": list(_lineage(init)),
        "frames": hash_labelled(frames),
    }


def _lineage(init: ForceField | None) -> tuple[str, ...]:
    """Fingerprints of the ancestors of a child of ``init``, root first."""
    return (*init.provenance.lineage, init.fingerprint) if init else ()


def seen_frames(frames: Sequence[Atoms], *, init: ForceField | None) -> tuple[str, ...]:
    """Keys of the frames that a child of ``init`` and its ancestors have seen, ascending."""
    inherited = init.provenance.seen_frames if init else ()
    return tuple(sorted({*inherited, *geometry_keys(frames)}))


def _stored_frames(training: Sequence[Atoms], n: int, *, seed: int) -> tuple[Atoms, ...]:
    """At most ``n`` training frames without labels, for merging."""
    return tuple(bare(atoms) for atoms in calibration_frames(training, min(n, len(training)), seed=seed))


def _provenance(
    sources: Sequence[Path],
    training: Sequence[Atoms],
    config: TrainConfig,
    *,
    lineage: tuple[str, ...],
    seen: tuple[str, ...],
    errors: Errors | None,
    origin: str = "",
) -> Provenance:
    """Record of the training for the file."""
    return Provenance(
        data_set=", ".join(path.stem for path in sources),
        data_hash=hash_frames(training),
        n_train=len(training),
        epochs=config.epochs,
        seed=config.seed,
        lineage=lineage,
        errors=errors.totals() if errors else {},
        seen_frames=seen,
        origin=origin,
    )


FINE_TUNING = TrainConfig(epochs=70, batch_size=5, learning_rate=2e-4)
"""How the bundled specialists were fine-tuned."""


def train_jointly(
    base: ForceField,
    labelled: Sequence[Sequence[Atoms]],
    config: TrainConfig = FINE_TUNING,
    *,
    checkpoint: Path | None = None,
    device: str | torch.device = "auto",
    callback: Callback | None = None,
) -> tuple[Potential, History]:
    """Fine-tune the specialists' base on the labelled frames of all of them together.

    Every batch holds each specialist's share of frames, and every specialist's atoms count the same in total.

    Parameters
    ----------
    base
        Where to start; not changed.
    labelled
        Frames with energies and forces, one sequence per specialist.
    config
        Options; ``validation`` frames of each sequence, but at most half of them, are held out.
    checkpoint, device, callback
        As for :func:`~ase_gffmerge.training.distill.distill`.

    Raises
    ------
    FramesError, IncompatibleSpecialistsError, DeviceError
        With the reason and the remedy.
    TrainingError
        When the loss is no longer finite.
    """
    if not labelled or not all(labelled):
        raise FramesError("joint training needs labelled frames of every specialist; give them")
    frames = [atoms for group in labelled for atoms in group]
    check_parent(base, sorted({int(z) for atoms in frames for z in atoms.numbers}), config)
    potential = deepcopy(base.potential).to(device=resolve_device(device)).train().requires_grad_(True)
    splits = [
        hold_out(group, min(config.validation, len(group) // 2), seed=config.seed) for group in labelled
    ]
    training, validation = (
        [labelled_graphs(part, potential) for part in parts] for parts in zip(*splits, strict=True)
    )
    owned = [
        [replace(graph, specialist=torch.full_like(graph.specialist, k)) for graph in graphs]
        for k, graphs in enumerate(training)
    ]
    return fit(
        potential,
        [graph for graphs in weigh(owned) for graph in graphs],
        [graph for graphs in validation for graph in graphs],
        config,
        checkpoint=checkpoint,
        run={"config": config.model_dump(), "base": base.fingerprint, "frames": hash_labelled(frames)},
        callback=callback,
    )
