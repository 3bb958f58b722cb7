"""A pair potential that keeps the whole contract, and relatives that each break one line of it."""

import random
import threading
import time
from typing import ClassVar

import numpy as np
import torch
from ase.calculators.calculator import (
    CalculationFailed,
    Calculator,
    CalculatorSetupError,
    PropertyNotImplementedError,
    all_changes,
)
from ase.stress import full_3x3_to_voigt_6_stress

from ase_gffmerge.graphs import find_neighbors

DEPTHS = np.zeros(119)
DEPTHS[[13, 29]] = 0.3, 0.5


class Pairs(Calculator):
    """Morse-like wells with a smooth end at the cutoff."""

    name = "pairs"
    implemented_properties = ("energy", "free_energy", "energies", "forces", "stress")
    default_parameters: ClassVar = {"cutoff": 5.0}
    nolabel = True
    discard_results_on_any_change = True

    def set_atoms(self, atoms):
        if (DEPTHS[atoms.numbers] == 0).any():
            raise CalculatorSetupError(f"{atoms.symbols} holds more than Al and Cu")

    def get_property(self, name, atoms=None, allow_calculation=True):
        if name == "stress" and (atoms or self.atoms).cell.rank < 3:
            raise PropertyNotImplementedError("no volume, no stress")
        return super().get_property(name, atoms, allow_calculation)

    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        self.results = self.evaluate(self.atoms)

    def evaluate(self, atoms):
        if len(atoms) == 0:
            raise CalculatorSetupError("no atoms")
        if not np.isfinite(atoms.positions).all():
            raise CalculationFailed("positions are not finite")
        return self.from_edges(atoms, *self.neighbours(atoms))

    def neighbours(self, atoms):
        return find_neighbors(atoms, self.parameters["cutoff"])

    def profile(self, r):
        """Energy and slope of a pair of unit depth."""
        x = np.exp(-1.2 * (r - 2.6))
        u = np.clip(1 - (r / self.parameters["cutoff"]) ** 2, 0, None)
        well, slope = x * (x - 2), -2.4 * x * (x - 1)
        return well * u**4, slope * u**4 - well * 8 * u**3 * r / self.parameters["cutoff"] ** 2

    def from_edges(self, atoms, edge_index, shifts):
        j, i = edge_index
        vectors = atoms.positions[j] - atoms.positions[i] + shifts @ atoms.cell.array
        lengths = np.linalg.norm(vectors, axis=1)
        depth = np.sqrt(DEPTHS[atoms.numbers[i]] * DEPTHS[atoms.numbers[j]])
        energy, slope = self.profile(lengths)
        gradient = 0.5 * (depth * slope / lengths)[:, None] * vectors
        n = len(atoms)
        energies = np.bincount(i, 0.5 * depth * energy, n)
        forces = np.zeros((n, 3))
        np.add.at(forces, i, gradient)
        np.add.at(forces, j, -gradient)
        total = float(energies.sum())
        results = {"energy": total, "free_energy": total, "energies": energies, "forces": forces}
        if atoms.cell.rank == 3:
            results["stress"] = full_3x3_to_voigt_6_stress(vectors.T @ gradient / atoms.get_volume())
        return results

    def spawn(self):
        return type(self)(**self.todict())


def changed(name, change):
    """A relative whose result ``name`` goes through ``change``."""

    class Changed(Pairs):
        def evaluate(self, atoms):
            results = super().evaluate(atoms)
            if name in results:
                results[name] = change(results[name])
            return results

    return Changed


StressInGPa = changed("stress", lambda stress: stress * 160.21766208)
StressFlipped = changed("stress", lambda stress: -stress)
StressOrder = changed("stress", lambda stress: stress[[0, 1, 2, 5, 4, 3]])
ForcesSlightlyOff = changed("forces", lambda forces: (1 + 1e-4) * forces)
StressSlightlyOff = changed("stress", lambda stress: (1 + 1e-4) * stress)
ForcesOff = changed("forces", lambda forces: 1.01 * forces)
NetForce = changed("forces", lambda forces: np.add(forces, [0.01, 0, 0]))
SingleForces = changed("forces", np.float32)
EnergiesOff = changed("energies", lambda energies: energies + 0.1)
FreeEnergyOff = changed("free_energy", lambda energy: energy + 0.1)
Noise = changed("forces", lambda forces: forces + 1e-14 * np.random.default_rng().normal(size=forces.shape))


class Stiff(Pairs):
    """Right, and a hundred times stiffer: so are the errors of central differences."""

    def profile(self, r):
        energy, slope = super().profile(r)
        return 100 * energy, 100 * slope


class NoFreeEnergy(Pairs):
    implemented_properties = ("energy", "energies", "forces", "stress")

    def evaluate(self, atoms):
        results = super().evaluate(atoms)
        del results["free_energy"]
        return results


class ExtraResult(Pairs):
    implemented_properties = (*Pairs.implemented_properties, "grade")

    def evaluate(self, atoms):
        return super().evaluate(atoms) | {"grade": 0.5}


class Undeclared(Pairs):
    implemented_properties = ("energy", "free_energy", "energies", "forces")


class Greedy(Pairs):
    """Implements what it never delivers."""

    implemented_properties = (*Pairs.implemented_properties, "magmom")

    def evaluate(self, atoms):
        results = super().evaluate(atoms)
        results["energies"] = None
        return results


class Scribbles(Pairs):
    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        atoms.info["seen"] = True


class Wraps(Pairs):
    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        atoms.wrap()
        super().calculate(atoms, properties, system_changes)


class ReadsInfo(Pairs):
    """Does not notice that what it reads has changed."""

    def evaluate(self, atoms):
        results = super().evaluate(atoms)
        results["energy"] += atoms.info.get("charge", 0)
        return results


class ReadsArray(Pairs):
    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        if "head" in atoms.arrays:
            self.results["energy"] += atoms.arrays["head"].sum()


class NoticesInfo(ReadsInfo):
    """As it should be."""

    def check_state(self, atoms, tol=1e-15):
        changes = super().check_state(atoms, tol)
        if self.atoms is not None and self.atoms.info.get("charge", 0) != atoms.info.get("charge", 0):
            changes.append("charge")
        return changes


class NeedsChoice(Pairs):
    """As it should be, for a calculator that must be told what to compute, for the structure and for every atom."""

    def evaluate(self, atoms):
        if len(atoms) and ("choice" not in atoms.info or not atoms.arrays.get("heads", np.zeros(1)).all()):
            raise CalculatorSetupError(
                f"atoms.info['choice'] or atoms.arrays['heads'] of {atoms.symbols} is missing"
            )
        return super().evaluate(atoms)

    def check_state(self, atoms, tol=1e-15):
        def chosen(structure):
            return structure.info.get("choice"), structure.arrays.get("heads", np.zeros(0)).tolist()

        changes = super().check_state(atoms, tol)
        return changes if self.atoms is None or chosen(self.atoms) == chosen(atoms) else [*changes, "choice"]


class NeverCaches(Pairs):
    def check_state(self, atoms, tol=1e-15):
        return ["positions"]


class Sloppy(Pairs):
    """Takes small displacements for none."""

    def check_state(self, atoms, tol=1e-15):
        return super().check_state(atoms, tol=1e-2)


class DefaultDtype(Pairs):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        torch.set_default_dtype(torch.float64)


class ResetsRandom(Pairs):
    def evaluate(self, atoms):
        np.random.seed(0)  # noqa: NPY002
        return super().evaluate(atoms)


class ResetsPythonsRandom(Pairs):
    def evaluate(self, atoms):
        random.seed(0)
        return super().evaluate(atoms)


class HoldsLambda(Pairs):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.smooth = lambda r: r

    def __deepcopy__(self, memo):
        return self.spawn()


class HoldsObject(Pairs):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parameters["device"] = torch.device("cpu")

    def todict(self, skip_default=True):
        return dict(self.parameters)


class SpawnRaises(Pairs):
    def spawn(self):
        raise RuntimeError("no more calculators\nand a second line")


class CopiesNothing(Pairs):
    def __deepcopy__(self, memo):
        return self


class SharedBuffers(Pairs):
    def evaluate(self, atoms):
        results = super().evaluate(atoms)
        if getattr(self, "buffer", np.zeros(0)).shape != results["forces"].shape:
            self.buffer = np.zeros_like(results["forces"])
        self.buffer[:] = results["forces"]
        return results | {"forces": self.buffer}


class SharedByAll(Pairs):
    """Unsafe in threads: what one evaluation leaves in the class, another overwrites."""

    scratch = None

    def evaluate(self, atoms):
        type(self).scratch = atoms
        time.sleep(0.05)
        return super().evaluate(type(self).scratch)


class OneThreadAtATime(Pairs):
    """Safe in threads as long as each has a calculator of its own, as many of ASE's own are; slow for some images."""

    busy = False

    def evaluate(self, atoms):
        if self.busy:
            raise RuntimeError("two threads evaluate with one calculator")
        self.busy = True
        time.sleep(0.02 if atoms.positions[0, 0] > 0 else 0.0)
        self.busy = False
        return super().evaluate(atoms)


class OldNeighbours(Pairs):
    """Searches for neighbours only when the elements change."""

    def neighbours(self, atoms):
        if getattr(self, "known", None) is None or not np.array_equal(self.known[0], atoms.numbers):
            self.known = atoms.numbers.copy(), super().neighbours(atoms)
        return self.known[1]


class IgnoresElements(Pairs):
    def set_atoms(self, atoms):
        pass


class LateElements(IgnoresElements):
    def evaluate(self, atoms):
        Pairs.set_atoms(self, atoms)
        return super().evaluate(atoms)


class PassesNaN(Pairs):
    def evaluate(self, atoms):
        if np.isfinite(atoms.positions).all():
            return super().evaluate(atoms)
        nan = np.full((len(atoms), 3), np.nan)
        return {"energy": np.nan, "free_energy": np.nan, "energies": nan[:, 0], "forces": nan, "stress": nan}


class NeverRecovers(Pairs):
    def evaluate(self, atoms):
        self.failed = getattr(self, "failed", False) or not np.isfinite(atoms.positions).all()
        if self.failed:
            raise CalculationFailed("not any more")
        return super().evaluate(atoms)


class SlowFarAway(Pairs):
    def evaluate(self, atoms):
        for _ in range(int(20_000 * np.abs(atoms.positions).max())):
            pass
        return super().evaluate(atoms)


class SlowInVacuum(Pairs):
    def evaluate(self, atoms):
        for _ in range(int(min(atoms.cell.volume, 1e9) / 100)):
            pass
        return super().evaluate(atoms)


class Leaks(Pairs):
    def evaluate(self, atoms):
        self.__dict__.setdefault("history", []).extend([atoms.copy(), {}])
        return super().evaluate(atoms)


class OnlyWhatIsAsked(Pairs):
    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        kept = {} if system_changes else self.results
        super().calculate(atoms, properties, system_changes)
        self.results = kept | {name: self.results[name] for name in properties}


class Abrupt(Pairs):
    """Ends at the cutoff with a step."""

    def profile(self, r):
        x = np.exp(-1.2 * (r - 2.6))
        return x * (x - 2), -2.4 * x * (x - 1)


class NotInvariant(Pairs):
    """Stiffer along x."""

    def from_edges(self, atoms, edge_index, shifts):
        stretched = atoms.copy()
        stretched.set_cell(atoms.cell.array * [1.01, 1, 1], scale_atoms=False)
        stretched.positions *= [1.01, 1, 1]
        results = super().from_edges(stretched, edge_index, shifts)
        results["forces"] = results["forces"] * [1.01, 1, 1]
        return results


class Labelled(Pairs):
    nolabel = False


class StressAnyway(Pairs):
    def get_property(self, name, atoms=None, allow_calculation=True):
        if name == "stress" and atoms.cell.rank < 3:
            return np.zeros(6)
        return super().get_property(name, atoms, allow_calculation)


class AnswersAnything(Pairs):
    def get_property(self, name, atoms=None, allow_calculation=True):
        if name not in self.implemented_properties:
            return None
        return super().get_property(name, atoms, allow_calculation)


class TakesNothing(Pairs):
    def evaluate(self, atoms):
        if len(atoms) == 0:
            return {"energy": 0.0, "free_energy": 0.0, "energies": np.zeros(0), "forces": np.zeros((0, 3))}
        return super().evaluate(atoms)


class Anchored(Pairs):
    """The energy depends on where the structure is."""

    def evaluate(self, atoms):
        results = super().evaluate(atoms)
        results["energy"] += 1e-3 * atoms.positions[0, 0]
        return results


class FirstAtomCounts(Pairs):
    def evaluate(self, atoms):
        results = super().evaluate(atoms)
        results["energy"] += 1e-3 * int(atoms.numbers[0])
        return results


class Offset(Pairs):
    def evaluate(self, atoms):
        results = super().evaluate(atoms)
        results["energy"] += 1.0
        return results


class SignedVolume(Pairs):
    def evaluate(self, atoms):
        results = super().evaluate(atoms)
        if "stress" in results:
            results["stress"] *= np.sign(np.linalg.det(atoms.cell.array))
        return results


class NeedsNeighbours(Pairs):
    def neighbours(self, atoms):
        edge_index, shifts = super().neighbours(atoms)
        return edge_index, shifts + 0 * shifts[0]


class AllOrNothing(Pairs):
    def evaluate(self, atoms):
        if atoms.pbc.any() and not atoms.pbc.all():
            raise NotImplementedError("slabs")
        return super().evaluate(atoms)


class Forgets(Pairs):
    """``todict`` does not say all that matters."""

    def __init__(self, cutoff=4.0):
        super().__init__(cutoff=cutoff)

    def todict(self, skip_default=True):
        return {"cutoff": 4.5}


class SpawnsItself(Pairs):
    def spawn(self):
        return self


class Training(Pairs):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.network = torch.nn.Linear(1, 1)


class Renamed(Pairs):
    name = property(lambda self: f"pairs-{time.perf_counter_ns()}")


class OnlyInMainThread(Pairs):
    def evaluate(self, atoms):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("not here")
        return super().evaluate(atoms)


class Stranger:
    """Looks like a calculator, and is none of ASE's."""

    implemented_properties = ("energy",)

    def reset(self):
        pass

    def get_stress(self, atoms=None):
        raise PropertyNotImplementedError


Explosive = changed("stress", lambda stress: 1e4 * np.abs(stress) + 1e3)
