"""Training state on disk as safetensors, written atomically after every epoch."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.fileformat import read_file, read_metadata, write_file


def save_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    metadata: dict[str, Any],
) -> None:
    """Write weights, their moving average, the optimiser's moments and JSON-able ``metadata``."""
    tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average.{name}": value.clone() for name, value in average.state_dict().items()}
    state = optimizer.state_dict()["state"]
    tensors |= {f"optimizer.{i}.{key}": value for i, entry in state.items() for key, value in entry.items()}
    write_file(path, {"checkpoint": metadata}, tensors)


def load_checkpoint(
    path: Path, *, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore what :func:`save_checkpoint` wrote and return its metadata."""
    metadata, tensors = read_file(path)
    try:
        for prefix, module in (("model.", model), ("average.", average)):
            module.load_state_dict(
                {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
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
            f"{path} does not belong to this training ({str(error).splitlines()[0]}); delete it to start afresh"
        ) from None


def belongs_to(path: Path, run: dict[str, Any]) -> bool:
    """Whether ``path`` is a checkpoint of a run with exactly these options and frames."""
    if not path.exists():
        return False
    saved = read_metadata(path).get("checkpoint", {}).get("run")
    return json.dumps(saved, sort_keys=True) == json.dumps(run, sort_keys=True)
