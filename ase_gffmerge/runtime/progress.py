"""How far a long computation is, and how long its phases took."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

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


def is_first() -> bool:
    """Whether this process talks and writes: it is alone, or the first of those that torchrun started."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0"


def n_started() -> int:
    """Processes that torchrun started to do the same, this one among them."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


@contextmanager
def progress_bar(description: str) -> Iterator[Progress]:
    """Show a bar on stderr if that is a terminal, or in a notebook; ``progress(fraction, text)`` moves it."""
    terminal = sys.stderr is not None and sys.stderr.isatty()  # a windowed program may have none
    if not (terminal or in_notebook()) or not is_first():
        yield no_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=1.0)
        yield lambda fraction, text: bar.update(task, completed=fraction, description=text)


def in_notebook() -> bool:
    """Whether this is a Jupyter kernel that can show bars, for which rich needs ipywidgets."""
    interactive = sys.modules.get("IPython")
    shell = getattr(interactive, "get_ipython", lambda: None)()
    return hasattr(shell, "kernel") and find_spec("ipywidgets") is not None


class Clock:
    """Time of the phases of a computation: ``with clock("solve"): ...``.

    Parameters
    ----------
    now
        Gives the time in seconds; default: wall time.

    Attributes
    ----------
    seconds
        Per phase, in the order of their first use; repeated phases add up.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a phase."""
        start = self.now()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self.now() - start
