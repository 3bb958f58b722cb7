"""What verbs print: results on stdout, progress on stderr."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ase_gffmerge.runtime.progress import Progress, is_first

if TYPE_CHECKING:
    from ase import Atoms

    from ase_gffmerge.evaluation.table import Table
    from ase_gffmerge.forcefield.force_field import ForceField
    from ase_gffmerge.merging.recipe import Recipe


def print_json(document: object) -> None:
    """Print one JSON document; numbers that are not finite become null."""
    typer.echo(json.dumps(plain(document), indent=1, ensure_ascii=False, allow_nan=False))


def plain(value: object) -> object:
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


def print_table(table: "Table") -> None:
    """Print a table: into the width of a terminal, else as wide as it is, so that programs find a row on a line."""
    if not sys.stdout.isatty():
        typer.echo(table.to_text())
        return
    from rich.console import Console

    console = Console()
    console.print(table.to_rich())
    for line in table.footnotes:
        console.print(line, highlight=False, markup=False)


def duration(seconds: float) -> str:
    """Seconds or minutes, rounded."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def extended_xyz(frames: "Sequence[Atoms]") -> str:
    """Text of an extended XYZ file."""
    from ase.io import write

    text = StringIO()
    write(text, frames, format="extxyz")
    return text.getvalue()


def print_values(values: Mapping[str, object]) -> None:
    """Print names and values in two columns."""
    from ase_gffmerge.evaluation.table import Table

    print_table(Table.of_values({name: _written(name, value) for name, value in values.items()}))


def _written(name: str, value: object) -> str | float | int:
    """Energies with digits behind the point, however large those of all electrons are."""
    if name.endswith("(eV)") and isinstance(value, float):
        return f"{value:.5f}"
    return value if isinstance(value, str | float | int) else str(value)


def require_outputs(
    *paths: Path | None,
    model: Path | None = None,
    plot: Path | None = None,
    inputs: Sequence[str | Path | None] = (),
    overwrite: bool = False,
) -> None:
    """Refuse a run whose result would be lost, or would replace something: before long work, not after it.

    Parameters
    ----------
    *paths
        Files to be written; ``None`` is left out.
    model
        A force field to be written, which is a folder in the format of some packages.
    plot
        A further one, whose ending says how a figure is written.
    inputs
        What is read, files of other packages as ``vendor:FILE``, which is never written over.
    overwrite
        Whether files that exist may be replaced.

    Raises
    ------
    FileFormatError
        For the first that must not or cannot be written.
    """
    from ase_gffmerge.errors import FileFormatError
    from ase_gffmerge.integrations.load import file_of, holds_model
    from ase_gffmerge.storage.tensor_file import require_writable

    if plot:
        from ase_gffmerge.evaluation.plots import figure_format

        figure_format(plot)
    read = [file for known in inputs if known is not None and (file := file_of(known)) and file.exists()]
    for path in filter(None, (model, *paths, plot)):
        if any(path.exists() and path.samefile(file) for file in read):
            raise FileFormatError(
                f"cannot write {path}: it is the input, which would be lost; choose another name"
            )
        folder = path == model and holds_model(path)
        if (folder or path.is_file()) and not overwrite:
            raise FileFormatError(f"{path} exists; choose another name, or replace it with --overwrite")
        require_writable(path.with_name(f"{path.name}.new") if folder else path)


def recipe_for(
    out: Path, specialists: "Sequence[ForceField]", recipe: "Recipe", *, exportable: bool = False
) -> "Recipe":
    """The recipe of a merge into a file of that name: what another package's format cannot hold is refused beforehand.

    Parameters
    ----------
    out
        The file; an ending but ``.safetensors`` means the format of the specialists' package.
    specialists
        All of one architecture, as far as a merge will not refuse them.
    recipe
        What is wanted.
    exportable
        Keep to what the format of the package can hold, whatever the file.

    Raises
    ------
    FileFormatError
        With what the format cannot hold, or where the specialists are no package's.
    """
    from ase_gffmerge.integrations import adapter_for
    from ase_gffmerge.integrations.load import format_of

    architecture = specialists[0].potential.architecture
    adapter = adapter_for(architecture) if exportable else format_of(out, architecture)
    if adapter is None:
        return recipe
    chosen = recipe.exportable() if exportable else recipe
    adapter.require_merge_exportable(
        [s.potential for s in specialists if s.potential.architecture == architecture],
        wide_readout=chosen.keeps_wide_readout,
        embeddings=chosen.conditioning == "per-specialist",
    )
    return chosen


def note(message: str) -> None:
    """Tell the user something that is not the result."""
    if is_first():
        typer.echo(message, err=True)


UNITS = {"force": "eV/Å", "energy": "eV/atom", "stress": "GPa"}


def with_unit(key: str) -> str:
    """Name of a number of a training, as ``force_mae``, in words and with its unit."""
    kind, _, measure = key.partition("_")
    return (
        f"{kind} {measure.upper()} ({UNITS[kind]})" if measure in ("mae", "rmse") else key.replace("_", " ")
    )


class EpochWatch:
    """Shows every epoch: on the bar of a terminal, else as a line on stderr."""

    def __init__(self, epochs: int, progress: Progress):
        self.epochs, self.progress, self.done = epochs, progress, 0

    def plan(self, epochs: int) -> None:
        """Take note that so many epochs are to come at most, fewer perhaps than were asked for."""
        self.epochs = epochs

    def __call__(self, epoch: int, losses: dict[str, float]) -> None:
        """Show the losses of ``epoch`` (from 1)."""
        if self.done == 0 and epoch > 1:
            note(f"continued after epoch {epoch - 1} of an interrupted run")
        self.done = epoch
        shown = "  ".join(f"{with_unit(key)} {value:.4g}" for key, value in losses.items())
        text = f"epoch {epoch}/{self.epochs}  {shown}"
        if sys.stderr.isatty():
            self.progress(epoch / self.epochs, text)
        else:
            note(text)

    def farewell(self) -> str:
        """Say what to do after Ctrl-C."""
        if not self.done:
            return "interrupted before an epoch of this run was complete; run the same command again"
        return f"interrupted; epoch {self.done} of {self.epochs} is saved; the same command continues"
