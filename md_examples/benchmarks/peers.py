"""How the benchmark compares with another package: a model of the same size with random weights, through its calculator.

Each file ``peer_*.py`` beside this one registers the row of a package that must be installed::

    gffmerge benchmark --with md_examples/benchmarks/peer_nequip.py --only nequip
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator

from ase_gffmerge.errors import first_line
from ase_gffmerge.evaluation.benchmark.harness import Bench, Row, md_step, medians
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.models import build_potential

CUTOFF = 5.0
PAINN = {"cutoff": CUTOFF, "channels": 128, "n_blocks": 3, "n_radial": 20}


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Model of another package, and ours of the same size.

    Attributes
    ----------
    package, module
        Its name to people and to ``import``.
    model
        What the package calls the model.
    architecture, hyper
        Of ours.
    make
        Gives the package's own calculator for the elements and the device of a bench; the flag says whether to compile.
    compiles
        Whether ``make`` can compile.
    target
        Ratio of the times to reach; ``None`` where none was set.
    remark
        Says what is unequal on these atoms, if anything is.
    """

    package: str
    module: str
    model: str
    architecture: str
    hyper: Mapping[str, Any]
    make: Callable[[Bench, bool], Calculator]
    compiles: bool = False
    target: float | None = None
    remark: Callable[[Atoms], str] = lambda _: ""


def peer_rows(bench: Bench, peer: Peer) -> list[Row]:
    """Compare steps of every size, eager with eager and, where both compile, compiled with compiled.

    What the package prints goes to stderr.
    """
    if find_spec(peer.module) is None:
        return [_nothing(peer, "", f"{peer.package} is not installed")]
    ways = (False, True) if bench.compile and peer.compiles else (False,)
    with redirect_stdout(sys.stderr), torch.random.fork_rng(devices=[]):
        potential = build_potential(peer.architecture, dict(peer.hyper), bench.force_field.species)
        own = ForceField(name=peer.architecture, potential=potential.eval().requires_grad_(False))
        return [row for compiled in ways for row in _rows(bench, peer, own, compiled=compiled)]


def _rows(bench: Bench, peer: Peer, own: ForceField, *, compiled: bool) -> Iterator[Row]:
    suffix = ", compiled" if compiled else ""
    make = cache(partial(peer.make, bench, compiled))
    for n_atoms in bench.sizes:
        atoms = bench.structure(n_atoms)
        try:
            step = md_step(make(), atoms)
            step()
        except Exception as error:  # another package, of any version
            yield _nothing(peer, suffix, f"{peer.package} does not work here: {first_line(error)}")
            return
        steps = {
            peer.package + suffix: step,
            "ours" + suffix: md_step(bench.calculator(own, compiled), atoms),
        }
        if bench.compile and not peer.compiles:
            steps["ours, compiled"] = md_step(bench.calculator(own, True), atoms)
        times = medians(steps, repeats=bench.repeats)
        yield _row(
            peer,
            suffix,
            ratio=times[peer.package + suffix] / times["ours" + suffix],
            milliseconds=times,
            note="; ".join(filter(None, (f"{len(atoms)} atoms", peer.remark(atoms)))),
        )


def _nothing(peer: Peer, suffix: str, note: str) -> Row:
    return Row(what=_what(peer, suffix), against="ours" + suffix, ratio=None, note=note)


def _row(peer: Peer, suffix: str, **measured: Any) -> Row:
    return Row(
        what=_what(peer, suffix),
        against="ours" + suffix,
        target=peer.target,
        sense="at least",
        **measured,
    )


def _what(peer: Peer, suffix: str) -> str:
    return f"MD step, {peer.package}'s {peer.model}{suffix}"
