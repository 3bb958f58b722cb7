"""Students of other sizes and architectures."""

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ase_gffmerge import ForceField, distill
from ase_gffmerge.cli import app
from ase_gffmerge.cli.info import describe, readable
from ase_gffmerge.errors import FramesError, IncompatibleSpecialistsError
from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.graphs.derivatives import hessian, hessian_products
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.merging.recipe import DistillOptions
from ase_gffmerge.merging.report import MergeReport
from ase_gffmerge.merging.report_plot import report_html
from ase_gffmerge.storage.tensor_file import read_file
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.loss import PROJECTION, add_projection, distillation_loss, with_features
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
    summary = MergeReport.from_dict(taught.merged.report).summary()
    assert summary.startswith("student of painn-CH3CH2OH: ")
    assert "painn-CH3CH2OH: student differs by" in summary
    assert "merge" not in summary
    assert "<h1>Student of painn-CH3CH2OH</h1>" in report_html(taught)
    rows = readable({"path": "", **describe(taught)})
    assert (rows["kind"], rows["taught by"]) == ("student", teacher.name)
    assert "recipe" not in rows


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


STRATEGIES = [
    ("nodes", "painn", "painn"),
    ("vectors", "painn", "painn"),
    ("vectors", "nequip", "painn"),
    ("edges", "escaip", "escaip"),
    ("edges-to-nodes", "escaip", "painn"),
    ("edges-to-nodes", "m3gnet", "nequip"),
]


def losses_of(
    teacher: ForceField, student: ForceField, options: DistillOptions
) -> tuple[list[float], set[str]]:
    """Six losses of Adam by features or Hessians alone, and the parameters that have a gradient."""
    network = deepcopy(student.potential).requires_grad_(True)
    teachers = prepare_teachers(network, [teacher], options, frames=[()], weights=[1.0])
    (graphs,) = teachers.training
    if options.feature_weight:
        add_projection(network, graphs, options.feature_match, alike=False)
    nothing = TrainConfig(energy_weight=0.0, force_weight=0.0, stress_weight=0.0)
    loss, batch = distillation_loss(nothing, options), batch_graphs(graphs[:3])
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses: list[float] = []
    for _ in range(6):
        optimizer.zero_grad()
        value = loss(network, batch, batch)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    moved = {
        name for name, p in network.named_parameters() if p.grad is not None and bool((p.grad != 0).any())
    }
    return losses, moved


def other_student(architecture: str) -> ForceField:
    return toy(
        architecture, {**SMALL[architecture], "channels": 4 if architecture == "escaip" else 6}, seed=5
    )


@pytest.mark.parametrize(("match", "teacher", "student"), STRATEGIES)
def test_every_kind_of_features_can_be_learned(match, teacher, student):
    options = QUICK.model_copy(update={"feature_weight": 1.0, "feature_match": match})
    losses, moved = losses_of(specialist(teacher), other_student(student), options)
    assert losses[-1] < 0.95 * losses[0]
    assert any(name.startswith("stages.0.") for name in moved)
    assert any(name.startswith(PROJECTION) for name in moved)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(("match", "teacher", "student"), STRATEGIES)
def test_no_layer_of_a_strategy_is_kept(match, teacher, student, tmp_path):
    given, other = specialist(teacher), other_student(student)
    options = QUICK.model_copy(update={"epochs": 1, "feature_weight": 1.0, "feature_match": match})
    taught, _ = distill(other, [given], options, device="cpu")
    assert set(taught.potential.state_dict()) == set(other.potential.state_dict())
    _, tensors = read_file(taught.save(tmp_path / "taught.safetensors"))
    assert not [name for name in tensors if PROJECTION in name]


@pytest.mark.parametrize("architecture", ["painn", "nequip"])
def test_vectors_of_atoms_turn_with_the_structure(architecture):
    potential = toy(architecture).potential
    atoms = rattled("CH3CH2OH", 1)[0]
    turned = atoms.copy()
    turned.rotate(70, (1, 2, 3))
    turn = torch.as_tensor(np.linalg.lstsq(atoms.positions, turned.positions, rcond=None)[0])
    one, other = (
        predict(with_features(potential, "vectors"), build_graph(a, 4.0)).readout_inputs[-1]
        for a in (atoms, turned)
    )
    assert float(one.abs().max()) > 1e-3
    torch.testing.assert_close(torch.einsum("nac,ab->nbc", one, turn), other, rtol=1e-9, atol=1e-10)


def test_products_of_hessians_are_those_of_the_matrix():
    potential = toy().potential
    graphs = [build_graph(atoms, 4.0) for atoms in (*rattled("CH3CH2OH", 1), *rattled("CH4", 1))]
    directions = torch.randn(14, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = hessian_products(potential, batch_graphs(graphs), directions)
    for graph, u, product in zip(graphs, directions.split([9, 5]), found.split([9, 5]), strict=True):
        expected = hessian(potential, graph) @ u.flatten().numpy()
        np.testing.assert_allclose(product.flatten(), expected, rtol=1e-9, atol=1e-10)


def test_rows_of_hessians_can_be_learned():
    losses, moved = losses_of(
        specialist(), other_student("painn"), QUICK.model_copy(update={"hessian_weight": 1.0})
    )
    assert losses[-1] < 0.95 * losses[0]
    assert any(name.startswith("stages.0.") for name in moved)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_student_that_learned_rows_of_hessians_has_better_ones():
    teacher = specialist()
    student = make_student(teacher, [teacher], architecture="painn", channels=4, blocks=2)
    directions = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def error(weight: float) -> float:
        options = QUICK.model_copy(update={"epochs": 6, "hessian_weight": weight})
        made = distill(student, [teacher], options, device="cpu")[0]
        graphs = [build_graph(atoms, 4.0) for atoms in teacher.calibration[:4]]
        pairs = [[hessian_products(f.potential, g, directions) for f in (made, teacher)] for g in graphs]
        return float(sum((a - b).abs().mean() for a, b in pairs))

    assert error(3.0) < 0.9 * error(0.0)


def test_features_that_do_not_exist_are_refused():
    painn, escaip = specialist(), specialist("escaip")
    options = QUICK.model_copy(update={"feature_weight": 1.0, "feature_match": "vectors"})
    with pytest.raises(IncompatibleSpecialistsError, match="escaip network has no features of vectors"):
        distill(painn, [escaip], options, device="cpu")
    edges = options.model_copy(update={"feature_match": "edges"})
    with pytest.raises(IncompatibleSpecialistsError, match="painn network has no features of edges"):
        distill(painn, [escaip], edges, device="cpu")
    short = toy("escaip", {**SMALL["escaip"], "cutoff": 3.0})
    with pytest.raises(IncompatibleSpecialistsError, match="as their cutoffs do"):
        distill(short, [escaip], edges, device="cpu")


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
