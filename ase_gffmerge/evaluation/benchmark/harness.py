"""What a force field costs on this machine, as ratios: every comparison is measured in turn within one process.

A row of the benchmark is a function from a :class:`Bench` to its :class:`Row` objects, registered with :func:`register`;
:func:`load_rows` runs a Python file outside the package that registers some.
"""

import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from matplotlib.figure import Figure

from ase_gffmerge.errors import BenchmarkError, first_line
from ase_gffmerge.evaluation.plots import save_figure
from ase_gffmerge.evaluation.table import Column, Table, Value
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.runtime.progress import Progress

MakeCalculator = Callable[[ForceField, bool], Calculator]
"""Gives a calculator of one force field on the benchmark's device; the flag says whether to compile."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured ratio.

    Attributes
    ----------
    what, against
        What is divided by what.
    ratio
        As the target counts it; ``None`` where nothing could be measured, see ``note``.
    target, sense
        The ratio to reach, and whether it is a least or a greatest value; ``None`` for what is told without one.
    milliseconds
        Medians of what was compared.
    note
        Sizes, or why there is no number.
    """

    what: str
    against: str
    ratio: float | None
    target: float | None = None
    sense: Literal["at least", "at most"] = "at most"
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; ``None`` without a target or a number."""
        if self.ratio is None or self.target is None:
            return None
        return self.ratio >= self.target if self.sense == "at least" else self.ratio <= self.target

    def to_dict(self) -> dict[str, object]:
        """Plain dictionary for JSON output."""
        return vars(self) | {"milliseconds": dict(self.milliseconds), "met": self.met}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What rows measure, and how thoroughly.

    Attributes
    ----------
    specialists
        One or several force fields with calibration frames.
    force_field
        Their merge, or the only one.
    calculator
        Makes the calculators.
    from_files
        Builds the calculator of the first so many specialists from their files; the merge of all is in the cache.
    sizes, scaling
        Numbers of atoms: of most rows, and of the fit of the exponent.
    steps
        MD steps of the memory row.
    repeats
        Of everything that is timed, in turn with what it is compared to.
    compile
        Also measure compiled force fields.
    """

    specialists: tuple[ForceField, ...]
    force_field: ForceField
    calculator: MakeCalculator
    from_files: Callable[[int], Calculator]
    sizes: Sequence[int] = (9, 256, 1000)
    scaling: Sequence[int] = (1000, 3200, 10000)
    steps: int = 300
    repeats: int = 7
    compile: bool = False

    def structure(self, n_atoms: int) -> Atoms:
        """About ``n_atoms`` atoms of the first specialist's kind."""
        return crowd(self.specialists[0].calibration[0], n_atoms)


Measure = Callable[[Bench], Iterable[Row]]
ROWS: dict[str, Measure] = {}
"""What the benchmark measures, by name and in this order."""


def register(name: str) -> Callable[[Measure], Measure]:
    """Enter a function into :data:`ROWS` (a decorator).

    Raises
    ------
    BenchmarkError
        If there is a row of this name.
    """

    def enter(measure: Measure) -> Measure:
        if name in ROWS:
            raise BenchmarkError(f"there are two rows {name!r} of the benchmark; rename one of them")
        ROWS[name] = measure
        return measure

    return enter


def load_rows(path: Path) -> None:
    """Import a Python file that registers rows; it may import its neighbours by name, as a script may.

    Raises
    ------
    BenchmarkError
        If it cannot be read or imported, or has the name of a module that is imported already.
    """
    path = path.resolve()
    if path.suffix != ".py" or not path.is_file():
        raise BenchmarkError(f"{path} is not a Python file; name one that registers rows of the benchmark")
    sys.path.insert(0, str(path.parent))
    try:
        module = importlib.import_module(path.stem)
    except Exception as error:  # a file of the user's
        raise BenchmarkError(f"{path} cannot be imported: {first_line(error)}") from error
    finally:
        sys.path.remove(str(path.parent))
    if Path(module.__file__ or "").resolve() != path:
        raise BenchmarkError(f"{path} has the name of another module, {path.stem!r}; rename the file")


def run_benchmark(bench: Bench, only: Sequence[str] | None, *, progress: Progress) -> dict[str, list[Row]]:
    """Measure the rows of these names, or all that are registered.

    Parameters
    ----------
    bench
        What is measured.
    only
        Names of rows, all if ``None`` or empty.
    progress
        Told the name of each row before it is measured.

    Raises
    ------
    BenchmarkError
        For names that do not exist.
    """
    unknown = sorted(set(only or ()) - set(ROWS))
    if unknown:
        raise BenchmarkError(
            f"there is no row {', '.join(unknown)}; choose from {', '.join(ROWS)}, "
            "or name the file that registers it (--with FILE.py)"
        )
    chosen = {name: measure for name, measure in ROWS.items() if not only or name in only}
    result = {}
    for done, (name, measure) in enumerate(chosen.items()):
        progress(done / len(chosen), name)
        result[name] = list(measure(bench))
    return result


def medians(functions: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Median milliseconds of functions that are called in turn, after one call each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            _wait()
            start = time.perf_counter()
            function()
            _wait()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def md_step(calculator: Calculator, atoms: Atoms) -> Callable[[], object]:
    """Give a function that moves a copy of ``atoms`` by the length of an MD step and asks for the forces."""
    own, rng = atoms.copy(), np.random.default_rng(0)
    own.calc = calculator

    def step() -> object:
        own.positions = atoms.positions + rng.normal(scale=0.002, size=atoms.positions.shape)
        return own.get_forces()

    return step


def crowd(unit: Atoms, n_atoms: int) -> Atoms:
    """Copies of a structure: of a crystal side by side, of a molecule turned at random on a cubic lattice.

    Molecules get the volume of a liquid, 12 Å^3 per atom. A single one stays without boundary conditions.
    """
    copies = max(1, round(n_atoms / len(unit)))
    edge = int(np.ceil(copies ** (1 / 3) - 1e-9))
    repeats = (edge, edge, int(np.ceil(copies / edge**2)))
    bare = Atoms(unit.numbers, positions=unit.positions, cell=unit.cell, pbc=unit.pbc)
    if unit.pbc.all():
        return bare * repeats
    if copies == 1:
        return bare
    spacing = (12.0 * len(unit)) ** (1 / 3)
    rng, places = np.random.default_rng(0), np.array(list(np.ndindex(repeats)))[:copies]
    result = Atoms(cell=spacing * np.array(repeats), pbc=True)
    for place in places:
        molecule = Atoms(bare.numbers, positions=bare.positions - bare.positions.mean(axis=0))
        molecule.rotate(rng.uniform(0, 360), rng.normal(size=3))
        molecule.positions += spacing * (place + 0.5)
        result += molecule
    return result


def plot_scaling(rows: Mapping[str, Sequence[Row]], path: Path) -> Path:
    """Draw milliseconds per MD step against atoms, from the scaling row, on logarithmic axes, and write a PNG."""
    times = {int(n): value for row in rows["scaling"] for n, value in row.milliseconds.items()}
    atoms = sorted(times)
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.loglog(atoms, [times[n] for n in atoms], marker="o", markersize=4, label="measured")
    axes.loglog(atoms, [times[atoms[0]] * n / atoms[0] for n in atoms], "--", color="0.5", label="linear")
    axes.set(xlabel="atoms", ylabel="ms per MD step")
    axes.grid(visible=True, which="both", alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return save_figure(figure, path)


def benchmark_table(rows: Mapping[str, Sequence[Row]]) -> Table:
    """All rows with their targets and times."""
    columns = (
        Column("row", words=True),
        Column("what", words=True),
        Column("in units of", words=True),
        Column("ratio", spec=".3g"),
        Column("target"),
        Column("", words=True),
        Column("times", "ms", words=True),
        Column("note", words=True),
    )
    return Table(
        columns=columns, rows=tuple(_cells(name, row) for name, found in rows.items() for row in found)
    )


def _cells(name: str, row: Row) -> tuple[Value, ...]:
    return (
        name,
        row.what,
        row.against,
        row.ratio,
        None if row.target is None else f"{row.sense} {row.target:g}",
        {True: "met", False: "missed", None: ""}[row.met],
        ", ".join(f"{key} {value:.4g}" for key, value in row.milliseconds.items()),
        row.note,
    )
