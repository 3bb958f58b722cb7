"""Work shared out among the processes that torchrun started: which part is mine, sums over all, one answer for all.

Outside of :func:`sharing`, and in a process that runs alone, every part is mine and a sum is what it was. All processes do
the same in the same order; what they do not share they repeat, so that all have the same in the end.
"""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ase_gffmerge.least_squares.gram import Gram

Item = TypeVar("Item")
Key = TypeVar("Key", int, tuple[int, ...])

_ranks: ContextVar[tuple[int, int]] = ContextVar("ranks", default=(0, 1))
"""Which of how many processes this one is, while work is shared."""


@contextmanager
def sharing() -> Iterator[None]:
    """Share work, for as long as the context lasts, with the processes that torchrun started, or a group joined before.

    A process that is alone does all of it.
    """
    if not dist.is_initialized() and "TORCHELASTIC_RUN_ID" in os.environ:
        _join()
    token = _ranks.set((dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1))
    try:
        yield
    finally:
        _ranks.reset(token)


@contextmanager
def alone() -> Iterator[None]:
    """Do all of some work in every process, for as long as the context lasts."""
    token = _ranks.set((0, 1))
    try:
        yield
    finally:
        _ranks.reset(token)


def _join() -> None:
    """Join the group, until the process ends."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    backend, of_torchrun = "cpu:gloo,cuda:nccl" if cuda else "gloo", os.environ
    if (of_torchrun["TORCHELASTIC_USE_AGENT_STORE"], of_torchrun["GROUP_WORLD_SIZE"]) == ("True", "1"):
        # one store for all tries on a machine: a process of the second would read addresses of those that died
        address = of_torchrun["MASTER_ADDR"], int(of_torchrun["MASTER_PORT"])
        store = dist.TCPStore(*address, is_master=False)  # type: ignore[attr-defined]
        own = dist.PrefixStore(of_torchrun["TORCHELASTIC_RESTART_COUNT"], store)  # type: ignore[attr-defined]
        rank, size = int(of_torchrun["RANK"]), int(of_torchrun["WORLD_SIZE"])
        dist.init_process_group(backend, store=own, rank=rank, world_size=size)
    else:
        dist.init_process_group(backend)
    atexit.register(dist.destroy_process_group)


def n_ranks() -> int:
    """Processes that share the work."""
    return _ranks.get()[1]


def is_mine(index: int) -> bool:
    """Whether part ``index`` of some work is for this process."""
    rank, size = _ranks.get()
    return index % size == rank


def mine(items: Iterable[Item]) -> Iterator[tuple[int, Item]]:
    """The parts for this process, with their indices."""
    return ((index, item) for index, item in enumerate(items) if is_mine(index))


def dealt(items: Sequence[Item], size: Callable[[Item], float]) -> list[Item]:
    """The items for this process, in their order, dealt out by size so that all processes have about as much to do."""
    rank, n = _ranks.get()
    loads, own = [0.0] * n, list[int]()
    for index in sorted(range(len(items)), key=lambda i: -size(items[i])):
        least = loads.index(min(loads))
        loads[least] += size(items[index])
        if least == rank:
            own.append(index)
    return [items[index] for index in sorted(own)]


def add_up(*tensors: Tensor) -> None:
    """Replace tensors by their sums over all processes."""
    if n_ranks() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def total(value: float) -> float:
    """Sum of a number over all processes."""
    both = torch.tensor([value], dtype=torch.float64)
    add_up(both)
    return float(both)


def add_up_gradients(parameters: Iterable[Tensor], value: float) -> float:
    """Replace the gradients of parameters by their sums over all processes, in one message with a number; its sum."""
    if n_ranks() == 1:
        return value
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in trained]
    numbers = parts[0].new_tensor([*(one.grad is not None for one in trained), value])
    flat = torch.cat([*(part.flatten() for part in parts), numbers])
    dist.all_reduce(flat)
    *sums, numbers = flat.split([*(part.numel() for part in parts), len(numbers)])
    *known, total_value = numbers.tolist()
    for parameter, gradient, count in zip(trained, sums, known, strict=True):
        parameter.grad = gradient.view_as(parameter) if count else None
    return total_value


def pooled(gram: Gram) -> Gram:
    """Statistics of the rows of all processes, in the memory of these."""
    if n_ranks() == 1:
        return gram
    numbers = torch.tensor([gram.yy, gram.n_rows], dtype=torch.float64)
    add_up(gram.xx, gram.xy, numbers)
    return Gram(gram.xx, gram.xy, *numbers.tolist())


def gathered(own: Mapping[Key, Item]) -> list[Item]:
    """What all processes have, in the order of the keys."""
    if n_ranks() == 1:
        return [own[key] for key in sorted(own)]
    everyone: list[Mapping[Key, Item]] = [{}] * n_ranks()
    dist.all_gather_object(everyone, dict(own))
    found = {key: item for part in everyone for key, item in part.items()}
    return [found[key] for key in sorted(found)]


def agreed(value: Item) -> Item:
    """What the first process has."""
    if n_ranks() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def by_first(action: Callable[[], Item]) -> Item:
    """Let the first process alone do something, such as read or write a file; what it got, which the others wait for."""
    return agreed(cast("Item", action() if is_mine(0) else None))
