"""Point 11: rebuilding, pickling, copying and threads."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ase_gffmerge.testing.calculator.harness import NotApplicable, Subject, check, require

THREADS = 3


def _moved(subject: Subject) -> Any:
    atoms = subject.structure.copy()
    atoms.positions[0] += 0.1
    return atoms


def _same_and_independent(subject: Subject, twin: Any, how: str) -> str:
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
    if not callable(getattr(subject.calc, "spawn", None)):
        raise NotApplicable("it has no spawn()")
    return _same_and_independent(subject, subject.calc.spawn(), "spawn()")


@check(11)
def works_in_threads(subject: Subject) -> str:
    """``NEB(parallel=True)`` evaluates its images, each with a calculator of its own, in threads."""
    images = [subject.structure.copy() for _ in range(THREADS)]
    for seed, image in enumerate(images):
        image.rattle(0.03, seed=seed)
    expected = [subject.evaluate(image) for image in images]
    twins = [subject.twin() for _ in images]
    with ThreadPoolExecutor(THREADS) as pool:
        got = list(pool.map(subject.evaluate, images * 4, twins * 4))
    details = [
        subject.compare(one, other, what="evaluating in threads")
        for one, other in zip(got, expected * 4, strict=True)
    ]
    return f"{len(details)} evaluations in {THREADS} threads"


CHECKS = (todict_rebuilds_it, pickles, deep_copies, spawns, works_in_threads)
