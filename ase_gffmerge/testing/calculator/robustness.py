"""Points 7, 8 and 11 to 13: failures, copies, side effects, reproducibility and memory."""

import copy
import gc
import logging
import os
import pickle
import random
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from ase import Atoms
from ase.calculators.calculator import (
    CalculationFailed,
    Calculator,
    CalculatorSetupError,
    PropertyNotImplementedError,
)

from ase_gffmerge.testing.calculator.harness import NotApplicable, Results, Subject, check, raised_by, require

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


THREADS = 3
REPEATS = 4


def _moved(subject: Subject) -> Atoms:
    atoms = subject.structure.copy()
    atoms.positions[0] += 0.1
    return atoms


def _same_and_independent(subject: Subject, twin: Calculator, how: str) -> str:
    """The twin agrees, and its evaluations do not touch the results of the original."""
    expected = subject.evaluate(subject.structure)
    detail = subject.compare(subject.evaluate(subject.structure, twin), expected, what=how)
    subject.evaluate(subject.structure)
    kept = copy.deepcopy(dict(subject.calc.results))
    subject.evaluate(_moved(subject), twin)
    stays = subject.calc.results.keys() == kept.keys()
    require(twin is not subject.calc and stays, f"{how} shares its results with the original")
    subject.compare(subject.calc.results, kept, what=f"an evaluation by a calculator made by {how}")
    return detail


@check(11)
def todict_rebuilds_it(subject: Subject) -> str:
    """``type(calc)(**calc.todict())`` is the same calculator."""
    twin = type(subject.calc)(**subject.calc.todict())
    return _same_and_independent(subject, twin, "todict()")


@check(11)
def pickles(subject: Subject) -> str:
    """Worker processes receive calculators by pickle, fresh or used."""
    subject.evaluate(subject.structure)
    return _same_and_independent(subject, pickle.loads(pickle.dumps(subject.calc)), "pickling")


@check(11)
def deep_copies(subject: Subject) -> str:
    """``copy.deepcopy(atoms)`` copies the calculator, too."""
    atoms = subject.atoms()
    subject.evaluate(atoms)
    return _same_and_independent(subject, copy.deepcopy(atoms).calc, "copy.deepcopy")


@check(11)
def spawns(subject: Subject) -> str:
    """``calc.spawn()`` shares the weights, but neither results nor neighbours."""
    spawn = getattr(subject.calc, "spawn", None)
    if not callable(spawn):
        raise NotApplicable("it has no spawn()")
    return _same_and_independent(subject, spawn(), "spawn()")


@check(11)
def works_in_threads(subject: Subject) -> str:
    """``NEB(parallel=True)`` evaluates its images, each with a calculator of its own, in threads."""
    images = [subject.structure.copy() for _ in range(THREADS)]
    for seed, image in enumerate(images):
        image.rattle(0.03, seed=seed)
    expected = [subject.evaluate(image) for image in images]
    twins = [subject.twin() for _ in images]

    def repeatedly(image: Atoms, twin: Calculator) -> list[Results]:
        """Evaluate in one thread, one after the other: no calculator is ever in two threads."""
        return [subject.evaluate(image, twin) for _ in range(REPEATS)]

    with ThreadPoolExecutor(THREADS) as pool:
        evaluated = list(pool.map(repeatedly, images, twins))
    details = [
        subject.compare(one, wanted, what="evaluating in threads")
        for got, wanted in zip(evaluated, expected, strict=True)
        for one in got
    ]
    return f"{len(details)} evaluations in {THREADS} threads"


STEPS = 20
EARLY = 5


def global_state() -> dict[str, object]:
    """What belongs to the whole process; torch's part only where torch is loaded."""
    state: dict[str, object] = {
        "random's state": random.getstate(),
        "numpy's random state": np.random.get_state()[1].tolist(),  # type: ignore[index] # noqa: NPY002
        "numpy's error handling": np.geterr(),
        "the environment": dict(os.environ),
        "the root logger": (logging.getLogger().level, list(logging.getLogger().handlers)),
        "the warning filters": list(warnings.filters),
        "the working directory": os.getcwd(),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        state |= {
            "torch's default dtype": torch.get_default_dtype(),
            "torch's random state": torch.random.get_rng_state().tolist(),
            "torch's matmul precision": torch.get_float32_matmul_precision(),
            "torch's grad mode": torch.is_grad_enabled(),
            "torch's number of threads": torch.get_num_threads(),
            "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
        }
    return state


@contextmanager
def unusual_state() -> Iterator[None]:
    """Random states in the middle of nowhere and torch's other default dtype; a change to what is usual shows, too."""
    torch = sys.modules.get("torch")
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.random()
    np.random.random()  # noqa: NPY002
    if torch is not None:
        dtype, state = torch.get_default_dtype(), torch.random.get_rng_state()
        torch.rand(1)
        torch.set_default_dtype(torch.float32 if dtype == torch.float64 else torch.float64)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        if torch is not None:
            torch.set_default_dtype(dtype)
            torch.random.set_rng_state(state)


@check(12)
def leaves_global_state_alone(subject: Subject) -> str:
    """Neither making a calculator nor an evaluation changes what other code relies on."""
    subject.evaluate(subject.structure)  # the first one may import
    subject.reset()
    with unusual_state():
        before = global_state()
        rebuilt = raised_by(lambda: type(subject.calc)(**subject.calc.todict())) is None
        built = global_state()
        subject.evaluate(subject.structure)
        after = global_state()
    for what in before:
        require(built[what] == before[what], f"making a calculator changes {what}")
        require(after[what] == built[what], f"an evaluation changes {what}")
    return "construction and evaluation" if rebuilt else "evaluation; it cannot be rebuilt from todict()"


@check(13)
def same_input_gives_the_same_bits(subject: Subject) -> None:
    """Two evaluations of one structure, from scratch, agree bitwise (on a CPU)."""
    subject.reset()
    first = subject.evaluate(subject.structure)
    subject.reset()
    second = subject.evaluate(subject.structure)
    for name, value in first.items():
        gap = np.abs(np.asarray(second[name]) - np.asarray(value)).max()
        require(np.array_equal(value, second[name]), f"a second evaluation changes {name} by {gap:.1e}")


@check(13)
def memory_is_flat(subject: Subject) -> str:
    """Steps of dynamics leave no objects behind."""
    atoms, counts = subject.atoms(), []
    for step in range(EARLY + STEPS):
        atoms.positions[0, 0] += 1e-3
        subject.evaluate(atoms)
        if step in (EARLY - 1, EARLY + STEPS - 1):
            gc.collect()
            counts.append(len(gc.get_objects()))
    grown = counts[1] - counts[0]
    require(grown < STEPS, f"{grown} more objects after {STEPS} evaluations")
    return f"{grown} more objects after {STEPS} evaluations"


@check(13)
def networks_are_frozen(subject: Subject) -> str:
    """Modules are in ``eval()`` mode, their weights need no gradient, and results hold no graph."""
    torch = sys.modules.get("torch")
    held = list(vars(subject.calc).values())
    held += [inner for outer in held for inner in getattr(outer, "__dict__", {}).values()]
    modules = [] if torch is None else [m for m in held if isinstance(m, torch.nn.Module)]
    if not modules:
        raise NotApplicable("no torch module in it")
    subject.evaluate(subject.structure)
    require(not any(m.training for m in modules), "a module is in training mode")
    gradients = sum(p.grad is not None for m in modules for p in m.parameters())
    require(not gradients, f"{gradients} weights have gathered gradients")
    return f"{len(modules)} modules"


CHECKS = (
    unknown_elements_fail_when_attached,
    positions_that_are_not_finite_fail,
    works_again_after_a_failure,
    unknown_properties_are_refused,
    an_empty_structure_is_refused,
    todict_rebuilds_it,
    pickles,
    deep_copies,
    spawns,
    works_in_threads,
    leaves_global_state_alone,
    same_input_gives_the_same_bits,
    memory_is_flat,
    networks_are_frozen,
)
