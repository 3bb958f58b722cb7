"""From the bytes of specialists' files to their merge in the cache, without loading a specialist.

A shortcut is a small file beside the cache's entries. It says what the way through the specialists found once: the name of
the entry and the specialists' fingerprints. Bytes that differ in anything have no shortcut, and the entry says itself which
merge of which specialists it is, so that a shortcut never decides alone what is served.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.storage.atomic import atomic_write, remove_leftovers
from ase_gffmerge.storage.tensor_file import SCHEMA

if TYPE_CHECKING:
    from ase_gffmerge.merging.recipe import Recipe

SUFFIX = ".shortcut"


@dataclass(frozen=True, kw_only=True)
class Shortcut:
    """Where a merge of files is.

    Attributes
    ----------
    content
        What :func:`hash_content` says about the files and the recipe.
    key
        Name of the entry, see :func:`~ase_gffmerge.workflows.cache.cache_key`.
    fingerprints
        Of the specialists in the files.
    """

    content: str
    key: str
    fingerprints: tuple[str, ...]


def hash_content(paths: Sequence[Path], recipe: "Recipe") -> str | None:
    """SHA-256 over every byte of the files in their order, the recipe and the versions; ``None`` for unreadable files."""
    from ase_gffmerge.merging.recipe import MERGE_VERSION

    try:
        digests = [_hash_file(path) for path in paths]
    except OSError:
        return None
    versions = {"merge": MERGE_VERSION, "schema": SCHEMA}
    document = {**versions, "recipe": recipe.model_dump(mode="json"), "files": digests}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(path)
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_shortcut(directory: Path, content: str) -> Shortcut | None:
    """The shortcut for files of this content; ``None`` where there is none, or one that is damaged."""
    try:
        found = json.loads((directory / f"{content}{SUFFIX}").read_bytes())
        shortcut = Shortcut(
            content=found["content"], key=found["key"], fingerprints=tuple(found["fingerprints"])
        )
        sound = shortcut.content == content and re.fullmatch("[0-9a-f]{64}", shortcut.key)
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
    return shortcut if sound else None


def write_shortcut(directory: Path, shortcut: Shortcut) -> None:
    """Write a shortcut; where that fails, the next hit takes the way through the specialists again."""
    path, data = directory / f"{shortcut.content}{SUFFIX}", json.dumps(vars(shortcut)).encode()
    remove_leftovers(path)
    with suppress(FileFormatError):
        atomic_write(path, data)
