"""What happens when the memory of a device does not suffice: smaller batches, or an error that says what would."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch

from ase_gffmerge.runtime.devices import is_out_of_memory, memory_errors
from ase_gffmerge.runtime.forking import survive_fork

Item = TypeVar("Item")
Frame = TypeVar("Frame", bound="Structure")
Result = TypeVar("Result")


class Structure(Protocol):
    """Atoms, or a graph of them."""

    def __len__(self) -> int:
        """Number of atoms."""
        ...

    def get_chemical_formula(self) -> str:
        """Formula for a message."""
        ...


def chunks(items: Iterable[Item], budget: int, *, size: Callable[[Any], int] = len) -> Iterator[list[Item]]:
    """Consecutive items, frames for example, in groups that do not exceed a budget, of at least one item each.

    Parameters
    ----------
    items
        What is grouped.
    budget
        Largest sum of the sizes in a group of several.
    size
        Of an item; of frames the number of atoms.
    """
    group: list[Item] = []
    total = 0
    for item in items:
        if group and total + size(item) > budget:
            yield group
            group, total = [], 0
        group.append(item)
        total += size(item)
    if group:
        yield group


def in_parts(
    evaluate: Callable[[Sequence[Frame]], Result], frames: Sequence[Frame], *, device: torch.device
) -> list[Result]:
    """Evaluate a batch of frames; where memory does not suffice, its halves, down to single frames.

    Parameters
    ----------
    evaluate
        Maps a batch of frames to its result.
    frames
        One batch of structures, or of their graphs.
    device
        Where ``evaluate`` computes; for the message, and to give cached memory back before trying again.

    Returns
    -------
    list
        One result per part, in the order of the frames; a single one when memory sufficed.

    Raises
    ------
    DeviceMemoryError
        When a single frame does not fit.
    """
    survive_fork()
    try:
        return [evaluate(frames)]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(frames) == 1:
            formula = f"{frames[0].get_chemical_formula()} ({len(frames[0])} atoms)"
            with memory_errors(formula, device=device):
                raise
    if device.type == "cuda":  # here the error is gone, and with it the tensors that its traceback held
        torch.cuda.empty_cache()
    half = len(frames) // 2
    return [
        result
        for part in (frames[:half], frames[half:])
        for result in in_parts(evaluate, part, device=device)
    ]
