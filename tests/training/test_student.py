"""Students of other sizes and architectures."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ase_gffmerge import ForceField, distill
from ase_gffmerge.cli import app
from ase_gffmerge.errors import FramesError, IncompatibleSpecialistsError
from ase_gffmerge.graphs import build_graph, predict
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.merging.recipe import DistillOptions
from ase_gffmerge.training.student import make_student
from ase_gffmerge.training.teachers import prepare_teachers
from helpers.toys import SMALL, rattled, toy

pytestmark = pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.MergeWarning")

QUICK = DistillOptions(epochs=3, copies=0, batch_size=4, learning_rate=3e-3, feature_weight=0)


def specialist(architecture: str = "painn", formula: str = "CH3CH2OH", **hyper) -> ForceField:
    made = toy(architecture, {**SMALL[architecture], **hyper}, name=f"{architecture}-{formula}")
    return made.with_calibration(rattled(formula, 10))


def mismatch(student: ForceField, teacher: ForceField) -> float:
    a, b = (
        np.concatenate(predict_frames(f.potential, teacher.calibration).forces) for f in (student, teacher)
    )
    return float(np.square(a - b).mean() / np.square(b).mean())


def test_a_smaller_student_is_the_teacher_compressed_and_learns_from_it():
    teacher = specialist()
    student = make_student(teacher, [teacher], architecture="painn", channels=4, blocks=2)
    assert student.potential.hyper.channels == 4
    assert len(student.calibration) == len(teacher.calibration)
    taught, history = distill(student, [teacher], QUICK, device="cpu")
    assert mismatch(taught, teacher) <= mismatch(student, teacher)
    assert taught.name == student.name == "painn-CH3CH2OH-painn-4x2"
    assert taught.merged is not None
    assert taught.merged.fingerprints == (teacher.fingerprint,)
    assert taught.extrapolation_grade is not None
    assert history.rows


def test_a_student_of_another_architecture_and_cutoff_is_shown_what_its_teacher_sees():
    teacher = specialist("nequip")
    teacher.potential.references += torch.tensor([-13.0, -1030.0, -2040.0], dtype=torch.float64)
    student = make_student(teacher, [teacher], architecture="painn", channels=8, blocks=1, seed=3)
    hyper = replace(student.potential.hyper, cutoff=3.0)
    short = type(student.potential)(hyper, student.potential.species).double()
    short.references.copy_(student.potential.references)
    teachers = prepare_teachers(short, [teacher], QUICK, frames=[()], weights=[1.0])
    atoms = teachers.distillation_sets[0].training[0]
    expected = predict(teacher.potential, build_graph(atoms, teacher.cutoff))
    graph = teachers.training[0][0]
    np.testing.assert_allclose(graph.forces, expected.forces, atol=1e-12)
    assert graph.n_edges == build_graph(atoms, 3.0).n_edges < build_graph(atoms, teacher.cutoff).n_edges
    taught, _ = distill(student, [teacher], QUICK.model_copy(update={"epochs": 8}), device="cpu")
    assert mismatch(taught, teacher) < mismatch(student, teacher)
    assert abs(float(graph.energy)) < 5 * len(atoms)


def test_features_of_another_size_are_matched_through_a_layer_that_is_not_kept():
    teacher = specialist()
    student = make_student(teacher, [teacher], architecture="painn", channels=4, blocks=2)
    options = QUICK.model_copy(update={"epochs": 1, "feature_weight": 1.0})
    taught, _ = distill(student, [teacher], options, device="cpu")
    plain, _ = distill(student, [teacher], QUICK.model_copy(update={"epochs": 1}), device="cpu")
    assert set(taught.potential.state_dict()) == set(student.potential.state_dict())
    assert taught.fingerprint != plain.fingerprint


def test_teachers_of_several_architectures_have_no_mean():
    teachers = [specialist(), specialist("nequip", "CH3CHO")]
    student = make_student(teachers[0], teachers, architecture="escaip", channels=8, blocks=1)
    taught, _ = distill(student, teachers, QUICK.model_copy(update={"epochs": 1}), device="cpu")
    rows = taught.merged.report["disagreements"]
    assert {row["model"] for row in rows} == {"merged", *(t.name for t in teachers)}
    with pytest.raises(IncompatibleSpecialistsError, match="differ in size"):
        distill(student, teachers, QUICK.model_copy(update={"feature_weight": 1.0}))
    bare = [teachers[0].with_calibration(())]
    with pytest.raises(FramesError, match="no frames to learn on"):
        make_student(bare[0], bare, architecture="painn", channels=4, blocks=2)


def test_energies_far_from_the_teachers_table_are_fitted():
    teacher = specialist()
    teacher.potential.references.zero_()
    with torch.no_grad():
        teacher.potential.readout.out.bias += 50.0
    student = make_student(teacher, [teacher], architecture="nequip", channels=4, blocks=2)
    energies = predict_frames(student.potential, teacher.calibration).energies
    expected = predict_frames(teacher.potential, teacher.calibration).energies
    assert np.abs(energies - expected).max() < 5 * 9


def test_the_command(tmp_path):
    teacher = specialist()
    teacher.save(tmp_path / "teacher.safetensors")
    (tmp_path / "quick.yaml").write_text("refine: {epochs: 1, copies: 0, feature_weight: 0}\n")
    out = tmp_path / "student.safetensors"
    call = [
        "distill",
        str(tmp_path / "teacher.safetensors"),
        "--student",
        "painn",
        "--channels",
        "4",
        "--blocks",
        "2",
    ]
    result = CliRunner().invoke(
        app, [*call, "--recipe", str(tmp_path / "quick.yaml"), "--out", str(out), "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["specialists"] == [teacher.name]
    assert ForceField.load(out).potential.hyper.channels == 4
