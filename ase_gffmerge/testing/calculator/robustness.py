"""Points 12 and 13: global state, reproducibility, memory."""

import gc
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ase_gffmerge.testing.calculator.harness import NotApplicable, Subject, check, raised_by, require

STEPS = 20
EARLY = 5


def global_state() -> dict[str, Any]:
    """What belongs to the whole process; torch's part only where torch is loaded."""
    state: dict[str, Any] = {
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


CHECKS = (leaves_global_state_alone, same_input_gives_the_same_bits, memory_is_flat, networks_are_frozen)
