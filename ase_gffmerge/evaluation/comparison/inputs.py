"""What a comparison of methods needs: specialists with their base, labelled frames for each, none of them seen before."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from ase import Atoms

from ase_gffmerge.data.frames import geometry_key, geometry_keys
from ase_gffmerge.data.labels import require_labels
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.errors import FramesError
from ase_gffmerge.forcefield.conditioning import without_choice
from ase_gffmerge.forcefield.force_field import ForceField, bundled_path, bundled_test_frames
from ase_gffmerge.inference.predict import check_frames
from ase_gffmerge.merging.average import check_compatible, working_copies
from ase_gffmerge.merging.recipe import load_recipe
from ase_gffmerge.merging.selection import check_ancestor, known_ancestor
from ase_gffmerge.methods import MergeInputs
from ase_gffmerge.runtime.devices import resolve_device


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """Frames with energies (eV) and forces (eV/Å), and where they come from, for messages."""

    source: str
    frames: tuple[Atoms, ...]


def make_merge_inputs(
    specialists: Sequence[ForceField],
    *,
    base: ForceField | None = None,
    labelled: Sequence[LabelledSet] | None = None,
    device: str | torch.device = "auto",
) -> MergeInputs:
    """Copies of the specialists on one device with distinct names, and their common ancestor.

    Parameters
    ----------
    specialists
        At least two of one architecture and level of theory; whether they are related is left to the methods.
    base
        Their common ancestor; default: the bundled model that their lineages name, if there is one.
    labelled
        Labelled training frames of every specialist, in order.
    device
        Where to compute.

    Raises
    ------
    IncompatibleSpecialistsError
        When no method at all can use the specialists together, or ``base`` is no ancestor of them.
    """
    check_compatible(specialists, load_recipe("mean", allow_unrelated=True))
    if base is None:
        base = known_ancestor(specialists)
    else:
        check_ancestor(base, specialists)
    target = resolve_device(device)
    copies = working_copies(specialists, target)
    return MergeInputs(
        specialists=tuple(copies),
        base=base.to(device=target, dtype=copies[0].potential.dtype) if base else None,
        labelled=tuple(known.frames for known in labelled) if labelled else None,
        device=target,
    )


def read_tests(sources: Sequence[str | Path], files: Sequence[Path] = ()) -> tuple[LabelledSet, ...]:
    """Test frames of every specialist, in order.

    Parameters
    ----------
    sources
        What the specialists were loaded from.
    files
        One file of labelled frames per specialist; without any, those that come with bundled specialists.

    Raises
    ------
    FramesError
        When their number is not that of the specialists, or files are missing, empty or lack labels.
    """
    if files:
        return read_labelled(files, sources, option="--test")
    strangers = [str(source) for source in sources if bundled_path(source) == Path(source)]
    if strangers:
        raise FramesError(
            f"there are no test frames for {', '.join(strangers)}: they come only with the bundled specialists; give one "
            f"file of labelled frames per specialist, in order (--test FILE, {len(sources)} times)"
        )
    return tuple(
        LabelledSet(source=f"the bundled test frames of {name}", frames=tuple(bundled_test_frames(str(name))))
        for name in sources
    )


def read_labelled(
    files: Sequence[Path], sources: Sequence[str | Path], *, option: str
) -> tuple[LabelledSet, ...]:
    """Read one file of labelled frames per specialist; whatever else the frames say about specialists is taken off.

    Parameters
    ----------
    files
        In the order of the specialists.
    sources
        What the specialists were loaded from.
    option
        Of the command line, for messages.

    Raises
    ------
    FramesError
        When their number is not that of the specialists, or files are missing, empty or lack labels.
    """
    if len(files) != len(sources):
        raise FramesError(
            f"{option} was given {len(files)} file(s) for {len(sources)} specialists; give one per specialist, in the order "
            f"of the specialists ({', '.join(map(str, sources))})"
        )
    sets = []
    for file in files:
        frames = read_frames(file)
        require_labels(frames, file)
        sets.append(LabelledSet(source=str(file), frames=tuple(map(without_choice, frames))))
    return tuple(sets)


def check_elements(merge_inputs: MergeInputs, sets: Sequence[LabelledSet]) -> None:
    """Raise :class:`FramesError` for frames with elements that their specialist does not know."""
    for specialist, known in zip(merge_inputs.specialists, sets, strict=True):
        try:
            check_frames(specialist.potential, known.frames)
        except FramesError as error:
            raise FramesError(f"{known.source} cannot be used for {specialist.name!r}: {error}") from None


def check_leaks(tests: Sequence[LabelledSet], seen: Mapping[str, Set[str]]) -> None:
    """Refuse test frames that were seen before.

    Parameters
    ----------
    tests
        All test frames: none of them may be known to any specialist.
    seen
        Keys of frames by where they were seen, see :func:`frames_seen`.

    Raises
    ------
    FramesError
        Names how many, of which file, and who has seen them.
    """
    for test in tests:
        keys = [geometry_key(atoms) for atoms in test.frames]
        for where, known in seen.items():
            leaked = [index for index, key in enumerate(keys) if key in known]
            if leaked:
                raise FramesError(_refusal(test, leaked, where))


def frames_seen(merge_inputs: MergeInputs, labelled: Sequence[LabelledSet] = ()) -> dict[str, Set[str]]:
    """Keys of all frames that specialists, base and training labels hold, by a description of where they are."""
    models = [*merge_inputs.specialists, *([merge_inputs.base] if merge_inputs.base else [])]
    seen: dict[str, Set[str]] = {}
    found: list[tuple[str, Iterable[str]]] = []
    for model in models:
        found += [
            (f"the training frames of {model.name!r} or its ancestors", model.provenance.seen_frames),
            (f"the calibration frames of {model.name!r}", geometry_keys(model.calibration)),
        ]
    found += [
        (f"the labelled training frames in {known.source}", geometry_keys(known.frames)) for known in labelled
    ]
    for where, keys in found:  # a base and a specialist may have one name
        seen[where] = {*seen.get(where, ()), *keys}
    return seen


def unrecorded(merge_inputs: MergeInputs) -> tuple[str, ...]:
    """Names of specialists whose files do not say which frames their training saw."""
    return tuple(s.name for s in merge_inputs.specialists if not s.provenance.seen_frames)


def _refusal(test: LabelledSet, leaked: Sequence[int], where: str) -> str:
    shown = ", ".join(map(str, leaked[:5])) + (", ..." if len(leaked) > 5 else "")
    return (
        f"{len(leaked)} of {len(test.frames)} frames in {test.source} (frames {shown}) are among {where}, up to rotation, "
        "translation and order of atoms; errors on them say nothing about new structures: leave them out of the test file, "
        "or test on other frames"
    )
