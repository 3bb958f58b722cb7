"""Calibration frames where a merge asks for them: given, in a file, or sampled by the specialist's own dynamics."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch
from ase import Atoms

from ase_gffmerge.data.frames import spread
from ase_gffmerge.errors import ArgumentError, FramesError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.forcefield.serialization import pack_frames
from ase_gffmerge.integrations.load import Frames, Source, as_force_field, as_list, structures
from ase_gffmerge.runtime.progress import Progress, no_progress, part_of
from ase_gffmerge.sampling.calibration_frames import SampleOptions, sample_frames
from ase_gffmerge.storage.tensor_file import content_digest

SAMPLE = "sample"
"""Frames that a specialist samples from those that it holds, or, as ``sample:FILE``, from structures in a file."""

MOST_STARTS = 4
"""Of a specialist's own frames, as many begin the dynamics that samples others."""

Calibration = Frames | None
"""Frames, a file of them, :data:`SAMPLE` or ``sample:FILE``; ``None`` for those that the specialist holds."""


@dataclass(frozen=True, kw_only=True)
class SampledLater:
    """A specialist that samples its calibration frames by dynamics of its own, once they are needed.

    Attributes
    ----------
    force_field
        The specialist.
    starts
        Structures that its dynamics starts from.
    """

    force_field: ForceField
    starts: tuple[Atoms, ...]

    @property
    def name(self) -> str:
        """Of the specialist."""
        return self.force_field.name

    @property
    def fingerprint(self) -> str:
        """Of the weights."""
        return self.force_field.fingerprint

    @property
    def content_digest(self) -> str:
        """SHA-256 of all that decides which frames are sampled."""
        specialist = self.force_field.with_calibration(()).content_digest
        options = SampleOptions().model_dump(mode="json")
        return content_digest({"specialist": specialist, "sampled": options}, pack_frames(self.starts))

    def with_calibration(self, frames: Sequence[Atoms]) -> ForceField:
        """The specialist with other frames than it would sample."""
        return self.force_field.with_calibration(frames)

    def sample(self, *, device: torch.device, progress: Progress = no_progress) -> ForceField:
        """The specialist with frames; on another device than its own a copy of it runs.

        Raises
        ------
        FramesError
            When not a single frame survives.
        """
        moving = self.force_field
        if moving.potential.device != device:
            moving = copy.deepcopy(moving).to(device=device)
        title = f"{moving.name} samples its frames: "
        watched = part_of(progress, 0, 1, prefix=title)
        result = sample_frames(moving, self.starts, SampleOptions(), progress=watched)
        return self.force_field.with_calibration(result.frames)


def with_frames(
    sources: Source | Iterable[Source], calibration: str | Sequence[Calibration]
) -> list[Source | SampledLater]:
    """Specialists with other calibration frames.

    Parameters
    ----------
    sources
        One or several.
    calibration
        One entry for each of them, or :data:`SAMPLE` for all.

    Raises
    ------
    ArgumentError
        When there are not as many entries as sources.
    FramesError
        For a specialist that is to sample, but neither holds a structure to start from nor is given one.
    """
    items = as_list(sources)
    if isinstance(calibration, str) and calibration == SAMPLE:
        calibration = [SAMPLE] * len(items)
    if isinstance(calibration, str | Path | Atoms) or len(calibration) != len(items):
        raise ArgumentError(
            f"calibration must hold one list of frames (or one file, or {SAMPLE}:FILE) for each of the {len(items)} "
            "specialists, in order"
        )
    return [_with_frames(item, frames) for item, frames in zip(items, calibration, strict=True)]


def _with_frames(source: Source, frames: Calibration) -> Source | SampledLater:
    if frames is None:
        return source
    force_field = as_force_field(source)
    if not is_sampled(frames):
        return force_field.with_calibration(structures(frames))
    path = file_of_frames(frames)
    own = force_field.calibration
    starts = structures(path) if path else tuple(spread(own, MOST_STARTS))
    if not starts:
        raise FramesError(
            f"{force_field.name!r} holds no structure that its dynamics could start from; name a file of structures, "
            f"{SAMPLE}:FILE, in place of {SAMPLE}"
        )
    for atoms in starts:
        force_field.check_species(atoms)
    return SampledLater(force_field=force_field, starts=starts)


def is_sampled(frames: Frames) -> TypeGuard[str]:
    """Whether frames are to be sampled; a file that exists counts as a file, whatever its name."""
    return isinstance(frames, str) and frames.partition(":")[0] == SAMPLE and not Path(frames).exists()


def file_of_frames(choice: str) -> str | None:
    """The file that is read: ``choice`` itself, or what follows ``sample:``."""
    return choice.partition(":")[2] or None if is_sampled(choice) else choice


def sampled(
    specialists: Sequence[Source | SampledLater], device: torch.device, progress: Progress = no_progress
) -> list[ForceField]:
    """Load specialists, and let those sample their frames that are to.

    Parameters
    ----------
    specialists
        As :func:`with_frames` returns them.
    device
        Where the dynamics run.
    progress
        Called with a fraction (0 to 1), for every specialist anew, and a description.
    """
    return [
        item.sample(device=device, progress=progress)
        if isinstance(item, SampledLater)
        else as_force_field(item)
        for item in specialists
    ]
