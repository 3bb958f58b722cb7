"""Distillation: the student comes closer to its teachers, never reads a label, resumes exactly, and stops in time."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.errors import (
    CheckpointWarning,
    FramesError,
    IncompatibleSpecialistsError,
    MergeWarning,
    RecipeError,
)
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import build_graph, predict
from ase_gffmerge.merging.recipe import DistillOptions, ReadoutOptions, Recipe, load_recipe
from ase_gffmerge.merging.report import MergeReport
from ase_gffmerge.models import build_potential
from ase_gffmerge.training.checkpoint import History, checkpoint_path, stale
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.distill import distill, parameter_groups
from ase_gffmerge.training.loss import LabeledGraph, labelled_graphs, relative_error_on, weigh
from ase_gffmerge.training.soap import SOAP, _eigenvectors
from ase_gffmerge.training.teachers import prepare_distillation_set, prepare_teachers
from ase_gffmerge.training.train import train_jointly
from ase_gffmerge.workflows.merge import close_enough, merge
from helpers.structures import OWN_ARCHITECTURES
from helpers.toys import SHALLOW, rattled, relative, toy

pytestmark = pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.MergeWarning")

TRAINING = {"epochs": 4, "batch_size": 4, "learning_rate": 1e-2, "force_weight": 10.0, "feature_weight": 0.0}
QUICK = DistillOptions(**TRAINING, copies=0, temperature=0.0)
MOLECULES = ("CH3OH", "HCOOH", "H2CO")


def relatives(
    architecture: str, names: tuple[str, ...] = MOLECULES[:2], size: float = 0.3
) -> list[ForceField]:
    """Specialists that are perturbed copies of one random base."""
    base = toy(architecture, SHALLOW[architecture], (13, 29) if names[0] == "Cu" else (1, 6, 8))
    made = []
    for k, name in enumerate(names):
        start = bulk(name, cubic=True) if name in ("Cu", "Al") else molecule(name)
        frames = rattled(start, 10, seed=k)
        made.append(relative(base, f"{name}-{k}", frames, seed=k + 1, size=size))
    return made


def mean_of(specialists: list[ForceField], **options: object) -> ForceField:
    return merge(specialists, load_recipe("mean", **options), device="cpu")[0]


def scores(history: History) -> list[float]:
    return [
        QUICK.force_weight * row["force_mae"] + row["energy_mae"] for row in (history.start, *history.rows)
    ]


def force_error(report: MergeReport) -> float:
    """Sum over the specialists of the merged model's force error: what distillation lowers."""
    return sum(row.force_mae for row in report.disagreements if row.model == "merged")


class Stop(Exception):
    """Stands for a kill."""


def stop_after(epoch: int) -> Callable[[int, dict[str, float]], None]:
    def callback(done: int, losses: dict[str, float]) -> None:
        if done == epoch:
            raise Stop

    return callback


@pytest.mark.parametrize("architecture", OWN_ARCHITECTURES)
@pytest.mark.parametrize("conditioning", ["shared", "per-specialist"])
def test_disagreement_falls_and_is_recorded(architecture: str, conditioning: str, tmp_path: Path) -> None:
    specialists = relatives(architecture, size=0.1)
    start = mean_of(specialists, conditioning=conditioning)
    before = start.fingerprint
    distilled, history = distill(start, specialists, QUICK, device="cpu")
    assert min(scores(history)[1:]) < 0.7 * scores(history)[0]
    assert start.fingerprint == before
    record = distilled.merged
    assert record is not None
    assert record.recipe["refine"] == QUICK.model_dump()
    old, new = (MergeReport.from_dict(m.merged.report) for m in (start, distilled))
    assert force_error(new) < 0.85 * force_error(old)
    assert (
        new.relative_disagreement < 1.1 * old.relative_disagreement
    )  # of the worst one, which no loss is asked to lower
    assert set(new.seconds) == {*old.seconds, "distillation"}
    assert distilled.provenance.epochs == 4
    assert distilled.provenance.n_train == 2 * 9 * 2
    loaded = ForceField.load(distilled.save(tmp_path / "a.safetensors"))
    assert loaded.fingerprint == distilled.fingerprint
    assert loaded.merged is not None
    assert json.dumps(vars(loaded.merged), sort_keys=True) == json.dumps(vars(record), sort_keys=True)


@pytest.mark.parametrize("architecture", OWN_ARCHITECTURES)
def test_features_are_matched_on_request(architecture: str) -> None:
    specialists = relatives(architecture)
    start = mean_of(specialists)

    def mismatch(model: ForceField) -> float:
        graphs = [build_graph(atoms, 4.0) for atoms in specialists[0].calibration]
        total = 0.0
        for graph in graphs:
            vectors = graph.positions[graph.edge_index[0]] - graph.positions[graph.edge_index[1]]
            pair = [torch.cat(m.potential.features(vectors, graph), -1) for m in (model, specialists[0])]
            total += float((pair[0] - pair[1]).abs().mean())
        return total

    without, with_features = (
        distill(start, specialists, QUICK.model_copy(update={"feature_weight": w}), device="cpu")[0]
        for w in (0.0, 30.0)
    )
    assert mismatch(with_features) < 0.8 * mismatch(without)


@pytest.mark.parametrize("architecture", OWN_ARCHITECTURES)
def test_copies_of_one_specialist_are_left_alone(architecture: str) -> None:
    first = relatives(architecture)[0]
    twins = [first, first]
    start = mean_of(twins, allow_identical=True)
    options = QUICK.model_copy(update={"epochs": 50, "patience": 2, "copies": 0})
    distilled, history = distill(start, twins, options, device="cpu")
    assert len(history.rows) == 2
    assert distilled.fingerprint == start.fingerprint


def test_labels_are_never_read() -> None:
    specialists = relatives("painn")
    extra = [rattled(name, 4, seed=9) for name in MOLECULES[:2]]

    def poisoned(frames: tuple[Atoms, ...]) -> list[Atoms]:
        copies = [atoms.copy() for atoms in frames]
        for atoms in copies:
            wrong = {
                "energy": np.nan,
                "forces": np.full((len(atoms), 3), np.nan),
                "stress": np.full(6, np.nan),
            }
            atoms.calc = SinglePointCalculator(atoms, **wrong)
        return copies

    start, options = mean_of(specialists), QUICK.model_copy(update={"epochs": 1})
    poisoned_specialists = [s.with_calibration(poisoned(s.calibration)) for s in specialists]
    clean = distill(start, specialists, options, frames=extra, device="cpu")[0]
    spoilt = distill(start, poisoned_specialists, options, frames=[poisoned(f) for f in extra], device="cpu")[
        0
    ]
    assert clean.fingerprint == spoilt.fingerprint


@pytest.mark.parametrize("stop", [1, 3])
def test_resumed_equals_uninterrupted(stop: int, tmp_path: Path) -> None:
    specialists = relatives("painn")
    start, checkpoint = mean_of(specialists), checkpoint_path(tmp_path / "a.safetensors")
    whole, history = distill(start, specialists, QUICK, device="cpu")
    with pytest.raises(Stop):
        distill(start, specialists, QUICK, checkpoint=checkpoint, device="cpu", callback=stop_after(stop))
    epochs: list[int] = []
    resumed, again = distill(
        start,
        specialists,
        QUICK,
        checkpoint=checkpoint,
        device="cpu",
        callback=lambda epoch, _: epochs.append(epoch),
    )
    assert epochs == list(range(stop + 1, 5))
    assert (again.start, again.rows) == (history.start, history.rows)
    for name, value in whole.potential.state_dict().items():
        assert torch.equal(value, resumed.potential.state_dict()[name]), name


def test_stresses_of_crystals_are_learnt() -> None:
    specialists = relatives("painn", ("Cu", "Al"))
    start = mean_of(specialists)
    options = QUICK.model_copy(update={"epochs": 8, "stress_weight": 100.0})
    distilled, _ = distill(start, specialists, options, device="cpu")

    def stress(model: ForceField) -> np.ndarray:
        graphs = [build_graph(atoms, 4.0) for atoms in specialists[0].calibration]
        return np.array([predict(model.potential, graph).stress(graph.cell).numpy() for graph in graphs])

    before, after = (np.abs(stress(model) - stress(specialists[0])).mean() for model in (start, distilled))
    assert after < 0.7 * before


def test_sampled_frames_join(monkeypatch: pytest.MonkeyPatch) -> None:
    first = relatives("painn")[0]
    n = len(prepare_distillation_set(first, QUICK).training)
    from ase_gffmerge.training import teachers

    class Result:
        frames = rattled("CH3OH", 5, seed=7)

    monkeypatch.setattr(teachers, "sample_frames", lambda *_: Result)
    distillation_set = prepare_distillation_set(first, QUICK.model_copy(update={"sampled": 5}))
    assert len(distillation_set.training) == n + 5 * 2
    held_out = {atoms.positions.tobytes() for atoms in distillation_set.held_out}
    assert len(held_out) == 1
    assert not held_out & {atoms.positions.tobytes() for atoms in distillation_set.training}


def test_every_frame_has_visited_copies_and_displaced_twins() -> None:
    first = relatives("painn")[0]
    distillation_set = prepare_distillation_set(
        first, QUICK.model_copy(update={"copies": 2, "temperature": 300.0})
    )
    assert len(distillation_set.training) == 9 * 3 * 2
    frames, copies, twins = (
        distillation_set.training[:9],
        distillation_set.training[9:27],
        distillation_set.training[27:],
    )
    for original, twin in zip((*frames, *copies), twins, strict=True):
        assert 0.01 < np.std(twin.positions - original.positions) < 0.06
    moved = [np.abs(copy.positions - frames[i // 2].positions).max() for i, copy in enumerate(copies)]
    assert min(moved) > 1e-3
    few = prepare_distillation_set(first, QUICK.model_copy(update={"copies": 5, "max_copied_edges": 60}))
    assert len(few.training) == 9 * 2 * 2


def test_few_frames_are_all_learned_from_and_others_judge() -> None:
    """A merge has solved on them all: one of them would find its start better than anything that is learned."""
    specialist = relatives("painn")[0]
    few = specialist.with_calibration(specialist.calibration[:3])
    options = QUICK.model_copy(update={"copies": 4, "interval": 20.0, "temperature": 500.0})
    chosen = prepare_distillation_set(few, options)
    seen = np.stack([atoms.positions for atoms in chosen.training])

    def nearest(atoms: Atoms) -> float:
        return float(np.abs(seen - atoms.positions).max(axis=(1, 2)).min())

    assert max(nearest(atoms) for atoms in few.calibration) < 1e-12
    assert chosen.held_out
    assert min(nearest(atoms) for atoms in chosen.held_out) > 1e-3


# -- refusals --


def test_refusals() -> None:
    specialists = relatives("painn", MOLECULES)
    start = mean_of(specialists[:2])
    with pytest.raises(IncompatibleSpecialistsError, match="in their order"):
        distill(start, specialists[1::-1], QUICK)
    with pytest.raises(IncompatibleSpecialistsError, match="frames were given for 1"):
        distill(start, specialists[:2], QUICK, frames=[[]])
    with pytest.raises(IncompatibleSpecialistsError, match="other elements"):
        distill(relatives("painn", ("Cu", "Al"))[0], specialists[:2], QUICK)
    with pytest.raises(FramesError, match="has no frames to distill from"):
        distill(start, [s.with_calibration(()) for s in specialists[:2]], QUICK)
    matching = QUICK.model_copy(update={"feature_weight": 1.0})
    with pytest.raises(IncompatibleSpecialistsError, match="feature_weight"):
        distill(specialists[0], [specialists[0], relatives("nequip")[1]], matching)
    with pytest.raises(RecipeError, match="did you mean 'epochs'"):
        load_recipe({"refine": {"epoch": 3}})


# -- refine: merge and distil at load time --


def test_refine_through_the_calculator_is_cached(tmp_path: Path) -> None:
    paths = [s.save(tmp_path / f"{s.name}.safetensors") for s in relatives("painn")]
    recipe = {"preset": "gffmerge", "refine": QUICK.model_dump()}
    fresh, cached = (
        GFFMergeCalculator(paths, recipe=recipe, cache_dir=tmp_path, device="cpu") for _ in range(2)
    )
    assert (fresh.cache_hit, cached.cache_hit) == (False, True)
    assert fresh.force_field.fingerprint == cached.force_field.fingerprint
    assert "distillation" in cached.report.seconds
    plain = GFFMergeCalculator(paths, recipe="fast", cache_dir=tmp_path, device="cpu")
    assert fresh.report.relative_disagreement < plain.report.relative_disagreement


@pytest.mark.parametrize("width", [0, 16])
def test_the_readout_stays_as_wide_as_the_recipe_says(width: int) -> None:
    options, readout = QUICK.model_copy(update={"epochs": 1}), ReadoutOptions(width=16, blocks=1, copies=1)
    seen: list[float] = []
    merged, report = merge(
        relatives("painn"),
        Recipe(readout=readout if width else None, refine=options),
        device="cpu",
        progress=lambda fraction, _: seen.append(fraction),
    )
    assert merged.potential.hyper.readout_width == width
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert merged.merged is not None
    assert report == MergeReport.from_dict(merged.merged.report)


@pytest.mark.parametrize(("rate", "kept"), [(2e-3, True), (1e-30, False)])
def test_a_distillation_that_gains_nothing_is_not_said_to_be_kept(rate: float, kept: bool) -> None:
    options = QUICK.model_copy(update={"threshold": 0.0, "epochs": 2, "learning_rate": rate})
    _, report = merge(relatives("painn"), Recipe(refine=options), device="cpu")
    assert report.trials[-1].name == "distillation"
    assert report.trials[-1].kept is kept


def test_what_is_close_enough_is_not_distilled() -> None:
    options = QUICK.model_copy(update={"threshold": 10.0})
    merged, report = merge(relatives("painn"), Recipe(refine=options), device="cpu")
    assert "distillation" not in report.seconds
    assert merged.merged is not None
    assert merged.merged.recipe["refine"]["threshold"] == 10.0
    assert report.held_out is not None
    assert options.threshold is not None
    assert report.held_out < options.threshold


def test_what_is_close_enough_depends_on_the_specialists_own_errors() -> None:
    specialists = relatives("painn")
    _, report = merge(specialists, "fast", device="cpu")
    (errors,) = [trial.disagreements for trial in report.trials if trial.kept][-1:]
    sizes = {row.specialist: row.force_rms for row in report.disagreements}

    def close(share: float, options: DistillOptions = QUICK) -> bool:
        known = [
            replace(s, provenance=replace(s.provenance, errors={"force_rmse": error * sizes[s.name] / share}))
            for s, error in zip(specialists, errors, strict=True)
        ]
        return close_enough(report, options, known)

    assert close(0.24)
    assert not close(0.26)
    alike = [replace(s, name="best") for s in specialists]  # files of one name in two folders
    _, of_alike = merge(alike, "fast", device="cpu")
    known = [
        replace(s, provenance=replace(s.provenance, errors={"force_rmse": error * size / 0.24}))
        for s, error, size in zip(alike, errors, sizes.values(), strict=True)
    ]
    assert of_alike.specialists == ("best", "best-2")
    assert close_enough(of_alike, QUICK, known)
    assert not close_enough(of_alike, QUICK, [known[0], specialists[1]])
    assert not close_enough(report, QUICK, specialists)  # no errors on record, and more than 0.3 % away
    assert close(0.26, QUICK.model_copy(update={"threshold": 1.01 * max(errors)}))
    assert not close(0.24, QUICK.model_copy(update={"threshold": 0.99 * max(errors)}))
    mean = replace(report, trials=(), held_out=0.0029)
    assert close_enough(mean, QUICK, specialists)
    assert not close_enough(replace(mean, held_out=None), QUICK, specialists)


def test_the_learning_rate_suits_how_near_the_start_is() -> None:
    specialists = relatives("painn", size=0.05)
    start = mean_of(specialists)

    def rate(error: float) -> float:
        teachers = prepare_teachers(start.potential, specialists, QUICK, frames=[(), ()], weights=(1.0, 1.0))
        found = max(relative_error_on(start.potential, graphs) for graphs in teachers.held_out)
        nearer = [  # targets between the prediction of the start and that of the teacher
            [replace(g, forces=f + (g.forces - f) * error / found) for g, f in zip(graphs, own, strict=True)]
            for graphs, own in zip(teachers.held_out, map(forces_of_start, teachers.held_out), strict=True)
        ]
        return replace(teachers, held_out=nearer).suited_rate(start.potential)

    def forces_of_start(graphs: list[LabeledGraph]) -> list[torch.Tensor]:
        return [predict(start.potential, graph).forces for graph in graphs]

    assert rate(0.025) == pytest.approx(1e-3, rel=0.1)
    assert rate(0.2) == 2e-3
    assert rate(0.0) == 2e-3


def test_an_interrupted_merge_is_continued(tmp_path: Path) -> None:
    specialists, checkpoint = relatives("painn"), tmp_path / "merged.checkpoint.safetensors"
    recipe = Recipe(refine=QUICK.model_copy(update={"epochs": 3}))

    def stop(fraction: float, text: str) -> None:
        if "epoch 3" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(specialists, recipe, checkpoint=checkpoint, device="cpu", progress=stop)
    assert checkpoint.exists()
    seen: list[str] = []
    again, _ = merge(
        specialists, recipe, checkpoint=checkpoint, device="cpu", progress=lambda _, text: seen.append(text)
    )
    assert not any("epoch 1 " in text for text in seen)
    assert not checkpoint.exists()
    assert again.fingerprint == merge(specialists, recipe, device="cpu")[0].fingerprint


def test_a_budget_cuts_epochs_then_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    from ase_gffmerge.training import distill as module

    specialists, options = relatives("painn"), QUICK.model_copy(update={"epochs": 6, "budget": 10.0})
    monkeypatch.setattr(module, "_seconds_per_frame", lambda *_: 0.2)
    start = mean_of(specialists)
    _, history = distill(
        start, specialists, options.model_copy(update={"budget": None, "patience": 9}), device="cpu"
    )
    assert len(history.rows) == 6
    distilled, history = distill(start, specialists, options, device="cpu")
    assert len(history.rows) < 6
    assert distilled.provenance.n_train * len(history.rows) * 0.2 <= 10.0


def test_a_run_with_a_budget_is_continued_on_a_machine_of_another_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ase_gffmerge.training import distill as module

    specialists, options = relatives("painn"), QUICK.model_copy(update={"epochs": 6, "budget": 10.0})
    start, checkpoint = mean_of(specialists), checkpoint_path(tmp_path / "a.safetensors")
    monkeypatch.setattr(module, "_seconds_per_frame", lambda *_: 0.08)
    whole, history = distill(start, specialists, options, device="cpu")
    assert 1 < len(history.rows) < 6
    with pytest.raises(Stop):
        distill(start, specialists, options, checkpoint=checkpoint, device="cpu", callback=stop_after(1))
    monkeypatch.setattr(module, "_seconds_per_frame", lambda *_: 0.5)
    resumed, again = distill(start, specialists, options, checkpoint=checkpoint, device="cpu")
    assert again.rows == history.rows
    assert resumed.fingerprint == whole.fingerprint
    other = options.model_copy(update={"seed": 1})
    with pytest.warns(CheckpointWarning, match=r"options\.seed was 0, is 1"):
        _, fresh = distill(start, specialists, other, checkpoint=checkpoint, device="cpu")
    assert len(fresh.rows) == 1


def test_no_pass_takes_more_edges_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither that which tells how long it will take, nor those of the validation."""
    from ase_gffmerge.inference import predict as inference
    from ase_gffmerge.training import loss as module

    specialists = relatives("painn")
    start, seen = mean_of(specialists), list[int]()

    def counting(potential: object, batch: LabeledGraph, **options: bool) -> object:
        if options.get("differentiable") or len(batch.energy) > 1:
            seen.append(batch.n_edges)
        return predict(potential, batch, **options)

    monkeypatch.setattr(module, "predict", counting)
    monkeypatch.setitem(inference.MAX_EDGES, "cpu", 70)
    options = QUICK.model_copy(update={"epochs": 1})
    distill(start, specialists, options, device="cpu", max_edges=70)
    assert seen
    assert max(seen) <= 70


def test_verdict_is_told() -> None:
    specialists = relatives("painn")
    options = QUICK.model_copy(update={"epochs": 1, "learning_rate": 1e-6})
    with pytest.warns(MergeWarning, match="distill it longer"):
        distill(mean_of(specialists), specialists, options, device="cpu")


# -- joint training, weights, early stop, optimiser --


def labelled(specialist: ForceField, frames: tuple[Atoms, ...]) -> list[Atoms]:
    """Frames with a specialist's predictions as labels."""
    made = []
    for atoms in frames:
        prediction = predict(specialist.potential, build_graph(atoms, 4.0))
        copy = atoms.copy()
        copy.calc = SinglePointCalculator(
            copy, energy=float(prediction.energy), forces=prediction.forces.numpy()
        )
        made.append(copy)
    return made


@pytest.mark.parametrize("architecture", OWN_ARCHITECTURES)
def test_joint_training_learns_all_labels(architecture: str) -> None:
    specialists = relatives(architecture)
    data = [labelled(s, s.calibration[: 10 - 4 * k]) for k, s in enumerate(specialists)]
    config = TrainConfig(epochs=6, batch_size=4, learning_rate=3e-3, validation=2)
    potential, history = train_jointly(mean_of(specialists), data, config, device="cpu")
    assert len(history.rows) == 6
    assert history.rows[-1]["loss"] < 0.8 * history.rows[0]["loss"]
    assert not any(p.requires_grad for p in potential.parameters())
    with pytest.raises(FramesError, match="labelled frames of every specialist"):
        train_jointly(mean_of(specialists), [data[0], []], config)


def test_groups_of_unequal_size_count_the_same() -> None:
    specialists = relatives("painn")
    groups = [
        labelled_graphs(labelled(s, s.calibration[: 2 + 6 * k]), s.potential)
        for k, s in enumerate(specialists)
    ]
    groups = weigh(groups, [1.0, 4.0])
    says = [sum(float(graph.weight) * len(graph) for graph in group) for group in groups]
    assert says[0] == pytest.approx(4 * says[1])
    groups = weigh(groups)
    says = [sum(float(graph.weight) * len(graph) for graph in group) for group in groups]
    assert says[0] == pytest.approx(says[1])
    assert sum(says) == pytest.approx(sum(len(graph) for group in groups for graph in group))


def test_patience() -> None:
    config = TrainConfig()

    def history(*errors: float) -> History:
        start, *rows = [{"force_mae": e, "energy_mae": 0.0} for e in errors]
        return History(rows, start)

    assert not stale(history(3.0), config, 2)
    assert not stale(history(3.0, 4.0), config, 2)
    assert stale(history(3.0, 4.0, 3.0), config, 2)
    assert not stale(history(3.0, 4.0, 2.0), config, 2)
    assert not stale(history(3.0, 2.0, 4.0), config, 2)
    assert stale(history(3.0, 2.0, 4.0, 2.5), config, 2)


def test_soap_without_rotation_is_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, generator=generator, dtype=torch.float64)
    curvature = torch.linspace(1, 30, 7, dtype=torch.float64)
    ends = []
    for optimiser in (
        lambda p: SOAP(p, lr=0.1, betas=(0.9, 0.99)),
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.99)),
    ):
        x = start.clone().requires_grad_()
        method = optimiser([x])
        for _ in range(20):
            method.zero_grad()
            (curvature * x.square()).sum().backward()
            method.step()
        ends.append(x.detach())
    torch.testing.assert_close(*ends)


def test_soap_does_not_see_a_rotation() -> None:
    """Unlike Adam it finds the axes of a rotated problem: the same steps in another basis, up to slow starts."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    stretch = torch.diag(torch.logspace(-2, 1, 6, dtype=torch.float64))
    q = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q

    def residual(method: type[torch.optim.Optimizer]) -> float:
        x = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
        optimiser = method([x], lr=0.03)
        for _ in range(300):
            optimiser.zero_grad()
            (stretch @ q @ (x - target)).square().sum().backward()
            optimiser.step()
        return float((stretch @ q @ (x - target)).square().sum().detach())

    assert residual(SOAP) < 0.3 * residual(torch.optim.Adam)


def test_wide_readouts_learn_slowly() -> None:
    hyper = {**SHALLOW["painn"], "readout_width": 16, "readout_blocks": 1}
    wide = build_potential("painn", hyper, (1, 6))
    plain, slow = parameter_groups(wide)
    assert slow["lr_scale"] == 4 / 16
    assert {id(p) for p in slow["params"]} == {
        id(p) for name, p in wide.named_parameters() if name.startswith("readout.") and "mlp" not in name
    }
    assert len(plain["params"]) + len(slow["params"]) == len(list(wide.parameters()))
    assert len(parameter_groups(build_potential("painn", SHALLOW["painn"], (1, 6)))) == 1


def test_round_off_chooses_no_basis() -> None:
    """A gradient of rank one in eight rows: seven eigenvalues are zero, and noise of round-off's size turns nothing."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.outer(*torch.randn(2, 8, generator=generator, dtype=torch.float64))
    noise = 1e-14 * torch.randn(8, 8, generator=generator, dtype=torch.float64)
    exact, noisy = (_eigenvectors(g @ g.mT) for g in (gradient, gradient + noise))
    torch.testing.assert_close(
        (exact.mT @ noisy).abs(), torch.eye(8, dtype=torch.float64), atol=1e-10, rtol=0
    )


def test_eigenbases_of_gradients_with_dead_units_are_found() -> None:
    """Their products span more than float32 does, on which its eigenvalue solver may give up."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows = torch.randn(64, 64, generator=generator) * torch.logspace(0, -44, 64)[:, None]
        weight = torch.nn.Parameter(torch.zeros(64, 64))
        optimizer = SOAP([weight], lr=0.1)
        weight.grad = rows
        optimizer.step()
        basis = optimizer.state[weight]["left_basis"]
        torch.testing.assert_close(basis.mT @ basis, torch.eye(64), atol=1e-5, rtol=0)
        assert weight.isfinite().all()
