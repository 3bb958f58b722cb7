"""What the tests of faults share: tiny specialists, processes, and comparison to the last bit."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from ase.build import molecule
from ase.io import write

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.forcefield.provenance import Provenance
from ase_gffmerge.merging.recipe import Recipe, load_recipe
from ase_gffmerge.workflows.cache import cache_key
from helpers.toys import labelled, rattled, relative, toy

HYPER = {"channels": 4, "n_blocks": 1, "n_radial": 3, "cutoff": 3.0}
RECIPE = load_recipe("mean")


def tiny_specialists() -> list[ForceField]:
    """Two relatives with calibration frames and everything that provenance can hold."""
    base = toy("painn", HYPER, dtype=torch.float32, level_of_theory="unknown")
    provenance = Provenance(lineage=("base",), seen_frames=("00ff00ff00ff00ff",), errors={"mae": 0.1})
    made = []
    for seed, (name, formula) in enumerate((("a", "CH3OH"), ("b", "CH3CHO"))):
        frames = (molecule(formula), molecule("H2O"))
        frames[1].rattle(0.05, seed=seed)
        made.append(relative(base, name, frames, seed=seed, size=0.01, absolute=True, provenance=provenance))
    return made


def run(context, target, *arguments, timeout: float = 60) -> int:
    """Exit code of a process; negative for the signal that killed it."""
    process = context.Process(target=target, args=arguments)
    process.start()
    process.join(timeout)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def same_content(first: ForceField, second: ForceField) -> bool:
    """Whether two force fields are equal in everything a file holds, to the last bit."""
    ours, theirs = first.potential.state_dict(), second.potential.state_dict()
    grades = [s.extrapolation_grade.state_dict() if s.extrapolation_grade else {} for s in (first, second)]
    plain = [replace(s, potential=ours, extrapolation_grade=None, calibration=()) for s in (first, second)]
    return (
        ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
        and grades[0].keys() == grades[1].keys()
        and all(torch.equal(value, grades[1][name]) for name, value in grades[0].items())
        and first.calibration == second.calibration
        and plain[0] == plain[1]
        and first.fingerprint == second.fingerprint
    )


def explains(error: Exception, *, named: object = "", longest: int = 3000) -> None:
    """Assert that a message is one line of sensible length that names its object."""
    message = str(error)
    assert 10 < len(message) < longest
    assert "\n" not in message.replace(str(named), "")
    assert str(named) in message


def labelled_water(path: Path) -> Path:
    """Write a few frames with EMT's energies and forces."""
    write(path, [labelled(atoms) for atoms in rattled("H2O", 6, size=0.05)])
    return path


def key_of(specialists: Sequence[ForceField], recipe: Recipe) -> str:
    """Name of a merge in the cache."""
    return cache_key([specialist.content_digest for specialist in specialists], recipe)
