"""Files that no reader ever sees half written: tensors with JSON metadata and a digest, verified, never unpickled.

Writing files such that no reader ever sees half of one, whenever the writer is killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ase_gffmerge.errors import FileFormatError, first_line


def atomic_write(
    path: Path,
    content: bytes | str | Callable[[Path], object],
    *,
    read_back: Callable[[Path], object] | None = None,
) -> None:
    """Write a temporary file beside ``path``, flush it to disk, read it back, and move it into place.

    Parameters
    ----------
    path
        The file; its folder is made where it is missing.
    content
        Bytes, text (written as UTF-8), or a function that fills the file whose path it is given.
    read_back
        Reads the temporary file and raises what is wrong with it: what nobody can read does not replace what somebody can.

    Raises
    ------
    FileFormatError
        When the folder cannot be written, or the file not be read back; nothing half-written is left behind, and a file that
        was there stays.
    """
    temporary = _temporary(path)
    try:
        if callable(content):
            content(temporary)
        else:
            _write_bytes(temporary, content.encode() if isinstance(content, str) else content)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        if read_back is not None:
            _read_back(temporary, read_back, path)
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise FileFormatError(
            f"cannot write {path}: {reason}; free some space, or choose another folder"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _read_back(temporary: Path, read: Callable[[Path], object], path: Path) -> None:
    try:
        read(temporary)
    except Exception as error:  # whatever a reader, another package's perhaps, makes of a broken file
        reason = first_line(error).replace(str(temporary), "it")
        raise FileFormatError(
            f"{path} is not written, since it could not be read back ({reason}); report this fault of ase-gffmerge; a file "
            "of that name is as it was"
        ) from error


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


FORMAT = "ase-gffmerge"
Content = TypeVar("Content")
_TYPE_NAMES = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "U8": "uint8",
    "I32": "int32",
    "I64": "int64",
    "BOOL": "bool",
}
"""Names in safetensors' headers and in torch of all types that our files hold."""


SCHEMA = 1
"""Version of what files hold, raised with every change that older code would misread."""


def digest(metadata: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over metadata text and every tensor's name, type, shape and bytes."""
    sha = hashlib.sha256(metadata.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def content_digest(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 that the header of a file of this content holds."""
    return digest(json.dumps(metadata, sort_keys=True), tensors)


def write_file(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    read_back: Callable[[Path], object] | None = None,
) -> None:
    """Write tensors and JSON-able metadata to ``path`` atomically.

    Parameters
    ----------
    path
        The file.
    metadata
        What goes into the header as JSON.
    tensors
        By name; from any device.
    read_back
        Reads the file before it is moved into place, and raises what is wrong with it; default: :func:`read_file`.
    """
    text = json.dumps(metadata, sort_keys=True)
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    header = {"format": FORMAT, "schema": str(SCHEMA), "metadata": text, "sha256": digest(text, plain)}
    atomic_write(path, _canonical(save(plain, metadata=header)), read_back=read_back or read_file)


def _canonical(data: bytes) -> bytes:
    """Sort the keys of the safetensors header, whose order is random: equal content gives equal bytes."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def read_metadata(path: Path) -> dict[str, Any]:
    """Read the metadata alone; tensors stay on disk and are not verified."""
    header, _ = _opened(path, _read_header)
    _require_ours(header, path)
    return _metadata(header, path)


def read_digest(path: Path) -> str:
    """SHA-256 of a file's content (:func:`content_digest`), verified without making tensors of it."""
    header, found = _opened(path, _read_digest)
    _require_ours(header, path)
    _require_unaltered(header, found, path)
    return found


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read metadata and tensors and verify the digest.

    Raises
    ------
    FileFormatError
        When the file is missing, not safetensors, not ours, of an unknown schema version, or altered.
    """
    header, tensors = _opened(path, _read_tensors)
    _require_ours(header, path)
    _require_unaltered(header, digest(header.get("metadata", ""), tensors), path)
    return _metadata(header, path), tensors


def _require_ours(header: Mapping[str, str], path: Path) -> None:
    if header.get("format") != FORMAT:
        raise FileFormatError(
            f"{path} is a safetensors file but not one of ase-gffmerge (its header has no format mark); "
            "make one with `gffmerge train` or `gffmerge merge`"
        )
    _require_schema(header.get("schema", ""), path)


def _require_unaltered(header: Mapping[str, str], found: str, path: Path) -> None:
    if found != header.get("sha256"):
        raise FileFormatError(f"{path} was altered after writing (its SHA-256 is wrong); copy it again")


def _metadata(header: Mapping[str, str], path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(header.get("metadata", ""))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: the metadata is not JSON ({error}); copy the file again") from None
    if not isinstance(metadata, dict):
        raise FileFormatError(f"{path}: the metadata is not a JSON object; copy the file again")
    return metadata


def _opened(path: Path, read: Callable[[BinaryIO], Content]) -> Content:
    """What ``read`` finds in a file."""
    _require_file(path)
    try:
        with path.open("rb") as handle:
            return read(handle)
    except _UNREADABLE as error:
        raise FileFormatError(
            f"{path} is not a readable safetensors file ({first_line(error)}); it is truncated, altered or of another "
            "kind: copy or download it again. Pickled checkpoints are never opened."
        ) from None


def _read_tensors(handle: BinaryIO) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors, in memory of their own: tensors mapped from a file would change with it."""
    header, _ = _read_header(handle)
    handle.seek(0)
    return header, load(handle.read())


def _read_digest(handle: BinaryIO) -> tuple[dict[str, str], str]:
    """Header, and what :func:`digest` says about the tensors, from their bytes."""
    header, entries = _read_header(handle)
    data = memoryview(handle.read())
    sha = hashlib.sha256(header.get("metadata", "").encode())
    for name in sorted(entries):
        entry = entries[name]
        kind = _TYPE_NAMES.get(entry["dtype"], entry["dtype"])
        sha.update(f"{name}|torch.{kind}|{tuple(entry['shape'])}|".encode())
        sha.update(data[slice(*entry["data_offsets"])])
    return header, sha.hexdigest()


def _require_file(path: Path) -> None:
    try:
        if path.is_file():
            return
        what = "is a folder" if path.is_dir() else "is not a file" if path.exists() else "does not exist"
    except (OSError, ValueError) as error:
        what = f"cannot be read ({first_line(error)})"
    raise FileFormatError(
        f"{path} {what}; give the name of a bundled model or the path of a .safetensors file"
    )


def _read_header(handle: BinaryIO) -> tuple[dict[str, str], dict[str, Any]]:
    """Strings and entries of a safetensors header, once its lengths fit the file: before anything large is read."""
    n_bytes = os.fstat(handle.fileno()).st_size
    n_header = int.from_bytes(handle.read(8), "little")
    if 8 + n_header > n_bytes:
        raise ValueError(f"a header of {n_header} bytes in a file of {n_bytes}")
    entries = json.loads(handle.read(n_header))
    strings = entries.pop("__metadata__", {})
    end = 8 + n_header + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if end != n_bytes:
        raise ValueError(f"tensors up to byte {end} in a file of {n_bytes}")
    if not all(isinstance(value, str) for value in strings.values()):
        raise ValueError("a header that does not consist of strings")
    return strings, entries


_UNREADABLE = (
    SafetensorError,
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,  # also for element types that torch does not have
    AssertionError,
    RuntimeError,  # shapes beyond 64 bits, deep nesting
    OverflowError,
    MemoryError,
)


def _require_schema(schema: str, path: Path) -> None:
    if schema == str(SCHEMA):
        return
    newer = schema.isascii() and schema.isdigit() and len(schema) < 9 and int(schema) > SCHEMA
    raise FileFormatError(
        f"{path} has schema version {schema!r}, this ase-gffmerge reads version {SCHEMA}; "
        + ("it was written by a newer one: " if newer else "")
        + "install the version that wrote it, or a newer one"
    )
