"""What the checks share: the object under test, how they fail and are run, and central differences."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, TypeVar, cast

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator, Calculator, PropertyNotImplementedError
from numpy.typing import ArrayLike

from ase_gffmerge.errors import first_line
from ase_gffmerge.testing.report import CheckResult, Outcome

Results = dict[str, Any]
"""Numbers and arrays by the name of the property."""
PROPERTIES = ("energy", "free_energy", "energies", "forces", "stress")
GPA_PER_EV_PER_ANGSTROM3 = 160.21766208


class CheckFailed(Exception):
    """The check's finding, as a sentence with the measured number."""


class NotApplicable(Exception):
    """Why the check cannot be done with this calculator and structure."""


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """Largest errors that pass.

    Attributes
    ----------
    energy : eV/atom
    forces : eV/Å
    stress : eV/Å^3
    drift : eV/atom
        Of the total energy over a run at constant energy.
    """

    energy: float
    forces: float
    stress: float
    drift: float


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A calculator under test, with a structure it can do.

    Attributes
    ----------
    calc
        The calculator; checks overwrite its results.
    structure
        Slightly rattled, without constraints or calculator.
    properties
        Properties to be checked.
    tolerances
        Errors that pass.
    displacement
        Of central differences: Å, and strain.
    timestep
        Of the dynamics, fs.
    steps
        Number of steps of the run at constant energy.
    """

    calc: Calculator
    structure: Atoms
    properties: tuple[str, ...]
    tolerances: Tolerances
    displacement: float
    timestep: float
    steps: int

    def atoms(self, calc: BaseCalculator | None = None) -> Atoms:
        """Copy of the structure with the calculator attached."""
        atoms = self.structure.copy()
        atoms.calc = self.calc if calc is None else calc
        return atoms

    def evaluate(self, atoms: Atoms, calc: BaseCalculator | None = None) -> Results:
        """All properties of a copy of ``atoms``, as copies; no stress without a volume."""
        own = atoms.copy()
        own.calc = self.calc if calc is None else calc
        names = [name for name in self.properties if name != "stress" or own.cell.rank == 3]
        return {name: copy.deepcopy(own.calc.get_property(name, own)) for name in names}

    def needs(self, *names: str) -> None:
        """Skip the check when a property is not served, or the stress has no volume."""
        missing = [name for name in names if name not in self.properties]
        if missing:
            raise NotApplicable(f"{', '.join(missing)} is not served")
        if "stress" in names and self.structure.cell.rank < 3:
            raise NotApplicable("the structure has no volume")

    def of(self, numbers: Sequence[int], positions: Sequence[Sequence[float]] | None = None) -> Atoms:
        """Atoms of elements that the structure holds, open, with its ``info`` and the arrays of atoms of their kind."""
        known = self.structure.numbers.tolist()
        atoms = self.structure[[known.index(number) for number in numbers]]
        atoms.cell, atoms.pbc = None, False
        atoms.positions = np.zeros((len(atoms), 3)) if positions is None else positions
        return atoms

    def bare(self) -> Atoms:
        """Copy of the structure without a cell."""
        atoms = self.structure.copy()
        atoms.cell, atoms.pbc = None, False
        return atoms

    def reset(self) -> None:
        """Let the calculator forget its results; wrappers like ASE's ``SumCalculator`` have no ``reset()``."""
        if callable(getattr(self.calc, "reset", None)):
            self.calc.reset()
        else:
            self.calc.atoms, self.calc.results = None, {}

    def twin(self) -> Calculator:
        """Calculator with results of its own: spawned, else a deep copy."""
        spawn = getattr(self.calc, "spawn", None)
        return spawn() if callable(spawn) else copy.deepcopy(self.calc)

    def compare(self, got: Mapping[str, ArrayLike], expected: Mapping[str, ArrayLike], *, what: str) -> str:
        """Largest deviation of each property, in words; fails beyond the tolerances.

        Parameters
        ----------
        got, expected
            Values by property; those that both hold are compared.
        what
            What was done, for the message.
        """
        limits = {
            "energy": self.tolerances.energy * len(self.structure),
            "free_energy": self.tolerances.energy * len(self.structure),
            "energies": self.tolerances.energy,
            "forces": self.tolerances.forces,
            "stress": self.tolerances.stress,
        }
        names = [name for name in limits if name in got and name in expected]
        found = {name: deviation(got[name], expected[name]) for name in names}
        wrong = [name for name in names if not found[name] <= limits[name]]
        if wrong:
            listed = ", ".join(
                f"{name} by {found[name]:.3g} (tolerance {limits[name]:.1g})" for name in wrong
            )
            raise CheckFailed(f"{what} changes {listed}")
        return "changes " + ", ".join(f"{name} {found[name]:.1e}" for name in names if name != "free_energy")


S = TypeVar("S", contravariant=True)


class Check(Protocol[S]):
    """A function that returns what it measured of a subject, or raises; ``point`` is the contract's point it belongs to."""

    point: int
    __name__: str

    def __call__(self, subject: S, /) -> str | None:
        """Check."""


def check(point: int) -> Callable[[Callable[[S], str | None]], Check[S]]:
    """Mark a function as the check of a contract's point."""

    def mark(function: Callable[[S], str | None]) -> Check[S]:
        marked = cast(Check[S], function)
        marked.point = point
        return marked

    return mark


def run_check(function: Check[S], subject: S) -> CheckResult:
    """Outcome of a check, whatever it raises."""
    outcome: Outcome = "passed"
    try:
        detail = function(subject) or ""
    except NotApplicable as reason:
        outcome, detail = "skipped", str(reason)
    except CheckFailed as finding:
        outcome, detail = "failed", str(finding)
    except Exception as error:
        outcome, detail = "failed", f"raised {type(error).__name__}: {first_line(error)[:300]}"
    return CheckResult(function.point, function.__name__, outcome, detail)


def require(condition: bool, finding: str) -> None:
    """Raise :class:`CheckFailed` with the finding unless the condition holds."""
    if not condition:
        raise CheckFailed(finding)


def deviation(got: ArrayLike, expected: ArrayLike) -> float:
    """Largest absolute difference; infinite when the shapes differ or anything is not finite."""
    got, expected = np.asarray(got, dtype=float), np.asarray(expected, dtype=float)
    if got.shape != expected.shape or not np.isfinite(got).all() or not np.isfinite(expected).all():
        return float("inf")
    return float(np.abs(got - expected).max(initial=0.0))


def raised_by(function: Callable[[], object]) -> BaseException | None:
    """Exception that a call raises, if any."""
    try:
        function()
    except Exception as error:
        return error
    return None


@contextmanager
def counted(calc: Calculator) -> Iterator[list[Sequence[str]]]:
    """Record what every call of ``calc.calculate`` was asked for."""
    calls: list[Sequence[str]] = []
    plain = calc.calculate

    def calculate(
        atoms: Atoms | None = None, properties: Sequence[str] = ("energy",), *args: object, **kwargs: object
    ) -> None:
        calls.append(tuple(properties or ()))
        plain(atoms, properties, *args, **kwargs)

    calc.calculate = calculate  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        with suppress(AttributeError):
            del calc.calculate


def declared(calc: Calculator) -> tuple[str, ...]:
    """Properties, of those the contract is about, that the calculator says it implements."""
    return tuple(name for name in PROPERTIES if name in getattr(calc, "implemented_properties", ()))


def refusal(calc: Calculator, atoms: Atoms, name: str) -> BaseException | None:
    """ASE's error for properties that are not implemented, if asking for this one raises it.

    Parameters
    ----------
    calc
        The calculator.
    atoms
        A structure, which stays as it is.
    name
        Of the property.
    """

    def ask() -> None:
        own = atoms.copy()
        own.calc = calc
        own.calc.get_property(name, own)

    error = raised_by(ask)
    return error if isinstance(error, PropertyNotImplementedError) else None


def served(calc: Calculator, atoms: Atoms) -> tuple[str, ...]:
    """Declared properties that the calculator does not refuse for ``atoms``."""
    return tuple(name for name in declared(calc) if refusal(calc, atoms, name) is None)


RELATIVE = 1e-5
"""Largest share of a derivative that its error may be said to be: a check must not pass for want of smoothness."""


def derivative(central: Callable[[float], np.ndarray], step: float) -> tuple[np.ndarray, float]:
    r"""Central differences extrapolated to step zero, and how far they can be trusted.

    With :math:`D(h) = f' + a h^2 + b h^4 + \dots` Richardson's :math:`R(h) = (4 D(h) - D(2h))/3` errs by
    :math:`-4 b h^4`, and :math:`R(2h)` by 16 times that. Their difference is therefore 15 times the error of
    :math:`R(h)` where the steps are small, holds terms of higher order where they are not, and round-off.

    Parameters
    ----------
    central
        Central differences of a step.
    step
        The smallest of the three steps, which are ``step``, ``2 * step`` and ``4 * step``.

    Returns
    -------
    derivative
        R(step).
    error
        Largest difference between R(step) and R(2 step), at most ``RELATIVE`` times the largest derivative.
    """
    slopes = [central(factor * step) for factor in (1, 2, 4)]
    fine, coarse = ((4 * short - long) / 3 for short, long in pairwise(slopes))
    return fine, min(deviation(fine, coarse), RELATIVE * float(np.abs(fine).max(initial=0.0)))
