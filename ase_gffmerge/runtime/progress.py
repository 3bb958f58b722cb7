"""How far a long computation is, and how long its phases took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[float, str], None]
"""Called now and then with the fraction done (0 to 1) and a short description of what is being done."""


def no_progress(fraction: float, text: str) -> None:
    """Ignore how far a computation is: the default of every ``progress`` argument."""


def part_of(progress: Progress, start: float, end: float, *, prefix: str = "") -> Progress:
    """Progress of a part of a computation.

    Parameters
    ----------
    progress
        Of the whole computation.
    start, end
        Fractions of the whole at which the part begins and ends.
    prefix
        Put before every description.
    """
    return lambda fraction, text: progress(start + (end - start) * fraction, prefix + text)


class Clock:
    """Wall time of the phases of a computation: ``with clock("solve"): ...``.

    Attributes
    ----------
    seconds
        Per phase, in the order of their first use; repeated phases add up.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a phase."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
