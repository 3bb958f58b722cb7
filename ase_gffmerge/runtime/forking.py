"""What a process needs that was forked from one that computes."""

import os
import threading
from types import TracebackType

import torch

_process = os.getpid()


def survive_fork() -> None:
    """Let torch compute with one thread in a process that was forked; call it before computing.

    Such a process inherits the pools of threads that torch had used, but not the threads, and would wait for them forever.
    """
    global _process
    if os.getpid() != _process:
        _process = os.getpid()
        torch.set_num_threads(1)


class ForkSafeLock:
    """A reentrant lock that is open in a forked process, whatever the threads of its parent were doing.

    Such a process has one thread; a lock that another thread held would never be given back.
    """

    def __init__(self) -> None:
        self._process, self._lock = os.getpid(), threading.RLock()

    def __enter__(self) -> None:
        if os.getpid() != self._process:
            self._process, self._lock = os.getpid(), threading.RLock()
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
