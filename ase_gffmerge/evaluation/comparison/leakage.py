"""Test frames that a model has already seen, recognised up to rigid motion and the order of atoms."""

from collections.abc import Mapping, Sequence, Set

from ase_gffmerge.data.hashing import geometry_key, geometry_keys
from ase_gffmerge.errors import FramesError
from ase_gffmerge.evaluation.comparison.inputs import LabelledSet
from ase_gffmerge.methods import MergeInputs


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
    for model in models:
        seen[f"the training frames of {model.name!r} or its ancestors"] = set(model.provenance.seen_frames)
        seen[f"the calibration frames of {model.name!r}"] = set(geometry_keys(model.calibration))
    for known in labelled:
        seen[f"the labelled training frames in {known.source}"] = set(geometry_keys(known.frames))
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
