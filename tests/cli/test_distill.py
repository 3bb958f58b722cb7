"""``gffmerge distill``: from specialists to a distilled file; resumable; refuses what it cannot use."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.runtime.memory import Portions
from ase_gffmerge.storage.tensor_file import read_file
from ase_gffmerge.training import distill as distillation
from ase_gffmerge.training.checkpoint import checkpoint_path
from ase_gffmerge.workflows import memory

PAIR = ("methanol.safetensors", "water.safetensors")
RECIPE = """
preset: closed-form
select: false
readout: {width: 16, blocks: 1, copies: 1}
refine: {threshold: 0, epochs: 3, copies: 0, batch_size: 4, learning_rate: 3.0e-3, force_weight: 10.0}
"""


@pytest.fixture
def recipe(files: Path) -> Path:
    path = files / "distilled.yaml"
    path.write_text(RECIPE)
    return path


def test_merges_distils_and_reports(gffmerge, recipe: Path) -> None:
    options = ("--recipe", recipe, "--device", "cpu")
    document = gffmerge("distill", *PAIR, "--out", "a.safetensors", *options, "--json").json()
    assert document["epochs"] == 3
    assert document["specialists"] == ["methanol", "water"]
    assert {"layers", "distillation"} <= set(document["seconds"])
    assert set(document["start"]) == {"force_mae", "energy_mae"}
    assert Path(document["loss_curve"]).exists()
    distilled = ForceField.load("a.safetensors")
    assert distilled.merged is not None
    assert distilled.merged.recipe["refine"]["epochs"] == 3
    assert distilled.potential.hyper.readout_width == 16
    assert not checkpoint_path(Path("a.safetensors")).exists()
    merged = gffmerge("merge", *PAIR, "--out", "b.safetensors", *options, "--json").json()
    assert ForceField.load("b.safetensors").fingerprint == distilled.fingerprint
    assert merged["held_out"] == document["held_out"]


def test_epochs_are_counted_that_the_budget_allows(gffmerge, files: Path) -> None:
    (files / "short.yaml").write_text(RECIPE.replace("refine: {", "refine: {budget: 1.0e-6, "))
    done = gffmerge("distill", *PAIR, "--out", "a.safetensors", "--recipe", "short.yaml", "--device", "cpu")
    assert done.code == 0, done.err
    assert "epoch 1/1 " in done.err


def test_frames_epochs_and_a_start_of_ones_own(gffmerge, recipe: Path) -> None:
    gffmerge("merge", *PAIR, "--out", "mean.safetensors", "--recipe", "mean", "--device", "cpu")
    done = gffmerge(
        *("distill", *PAIR, "--out", "a.safetensors", "--init", "mean.safetensors", "--recipe", recipe),
        *("--epochs", 1, "--calibration", "methanol.xyz", "water.xyz", "--device", "cpu"),
    )
    assert done.code == 0, done.err
    assert "methanol: merged differs by" in done.out
    assert "written: a.safetensors, a.png (1 epochs)" in done.err
    distilled = ForceField.load("a.safetensors")
    assert distilled.merged is not None
    assert distilled.merged.recipe["method"] == "mean"
    assert (distilled.provenance.epochs, distilled.provenance.n_train) == (1, 2 * 11 * 2)


def test_a_bound_of_the_memory_reaches_merge_and_training(gffmerge, recipe: Path, monkeypatch) -> None:
    bounds, parts = [], []

    def interrupted(*arguments, max_edges: int | None, **options) -> None:
        parts.append(max_edges)
        raise KeyboardInterrupt

    def merged(specialists, options, **more):
        bounds.append(options.max_memory)
        return SimpleNamespace(force_field=ForceField.load("methanol.safetensors"))

    monkeypatch.setattr(distillation, "distill", interrupted)
    monkeypatch.setattr("ase_gffmerge.workflows.load_or_merge.resolve", merged)
    command = ("distill", *PAIR, "--recipe", recipe, "--device", "cpu", "--out", "a.safetensors")
    assert "more than max_memory=10 MB" in gffmerge(*command, "--max-memory", "10MB").error()
    gffmerge(*command, "--max-memory", "100GB")
    estimate = memory.DistillationModel.estimate
    few = Portions(edges=40)
    monkeypatch.setattr(memory.DistillationModel, "estimate", lambda self, _=None: estimate(self, few))
    gffmerge(*command)
    assert bounds == ["10MB", "100GB", None]
    assert parts == [None, 40]


def test_specialists_without_frames_learn_from_those_that_are_named(gffmerge, recipe: Path) -> None:
    for name in PAIR:
        ForceField.load(name).with_calibration(()).save(f"bare-{name}")
    command = ("distill", *(f"bare-{name}" for name in PAIR), "--out", "a.safetensors", "--recipe", recipe)
    assert "--calibration A B" in gffmerge(*command).error()
    frames = ("--calibration", "methanol.xyz", "water.xyz", "--epochs", 1)
    assert gffmerge(*command, *frames).code == 0
    assert ForceField.load("a.safetensors").provenance.n_train == 2 * 6 * 2


def test_interrupted_run_says_how_to_go_on_and_does(
    gffmerge, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("distill", *PAIR, "--recipe", recipe, "--device", "cpu", "--out")
    gffmerge(*command, "whole.safetensors")
    original = distillation.fit

    def interrupted(*arguments, callback, **options):
        def after_epoch(epoch: int, losses: dict[str, float]) -> None:
            callback(epoch, losses)
            if epoch == 2:
                raise KeyboardInterrupt

        return original(*arguments, callback=after_epoch, **options)

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "fit", interrupted)
        stopped = gffmerge(*command, "a.safetensors")
    assert stopped.code == 130
    assert "epoch 2 of 3 is saved; the same command continues" in stopped.err
    assert read_file(checkpoint_path(Path("a.safetensors")))[0]["checkpoint"]["epoch"] == 2
    resumed = gffmerge(*command, "a.safetensors")
    assert "continued after epoch 2" in resumed.err
    assert ForceField.load("a.safetensors").fingerprint == ForceField.load("whole.safetensors").fingerprint


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("methanol.safetensors", "--out", "a.safetensors"), "at least two"),
        ((*PAIR, "--out", "a.safetensors", "--init", "none.safetensors"), "no specialist"),
        ((*PAIR, "--out", "a.safetensors", "--calibration", "water.xyz"), "each of the 2"),
        ((*PAIR, "--out", "a.safetensors", "--epochs", "0"), "epochs"),
        ((*PAIR, "--out", "a.safetensors", "--recipe", "broken.yaml"), "did you mean 'epochs'"),
        ((*PAIR, "--out", "tiny.yaml/a.safetensors"), "cannot write"),
        ((*PAIR, "--out", "a.safetensors", "--channels", "16"), "give --student"),
    ],
)
def test_bad_input_is_one_line(gffmerge, recipe: Path, arguments: tuple[str, ...], said: str) -> None:
    (recipe.parent / "broken.yaml").write_text("refine: {epoch: 3}")
    if "--recipe" not in arguments:
        arguments = (*arguments, "--recipe", str(recipe))
    assert said in gffmerge("distill", *arguments).error()
