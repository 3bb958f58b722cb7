"""Labels: the right value or one clear line, whatever program wrote the file."""

from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import ExternalForce, FixSymmetry, Hookean
from ase.io.trajectory import Trajectory

from ase_gffmerge.data.labels import (
    energy_label,
    force_labels,
    frame_weight,
    is_isolated_atom,
    isolated_atom_energies,
    require_labels,
    stress_label,
)
from ase_gffmerge.data.plausibility import ATOMS, implausible_units, least_curvature, work_factors
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.errors import FramesError, LabelWarning
from ase_gffmerge.inference.errors import labels
from ase_gffmerge.models import build_potential
from ase_gffmerge.training.initialization import fit_references
from ase_gffmerge.training.loss import labelled_graph, weigh


def methanol(seed: int = 0) -> Atoms:
    atoms = molecule("CH3OH")
    atoms.rattle(0.05, seed=seed)
    atoms.calc = EMT()
    return atoms


def copper(seed: int = 0, strain: float = 0.01) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    deformation = np.eye(3) + strain * np.random.default_rng(seed).standard_normal((3, 3))
    atoms.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
    atoms.rattle(0.03, seed=seed)
    atoms.calc = EMT()
    return atoms


def write_extxyz(path: Path, atoms: Atoms, **info: object) -> Path:
    """A frame with info of our own, and with forces under the key ``forces_key`` if that is given."""
    bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    key = info.pop("forces_key", None)
    if key is not None:
        bare.arrays[str(key)] = atoms.get_forces()
    bare.info |= info
    ase.io.write(path, bare, format="extxyz", append=True)
    return path


@pytest.mark.parametrize("name", ["run.traj", "run.db", "run.json"])
@pytest.mark.parametrize("constraint", ["hookean", "force", "symmetry"])
def test_the_bias_of_a_constraint_is_no_label(tmp_path: Path, name: str, constraint: str) -> None:
    atoms = copper() if constraint == "symmetry" else methanol()
    free = atoms.copy()
    free.calc = EMT()
    atoms.set_constraint(
        {
            "hookean": lambda: Hookean(0, 1, rt=1.0, k=10.0),
            "force": lambda: ExternalForce(0, 1, 0.5),
            "symmetry": lambda: FixSymmetry(bulk("Cu", cubic=True)),
        }[constraint]()
    )
    biased = atoms.get_stress() if constraint == "symmetry" else atoms.get_potential_energy()
    raw = free.get_stress() if constraint == "symmetry" else free.get_potential_energy()
    assert not np.allclose(biased, raw)
    atoms.get_forces()
    ase.io.write(tmp_path / name, atoms)
    (frame,) = read_frames(tmp_path / name)
    assert energy_label(frame) == pytest.approx(free.get_potential_energy())
    np.testing.assert_allclose(force_labels(frame), free.get_forces(), atol=1e-12)
    assert labels([frame]).energies[0] == pytest.approx(free.get_potential_energy())
    potential = build_potential("painn", {"channels": 4, "n_blocks": 1}, (1, 6, 8, 29)).double()
    graph = labelled_graph(frame, potential, np.zeros(4))
    assert float(graph.energy) == pytest.approx(free.get_potential_energy())
    if constraint == "symmetry":
        np.testing.assert_allclose(graph.stress[0], free.get_stress(voigt=False), atol=1e-12)


def test_an_energy_of_shape_1_is_a_number(tmp_path: Path) -> None:
    with Trajectory(tmp_path / "run.traj", "w") as trajectory:
        for energy in ([1.5], [[2.5]]):
            atoms = molecule("H2O")
            atoms.calc = SinglePointCalculator(atoms, energy=np.array(energy), forces=np.zeros((3, 3)))
            trajectory.write(atoms)
    frames = read_frames(tmp_path / "run.traj")
    assert [energy_label(atoms) for atoms in frames] == [1.5, 2.5]
    assert labels(frames).energies.shape == (2,)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"energy": np.zeros(3)}, r"frame 1: energy has shape \(3,\), but an energy is one number"),
        (
            {"energy": 0.0, "forces": np.zeros((2, 3))},
            r"frame 1: forces have shape \(2, 3\), expected \(3, 3\)",
        ),
        (
            {"energy": 0.0, "stress": np.zeros(5)},
            r"frame 1: stress has shape \(5,\), expected \(6,\), \(9,\) or",
        ),
        ({"energy": np.inf}, "frame 1: energy is not finite; remove this frame"),
    ],
)
def test_wrong_labels_are_refused_by_file_and_frame(tmp_path: Path, results: dict, message: str) -> None:
    with Trajectory(tmp_path / "run.traj", "w") as trajectory:
        for given in ({"energy": 0.0}, results):
            atoms = Atoms("OH2", np.eye(3), cell=[9, 9, 9], pbc=True)
            atoms.calc = SinglePointCalculator(atoms)
            atoms.calc.results = given
            trajectory.write(atoms)
    with pytest.raises(FramesError, match=f"run.traj, {message}"):
        read_frames(tmp_path / "run.traj")


@pytest.mark.parametrize(
    ("text", "value"), [("-1.0D+00", -1.0), ("-2.5d-1", -0.25), ("None", None), ("?", None)]
)
def test_energies_that_are_words(tmp_path: Path, text: str, value: float | None) -> None:
    path = tmp_path / "f.extxyz"
    path.write_text(
        f'1\nProperties=species:S:1:pos:R:3:forces:R:3 energy={text} pbc="F F F"\nCu 0 0 0 0 0 0.1\n'
    )
    if value is not None:
        assert energy_label(read_frames(path)[0]) == value
        return
    with pytest.raises(
        FramesError, match=r"f.extxyz, frame 0: energy is .*, which is no number; mend it or remove"
    ):
        read_frames(path)


@pytest.mark.parametrize("shape", [(9,), (3, 3)])
@pytest.mark.parametrize("key", ["virial", "virials"])
def test_virials_become_stresses_and_say_so(tmp_path: Path, key: str, shape: tuple[int, ...]) -> None:
    atoms = copper()
    virial = -atoms.get_stress(voigt=False) * atoms.get_volume()
    path = write_extxyz(tmp_path / "f.extxyz", atoms, **{key: virial.reshape(shape)})
    with pytest.warns(
        LabelWarning, match=f"f.extxyz: stresses are made of '{key}': stress = -virial / volume"
    ):
        frame = read_frames(path)[0]
    np.testing.assert_allclose(stress_label(frame), atoms.get_stress(voigt=False), atol=1e-7)


def test_a_molecule_has_no_stress_whatever_its_virial(tmp_path: Path) -> None:
    path = write_extxyz(tmp_path / "f.extxyz", methanol(), virial=np.eye(3), energy=1.0)
    assert stress_label(read_frames(path)[0]) is None


def test_stresses_of_nine_numbers(tmp_path: Path) -> None:
    atoms = copper()
    stress = atoms.get_stress(voigt=False)
    for value in (stress, stress.ravel(), atoms.get_stress()):
        path = write_extxyz(tmp_path / f"{value.shape}.extxyz", atoms, REF_stress=value)
        frame = read_frames(path, stress_key="REF_stress")[0]
        np.testing.assert_allclose(stress_label(frame), stress, atol=1e-7)


@pytest.mark.parametrize("program", ["REF_", "dft_", "DFT_", "ref_"])
def test_keys_of_other_programs(tmp_path: Path, program: str) -> None:
    atoms = methanol()
    energy = atoms.get_potential_energy()
    path = write_extxyz(
        tmp_path / "f.extxyz", atoms, forces_key=f"{program}forces", **{f"{program}energy": energy}
    )
    with pytest.raises(
        FramesError, match=rf"1 of 1 frames lack energy .* keys there are {program}energy.*'auto'"
    ):
        require_labels(read_frames(path), path)
    for keys in ((f"{program}energy", f"{program}forces"), ("auto", "auto")):
        frames = read_frames(path, energy_key=keys[0], forces_key=keys[1])
        require_labels(frames, path)
        assert energy_label(frames[0]) == pytest.approx(energy)
        np.testing.assert_allclose(force_labels(frames[0]), atoms.get_forces(), atol=1e-7)
    with pytest.raises(
        FramesError, match=rf"no frame has the key 'E' for energy; the keys there are {program}energy"
    ):
        read_frames(path, energy_key="E")


def test_a_free_energy_alone_is_an_energy_and_contradicts_none(tmp_path: Path) -> None:
    alone = write_extxyz(tmp_path / "alone.extxyz", methanol(), free_energy=-3.0, forces_key="forces")
    both = write_extxyz(
        tmp_path / "both.extxyz", methanol(), energy=-2.5, free_energy=-3.0, forces_key="forces"
    )
    for path, energy in ((alone, -3.0), (both, -2.5)):
        for key in (None, "auto"):
            frames = read_frames(path, energy_key=key)
            require_labels(frames, path)
            assert energy_label(frames[0]) == energy


def test_contradicting_keys_are_refused_unless_one_is_named(tmp_path: Path) -> None:
    path = write_extxyz(tmp_path / "f.extxyz", methanol(), energy=-2.0, REF_energy=-5.0, forces_key="forces")
    with pytest.raises(FramesError, match=r"frame 0: the keys energy, REF_energy contradict .* --energy-key"):
        require_labels(read_frames(path), path)
    with pytest.raises(FramesError, match="contradict each other"):
        read_frames(path, energy_key="auto")
    for key, energy in (("energy", -2.0), ("REF_energy", -5.0)):
        frames = read_frames(path, energy_key=key)
        require_labels(frames, path)
        assert energy_label(frames[0]) == energy
    same = write_extxyz(
        tmp_path / "same.extxyz", methanol(), energy=-2.0, REF_energy=-2.0, forces_key="forces"
    )
    require_labels(read_frames(same), same)


def test_frames_without_atoms_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.extxyz"
    path.write_text(
        '1\nProperties=species:S:1:pos:R:3 pbc="F F F"\nCu 0 0 0\n0\nProperties=species:S:1:pos:R:3\n'
    )
    with pytest.raises(FramesError, match=r"f.extxyz, frame 1 has no atoms; remove this frame"):
        read_frames(path)


def test_weights_count_or_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.extxyz"
    for weight in (0.5, 2):
        write_extxyz(path, methanol(), energy=1.0, config_weight=weight, forces_key="forces")
    frames = read_frames(path)
    assert [frame_weight(atoms) for atoms in frames] == [0.5, 2.0]
    potential = build_potential("painn", {"channels": 4, "n_blocks": 1}, (1, 6, 8)).double()
    graphs = [labelled_graph(atoms, potential, np.zeros(3)) for atoms in frames]
    assert [float(graph.weight) for graph in graphs] == [0.5, 2.0]
    (group,) = weigh([graphs])
    assert [float(graph.weight) for graph in group] == pytest.approx(
        [0.4, 1.6]
    )  # a mean of 1, and the same ratio
    write_extxyz(path, methanol(), config_weight=-1.0)
    with pytest.raises(
        FramesError, match=r"frame 2: config_weight is -1.0; give a number that is not negative"
    ):
        read_frames(path)


def test_isolated_atoms_give_reference_energies() -> None:
    def atom(symbol: str, energy: float, **options: object) -> Atoms:
        atoms = Atoms(symbol, **options)  # type: ignore[arg-type]
        atoms.calc = SinglePointCalculator(atoms, energy=energy)
        return atoms

    marked = atom("O", -15.0, cell=[5, 5, 5], pbc=True)
    assert not is_isolated_atom(marked)
    marked.info["config_type"] = "IsolatedAtom"
    alone = [atom("H", -1.0), atom("C", -8.0, cell=[12, 12, 12], pbc=True), marked]
    assert all(map(is_isolated_atom, alone))
    assert not is_isolated_atom(molecule("H2"))
    assert not is_isolated_atom(bulk("Cu"))
    known = isolated_atom_energies([*alone, molecule("H2")])
    assert known == {1: -1.0, 6: -8.0, 8: -15.0}
    with pytest.raises(FramesError, match=r"isolated H atoms have energies -1.0+ and -1.50+ eV"):
        isolated_atom_energies([*alone, atom("H", -1.5)])
    water = molecule("H2O")
    water.calc = SinglePointCalculator(water, energy=-20.0)
    assert fit_references([water], [1, 8], {1: -1.0, 6: -8.0}) == pytest.approx({1: -1.0, 8: -18.0})
    assert fit_references([water], [1, 8], known) == {1: -1.0, 8: -15.0}


def in_units(
    frames: list[Atoms], *, energy: float = 1.0, forces: float = 1.0, stress: float = 1.0
) -> list[Atoms]:
    for atoms in frames:
        results = {"energy": energy * atoms.get_potential_energy(), "forces": forces * atoms.get_forces()}
        if atoms.pbc.all():
            results["stress"] = stress * atoms.get_stress()
        atoms.calc = SinglePointCalculator(atoms, **results)
    return frames


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"energy": 1 / units.Hartree}, "as for energies in Hartree"),
        ({"energy": units.mol / units.kcal}, "as for energies in kcal/mol"),
        ({"energy": 1 / units.Hartree, "forces": units.Bohr / units.Hartree}, "forces in atomic units"),
        ({"forces": -1.0}, "as for gradients instead of forces"),
    ],
)
def test_units_that_do_not_fit_each_other(scales: dict, message: str) -> None:
    frames = in_units([methanol(k) for k in range(12)], **scales)
    with pytest.warns(
        LabelWarning, match=f"set: energies change by .* times the work of the forces, .*{message}"
    ):
        require_labels(frames, "set")


@pytest.mark.parametrize(
    ("scale", "message"), [(0.1 * units.GPa, "kbar"), (-0.1 * units.GPa, "VASP"), (units.GPa, "GPa")]
)
def test_units_of_stresses(scale: float, message: str) -> None:
    frames = []
    for k in range(10):
        atoms = bulk("Cu", a=3.5 + 0.02 * k)
        atoms.calc = EMT()
        frames.append(atoms)
    (said,) = implausible_units(in_units(frames, stress=1 / scale))
    assert f"stresses in {message}" in said or message in said
    assert "work of the stresses" in said


def test_right_units_and_noise_say_nothing() -> None:
    assert implausible_units(in_units([methanol(k) for k in range(12)])) == []
    crystals = in_units([copper(k) for k in range(12)])
    assert implausible_units(crystals) == []
    assert work_factors(crystals)[0] == pytest.approx(1, abs=0.3)
    rng = np.random.default_rng(0)
    for atoms in crystals:
        atoms.calc = SinglePointCalculator(atoms, energy=rng.normal(), forces=rng.normal(size=(4, 3)))
    assert work_factors(crystals) == (None, None)


UNRELATED = [
    "CH3OH",
    "H2O",
    "C2H6",
    "C2H2",
    "HCN",
    "N2",
    "CO2",
    "H2CO",
    "CH4",
    "C6H6",
    "CH3CN",
    "N2O",
    "C2H4",
    "CO",
]


def springs(scale: float, n: int = 2) -> list[Atoms]:
    """Molecules of different compositions whose bonds are springs of 30 eV/Å², and whose energies are of that scale."""
    rng, frames = np.random.default_rng(0), []
    for name in UNRELATED * n:
        atoms = molecule(name)
        distances = atoms.get_all_distances()
        pairs = np.argwhere(np.triu((distances > 0) & (distances < 1.6)))
        atoms.rattle(rng.choice([0.02, 0.05, 0.1]), rng=rng)
        energy, forces = -5.0 * len(atoms) + rng.normal(scale=0.05), np.zeros((len(atoms), 3))
        for i, j in pairs:
            bond = atoms.positions[j] - atoms.positions[i]
            stretch = np.linalg.norm(bond) - distances[i, j]
            energy += 15 * stretch**2
            forces[i] += (pull := 30 * stretch * bond / np.linalg.norm(bond))
            forces[j] -= pull
        atoms.positions += rng.uniform(
            5, 50, 3
        )  # too far from frames of the same atoms for the work of forces
        atoms.calc = SinglePointCalculator(atoms, energy=energy * scale, forces=forces)
        frames.append(atoms)
    return frames


@pytest.mark.parametrize("n", [1, 2, 8])
def test_unrelated_frames_in_hartree(n: int) -> None:
    """Compositions that occur once, twice or eight times: bonds that no molecule has tell the unit."""
    assert least_curvature(springs(1, n)) < 300
    assert implausible_units(springs(1, n)) == []
    (said,) = implausible_units(springs(1 / units.Hartree, n))
    assert "if energies are in Hartree, multiply them by 27.2114, if in Rydberg by 13.6057" in said
    assert least_curvature(springs(0.0, n)) is None
    assert least_curvature(springs(1, n)[:8]) is None


def test_total_energies_in_hartree_and_stresses_out_of_this_world() -> None:
    water = molecule("H2O")
    water.calc = SinglePointCalculator(water, energy=-76.4, forces=np.zeros((3, 3)))
    (said,) = implausible_units([water])
    assert said == "energies look like total energies in Hartree; multiply them by 27.2114"
    atoms = sum(ATOMS[z] for z in water.numbers)
    water.calc = SinglePointCalculator(water, energy=-0.976 * atoms, forces=np.zeros((3, 3)))
    assert implausible_units([water]) == []  # pseudopotentials in eV may come as near
    cell = bulk("Cu")
    cell.calc = SinglePointCalculator(cell, energy=0.0, forces=np.zeros((1, 3)), stress=np.full(6, 45.0))
    (said,) = implausible_units([cell])
    assert "if they are in kbar, multiply them by 0.0006242" in said
    cell.set_cell([30, 30, 30])
    cell.calc = SinglePointCalculator(cell, energy=0.0, forces=np.zeros((1, 3)), stress=np.full(6, 0.2))
    assert "0.2 eV/Å³" in implausible_units([cell])[0]  # a molecule in a box
