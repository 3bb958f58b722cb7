"""A student for a distillation: a smaller copy of what it learns from, or a new network of any architecture."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from ase_gffmerge.data.frames import bare
from ase_gffmerge.errors import FramesError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.merging.compress import compress
from ase_gffmerge.models.channel_groups import channels_are_declared
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.initialization import OFFSET_TOLERANCE, fit_references, random_potential

PLAIN = {"readout": None}
"""Recipe of the compression: a wide readout would cost more per step, and training starts from either."""


def make_student(
    teacher: ForceField,
    specialists: Sequence[ForceField],
    *,
    architecture: str,
    channels: int,
    blocks: int,
    frames: Sequence[Sequence[Atoms]] | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> ForceField:
    """Make the force field that a distillation starts from.

    One of the teacher's architecture, cutoff and no more channels and blocks is the compressed teacher
    (:mod:`ase_gffmerge.merging.compress`); any other one has random weights, and reference energies that fit its teachers'.

    Parameters
    ----------
    teacher
        What is compressed: a merge of the specialists, or the only specialist.
    specialists
        Whose calibration frames are used.
    architecture, channels, blocks
        Of the student.
    frames
        Further frames, one sequence per specialist.
    seed
        Of random weights.
    device
        Where the compression runs.

    Raises
    ------
    FramesError, FileFormatError, RecipeError
        Without frames, and for sizes that make no network.
    """
    extra = frames if frames is not None else [()] * len(specialists)
    typical = [
        tuple(map(bare, (*s.calibration, *given))) for s, given in zip(specialists, extra, strict=True)
    ]
    if not all(typical):
        missing = next(s.name for s, own in zip(specialists, typical, strict=True) if not own)
        raise FramesError(f"{missing!r} has no frames to learn on; give structures of what it is used for")
    together = [atoms for own in typical for atoms in own]
    hyper = teacher.potential.hyper
    name = f"{'+'.join(s.name for s in specialists)}-{architecture}-{channels}x{blocks}"
    smaller = channels <= hyper.channels and min(2, hyper.n_blocks) <= blocks <= hyper.n_blocks
    if (
        teacher.potential.architecture == architecture
        and smaller
        and hyper.n_embeddings == 1
        and channels_are_declared(teacher.potential)
    ):
        plain = replace(teacher, calibration=())
        compressed, _ = compress(
            plain, channels=channels, blocks=blocks, frames=together, recipe=PLAIN, device=device
        )
        return replace(compressed, name=name)
    species = tuple(sorted({z for s in specialists for z in s.species}))
    config = TrainConfig(
        model=architecture,
        hyper={"channels": channels, "n_blocks": blocks, "cutoff": hyper.cutoff},
        seed=seed,
    )
    potential = random_potential(config, species)
    for z, energy in _references(specialists, typical, species).items():
        potential.references[species.index(z)] = energy
    return ForceField(
        name=name,
        potential=potential.requires_grad_(False).eval(),
        calibration=tuple(together),
        level_of_theory=" + ".join(dict.fromkeys(s.level_of_theory for s in specialists)),
    )


def _references(
    specialists: Sequence[ForceField], frames: Sequence[Sequence[Atoms]], species: Sequence[int]
) -> dict[int, float]:
    """Reference energies of the specialists, if their energies are near to them, else ones that fit their energies."""
    table = {z: e for s in reversed(specialists) for z, e in zip(s.species, s.potential.references.tolist())}
    labelled = []
    for specialist, own in zip(specialists, frames, strict=True):
        energies = predict_frames(specialist.potential, own).energies
        for atoms, energy in zip(own, energies, strict=True):
            copy = atoms.copy()
            copy.calc = SinglePointCalculator(copy, energy=float(energy))
            labelled.append(copy)
    offsets = [
        (a.get_potential_energy() - sum(table[z] for z in a.numbers.tolist())) / len(a) for a in labelled
    ]
    return table if abs(float(np.mean(offsets))) < OFFSET_TOLERANCE else fit_references(labelled, species)
