"""Frame files of every kind give labelled frames in eV and Å; damaged ones give one clear error."""

from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.trajectory import Trajectory
from hypothesis import given, settings
from hypothesis import strategies as st

from ase_gffmerge.data.frames import geometry_fingerprint, hash_frames
from ase_gffmerge.data.labels import require_labels
from ase_gffmerge.data.readers import iter_frames, read_frames
from ase_gffmerge.errors import FileFormatError, FramesError, LabelWarning

KCAL = units.kcal / units.mol
N = 4
Z = np.array([8, 1, 1], dtype=np.uint8)
CELL = np.array([[4.0, 0, 0], [1.0, 5.0, 0], [0, 0.5, 6.0]])


def arrays(n: int = N) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(n, 3, 3))
    return (
        rng.normal(size=(n, 3, 3)),
        rng.normal(size=n),
        rng.normal(size=(n, 3, 3)),
        w + w.transpose(0, 2, 1),
    )


R, E, F, W = arrays()
RMD17 = {"nuclear_charges": Z, "coords": R, "energies": E, "forces": F, "old_indices": np.arange(N)}
MD17 = {"z": Z, "R": R, "E": E[:, None], "F": F, "name": np.array(b"water"), "theory": np.array("none")}
LIPS = {"nuclear_charges": Z, "cell": CELL, "coords": R, "energies": E, "forces": F, "virials": W}


def write_npz(folder: Path, **content: np.ndarray) -> Path:
    path = folder / "frames.npz"
    np.savez(path, **content)
    return path


def write_deepmd(folder: Path, *, sets: int = 2, text: bool = False) -> Path:
    folder.mkdir()
    (folder / "type.raw").write_text("1\n0\n0\n")
    (folder / "type_map.raw").write_text("H\nO\n")
    content = {"coord": R, "box": np.array([CELL] * N), "energy": E[:, None], "force": F, "virial": W}
    for name, value in content.items():
        flat = value.reshape(N, -1)
        if text:
            np.savetxt(folder / f"{name}.raw", flat, fmt="%.17g")
            continue
        for i, part in enumerate(np.array_split(flat, sets)):
            (folder / f"set.{i:03d}").mkdir(exist_ok=True)
            np.save(folder / f"set.{i:03d}" / f"{name}.npy", part)
    return folder


def labelled(n: int = N) -> list[Atoms]:
    frames = []
    for i in range(n):
        atoms = Atoms("OH2", positions=R[i], cell=CELL, pbc=True)
        atoms.calc = SinglePointCalculator(
            atoms, energy=E[i], forces=F[i], stress=W[i][[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
        )
        frames.append(atoms)
    return frames


@pytest.mark.parametrize("content", [RMD17, MD17])
def test_molecules_in_kcal_per_mol(tmp_path: Path, content: dict) -> None:
    frames = read_frames(write_npz(tmp_path, **content))
    assert len(frames) == N
    for i, atoms in enumerate(frames):
        assert atoms.numbers.tolist() == [8, 1, 1]
        assert not atoms.pbc.any()
        np.testing.assert_array_equal(atoms.positions, R[i])
        assert atoms.get_potential_energy() == pytest.approx(E[i] * KCAL, rel=1e-14)
        np.testing.assert_allclose(atoms.get_forces(), F[i] * KCAL, rtol=1e-14)
        assert "stress" not in atoms.calc.results


def check_periodic(frames: list[Atoms]) -> None:
    volume = np.linalg.det(CELL)
    for i, atoms in enumerate(frames):
        assert atoms.pbc.all()
        np.testing.assert_allclose(atoms.cell.array, CELL)
        assert atoms.get_potential_energy() == pytest.approx(E[i])
        np.testing.assert_allclose(atoms.get_forces(), F[i])
        np.testing.assert_allclose(atoms.get_stress(voigt=False), -W[i] / volume)


def test_lips20_archive_in_ev_with_cell_and_stress(tmp_path: Path) -> None:
    frames = read_frames(write_npz(tmp_path, **LIPS))
    assert len(frames) == N
    check_periodic(frames)


def test_lips20_archive_in_single_precision_without_virials(tmp_path: Path) -> None:
    content = {
        k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in LIPS.items() if k != "virials"
    }
    atoms = read_frames(write_npz(tmp_path, **content))[0]
    assert atoms.positions.dtype == atoms.get_forces().dtype == np.float64
    assert atoms.pbc.all()
    assert "stress" not in atoms.calc.results


@pytest.mark.parametrize("kind", [{"sets": 1}, {"sets": 2}, {"text": True}])
def test_deepmd_folder(tmp_path: Path, kind: dict) -> None:
    frames = read_frames(write_deepmd(tmp_path / "system", **kind))
    assert len(frames) == N
    assert frames[0].get_chemical_symbols() == ["O", "H", "H"]
    check_periodic(frames)


def test_deepmd_folder_without_periodicity(tmp_path: Path) -> None:
    folder = write_deepmd(tmp_path / "system")
    (folder / "nopbc").touch()
    assert not read_frames(folder)[0].pbc.any()


def test_the_sign_of_the_virial_on_a_strained_crystal(tmp_path: Path) -> None:
    """A compressed crystal has W = -dE/de > 0 (finite differences) and so a negative stress, as from ASE."""
    atoms = bulk("Cu", "fcc", a=3.5, cubic=True)
    atoms.calc = EMT()
    energy = {}
    for strain in (-1e-4, 1e-4):
        strained = atoms.copy()
        strained.set_cell(atoms.cell.array * (1 + strain), scale_atoms=True)
        strained.calc = EMT()
        energy[strain] = strained.get_potential_energy()
    trace = -(energy[1e-4] - energy[-1e-4]) / 2e-4
    assert trace > 0
    content = {
        "nuclear_charges": atoms.numbers.astype(np.uint8),
        "cell": atoms.cell.array,
        "coords": atoms.positions[None],
        "energies": np.array([atoms.get_potential_energy()]),
        "forces": atoms.get_forces()[None],
        "virials": np.eye(3)[None] * trace / 3,
    }
    frame = read_frames(write_npz(tmp_path, **content))[0]
    np.testing.assert_allclose(frame.get_stress(), atoms.get_stress(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["frames.extxyz", "frames.traj", "strange@0:1.xyz"])
def test_files_of_ase(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".traj":
        with Trajectory(path, "w") as trajectory:
            for atoms in labelled():
                trajectory.write(atoms)
    else:
        ase.io.write(tmp_path / "plain.extxyz", labelled(), format="extxyz")
        (tmp_path / "plain.extxyz").rename(path)
    frames = read_frames(path)
    assert len(frames) == N
    assert frames[-1].pbc.all()
    np.testing.assert_allclose(frames[-1].get_forces(), F[-1], atol=1e-7)
    np.testing.assert_allclose(frames[-1].get_stress(voigt=False), W[-1], atol=1e-7)


def test_a_structure_without_labels(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "salt.cif", bulk("NaCl", "rocksalt", a=5.6))
    frames = read_frames(tmp_path / "salt.cif")
    assert frames[0].pbc.all()
    with pytest.raises(FramesError, match="1 of 1 frames lack energy"):
        require_labels(frames, "salt.cif")


@pytest.mark.parametrize(
    ("index", "expected"),
    [(":", [0, 1, 2, 3]), ("::2", [0, 2]), (-1, [3]), ("1", [1]), (slice(1, 3), [1, 2])],
)
@pytest.mark.parametrize("kind", ["npz", "extxyz"])
def test_index(tmp_path: Path, index: str | int | slice, expected: list[int], kind: str) -> None:
    path = write_npz(tmp_path, **LIPS)
    if kind == "extxyz":
        path = tmp_path / "frames.extxyz"
        ase.io.write(path, labelled())
    np.testing.assert_allclose(
        [a.get_potential_energy() for a in read_frames(path, index=index)], E[expected]
    )


@pytest.mark.parametrize("index", ["a", "7:9", 4, -5])
def test_impossible_index(tmp_path: Path, index: str | int) -> None:
    with pytest.raises(FramesError, match="index"):
        read_frames(write_npz(tmp_path, **RMD17), index=index)


def test_iter_frames_is_lazy(tmp_path: Path) -> None:
    assert next(iter_frames(write_npz(tmp_path, **MD17))).get_potential_energy() == pytest.approx(E[0] * KCAL)


def nan_at(array: np.ndarray, frame: int) -> np.ndarray:
    array = array.copy()
    array[frame] = np.nan
    return array


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"forces": None},
            FileFormatError,
            r"lacks forces \(it has: nuclear_charges, coords, energies, old_indices\)",
        ),
        ({"forces": F[:-1]}, FileFormatError, r"forces have shape \(3, 3, 3\), expected \(4, 3, 3\)"),
        ({"energies": E[:-1]}, FileFormatError, r"energies have shape \(3,\), expected \(4,\)"),
        (
            {"coords": R[:, :2]},
            FileFormatError,
            r"positions have shape \(4, 2, 3\), expected \('n_frames', 3, 3\)",
        ),
        ({"coords": R[0]}, FileFormatError, "positions have shape"),
        ({"energies": np.array(["a"] * N)}, FileFormatError, "energies have type <U1, expected numbers"),
        ({"nuclear_charges": Z.astype(float)}, FileFormatError, "expected integers"),
        ({"nuclear_charges": Z * 0}, FramesError, "outside the periodic table"),
        ({"forces": nan_at(F, 2)}, FramesError, r"forces of 1 of 4 frames \(first: frame 2\) are not finite"),
        ({"energies": nan_at(E, 1)}, FramesError, "energies of 1 of 4 frames"),
        ({"coords": R[:0], "energies": E[:0], "forces": F[:0]}, FramesError, "0 frames of 3 atoms"),
        ({"forces": np.array([None] * N)}, FileFormatError, "not a plain .npz archive"),
        ({"cell": CELL * 0}, FramesError, "the cell of frame 0 has no volume"),
    ],
)
def test_wrong_archives(tmp_path: Path, change: dict, error: type[Exception], message: str) -> None:
    path = write_npz(tmp_path, **{k: v for k, v in (RMD17 | change).items() if v is not None})
    with pytest.raises(error, match=message) as caught:
        read_frames(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("keep", [1, 100, 0.5, 0.99])
def test_truncated_archive(tmp_path: Path, keep: float) -> None:
    path = write_npz(tmp_path, **RMD17)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep >= 1 else keep * len(data))])
    with pytest.raises(FileFormatError, match="truncated, damaged"):
        read_frames(path)


def test_altered_archive(tmp_path: Path) -> None:
    path = write_npz(tmp_path, **RMD17)
    data = bytearray(path.read_bytes())
    data[data.index(F.tobytes()) + 5] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match="damaged"):
        read_frames(path)


def test_missing_empty_and_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(FramesError, match="does not exist"):
        read_frames(tmp_path / "none.npz")
    for name in ("empty.npz", "empty.xyz"):
        (tmp_path / name).touch()
        with pytest.raises(FramesError, match="is empty"):
            read_frames(tmp_path / name)
    (tmp_path / "frames.qqq").write_text("nothing known\n")
    with pytest.raises(FileFormatError, match=r"does not know the file type '\.qqq'"):
        read_frames(tmp_path / "frames.qqq")
    with pytest.raises(FileFormatError, match="is a folder without type"):
        read_frames(tmp_path)
    np.save(tmp_path / "array.npy", R)
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(FileFormatError, match="a single array"):
        read_frames(tmp_path / "array.npz")


def test_truncated_and_not_finite_extxyz(tmp_path: Path) -> None:
    path = tmp_path / "frames.extxyz"
    ase.io.write(path, labelled())
    text = path.read_text()
    path.write_text(text[: int(0.9 * len(text))])
    with pytest.raises(FileFormatError, match="cannot be read"):
        read_frames(path)
    frames = labelled()
    frames[1].calc.results["energy"] = float("nan")
    with Trajectory(tmp_path / "frames.traj", "w") as trajectory:
        for atoms in frames:
            trajectory.write(atoms)
    with pytest.raises(FramesError, match=r"frames.traj, frame 1: energy is not finite; remove this frame"):
        read_frames(tmp_path / "frames.traj")


def damage(folder: Path, what: str) -> None:
    if what == "map":
        (folder / "type_map.raw").unlink()
    elif what == "elements":
        (folder / "type_map.raw").write_text("A B")
    elif what == "box":
        (folder / "set.000" / "box.npy").unlink()
        (folder / "set.001" / "box.npy").unlink()
    elif what == "one":
        (folder / "set.001" / "force.npy").unlink()
    elif what == "coord":
        for file in folder.glob("set.*/coord.npy"):
            file.unlink()
    elif what == "mixed":
        np.save(folder / "set.000" / "real_atom_types.npy", Z)
    elif what == "cut":
        file = folder / "set.000" / "energy.npy"
        file.write_bytes(file.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("map", "lacks type_map.raw"),
        ("elements", "do not give elements"),
        ("box", "lacks box.npy; add it, or an empty file 'nopbc'"),
        ("one", "force.npy is missing, truncated or damaged"),
        ("coord", "lacks coordinates"),
        ("mixed", "mixed type"),
        ("cut", "energy.npy is missing, truncated or damaged"),
    ],
)
def test_wrong_deepmd_folders(tmp_path: Path, what: str, message: str) -> None:
    folder = write_deepmd(tmp_path / "system")
    damage(folder, what)
    with pytest.raises(FileFormatError, match=message):
        read_frames(folder)


def test_require_labels_says_which_frames_lack_what() -> None:
    frames = labelled() + [molecule("H2O") for _ in range(7)]
    with pytest.warns(LabelWarning, match="349 GPa"):  # drawn at random
        require_labels(frames[:N], "here", ("energy", "forces", "stress"))
    with pytest.raises(
        FramesError, match=r"here: 7 of 11 frames lack energy \(frames 4, 5, 6, 7, 8, \.\.\.\)"
    ):
        require_labels(frames, "here")
    with pytest.raises(FramesError, match="there are no frames"):
        require_labels([], "here")


def test_hash_frames_sees_geometry_and_order_but_not_labels() -> None:
    frames = labelled()
    reference = hash_frames(frames)
    assert reference == hash_frames([atoms.copy() for atoms in frames])
    assert len(reference) == 64
    assert len({reference, hash_frames(frames[::-1]), hash_frames(frames[:-1]), hash_frames([])}) == 4
    frames[0].positions[0, 0] = np.nextafter(frames[0].positions[0, 0], 9)
    assert hash_frames(frames) != reference


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), angle=st.floats(0, 360), periodic=st.booleans())
def test_fingerprint_forgives_rigid_motion_and_order(seed: int, angle: float, periodic: bool) -> None:
    rng = np.random.default_rng(seed)
    atoms = Atoms("C2H3O", positions=rng.uniform(0, 4, (6, 3)), cell=CELL * 2, pbc=periodic)
    moved = atoms[rng.permutation(6)]
    moved.translate(rng.normal(size=3))
    moved.rotate(angle, rng.normal(size=3) + 3, rotate_cell=True)
    assert geometry_fingerprint(moved) == geometry_fingerprint(atoms)
    moved.positions[0] += 0.05
    assert geometry_fingerprint(moved) != geometry_fingerprint(atoms)


def test_fingerprint_tells_elements_and_cells_apart() -> None:
    water = molecule("H2O")
    heavy = water.copy()
    heavy.symbols[0] = "S"
    crystals = [bulk("Cu", a=a) for a in (3.5, 3.6)]
    assert len({geometry_fingerprint(a) for a in (water, heavy, *crystals)}) == 4
    wrapped = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    other = wrapped.copy()
    other.positions[3] += other.cell[0]
    assert geometry_fingerprint(wrapped) == geometry_fingerprint(other)
