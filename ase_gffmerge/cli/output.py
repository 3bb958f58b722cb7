"""What verbs print: results on stdout, progress on stderr."""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer

from ase_gffmerge.runtime.progress import Progress, no_progress


def print_json(document: Any) -> None:
    """Print one JSON document; numbers that are not finite become null."""
    typer.echo(json.dumps(plain(document), indent=1, ensure_ascii=False, allow_nan=False))


def plain(value: Any) -> Any:
    """Containers and numpy numbers as JSON types."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def print_table(rows: Mapping[str, Any]) -> None:
    """Print names and values in two columns."""
    width = max((len(name) for name in rows), default=0)
    for name, value in rows.items():
        lines = str(f"{value:.6g}" if isinstance(value, float) else value).splitlines() or [""]
        typer.echo(f"{name:<{width}}  {lines[0]}")
        for line in lines[1:]:
            typer.echo(f"{'':<{width}}  {line}")


def note(message: str) -> None:
    """Tell the user something that is not the result."""
    typer.echo(message, err=True)


@contextmanager
def progress_bar(description: str) -> Iterator[Progress]:
    """Show a bar on stderr if that is a terminal; ``progress(fraction, text)`` moves it."""
    if not sys.stderr.isatty():
        yield no_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=1.0)
        yield lambda fraction, text: bar.update(task, completed=fraction, description=text)
