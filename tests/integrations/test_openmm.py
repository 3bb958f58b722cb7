"""Some molecules by a calculator, the others by a classical force field of OpenMM."""

import sys

import numpy as np
import pytest
from ase import units
from ase.build import molecule

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.errors import ArgumentError
from helpers.page_blocks import Page

PAGE = Page("docs/how_to/openmm.md")
ETHANOL = list(range(9))
KJ = units.mol / units.kJ


def test_without_openmm(monkeypatch):
    monkeypatch.setitem(sys.modules, "openmm", None)
    monkeypatch.delitem(sys.modules, "ase_gffmerge.engines.openmm", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'openmm>=8\.5'"):
        __import__("ase_gffmerge.engines.openmm")


@pytest.fixture
def openmm():
    return pytest.importorskip("openmm")


@pytest.fixture
def calculator():
    return GFFMergeCalculator("rmd17-ethanol", dtype="float64", device="cpu")


class Box:
    """Ethanol of the page among water, and its classical systems.

    Parameters
    ----------
    n_waters
        On a grid.
    edge
        Of a periodic box, nm; none: an open system.
    """

    def __init__(self, n_waters: int, edge: float | None = None):
        from openmm import Vec3, app, unit

        code = next(code for kind, _, _, code in PAGE.blocks if kind == "runs")
        page: dict = {}
        exec(code[: code.index("box = app")], page)
        self.classical, self.edge = page["classical"], edge
        model = app.Modeller(page["topology"], page["ethanol"].positions * unit.angstrom)
        water = molecule("H2O")
        for k in range(n_waters):
            topology = app.Topology()
            residue = topology.addResidue("HOH", topology.addChain())
            oxygen, *hydrogens = [
                topology.addAtom(name, app.Element.getBySymbol(name[0]), residue)
                for name in ("O", "H1", "H2")
            ]
            for hydrogen in hydrogens:
                topology.addBond(oxygen, hydrogen)
            place = 3.5 * np.array([k % 3 + 1, k // 3 % 3 - 1, k // 9 + 1])
            model.add(topology, (water.positions + place) * unit.angstrom)
        self.topology = model.topology
        if edge:
            model.topology.setPeriodicBoxVectors(edge * np.eye(3) * unit.nanometer)
        self.positions = np.array([Vec3(*p) for p in model.positions.value_in_unit(unit.nanometer)])

    def system(self, topology=None, **options):
        from openmm import app, unit

        if self.edge:
            options |= {"nonbondedMethod": app.PME, "nonbondedCutoff": 0.45 * self.edge * unit.nanometer}
        return self.classical.createSystem(topology or self.topology, removeCMMotion=False, **options)


def context(system, positions, timestep=0.0005):
    import openmm

    made = openmm.Context(
        system, openmm.VerletIntegrator(timestep), openmm.Platform.getPlatformByName("Reference")
    )
    made.setPositions(positions)
    return made


def evaluated(made) -> tuple[float, np.ndarray]:
    """Energy (kJ/mol) and forces (kJ/mol/nm)."""
    from openmm import unit

    state = made.getState(energy=True, forces=True)
    return state.getPotentialEnergy()._value, state.getForces(asNumpy=True).value_in_unit(
        unit.kilojoule_per_mole / unit.nanometer
    )


def with_all_kinds_of_terms(system):
    """Angles and torsions within ethanol, whose values at these positions are not zero, and a second nonbonded force."""
    import openmm

    angle, torsion, ryckaert = (
        openmm.HarmonicAngleForce(),
        openmm.PeriodicTorsionForce(),
        openmm.RBTorsionForce(),
    )
    angle.addAngle(0, 1, 2, 1.5, 400)
    torsion.addTorsion(0, 1, 2, 3, 3, 0.3, 5)
    ryckaert.addTorsion(0, 1, 2, 3, 1, 2, 3, 4, 5, 6)
    custom = openmm.CustomNonbondedForce("0.01/r")
    for _ in range(system.getNumParticles()):
        custom.addParticle([])
    custom.addExclusion(0, 1)
    for force in (angle, torsion, ryckaert, custom):
        system.addForce(force)
    return system


def test_the_energy_is_a_sum(openmm, calculator):
    from ase_gffmerge.engines.openmm import create_mixed_system

    box = Box(9)
    system = with_all_kinds_of_terms(box.system())
    mixed = create_mixed_system(box.topology, system, ETHANOL, calculator)
    alone_topology = Box(0).topology
    alone = with_all_kinds_of_terms(box.system(alone_topology))
    whole, within = (evaluated(context(s, box.positions[: s.getNumParticles()])) for s in (system, alone))
    atoms = molecule("CH3CH2OH")
    atoms.calc = calculator.spawn()
    energy, forces = evaluated(context(mixed, box.positions))
    assert abs(within[0]) > 10
    assert energy == pytest.approx(whole[0] - within[0] + atoms.get_potential_energy() * KJ, abs=1e-6)
    expected = whole[1].copy()
    expected[:9] += atoms.get_forces() * KJ * 10 - within[1]
    np.testing.assert_allclose(forces, expected, atol=1e-7)
    assert calculator.extras["n_edges"] == 72, "it is used itself"
    unchanged = evaluated(context(system, box.positions))
    assert unchanged[0] == whole[0]


@pytest.fixture
def periodic(openmm, calculator):
    """A box, and ethanol in it by the calculator."""
    from ase_gffmerge.engines.openmm import create_mixed_system

    box = Box(18, edge=1.9)
    system = box.system(constraints=openmm.app.HBonds, rigidWater=True)
    return box, create_mixed_system(box.topology, system, ETHANOL, calculator)


def test_forces_are_derivatives_and_the_boundary_leaves_no_trace(periodic):
    box, mixed = periodic
    made = context(mixed, box.positions)
    energy, forces = evaluated(made)
    for atom, axis in ((0, 0), (3, 2), (9, 1)):
        pair = []
        for step in (1e-5, -1e-5):
            moved = box.positions.copy()
            moved[atom, axis] += step
            made.setPositions(moved)
            pair.append(evaluated(made)[0])
        assert forces[atom, axis] == pytest.approx(-(pair[0] - pair[1]) / 2e-5, abs=1e-2, rel=1e-4)
    wrapped = (box.positions + np.array([0.02, 0.9, 0.1])) % box.edge
    assert np.ptp(wrapped[:9], axis=0).max() > 1, "cut by the boundary"
    made.setPositions(wrapped)
    again, turned = evaluated(made)
    assert again == pytest.approx(energy, abs=0.05)  # particle-mesh Ewald sees the place
    np.testing.assert_allclose(turned[:9], forces[:9], atol=5)


def test_energy_is_conserved(openmm, periodic):
    box, mixed = periodic
    assert mixed.getNumConstraints() == 3 * 18, "of water alone"
    made = context(mixed, box.positions, timestep=0.00025)
    made.setVelocitiesToTemperature(200, 1)
    totals = []
    for _ in range(10):
        made.getIntegrator().step(10)
        state = made.getState(energy=True)
        totals.append((state.getPotentialEnergy() + state.getKineticEnergy())._value)
    assert np.ptp(totals) < 1.0, "kJ/mol, of some 100 in kinetic energy"
    assert state.getKineticEnergy()._value > 50


def test_a_system_survives_its_file(openmm, periodic):
    box, mixed = periodic
    written = openmm.XmlSerializer.serialize(mixed)
    there, back = (
        evaluated(context(s, box.positions)) for s in (mixed, openmm.XmlSerializer.deserialize(written))
    )
    assert back[0] == pytest.approx(there[0], abs=1e-6)


def test_what_is_refused(openmm, calculator):
    from ase_gffmerge.engines.openmm import create_mixed_system

    box = Box(1)

    def mixed(atoms, add=None):
        system = box.system()
        if add:
            system.addForce(add)
        return create_mixed_system(box.topology, system, atoms, calculator)

    for atoms in ([], [0, 0], [400]):
        with pytest.raises(ArgumentError, match="give every atom of a molecule once"):
            mixed(atoms)
    with pytest.raises(ArgumentError, match="choose whole molecules"):
        mixed([0, 1])
    bias = openmm.CustomBondForce("r")
    with pytest.raises(ArgumentError, match="CustomBondForce, in which"):
        mixed(ETHANOL, add=bias)
    two = create_mixed_system(box.topology, mixed(ETHANOL), [9, 10, 11], calculator)
    assert [type(force).__name__ for force in two.getForces()].count("PythonForce") == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_runs(openmm, tmp_path, merge_cache):
    PAGE.run(tmp_path, merge_cache)
