"""Joint training: one potential for all specialists' labelled frames, the reference every merge is measured against."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from ase import Atoms

from ase_gffmerge.data.frames import hold_out
from ase_gffmerge.data.hashing import hash_labelled
from ase_gffmerge.errors import FramesError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.devices import resolve_device
from ase_gffmerge.training.checkpoint import History
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.initialization import check_parent
from ase_gffmerge.training.loop import Callback, fit
from ase_gffmerge.training.loss import labelled_graphs, weigh

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
