"""Points 1 to 6: type, properties, results, sums, and what the calculator watches (ASE does not watch ``atoms.info``)."""

from collections.abc import Callable, Mapping

import ase.outputs
import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.jsonio import encode

from ase_gffmerge.testing.calculator.harness import (
    GPA_PER_EV_PER_ANGSTROM3,
    CheckFailed,
    NotApplicable,
    Subject,
    check,
    declared,
    raised_by,
    refusal,
    require,
)


@check(1)
def is_an_ase_calculator(subject: Subject) -> None:
    """Derive from ASE's ``Calculator``."""
    require(
        isinstance(subject.calc, Calculator),
        f"{type(subject.calc).__name__} does not derive from ase.calculators.calculator.Calculator",
    )


@check(1)
def parameters_can_be_written(subject: Subject) -> None:
    """Trajectories store the parameters as JSON; a torch device or dtype among them breaks writing."""
    for key, value in subject.calc.todict().items():
        error = raised_by(lambda value=value: encode(value))  # type: ignore[misc]
        require(error is None, f"parameter {key}={value!r} cannot be written as JSON: {error}")


@check(2)
def serves_what_it_says(subject: Subject) -> str:
    """Every implemented property can be had, and nothing else is in the results."""
    names = [name for name in declared(subject.calc) if name != "stress" or subject.structure.cell.rank == 3]
    refused = [name for name in names if refusal(subject.calc, subject.structure, name)]
    require(not refused, f"{', '.join(refused)} is among implemented_properties, but is refused")
    results = subject.evaluate(subject.structure)
    missing = [name for name, value in results.items() if value is None]
    require(not missing, f"{', '.join(missing)} is among implemented_properties but comes back as None")
    extra = set(subject.calc.results) - set(subject.calc.implemented_properties)
    require(not extra, f"results hold {sorted(extra)}, which implemented_properties do not name")
    return f"serves {', '.join(results)}"


@check(2)
def free_energy_is_the_energy(subject: Subject) -> None:
    """Optimisers, cell filters and conserved quantities ask for the free energy."""
    require(
        "free_energy" in subject.calc.implemented_properties,
        "free_energy is not among implemented_properties: optimisers and cell filters ask for it",
    )
    atoms = subject.atoms()
    energy, free = atoms.get_potential_energy(), atoms.get_potential_energy(force_consistent=True)
    require(energy == free, f"free_energy - energy is {free - energy:.3g} eV")


@check(3)
def types_and_shapes(subject: Subject) -> None:
    """The energy is a Python float, everything else a float64 array of the right shape."""
    n = len(subject.structure)
    shapes = {"energies": (n,), "forces": (n, 3), "stress": (6,)}
    results = subject.evaluate(subject.structure)
    for name in ("energy", "free_energy"):
        if name in results:
            kind = type(results[name]).__name__
            require(isinstance(results[name], float), f"{name} is a {kind}, not a float")
    for name in shapes.keys() & results.keys():
        value = results[name]
        require(isinstance(value, np.ndarray), f"{name} is a {type(value).__name__}, not an array")
        require(value.dtype == np.float64, f"{name} is {value.dtype}, not float64")
        require(value.shape == shapes[name], f"{name} has shape {value.shape}, not {shapes[name]}")


@check(3)
def results_are_new(subject: Subject) -> None:
    """Results of one structure survive the evaluation of the next, and callers get copies."""
    atoms = subject.atoms()
    subject.evaluate(atoms)
    kept = dict(subject.calc.results)
    before = {name: np.array(value) for name, value in kept.items()}
    atoms.positions[0] += 0.1
    subject.evaluate(atoms)
    changed = [name for name, value in kept.items() if not np.array_equal(value, before[name])]
    require(
        not changed, f"evaluating another structure overwrites the earlier arrays of {', '.join(changed)}"
    )
    for name in {"forces", "energies"} & set(subject.properties):
        given = subject.calc.get_property(name, atoms)
        given[...] = -1e9
        again = subject.calc.get_property(name, atoms)
        require(not np.array_equal(given, again), f"callers can change the stored {name}")


@check(3)
def stress_has_unit_and_sign(subject: Subject) -> str:
    """A third of the trace is dE/dV in eV/Å^3, positive under tension."""
    subject.needs("stress", "energy")
    ratio = _pressure_ratio(subject)
    if abs(ratio / GPA_PER_EV_PER_ANGSTROM3 - 1) < 0.05:
        raise CheckFailed(f"the stress is {ratio:.4g} times (dE/dV) in eV/Å^3: it is in GPa")
    require(abs(ratio + 1) > 0.05, f"the stress is {ratio:.4g} times (dE/dV): its sign is flipped")
    require(abs(ratio - 1) < 0.05, f"the stress is {ratio:.4g} times (dE/dV) in eV/Å^3")
    return f"trace is {ratio:.6f} times 3 dE/dV"


def _pressure_ratio(subject: Subject) -> float:
    """A third of the stress's trace over dE/dV, for a structure compressed enough to have a pressure."""
    atoms = subject.atoms()
    atoms.set_cell(0.97 * atoms.cell.array, scale_atoms=True)
    mean = atoms.get_stress()[:3].mean()
    energies, volumes = [], []
    for factor in (1 - 1e-4, 1 + 1e-4):
        scaled = atoms.copy()
        scaled.set_cell(factor * atoms.cell.array, scale_atoms=True)
        scaled.calc = subject.calc
        energies.append(scaled.get_potential_energy())
        volumes.append(scaled.get_volume())
    slope = (energies[1] - energies[0]) / (volumes[1] - volumes[0])
    if max(abs(slope), abs(mean)) < 100 * subject.tolerances.stress:
        raise NotApplicable(f"the structure has no pressure to speak of ({slope:.1e} eV/Å^3)")
    return float(mean / slope) if slope else float("inf")


@check(4)
def results_are_known_to_ase(subject: Subject) -> None:
    """Keys outside ``ase.outputs.all_outputs`` break ``export_properties`` and stored calculators."""
    atoms = subject.atoms()
    subject.evaluate(atoms)
    unknown = sorted(set(subject.calc.results) - set(ase.outputs.all_outputs))
    require(not unknown, f"results hold {unknown}, which ASE does not know: export_properties() raises")
    SinglePointCalculator(atoms, **subject.calc.results)
    subject.calc.export_properties()


@check(5)
def energies_sum_to_the_energy(subject: Subject) -> str:
    """Per-atom energies sum to the energy."""
    subject.needs("energies", "energy")
    results = subject.evaluate(subject.structure)
    gap = abs(results["energies"].sum() - results["energy"])
    limit = subject.tolerances.energy * len(subject.structure)
    require(gap <= limit, f"energies.sum() differs from the energy by {gap:.3g} eV")
    return f"to {gap:.1e} eV"


@check(5)
def forces_sum_to_zero(subject: Subject) -> str:
    """Without an external field the net force is zero."""
    subject.needs("forces")
    net = np.abs(subject.evaluate(subject.structure)["forces"].sum(axis=0)).max()
    require(net <= subject.tolerances.forces, f"the net force is {net:.3g} eV/Å")
    return f"to {net:.1e} eV/Å"


@check(5)
def no_stress_without_a_volume(subject: Subject) -> None:
    """A structure without three cell vectors has no stress, and asking for it says so."""
    if "stress" not in subject.calc.implemented_properties:
        raise NotApplicable("stress is not served")
    atoms = subject.bare()
    atoms.calc = subject.calc
    error = raised_by(lambda: atoms.get_stress())
    require(error is not None, "a structure without a cell has a stress")
    require(
        isinstance(error, PropertyNotImplementedError),
        f"raises {type(error).__name__} instead of PropertyNotImplementedError",
    )


@check(6)
def has_a_name_and_no_label(subject: Subject) -> str:
    """Trajectories store the name; a label would be for files."""
    calc = subject.calc
    require(isinstance(calc.name, str) and bool(calc.name), f"name is {calc.name!r}")
    require(
        bool(getattr(calc, "nolabel", False)),
        "nolabel is not set: ASE hands the calculator a label for files",
    )
    return f"called {calc.name!r}"


@check(6)
def same_structure_is_not_computed_again(subject: Subject) -> None:
    """Results are kept for an equal structure, and only for that."""
    atoms = subject.atoms()
    subject.evaluate(atoms)
    asked = [name for name in ("energy", "forces") if name in subject.properties]
    require(not subject.calc.calculation_required(atoms, asked), "an equal structure is computed again")
    for name, edit in _EDITS.items():
        changed = subject.atoms()
        edit(changed)
        require(
            bool(subject.calc.calculation_required(changed, asked)),
            f"changed {name} are not noticed: results of the earlier structure are returned",
        )


_EDITS: dict[str, Callable[[Atoms], object]] = {
    "positions": lambda atoms: atoms.positions.__setitem__((0, 0), atoms.positions[0, 0] + 1e-6),
    "cell vectors": lambda atoms: atoms.set_cell(atoms.cell.array + 1e-6),
    "boundary conditions": lambda atoms: atoms.set_pbc(~atoms.pbc),
    "elements": lambda atoms: atoms.numbers.__setitem__(0, atoms.numbers[0] + 1),
    "numbers of atoms": lambda atoms: atoms.append(atoms[0]),
}

UNPHYSICAL = {
    "numbers",
    "positions",
    "tags",
    "momenta",
    "masses",
}  # what ASE watches, or no energy depends on


class _Spied(dict[str, object]):
    """A dictionary that notes which keys are looked up."""

    def __init__(self, content: Mapping[str, object], seen: set[str]):
        super().__init__(content)
        self.seen = seen

    def __getitem__(self, key: str) -> object:
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: object = None) -> object:
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
        def info(self) -> _Spied:
            return vars(self)["_info"]

        @info.setter
        def info(self, content: Mapping[str, object]) -> None:
            vars(self)["_info"] = _Spied(content, seen["info"])

        @property  # type: ignore[override]
        def arrays(self) -> _Spied:
            return vars(self)["_arrays"]

        @arrays.setter
        def arrays(self, content: Mapping[str, object]) -> None:
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


CHECKS = (
    is_an_ase_calculator,
    parameters_can_be_written,
    serves_what_it_says,
    free_energy_is_the_energy,
    types_and_shapes,
    results_are_new,
    stress_has_unit_and_sign,
    results_are_known_to_ase,
    energies_sum_to_the_energy,
    forces_sum_to_zero,
    no_stress_without_a_volume,
    has_a_name_and_no_label,
    same_structure_is_not_computed_again,
    watches_what_it_reads,
)
