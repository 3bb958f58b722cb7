"""Writing files such that no reader ever sees half of one, whenever the writer is killed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from glob import escape
from pathlib import Path

from ase_gffmerge.errors import FileFormatError


def atomic_write(path: Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Write a temporary file beside ``path``, flush it to disk, and move it into place.

    Parameters
    ----------
    path
        The file; its folder is made where it is missing.
    content
        Bytes, text (written as UTF-8), or a function that fills the file whose path it is given.

    Raises
    ------
    FileFormatError
        When the folder cannot be written; nothing half-written is left behind.
    """
    temporary = _temporary(path)
    try:
        if callable(content):
            content(temporary)
        else:
            _write_bytes(temporary, content.encode() if isinstance(content, str) else content)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise FileFormatError(
            f"cannot write {path}: {reason}; free some space, or choose another folder"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(path: Path) -> None:
    """Raise :class:`FileFormatError` when ``path`` cannot be written: before long work, not after it."""
    _temporary(path).unlink()


def remove_leftovers(path: Path) -> None:
    """Delete temporary files that killed writers of ``path`` left beside it."""
    for abandoned in path.parent.glob(f"{escape(_prefix(path))}*.tmp"):
        with suppress(OSError):
            abandoned.unlink()


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _prefix(path: Path) -> str:
    """Beginning of a temporary file's name; cut, since the name of ``path`` may be as long as names can be."""
    return f".{path.name.encode(errors='surrogateescape')[:64].decode(errors='ignore')}."


def _temporary(path: Path) -> Path:
    """Make an empty temporary file beside ``path``, and the folder where it is missing."""
    try:
        if path.is_dir():
            raise FileFormatError(f"cannot write {path}: it is a folder; give the name of a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}.tmp")
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileFormatError(
            f"cannot write {path}: {reason}; choose a folder you may write to, or a shorter name"
        ) from None
    return temporary
