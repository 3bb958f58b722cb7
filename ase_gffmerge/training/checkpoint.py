"""Training state on disk as safetensors, written atomically after every epoch."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ase_gffmerge.errors import CheckpointWarning, FileFormatError, first_line
from ase_gffmerge.storage.tensor_file import read_file, write_file


def checkpoint_path(out: Path) -> Path:
    """Where the checkpoint of the specialist file ``out`` lies: beside it."""
    return out.with_name(f"{out.name.removesuffix('.safetensors')}.checkpoint.safetensors")


def save_checkpoint(
    path: Path,
    *,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    metadata: dict[str, Any],
) -> None:
    """Write the weights of several modules by name, the optimiser's moments and JSON-able ``metadata``."""
    tensors: dict[str, Tensor] = {
        f"{kind}.{name}": value.clone()
        for kind, module in modules.items()
        for name, value in module.state_dict().items()
    }
    state = optimizer.state_dict()["state"]
    tensors |= {f"optimizer.{i}.{key}": value for i, entry in state.items() for key, value in entry.items()}
    write_file(path, {"checkpoint": metadata}, tensors)


def load_checkpoint(
    path: Path, *, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore what :func:`save_checkpoint` wrote and return its metadata."""
    metadata, tensors = read_file(path)
    try:
        for kind, module in modules.items():
            prefix = f"{kind}."
            module.load_state_dict(
                {
                    name.removeprefix(prefix): value
                    for name, value in tensors.items()
                    if name.startswith(prefix)
                }
            )
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return metadata["checkpoint"]
    except (RuntimeError, KeyError, ValueError) as error:
        raise FileFormatError(
            f"{path} does not belong to this training ({first_line(error)}); delete it"
        ) from None


def can_resume(path: Path, run: Mapping[str, Any]) -> bool:
    """Whether ``path`` is an intact checkpoint of a run with exactly these options and frames.

    A checkpoint of another run, or a damaged one, is renamed to ``*.old.safetensors`` with a
    :class:`CheckpointWarning` that says what differs: it is neither continued nor lost.
    """
    if not path.exists():
        return False
    try:
        saved = read_file(path)[0]["checkpoint"]["run"]
        difference = differences(saved, run)
    except (FileFormatError, KeyError, TypeError) as error:
        difference = f"it cannot be read ({error})"
    if not difference:
        return True
    old = path.with_name(f"{path.name.removesuffix('.safetensors')}.old.safetensors")
    path.replace(old)
    warnings.warn(
        f"{path} is not continued: {difference}. Training starts afresh; it is kept as {old.name}",
        CheckpointWarning,
        stacklevel=2,
    )
    return False


def differences(saved: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """Which options of two run identities differ, as text; empty when none does."""
    before, now = _flat(saved), _flat(run)
    changed = [
        f"{key} was {before.get(key, 'not set')}, is {now.get(key, 'not set')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, ...) != now.get(key, ...)
    ]
    return "; ".join(text if len(text) < 120 else f"{text.split(' was ')[0]} differs" for text in changed)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as one level of dotted keys with JSON values."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, sort_keys=True)
    return flat
