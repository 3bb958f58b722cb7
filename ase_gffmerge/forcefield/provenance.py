"""Where a force field comes from, and how that is kept in its file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

SEEN_FRAMES = "provenance.seen_frames"
_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Training history of a force field.

    Attributes
    ----------
    data_set, data_hash
        Name and SHA-256 of the training frames.
    n_train, epochs, seed
        Size and length of the training.
    lineage
        Fingerprints of the ancestors, root first.
    errors
        Errors on its own test frames: ``force_mae``, ``force_rmse`` (eV/Å), ``energy_mae`` (eV/atom), and ``stress_mae``
        (GPa) where they have stresses.
    seen_frames
        Keys (:func:`~ase_gffmerge.data.frames.geometry_key`) of all training and validation frames, those of the
        ancestors among them, ascending: no test frame may be one of these. Empty when nothing is known.
    origin
        Package and version of another package's force field that this one was read from, or descends from.
    """

    data_set: str = "unknown"
    data_hash: str = ""
    n_train: int = 0
    epochs: int = 0
    seed: int = 0
    lineage: tuple[str, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)
    seen_frames: tuple[str, ...] = ()
    origin: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Metadata for a file or a printout: of the frames seen only the number."""
        return {**vars(self), "seen_frames": len(self.seen_frames)}


@dataclass(frozen=True, kw_only=True)
class MergeRecord:
    """How a merged potential was made.

    Attributes
    ----------
    specialists
        Their names, in the order of their indices.
    fingerprints
        Their SHA-256 fingerprints.
    recipe
        The complete recipe.
    report
        The merge report as JSON-able dictionary.
    cache_key
        Name of this merge in the cache of merges, so that an entry says which one it is; empty elsewhere.
    """

    specialists: tuple[str, ...]
    fingerprints: tuple[str, ...]
    recipe: Mapping[str, Any]
    report: Mapping[str, Any]
    cache_key: str = ""


def pack_seen(provenance: Provenance) -> dict[str, Tensor]:
    """Keys of the frames seen as one tensor (n_frames, 8) of bytes; nothing when there are none."""
    if not provenance.seen_frames:
        return {}
    content = bytes.fromhex("".join(provenance.seen_frames))
    return {SEEN_FRAMES: torch.as_tensor(np.frombuffer(content, dtype=np.uint8).reshape(-1, _BYTES).copy())}


def unpack_provenance(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Provenance:
    """Inverse of :meth:`Provenance.to_dict` and :func:`pack_seen`; raises ``ValueError`` for what is no provenance."""
    keys = tensors.get(SEEN_FRAMES, torch.empty((0, _BYTES), dtype=torch.uint8))
    if keys.dtype != torch.uint8 or keys.shape != (metadata["seen_frames"], _BYTES):
        raise ValueError(f"seen_frames ({metadata['seen_frames']} are announced, the tensor does not fit)")
    seen = tuple(keys.numpy().tobytes().hex(" ", _BYTES).split())
    provenance = Provenance(**{**metadata, "lineage": texts(metadata, "lineage"), "seen_frames": seen})
    for name, kind in (
        ("data_set", str),
        ("data_hash", str),
        ("origin", str),
        ("n_train", int),
        ("epochs", int),
        ("seed", int),
    ):
        require_kind(getattr(provenance, name), kind, name)
    for value in require_kind(provenance.errors, dict, "errors").values():
        require_kind(value, (int, float), "errors")
    return provenance


def unpack_merge_record(metadata: Mapping[str, Any]) -> MergeRecord:
    """Inverse of ``vars``; raises ``ValueError`` for what is no record of a merge."""
    return MergeRecord(
        specialists=texts(metadata, "specialists"),
        fingerprints=texts(metadata, "fingerprints"),
        recipe=require_kind(metadata["recipe"], dict, "recipe"),
        report=require_kind(metadata["report"], dict, "report"),
        cache_key=require_kind(metadata["cache_key"], str, "cache_key"),
    )


def texts(metadata: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A list of strings in a file's metadata; raises ``ValueError`` for anything else."""
    return tuple(require_kind(value, str, name) for value in require_kind(metadata[name], list, name))


def require_kind(value: Any, kind: type | tuple[type, ...], name: str) -> Any:
    """Return ``value`` if it is of that kind; raises ``ValueError`` with its name if it is not.

    Parameters
    ----------
    value
        Anything; ``True`` and ``False`` are of no kind.
    kind
        Type or types.
    name
        Of the value, for the message.
    """
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} (of type {type(value).__name__})")
    return value
