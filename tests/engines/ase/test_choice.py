"""Which specialist structures say they belong to: heard alike wherever a structure is evaluated."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from typer.testing import CliRunner

from ase_gffmerge import ForceField, GFFMergeCalculator, run_replicas
from ase_gffmerge.cli import app
from ase_gffmerge.errors import MergeWarning, StructureError
from ase_gffmerge.evaluation.comparison.inputs import read_labelled
from ase_gffmerge.evaluation.md.runs import Contestant, Protocol, run_models
from ase_gffmerge.inference.errors import evaluate
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.training.loss import labelled_graphs
from ase_gffmerge.workflows.merge import merge
from helpers.structures import cluster
from helpers.toys import random_force_field

NAMES = np.array(["ethanol", "methanol"] * 3)
STATEMENTS = {
    "array of names": ("arrays", NAMES),
    "array of numbers": ("arrays", np.array([0, 1] * 3)),
    "name": ("info", "methanol"),
    "number": ("info", 1),
}
SHORT = {"ensemble": "nve", "temperature": 10.0, "timestep": 0.2, "steps": 2, "every": 1}


def saying(where: str, what: object) -> Atoms:
    atoms = cluster()
    getattr(atoms, where)["specialist"] = what
    return atoms


def labelled(atoms: Atoms) -> Atoms:
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.zeros((len(atoms), 3)))
    return atoms


def energy(force_field: ForceField, atoms: Atoms, **choice: object) -> float:
    atoms = atoms.copy()
    atoms.calc = GFFMergeCalculator(force_field, dtype="float64", device="cpu", **choice)
    return atoms.get_potential_energy()


def command(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="gffmerge")
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout + done.stderr


@pytest.fixture(params=STATEMENTS)
def atoms(request) -> Atoms:
    return saying(*STATEMENTS[request.param])


def test_a_statement_is_heard_everywhere(conditioned, atoms):
    said, names = energy(conditioned, atoms), conditioned.specialist_names
    assert abs(said - energy(conditioned, cluster(), specialist=0)) > 1e-4, "not what is there by default"
    assert predict_frames(conditioned.potential, [atoms], names=names).energies == pytest.approx([said])
    (run,) = run_replicas(conditioned.potential, [atoms], names=names, specialist=0, **SHORT)
    assert run.potential_energies[0] == pytest.approx(said)
    assert energy(conditioned, run.frames[-1]) == pytest.approx(run.potential_energies[-1])


def test_a_force_field_with_one_surface_does_not_listen(atoms):
    toy = random_force_field("painn")
    said = energy(toy, cluster())
    assert predict_frames(toy.potential, [atoms]).energies == pytest.approx([said])
    assert run_replicas(toy.potential, [atoms], **SHORT)[0].potential_energies[0] == pytest.approx(said)
    (graph,) = labelled_graphs([labelled(atoms)], toy.potential)
    assert graph.specialist.tolist() == [0] * len(atoms)


def test_names_survive_a_file(conditioned, tmp_path):
    atoms = saying("arrays", NAMES)
    write(tmp_path / "named.xyz", atoms, format="extxyz")
    back = read(tmp_path / "named.xyz")
    assert back.arrays["specialist"].dtype.kind == "O"
    assert energy(conditioned, back) == pytest.approx(energy(conditioned, atoms), abs=1e-6)


def test_objects_that_are_no_names_are_refused(conditioned):
    mixed = saying("arrays", np.array(["ethanol", 1, "ethanol", 1, 1, 1], dtype=object))
    with pytest.raises(StructureError, match="holds object values; give names or whole numbers"):
        conditioned.prepared(mixed)


@pytest.mark.parametrize(
    "use", [predict_frames, lambda p, frames, **o: run_replicas(p, frames, **SHORT, **o)]
)
@pytest.mark.parametrize(
    ("where", "what", "message"),
    [
        ("info", "methanol", "names a bare potential does not keep.*names=force_field.specialist_names"),
        ("arrays", NAMES, "names=force_field.specialist_names"),
        ("arrays", np.full(6, 5), "no specialist number 5"),
        ("info", 2, "no specialist number 2"),
        ("info", None, "nothing says which one CH4O belongs to"),
    ],
)
def test_what_cannot_be_heard_is_refused(conditioned, use, where, what, message):
    with pytest.raises(StructureError, match=message):
        use(conditioned.potential, [saying(where, what)])


def test_one_choice_for_each_replica(conditioned):
    own = [energy(conditioned, cluster(), specialist=name) for name in conditioned.specialist_names]
    for choice in ([0, 1], ["ethanol", "methanol"]):
        runs = run_replicas(
            conditioned.potential,
            [cluster()] * 2,
            specialist=choice,
            names=conditioned.specialist_names,
            **SHORT,
        )
        assert [run.potential_energies[0] for run in runs] == pytest.approx(own)


def test_compared_models_hear_the_structures(conditioned, tmp_path):
    atoms = saying("info", "methanol")
    protocol = Protocol(temperature=10, picoseconds=0.04, timestep=0.2, seeds=1)

    def runs(start: Atoms, specialist: str | None = None) -> np.ndarray:
        model = Contestant(label="m", force_field=conditioned, specialist=specialist)
        found = run_models([model], [start], protocol, folder=tmp_path)["m"]
        return np.concatenate([found[ensemble][0].positions.ravel() for ensemble in ("nvt", "nve")])

    said, told = runs(atoms, "ethanol"), runs(cluster(), "methanol")
    assert said == pytest.approx(told, abs=1e-12)
    assert not np.allclose(runs(cluster(), "ethanol"), said, atol=1e-12, rtol=0)


def test_evaluate_in_the_shell(conditioned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    conditioned.save("both.safetensors")
    random_force_field("painn").save("toy.safetensors")
    write("named.xyz", labelled(saying("arrays", NAMES)), format="extxyz")
    write("wrong.xyz", labelled(saying("arrays", np.full(6, 5))), format="extxyz")
    write("plain.xyz", labelled(cluster()), format="extxyz")
    for frames in ("named.xyz", "wrong.xyz", "plain.xyz"):
        assert command("evaluate", "toy.safetensors", frames)[0] == 0
    assert command("evaluate", "both.safetensors", "toy.safetensors", "named.xyz")[0] == 0
    code, said = command("evaluate", "both.safetensors", "wrong.xyz", "--specialist", "ethanol")
    assert (code, said.count("\n")) == (2, 1)
    assert "no specialist number 5" in said
    code, said = command("evaluate", "both.safetensors", "plain.xyz", "--md", "--md-out", "md")
    assert (code, said.count("\n")) == (2, 1)
    assert "nothing says which one" in said
    assert not Path("md").exists()


def test_errors_by_name(conditioned):
    frames, names = [labelled(saying("info", "methanol"))], conditioned.specialist_names
    silent = [labelled(cluster())]
    assert evaluate(conditioned.potential, frames, specialist=0, names=names) == evaluate(
        conditioned.potential, silent, specialist=1
    )


def test_frames_that_are_given_for_a_specialist_are_its_own(relatives, tmp_path):
    """Also when they say something else, or come from a file that does."""
    strange = [
        replace(s, calibration=tuple(saying("info", "ice") for _ in s.calibration[:2])) for s in relatives
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)
        merged, _ = merge(strange, {"preset": "mean", "conditioning": "per-specialist"}, device="cpu")
    assert all("specialist" not in atoms.info for s in (*strange, merged) for atoms in s.calibration)
    write(tmp_path / "named.xyz", labelled(saying("arrays", NAMES)), format="extxyz")
    (known,) = read_labelled([tmp_path / "named.xyz"], ["ethanol"], option="--test")
    assert "specialist" not in known.frames[0].arrays
    assert known.frames[0].get_potential_energy() == -1.0
