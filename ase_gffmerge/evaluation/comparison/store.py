"""Finished rows of comparisons on disk, one small JSON file each, so that an interrupted comparison goes on."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ase_gffmerge import __version__
from ase_gffmerge.data.hashing import hash_frames, hash_labelled
from ase_gffmerge.evaluation.comparison.inputs import LabelledSet
from ase_gffmerge.evaluation.comparison.measurement import Measurement
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.merging.recipe import MERGE_VERSION
from ase_gffmerge.methods import MergeInputs, Method, Requirement
from ase_gffmerge.storage.atomic import atomic_write, require_writable
from ase_gffmerge.workflows.cache import MergeCache


def default_folder() -> Path:
    """Where rows are kept unless a folder is named: beside the cached merges."""
    return MergeCache().directory / "comparisons"


class RowStore:
    """Rows of one comparison in a folder that may hold those of others.

    Parameters
    ----------
    folder
        Made when it does not exist.
    mixture, tests
        What is compared: a row of other weights, frames, device or version is not found.
    fresh
        Find nothing: every row is measured again and replaces the old one.

    Raises
    ------
    FileFormatError
        When the folder cannot be written.
    """

    def __init__(
        self, folder: Path, merge_inputs: MergeInputs, tests: Sequence[LabelledSet], *, fresh: bool = False
    ):
        self.folder, self.fresh = folder.expanduser(), fresh
        self._parts, self._needed = _parts(merge_inputs, tests), _needed(merge_inputs)
        require_writable(self.folder / "row.json")

    def path(self, model: str, method: Method | None = None) -> Path:
        """File of a row, of the specialists themselves without a method.

        Base, labels and the version of the merge count only for methods that declare to need or to use them.
        """
        needs = sorted(method.needs) if method else []
        always = {**self._parts, "merge": MERGE_VERSION if method and method.merges else None}
        parts = [always, *(self._needed[need] for need in needs), model]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{model}-{key[:24]}.json"

    def find(self, model: str, method: Method | None = None) -> Measurement | None:
        """A finished row; ``None`` when there is none, or it cannot be read."""
        path = self.path(model, method)
        if self.fresh or not path.is_file():
            return None
        try:
            return Measurement.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, row: Measurement, model: str, method: Method | None = None) -> None:
        """Write a finished row at once and atomically.

        Parameters
        ----------
        row
            What was measured.
        model, method
            As in :meth:`path`.
        """
        text = json.dumps(row.to_dict(), indent=1)
        atomic_write(self.path(model, method), text)


def _parts(merge_inputs: MergeInputs, tests: Sequence[LabelledSet]) -> dict[str, object]:
    """What every row depends on."""
    return {
        "version": __version__,
        "device": str(merge_inputs.device),
        "specialists": [_identity(specialist) for specialist in merge_inputs.specialists],
        "tests": [hash_labelled(test.frames) for test in tests],
    }


def _needed(merge_inputs: MergeInputs) -> dict[Requirement, object]:
    """What a row depends on through each need of its method."""
    return {
        Requirement.FRAMES: [hash_frames(specialist.calibration) for specialist in merge_inputs.specialists],
        Requirement.BASE: merge_inputs.base.fingerprint if merge_inputs.base else None,
        Requirement.LABELS: [hash_labelled(frames) for frames in merge_inputs.labelled or ()],
    }


def _identity(specialist: ForceField) -> list[object]:
    return [specialist.name, specialist.fingerprint, list(specialist.species), specialist.level_of_theory]
