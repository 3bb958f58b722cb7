"""Point 6: a calculator that reads ``atoms.info`` or extra arrays must notice when they change; ASE itself does not."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_changes

from ase_gffmerge.testing.calculator.harness import CheckFailed, Subject, check, raised_by

UNPHYSICAL = {
    "numbers",
    "positions",
    "tags",
    "momenta",
    "masses",
}  # what ASE watches, or no energy depends on


class _Spied(dict):
    """A dictionary that notes which keys are looked up."""

    def __init__(self, content: Mapping[str, Any], seen: set[str]):
        super().__init__(content)
        self.seen = seen

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As for any dictionary, noted."""
        self.seen.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.seen.add(str(key))
        return super().__contains__(key)


def keys_read(subject: Subject) -> dict[str, set[str]]:
    """Keys of ``atoms.info`` and ``atoms.arrays`` that ``calc.calculate`` looks up, in the structure or a copy of it."""
    seen: dict[str, set[str]] = {"info": set(), "arrays": set()}

    class Spied(Atoms):
        @property
        def info(self) -> Any:
            return vars(self)["_info"]

        @info.setter
        def info(self, content: Mapping[str, Any]) -> None:
            vars(self)["_info"] = _Spied(content, seen["info"])

        @property
        def arrays(self) -> Any:
            return vars(self)["_arrays"]

        @arrays.setter
        def arrays(self, content: Mapping[str, Any]) -> None:
            vars(self)["_arrays"] = _Spied(content, seen["arrays"])

    atoms = subject.structure
    spied = Spied(atoms)
    spied.info = atoms.info
    spied.arrays.update({name: values.copy() for name, values in atoms.arrays.items()})
    for keys in seen.values():
        keys.clear()
    subject.calc.calculate(spied, list(subject.properties), list(all_changes))
    subject.reset()
    return {"info": seen["info"], "arrays": seen["arrays"] - UNPHYSICAL}


def _edited(atoms: Atoms, where: str, key: str) -> Atoms:
    """Copy of ``atoms`` with another value under ``key``."""
    atoms = atoms.copy()
    if where == "info":
        old = atoms.info.get(key, 0)
        atoms.info[key] = old + 1 if isinstance(old, int | float | np.ndarray) else f"another {old}"
    else:
        old = atoms.arrays.get(key, np.zeros(len(atoms), dtype=int))
        atoms.arrays[key] = old + 1 if old.dtype.kind in "ifu" else np.roll(old, 1, axis=0)
    return atoms


@check(6)
def watches_what_it_reads(subject: Subject) -> str:
    """A change of something the calculator reads, such as ``atoms.info["charge"]``, must not return old results."""
    keys = keys_read(subject)
    pairs = [(where, key) for where in keys for key in sorted(keys[where])]
    for where, key in pairs:
        before = subject.evaluate(subject.structure)["energy"]
        edited = _edited(subject.structure, where, key)
        if subject.calc.calculation_required(edited, ["energy"]):
            continue
        subject.reset()
        found: list[float] = []
        error = raised_by(lambda edited=edited, found=found: found.append(subject.evaluate(edited)["energy"]))  # type: ignore[misc]
        if error is not None or found[0] != before:
            effect = (
                f"raises {type(error).__name__}"
                if error
                else f"changes the energy by {found[0] - before:.3g} eV"
            )
            raise CheckFailed(
                f"another atoms.{where}[{key!r}] {effect}, but the results of before are returned"
            )
    listed = ", ".join(f"{where}[{key!r}]" for where, key in pairs if key not in all_changes)
    return f"reads {listed}" if listed else "reads nothing beyond the geometry"


CHECKS = (watches_what_it_reads,)
