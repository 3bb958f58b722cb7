r"""Replay of a network as a CUDA graph, for any number of atoms and edges.

Below some hundred atoms a GPU computes faster than a processor can tell it what to do: a network of a few hundred kernels
takes as long as launching them. A CUDA graph launches all of them at once, but always the same ones at the same addresses.
Graphs are therefore filled up to a few sizes, with edges that lead from padding atoms to themselves and are as long as the
cutoff. Nothing flows from padding to an atom, so its energies and gradients are what they are without it.

A size is recorded when it comes back; a neighbor list that outgrows its size takes the next one, which is recorded in turn
or was before. Which size a graph takes depends on the graph alone, never on those before it.
"""

import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from ase_gffmerge.errors import CaptureWarning, first_line
from ase_gffmerge.graphs.derivatives import EdgeDerivatives
from ase_gffmerge.runtime.devices import is_out_of_memory

Arguments = tuple[Tensor, ...]
"""Edge vectors (n_edges, 3), edge index (2, n_edges), specialist (n_atoms,) and atomic numbers (n_atoms,); of networks that
pad neighborhoods also a tensor whose length is their width (:class:`~ase_gffmerge.graphs.graph.TracedTopology`)."""
PADDED = 0, 1, 0, 0, 0
"""Dimension along which each of them is filled up."""
TensorFunction = Callable[..., EdgeDerivatives]
"""An edge function and its gradient as a function of tensors alone, which can be traced and recorded."""

PADDING_ATOMS = 8
"""Least number of padding atoms, which share the superfluous edges: sums over the edges of one atom are slow on a GPU."""
VISITS, BACKOFF = 3, 4
"""Graphs of a size before it is recorded, which costs as much as ten evaluations, and the factor by which they become more
each time that its recording fails or is given up."""
RECORDINGS = 8
"""Sizes that are kept, the latest ones."""
FAILURES = 3
"""After so many nothing is recorded any more; a single one may be the fault of another thread."""
MAX_EDGES = 50_000
"""Of a recording: what is larger (500 atoms of 100 neighbors) keeps a GPU busy anyway."""


@dataclass(frozen=True)
class Size:
    """Numbers of atoms and edges of a recording, padding included, and the width of its neighborhoods (0: not padded)."""

    n_atoms: int
    n_edges: int
    width: int = 0

    @classmethod
    def of(cls, arguments: Sequence[Tensor]) -> "Size":
        """Give the size of arguments as they are."""
        return cls(len(arguments[2]), len(arguments[0]), *map(len, arguments[4:]))

    def padded(self) -> "Size":
        """Give the least size of a recording with room for this one and the padding."""
        width = capacity(self.width) if self.width else 0
        return Size(capacity(self.n_atoms + PADDING_ATOMS), capacity(self.n_edges), width)


def capacity(count: int) -> int:
    """Least of the numbers 16, 20, 24, 28, 32, 40, 48, ... (four per octave) that is not below ``count``."""
    step = 4
    while 8 * step < count:
        step *= 2
    return max(4, -(-count // step)) * step


Record = Callable[[TensorFunction, Arguments], tuple[EdgeDerivatives, Callable[[], object]]]
"""Evaluates a function, and gives its result with what writes that of the inputs' later values in its place."""


@dataclass(frozen=True)
class Recording:
    """What is read and written by a replay, always at the same addresses, and the padding atoms that fill up its graphs."""

    padding: Arguments
    inputs: Arguments
    outputs: EdgeDerivatives
    replay: Callable[[], object]

    def __call__(self, arguments: Sequence[Tensor]) -> EdgeDerivatives:
        """Put a graph in the place of the first padding atoms, replay, and copy what belongs to it."""
        edges, atoms = slice(len(arguments[0])), slice(len(arguments[2]))
        for buffer, values, padding, dim in zip(
            self.inputs, arguments, self.padding, PADDED[: len(arguments)], strict=True
        ):
            n = values.shape[dim]
            torch.cat([values, padding.narrow(dim, n, padding.shape[dim] - n)], dim=dim, out=buffer)
        self.replay()
        gradient, energies, scalars = self.outputs
        return gradient[edges].clone(), energies[atoms].clone(), [x[atoms].clone() for x in scalars]


def padding_graph(size: Size, padding_atom: tuple[int, float], *, like: Tensor) -> Arguments:
    """Graph of padding atoms alone.

    Parameters
    ----------
    size
        Numbers of atoms and edges, and width of neighborhoods.
    padding_atom
        Atomic number of the padding atoms, and the length of their edges in Å.
    like
        Device and type of the result are those of this tensor.
    """
    number, distance = padding_atom
    vectors = like.new_zeros(size.n_edges, 3)
    vectors[:, 0] = distance
    atoms = size.n_atoms - 1 - torch.arange(size.n_edges, device=like.device) % PADDING_ATOMS
    specialist = atoms.new_zeros(size.n_atoms)
    graph = vectors, atoms.repeat(2, 1), specialist, torch.full_like(specialist, number)
    return (*graph, like.new_zeros(size.width)) if size.width else graph


class CapturedFunction:
    """The same function, recorded once for every size of graph that comes back; safe to call from several threads.

    Parameters
    ----------
    function
        Made of kernels alone: nothing in it may wait for a number from the device.
    padding_atom
        Atomic number of the padding atoms, and the length of their edges in Å: an element of the network, and its cutoff.
    record
        How to record.
    """

    def __init__(self, function: TensorFunction, *, padding_atom: tuple[int, float], record: Record):
        self.function, self.padding_atom, self.record = function, padding_atom, record
        self._visits: Counter[Size] = Counter()
        self._needed: dict[Size, int] = {}
        self._recordings: OrderedDict[Size, Recording] = OrderedDict()
        self._failures, self._lock = 0, threading.Lock()
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, *arguments: Tensor) -> EdgeDerivatives:
        """Evaluate, by a recording where there is one."""
        size = Size.of(arguments)
        if size.n_edges <= MAX_EDGES and self._failures < FAILURES:
            with self._lock:
                recording = self._recording(size.padded(), arguments[0])
                if recording is not None:
                    self._take_turns(arguments[0].device)
                    return recording(arguments)
        return self._launched(arguments)

    def _recording(self, size: Size, vectors: Tensor) -> Recording | None:
        """Find the recording of a size, or make it if graphs of this size have come often enough."""
        if size in self._recordings:
            self._recordings.move_to_end(size)
            return self._recordings[size]
        self._visits[size] += 1
        if self._visits[size] < self._needed.get(size, VISITS):
            return None
        if len(self._recordings) >= RECORDINGS:
            self._forget(next(iter(self._recordings)))
        padding = padding_graph(size, self.padding_atom, like=vectors)
        inputs = tuple(x.clone() for x in padding)
        try:
            outputs, replay = self.record(self.function, inputs)
        except Exception as error:  # whatever CUDA and the network may say
            self._failed(size, error)
            return None
        recording = self._recordings[size] = Recording(padding, inputs, outputs, replay)
        return recording

    def _take_turns(self, device: torch.device) -> None:
        """Let this stream wait for the one that used the recordings before: they share memory."""
        if device.type != "cuda":
            return
        stream = torch.cuda.current_stream(device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def _launched(self, arguments: Sequence[Tensor]) -> EdgeDerivatives:
        """Evaluate kernel by kernel; recordings give their memory back where it is short."""
        try:
            return self.function(*arguments)
        except Exception as error:
            if not (self._recordings and is_out_of_memory(error)):
                raise
        with self._lock:
            self._forget(*self._recordings)
        return self.function(*arguments)

    def _forget(self, *sizes: Size) -> None:
        """Give up what was recorded, and wait longer before it is recorded again."""
        for size in sizes:
            self._recordings.pop(size, None)
            self._visits[size], self._needed[size] = 0, BACKOFF * self._needed.get(size, VISITS)

    def _failed(self, size: Size, error: Exception) -> None:
        """Try again later; not for ever, if it is not for lack of memory."""
        if is_out_of_memory(error):
            self._forget(size, *self._recordings)
            return
        self._forget(size)
        self._failures += 1
        if self._failures == FAILURES:
            warnings.warn(
                "the force field cannot be recorded as a CUDA graph and is launched kernel by kernel, with the same results "
                f"({first_line(error)}); a newer torch or driver may help, compile=False avoids the attempt",
                CaptureWarning,
                stacklevel=5,
            )


_ONE_AT_A_TIME = (
    threading.Lock()
)  # a capture begins by waiting for the device, which breaks others that are under way


class CudaGraphs:
    """Records functions as CUDA graphs that share their working memory.

    Only one of them may be replayed at a time, and its outputs must be copied before the next one. They share memory because
    they are captured on one stream; nothing else runs on it, so that what libraries keep for it belongs to the graphs alone.
    """

    WARM_UP = 3
    """Evaluations before recording: libraries prepare themselves on first use, which cannot be recorded."""

    def __init__(self) -> None:
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        self._pool: Any = None
        self._living: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(
        self, function: TensorFunction, inputs: Arguments
    ) -> tuple[EdgeDerivatives, Callable[[], object]]:
        """Record one evaluation of ``function`` on ``inputs``; give its outputs, and what replays it."""
        with _ONE_AT_A_TIME, torch.cuda.device(inputs[0].device):
            if self._streams is None:
                self._streams = torch.cuda.Stream(), torch.cuda.Stream()
            if not self._living:
                self._pool = torch.cuda.graph_pool_handle()
            aside, recorded = self._streams
            self._warm_up(function, inputs, aside)
            graph = torch.cuda.CUDAGraph()
            outputs = self._captured(graph, recorded, function, inputs)
            self._living.add(graph)
        return outputs, graph.replay

    def _warm_up(self, function: TensorFunction, inputs: Arguments, stream: torch.cuda.Stream) -> None:
        present = torch.cuda.current_stream()
        stream.wait_stream(present)
        try:
            with torch.cuda.stream(stream):
                for _ in range(self.WARM_UP):
                    function(*inputs)
        finally:
            present.wait_stream(stream)

    def _captured(
        self,
        graph: torch.cuda.CUDAGraph,
        stream: torch.cuda.Stream,
        function: TensorFunction,
        inputs: Arguments,
    ) -> EdgeDerivatives:
        """Capture; whatever goes wrong, leave torch as it was and tell the first cause."""
        present, cause = torch.cuda.current_stream(), None
        try:
            # "thread_local": other threads may go on with work of their own
            with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
                try:
                    return function(*inputs)
                except Exception as error:
                    cause = error
                    raise
        except Exception as error:
            if torch.cuda.current_stream() != present:
                self._abandon(present)
            raise (cause or error) from None

    def _abandon(self, present: torch.cuda.Stream) -> None:
        """Undo by hand what torch leaves behind when a capture cannot even be ended."""
        torch.cuda.set_stream(present)
        for undo in ("_cuda_endAllocateToPool", "_cuda_releasePool"):  # private, and not in every version
            with suppress(AttributeError, RuntimeError):
                getattr(torch._C, undo)(torch.cuda.current_device(), self._pool)
        self._pool = torch.cuda.graph_pool_handle()
