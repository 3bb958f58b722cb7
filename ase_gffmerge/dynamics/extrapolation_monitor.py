"""An observer of dynamics and relaxations that acts on structures beyond the calibration frames."""

import warnings
from pathlib import Path
from typing import Any, Literal, get_args

import ase.io
import numpy as np
from ase import Atoms

from ase_gffmerge.errors import (
    ExtrapolationError,
    ExtrapolationWarning,
    GFFMergeError,
    MissingExtrapolationGradeError,
)
from ase_gffmerge.storage.tensor_file import require_writable

Action = Literal["warn", "stop", "record"]
KEY = "extrapolation"


class ExtrapolationMonitor:
    """Observer for ASE's dynamics and optimisers that acts when an atom's extrapolation grade passes a threshold.

    The grade is that of the evaluation the step has just made: watching costs nothing.

    Parameters
    ----------
    atoms
        What moves.
    action
        ``warn``: an :class:`ExtrapolationWarning`, and then silence for ``quiet`` calls. ``stop``: raise
        :class:`ExtrapolationError` out of ``dyn.run()``; the atoms keep their last positions and momenta, so that the
        run can be continued. ``record``: append the structure, with its grades but without energies and forces, to
        ``file``: it is to be labelled.
    threshold
        Of the largest grade. 1 is the furthest calibration atom; ordinary dynamics at somewhat higher temperature touch it
        now and then.
    file
        Extended XYZ file of ``record``.
    quiet
        Calls between two warnings.
    calculator
        The one that knows the grade; default: ``atoms.calc``. Needed when that combines several calculators.

    Attributes
    ----------
    grade, atom
        Largest grade at the last call, and the index of its atom.
    largest
        Largest grade of all calls.
    n_calls, n_beyond
        Calls so far, and how many of them found a grade above the threshold.

    Raises
    ------
    MissingExtrapolationGradeError
        When the force field of the calculator has no extrapolation grade.
    GFFMergeError
        For options that do not fit each other.
    FileFormatError
        When ``file`` cannot be written.

    Examples
    --------
    ``dyn.attach(ExtrapolationMonitor(atoms, action="stop", threshold=3), interval=10)``
    """

    def __init__(
        self,
        atoms: Atoms,
        *,
        action: Action = "warn",
        threshold: float = 2.0,
        file: str | Path | None = None,
        quiet: int = 100,
        calculator: Any = None,
    ) -> None:
        if action not in get_args(Action):
            raise GFFMergeError(f"unknown action {action!r}; choose one of {', '.join(get_args(Action))}")
        if not threshold > 0 or quiet < 0:
            raise GFFMergeError(
                f"a threshold of {threshold} and {quiet} quiet calls are impossible; the first must be positive, the other "
                "not negative"
            )
        if (action == "record") != (file is not None):
            raise GFFMergeError(
                f"a file goes with action='record' and no other, not with {action!r} and {file}"
            )
        self.atoms, self.calculator = atoms, atoms.calc if calculator is None else calculator
        require_extrapolation_grade(self.calculator)
        self.file = None if file is None else Path(file)
        if self.file is not None:
            require_writable(self.file)
        self.action, self.threshold, self.quiet = action, threshold, quiet
        self.grade, self.atom, self.largest = 0.0, 0, 0.0
        self.n_calls, self.n_beyond = 0, 0
        self._silent_until = 0

    def __call__(self) -> None:
        """Look at the current structure, and act if need be."""
        self.calculator.get_potential_energy(self.atoms)  # from memory, unless the atoms moved since
        grades = self.calculator.extras[KEY]
        self.atom = int(np.argmax(grades))
        self.grade = float(grades[self.atom])
        self.largest = max(self.largest, self.grade)
        self.n_calls += 1
        if self.grade <= self.threshold:
            return
        self.n_beyond += 1
        if self.action == "record":
            self._record(grades)
        elif self.action == "stop":
            raise ExtrapolationError(
                f"{self.describe()}; stopped before the run goes where the force field knows nothing: add structures like "
                "this one to the calibration frames, or raise the threshold",
                atom=self.atom,
                grade=self.grade,
            )
        elif self.n_calls > self._silent_until:
            self._silent_until = self.n_calls + self.quiet
            warnings.warn(
                f"{self.describe()}; its forces are not to be trusted", ExtrapolationWarning, stacklevel=2
            )

    def describe(self) -> str:
        """Which atom was furthest out at the last call, in words."""
        symbol = self.atoms.symbols[self.atom]
        return (
            f"atom {self.atom} ({symbol}) of {self.atoms.get_chemical_formula()} has extrapolation grade {self.grade:.2f}, "
            f"above {self.threshold:g} (1 is the edge of the calibration frames)"
        )

    def _record(self, grades: np.ndarray) -> None:
        assert self.file is not None
        frame = self.atoms.copy()
        frame.set_constraint()
        frame.arrays[KEY] = grades.copy()
        frame.info["extrapolation_max"] = self.grade
        ase.io.write(self.file, frame, format="extxyz", append=True)


def require_extrapolation_grade(calculator: Any) -> None:
    """Raise :class:`MissingExtrapolationGradeError` when a calculator will not serve extrapolation grades."""
    force_field = getattr(calculator, "force_field", None)
    if getattr(force_field, "extrapolation_grade", None) is not None:
        return
    if force_field is None:
        raise MissingExtrapolationGradeError(
            f"{type(calculator).__name__} has no extrapolation grade; give the GFFMergeCalculator as calculator="
        )
    raise MissingExtrapolationGradeError(
        f"{force_field.name!r} has no extrapolation grade: it is a single specialist, or a merge by an older version; merge "
        "again, or give the calculator ForceField.load(...).with_extrapolation_grade()"
    )
