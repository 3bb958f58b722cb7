"""Finished results in a folder, each under its key, so that work that was interrupted goes on where it stopped.

A file holds the results of one task, numbers and arrays by name. It is written atomically and carries a digest: whoever is
killed leaves whole files or none, and a damaged one counts as missing. Any number of processes may write into one folder.
"""

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.storage.tensor_file import (
    read_file,
    read_metadata,
    remove_leftovers,
    require_writable,
    write_file,
)

Record = Mapping[str, object]
"""One result: JSON-able values and arrays of numbers by name."""

KIND = "results, second version"
NUMBER = "number"
"""In the place of an array's type: a float of Python."""


@dataclass(frozen=True)
class ResultStore:
    """Results in a folder that may hold those of other work, too.

    Attributes
    ----------
    folder
        Made when it does not exist.
    fresh
        Find nothing: everything is computed again and replaces what was there.

    Raises
    ------
    FileFormatError
        When the folder cannot be written.
    """

    folder: Path
    fresh: bool = False

    def __post_init__(self) -> None:
        """Refuse a folder that cannot be written, before any work."""
        object.__setattr__(self, "folder", Path(self.folder).expanduser().absolute())
        require_writable(self.folder / "results.safetensors")

    def find(self, keys: Collection[str]) -> dict[str, Record]:
        """Finished results of these keys, as far as there are any that can be read."""
        wanted, found = set(keys), dict[str, Record]()
        for path in [] if self.fresh else self._files():
            try:
                if wanted.isdisjoint(_keys(read_metadata(path))):
                    continue
                metadata, tensors = read_file(path)
            except FileFormatError:
                continue
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            records = zip(_keys(metadata), _unpacked(metadata, arrays), strict=True)
            found |= {key: record for key, record in records if key in wanted}
        return found

    def keep(self, records: Mapping[str, Record], *, name: str = "chunk") -> Path | None:
        """Write the results of one task at once and atomically.

        Parameters
        ----------
        records
            By key.
        name
            Beginning of the file's name.
        """
        if not records:
            return None
        metadata, arrays = _packed(list(records), list(records.values()))
        key = hashlib.sha256(json.dumps(sorted(records)).encode()).hexdigest()
        path = self.folder / f"{name}-{key[:24]}.safetensors"
        remove_leftovers(path)
        write_file(path, metadata, {label: torch.from_numpy(array) for label, array in arrays.items()})
        return path

    def _files(self) -> list[Path]:
        """All files of results, later ones last."""
        paths = [path for path in self.folder.glob("*.safetensors") if not path.name.startswith(".")]
        return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name))


def _keys(metadata: Mapping[str, object]) -> Sequence[str]:
    """Keys of what a file holds; none of a file of another kind."""
    keys = metadata.get("keys") if metadata.get("kind") == KIND else None
    return [str(key) for key in keys] if isinstance(keys, list) else []


def _packed(
    keys: Sequence[str], records: Sequence[Record]
) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """Arrays and numbers of one name and type in one row, and a list of the forms that records have.

    A form is a list of names, labels of rows, and shapes; most results of a task share one.
    """
    forms: dict[tuple[tuple[str, str, tuple[int, ...]], ...], int] = {}
    of: list[int] = []
    plain: list[dict[str, object]] = []
    parts: dict[str, list[np.ndarray]] = {}
    numbers: dict[str, list[float]] = {}
    for record in records:
        form, rest = [], {}
        for name, value in record.items():
            if isinstance(value, np.ndarray):
                label, shape = f"{name}:{value.dtype.str}", value.shape
                parts.setdefault(label, []).append(value.ravel())
            elif type(value) is float:
                label, shape = f"{name}:{NUMBER}", ()
                numbers.setdefault(label, []).append(value)
            else:
                rest[name] = value
                continue
            form.append((name, label, shape))
        of.append(forms.setdefault(tuple(form), len(forms)))
        plain.append(rest)
    rows = {label: np.concatenate(values) for label, values in parts.items()}
    rows |= {label: np.array(values) for label, values in numbers.items()}
    metadata: dict[str, object] = {
        "kind": KIND,
        "keys": list(keys),
        "forms": list(forms),
        "of": of,
        "plain": plain if any(plain) else [],
    }
    return metadata, {label: row for label, row in rows.items() if row.size}


def _unpacked(metadata: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Iterator[Record]:
    """Inverse of :func:`_packed`."""
    taken: dict[str, int] = {}
    of = metadata["of"]
    for index, rest in zip(of, metadata["plain"] or [{}] * len(of), strict=True):
        record = dict(rest)
        for name, label, shape in metadata["forms"][index]:
            start, kind = taken.get(label, 0), label.rpartition(":")[2]
            taken[label] = end = start + math.prod(shape)
            if kind == NUMBER:
                record[name] = float(arrays[label][start])
            else:
                array = arrays[label] if label in arrays else np.empty(0, dtype=kind)
                record[name] = array[start:end].reshape(shape).copy()
        yield record
