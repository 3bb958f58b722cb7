"""Points 7 and 8: unknown elements, structures that cannot be evaluated, and what comes after a failure."""

import numpy as np
from ase.calculators.calculator import CalculationFailed, CalculatorSetupError, PropertyNotImplementedError

from ase_gffmerge.testing.calculator.harness import NotApplicable, Subject, check, raised_by, require

OGANESSON = 118


@check(7)
def unknown_elements_fail_when_attached(subject: Subject) -> str | None:
    """``atoms.calc = calc`` names what is not supported, instead of failing later or not at all."""
    atoms = subject.structure.copy()
    atoms.numbers[0] = OGANESSON
    error = raised_by(lambda: setattr(atoms, "calc", subject.calc))
    if error is not None:
        require("Og" in str(error), f"the error does not name the element: {error}")
        return "refused when attached"
    error = raised_by(lambda: atoms.get_potential_energy())
    require(
        error is None,
        f"oganesson is accepted by atoms.calc = calc and fails only in the evaluation ({type(error).__name__}: {error})",
    )
    rest = subject.evaluate(subject.structure[1:])["energy"] if len(atoms) > 1 else 0.0
    ignored = abs(atoms.get_potential_energy() - rest) < 1e-12
    require(not ignored, "an atom of oganesson is silently ignored")
    raise NotApplicable("it evaluates oganesson like anything else")


@check(8)
def positions_that_are_not_finite_fail(subject: Subject) -> None:
    """A NaN must stop a run, with ASE's own error."""
    for bad in (np.nan, np.inf):
        atoms = subject.atoms()
        atoms.positions[0, 0] = bad
        error = raised_by(lambda atoms=atoms: subject.evaluate(atoms))  # type: ignore[misc]
        require(error is not None, f"a position of {bad} is evaluated without complaint")
        require(
            isinstance(error, CalculationFailed),
            f"a position of {bad} raises {type(error).__name__} instead of CalculationFailed",
        )


@check(8)
def works_again_after_a_failure(subject: Subject) -> str:
    """An exception leaves nothing behind; then the next structure is evaluated afresh."""
    moved = subject.structure.copy()
    moved.positions[0] += 0.3
    subject.reset()
    expected = subject.evaluate(moved)
    subject.reset()
    atoms = subject.atoms()
    subject.evaluate(atoms)
    atoms.positions[0, 0] = np.nan
    raised_by(lambda: subject.evaluate(atoms))
    return subject.compare(subject.evaluate(moved), expected, what="a failure before it")


@check(8)
def unknown_properties_are_refused(subject: Subject) -> None:
    """``PropertyNotImplementedError`` for what is not implemented."""
    others = [
        name for name in ("dipole", "magmom", "charges") if name not in subject.calc.implemented_properties
    ]
    if not others:
        raise NotApplicable("it implements everything that could be asked for")
    name = others[0]
    error = raised_by(lambda: subject.calc.get_property(name, subject.structure))
    require(
        isinstance(error, PropertyNotImplementedError),
        f"asking for {name} " + (f"raises {type(error).__name__}" if error else "returns something"),
    )


@check(8)
def an_empty_structure_is_refused(subject: Subject) -> None:
    """``CalculatorSetupError`` for a structure without atoms."""
    error = raised_by(lambda: subject.evaluate(subject.structure[:0]))
    require(
        isinstance(error, CalculatorSetupError),
        "no atoms "
        + (f"raise {type(error).__name__}" if error else "are evaluated")
        + ", not CalculatorSetupError",
    )


CHECKS = (
    unknown_elements_fail_when_attached,
    positions_that_are_not_finite_fail,
    works_again_after_a_failure,
    unknown_properties_are_refused,
    an_empty_structure_is_refused,
)
