"""Functions recorded as CUDA graphs."""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import torch

from ase_gffmerge.graphs.derivatives import EdgeDerivatives
from ase_gffmerge.inference.cuda_graphs import Arguments, TensorFunction

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
        self._streams: Any = None
        self._pool: Any = None
        self._living: WeakSet[Any] = WeakSet()

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

    def _warm_up(self, function: TensorFunction, inputs: Arguments, stream: Any) -> None:
        present = torch.cuda.current_stream()
        stream.wait_stream(present)
        try:
            with torch.cuda.stream(stream):
                for _ in range(self.WARM_UP):
                    function(*inputs)
        finally:
            present.wait_stream(stream)

    def _captured(
        self, graph: Any, stream: Any, function: TensorFunction, inputs: Arguments
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

    def _abandon(self, present: Any) -> None:
        """Undo by hand what torch leaves behind when a capture cannot even be ended."""
        torch.cuda.set_stream(present)
        for undo in ("_cuda_endAllocateToPool", "_cuda_releasePool"):  # private, and not in every version
            with suppress(AttributeError, RuntimeError):
                getattr(torch._C, undo)(torch.cuda.current_device(), self._pool)
        self._pool = torch.cuda.graph_pool_handle()
