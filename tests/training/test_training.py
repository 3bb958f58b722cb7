"""Training: it learns, resumes exactly, and refuses what it cannot use."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from ase_gffmerge.data.frames import geometry_keys
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.errors import (
    CheckpointWarning,
    DeviceError,
    FileFormatError,
    FramesError,
    GFFMergeError,
    IncompatibleSpecialistsError,
    RecipeError,
    ReferenceWarning,
    StructureError,
    TrainingError,
)
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.storage.tensor_file import read_file
from ase_gffmerge.training.checkpoint import checkpoint_path, differences
from ase_gffmerge.training.config import TrainConfig, load_config
from ase_gffmerge.training.initialization import fit_references, load_references, warn_of_offset
from ase_gffmerge.training.loop import one_cycle
from ase_gffmerge.training.loss import labelled_graph, loss_terms
from ase_gffmerge.training.train import train

TINY = {"channels": 8, "n_blocks": 1, "n_radial": 6}


def config(**changes: object) -> TrainConfig:
    options = {"hyper": TINY, "epochs": 3, "validation": 2, "batch_size": 5, "learning_rate": 1e-2, **changes}
    return TrainConfig(**options)


class Stop(Exception):
    """Stands for a kill."""


def stop_after(epoch: int):
    def callback(done: int, losses: dict[str, float]) -> None:
        if done == epoch:
            raise Stop

    return callback


def test_loss_falls_and_everything_is_recorded(frame_file, tmp_path: Path) -> None:
    frames, test = frame_file("CH3OH", 12), frame_file("CH3OH", 3, seed=9)
    out = tmp_path / "methanol.safetensors"
    epochs: list[int] = []
    options = config(epochs=30, level_of_theory="EMT")
    specialist, history, errors = train(
        [frames], out, options, test=[test], n_calibration=4, callback=lambda epoch, _: epochs.append(epoch)
    )
    assert history.rows[-1]["loss"] < 0.7 * history.rows[0]["loss"]
    assert set(history.rows[0]) == {"loss", "force_mae", "energy_mae"}
    assert epochs == list(range(1, 31))
    loaded = ForceField.load(out)
    assert loaded.name == "methanol"
    assert loaded.level_of_theory == "EMT"
    assert len(loaded.calibration) == 4
    assert all(frame.calc is None for frame in loaded.calibration)
    assert (loaded.provenance.n_train, loaded.provenance.epochs) == (10, 30)
    assert errors is not None
    assert loaded.provenance.errors == errors.totals()
    assert loaded.fingerprint == specialist.fingerprint
    assert not checkpoint_path(out).exists()


def test_training_leaves_the_global_random_state_alone(frame_file, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    train([frame_file("CH3OH")], tmp_path / "a.safetensors", config(epochs=1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_nequip(frame_file, tmp_path: Path) -> None:
    options = config(model="nequip", hyper={"channels": 4, "n_blocks": 1, "n_radial": 4}, epochs=4)
    whole = train([frame_file("H2O")], tmp_path / "whole.safetensors", options)[0]
    assert ForceField.load(tmp_path / "whole.safetensors").potential.architecture == "nequip"
    with pytest.raises(Stop):
        train([frame_file("H2O")], tmp_path / "a.safetensors", options, callback=stop_after(2))
    resumed = train([frame_file("H2O")], tmp_path / "a.safetensors", options)[0]
    assert resumed.fingerprint == whole.fingerprint
    child = train([frame_file("H2O")], tmp_path / "c.safetensors", config(hyper={}, epochs=1), init=whole)[0]
    assert child.potential.architecture == "nequip"


def test_seed_decides_the_outcome(frame_file, tmp_path: Path) -> None:
    frames = [frame_file("CH3OH")]
    prints = [
        train(frames, tmp_path / f"{i}.safetensors", config(seed=seed, epochs=1))[0].fingerprint
        for i, seed in enumerate((1, 1, 2))
    ]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_resumed_equals_uninterrupted(frame_file, tmp_path: Path, stop: int) -> None:
    frames, options = [frame_file("CH3OH")], config(epochs=4)
    whole, history, _ = train(frames, tmp_path / "whole.safetensors", options)
    out = tmp_path / "resumed.safetensors"
    with pytest.raises(Stop):
        train(frames, out, options, callback=stop_after(stop))
    assert checkpoint_path(out).exists()
    assert not out.exists()
    seen: list[int] = []
    resumed, again, _ = train(frames, out, options, callback=lambda epoch, _: seen.append(epoch))
    assert seen == list(range(stop + 1, 5))
    assert again.rows == history.rows
    assert resumed.fingerprint == whole.fingerprint
    for name, value in whole.potential.state_dict().items():
        assert torch.equal(value, resumed.potential.state_dict()[name]), name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epochs": 5}, "config.epochs was 4, is 5"),
        ({"seed": 3}, "config.seed was 0, is 3"),
        ({"hyper": {**TINY, "channels": 4}}, "channels was 8, is 4"),
    ],
)
def test_checkpoint_of_another_run_is_set_aside(frame_file, tmp_path: Path, change: dict, said: str) -> None:
    frames, out = [frame_file("CH3OH")], tmp_path / "a.safetensors"
    with pytest.raises(Stop):
        train(frames, out, config(epochs=4), callback=stop_after(2))
    kept = checkpoint_path(out).read_bytes()
    with pytest.warns(CheckpointWarning, match=said) as caught:
        fresh = train(frames, out, config(**{"epochs": 4, **change}))[0]
    assert "a.checkpoint.old.safetensors" in str(caught[0].message)
    assert (tmp_path / "a.checkpoint.old.safetensors").read_bytes() == kept
    other = train(frames, tmp_path / "b.safetensors", config(**{"epochs": 4, **change}))[0]
    assert fresh.fingerprint == other.fingerprint


def test_checkpoint_of_other_labels_is_not_continued(frame_file, tmp_path: Path) -> None:
    path, out = frame_file("CH3OH"), tmp_path / "a.safetensors"
    with pytest.raises(Stop):
        train([path], out, config(), callback=stop_after(1))
    frames = read(path, ":")
    frames[0].calc.results["energy"] += 1.0
    write(path, frames, format="extxyz")
    with pytest.warns(CheckpointWarning, match="frames"):
        train([path], out, config(epochs=3))


def test_damaged_checkpoint_is_set_aside(frame_file, tmp_path: Path) -> None:
    frames, out = [frame_file("CH3OH")], tmp_path / "a.safetensors"
    with pytest.raises(Stop):
        train(frames, out, config(), callback=stop_after(1))
    data = bytearray(checkpoint_path(out).read_bytes())
    data[-1] ^= 1
    checkpoint_path(out).write_bytes(data)
    with pytest.warns(CheckpointWarning, match="cannot be read"):
        train(frames, out, config())


def test_checkpoint_is_no_specialist(frame_file, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    with pytest.raises(Stop):
        train([frame_file("CH3OH")], out, config(), callback=stop_after(1))
    with pytest.raises(FileFormatError, match="unfinished training"):
        ForceField.load(checkpoint_path(out))


def test_kill_while_saving_keeps_the_epoch_before(frame_file, tmp_path: Path, monkeypatch) -> None:
    frames, out, options = [frame_file("CH3OH")], tmp_path / "a.safetensors", config(epochs=4)
    whole = train(frames, tmp_path / "whole.safetensors", options)[0]
    original = Path.write_bytes
    count = 0

    def dying(self: Path, data: bytes) -> int:
        nonlocal count
        count += 1
        if count == 3:
            original(self, data[: len(data) // 2])
            raise Stop
        return original(self, data)

    monkeypatch.setattr(Path, "write_bytes", dying)
    with pytest.raises(Stop):
        train(frames, out, options)
    monkeypatch.undo()
    assert read_file(checkpoint_path(out))[0]["checkpoint"]["epoch"] == 2
    assert train(frames, out, options)[0].fingerprint == whole.fingerprint


@pytest.mark.filterwarnings("ignore:.*overflow.*:RuntimeWarning")
def test_divergence_is_explained(frame_file, tmp_path: Path) -> None:
    path = frame_file("CH3OH")
    out = tmp_path / "a.safetensors"
    with pytest.raises(
        TrainingError, match=r"diverged in epoch \d of 3 .* lower learning_rate \(now 1e\+30\)"
    ):
        train([path], out, config(learning_rate=1e30))
    assert not out.exists()


def test_stress_is_used_where_present(frame_file, tmp_path: Path) -> None:
    copper, mixed = frame_file("Cu", 4), frame_file("CH3OH", 4)
    frames = [read(copper, "0"), read(mixed, "0")]
    start = train([copper, mixed], tmp_path / "a.safetensors", config(epochs=1))[0]
    potential = start.potential.requires_grad_(True)
    references = potential.references.numpy()
    graphs = [labelled_graph(atoms, potential, references) for atoms in frames]
    assert torch.isfinite(graphs[0].stress).all()
    assert torch.isnan(graphs[1].stress).all()
    from ase_gffmerge.graphs import batch_graphs

    losses = [loss_terms(potential, batch_graphs(graphs), config(stress_weight=w)) for w in (0.0, 1.0, 2.0)]
    none, once, twice = (loss.item() for loss in losses)
    assert none < once
    assert twice - once == pytest.approx(once - none, rel=1e-3)
    losses[2].backward()
    assert all(torch.isfinite(p.grad).all() for p in potential.parameters() if p.grad is not None)


def test_stress_gradient_agrees_with_ase_sign(frame_file, tmp_path: Path) -> None:
    """A model trained on stresses predicts them with ASE's sign: positive under tension."""
    path = frame_file("Cu", 10)
    options = config(epochs=60, stress_weight=50.0, force_weight=1.0, batch_size=4)
    potential = train([path], tmp_path / "a.safetensors", options)[0].potential
    from ase_gffmerge.graphs import build_graph, predict

    frames = read(path, ":")
    predicted, expected = [], []
    for atoms in frames:
        graph = build_graph(atoms, potential.hyper.cutoff, dtype=potential.dtype)
        predicted.append(predict(potential, graph).stress(graph.cell)[0].numpy().ravel())
        expected.append(atoms.get_stress(voigt=False).ravel())
    assert np.corrcoef(np.ravel(predicted), np.ravel(expected))[0, 1] > 0.5


# -- references and parents --


def table(specialist: ForceField) -> dict[int, float]:
    return dict(zip(specialist.species, specialist.potential.references.tolist(), strict=True))


def test_references_are_fitted_or_given(frame_file, tmp_path: Path) -> None:
    frames = [frame_file("CH3OH"), frame_file("H2O")]
    fitted = train(frames, tmp_path / "a.safetensors", config(epochs=1))[0]
    energies = {name: -10.0 * i for i, name in enumerate(("H", "C", "O"), start=1)}
    (tmp_path / "references.json").write_text(json.dumps(energies))
    given = train(
        frames,
        tmp_path / "b.safetensors",
        config(epochs=1),
        references=load_references(tmp_path / "references.json"),
    )[0]
    assert table(given) == {1: -10.0, 6: -20.0, 8: -30.0}
    assert table(fitted) != table(given)


def test_fitted_references_reproduce_additive_energies() -> None:
    frames = [molecule(name) for name in ("H2O", "CH4", "CH3OH", "CO2")]
    truth = {1: -13.0, 6: -1000.0, 8: -2000.0}
    for atoms in frames:
        atoms.calc = SinglePointCalculator(atoms, energy=sum(truth[z] for z in atoms.numbers))
    assert fit_references(frames, [1, 6, 8]) == pytest.approx(truth)


def test_inherited_references_that_do_not_fit_are_pointed_out() -> None:
    frames = [molecule("CH3OH")]
    frames[0].calc = SinglePointCalculator(frames[0], energy=-3052.0)
    warn_of_offset(frames, {1: -13.0, 6: -1000.0, 8: -2000.0})
    with pytest.warns(ReferenceWarning, match=r"16\.7 eV per atom.*--references"):
        warn_of_offset(frames, {1: -13.0, 6: -1100.2, 8: -2000.0})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"Qq": 1}', '{"H": "x"}', '{"H": NaN}', '{"H": null}'])
def test_bad_reference_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "references.json"
    path.write_text(text)
    with pytest.raises(FramesError, match=r"references\.json.*write a JSON"):
        load_references(path)
    with pytest.raises(FramesError, match="cannot read"):
        load_references(tmp_path / "none.json")


def test_references_must_cover_the_elements(frame_file, tmp_path: Path) -> None:
    with pytest.raises(FramesError, match="lack C, O"):
        train([frame_file("CH3OH")], tmp_path / "a.safetensors", config(), references={1: -13.0})


def test_child_keeps_references_and_records_its_lineage(frame_file, tmp_path: Path) -> None:
    base = train([frame_file("CH3OH"), frame_file("H2O")], tmp_path / "base.safetensors", config())[0]
    before = base.fingerprint
    child = train(
        [frame_file("H2O", seed=4)], tmp_path / "child.safetensors", config(hyper={}, epochs=1), init=base
    )[0]
    assert base.fingerprint == before, "the parent is not changed"
    assert table(child) == table(base)
    assert child.species == base.species
    assert child.provenance.lineage == (before,)
    assert child.fingerprint != before
    seen = [read_frames(frame_file(*of)) for of in (("CH3OH",), ("H2O",), ("H2O", 12, 4))]
    assert base.provenance.seen_frames == geometry_keys(seen[0] + seen[1])
    assert child.provenance.seen_frames == geometry_keys(seen[0] + seen[1] + seen[2])
    with pytest.warns(ReferenceWarning, match="eV per atom"):
        other = train(
            [frame_file("H2O", seed=4)],
            tmp_path / "other.safetensors",
            config(hyper={}, epochs=1),
            init=child,
            references={1: -1.0, 8: -2.0},
        )[0]
    assert other.provenance.lineage == (before, child.fingerprint)
    assert table(other) == {**table(base), 1: -1.0, 8: -2.0}


def test_impossible_parents_are_refused(frame_file, tmp_path: Path) -> None:
    base = train([frame_file("H2O")], tmp_path / "base.safetensors", config(epochs=1))[0]
    out = tmp_path / "child.safetensors"
    with pytest.raises(IncompatibleSpecialistsError, match="also contain C"):
        train([frame_file("CH3OH")], out, config(), init=base)
    with pytest.raises(IncompatibleSpecialistsError, match="cannot start a nequip"):
        train([frame_file("H2O")], out, config(model="nequip"), init=base)
    with pytest.raises(IncompatibleSpecialistsError, match=r"'channels': 8.*'channels': 16"):
        train([frame_file("H2O")], out, config(hyper={"channels": 16}), init=base)


# -- bad input: nothing is written --


def refused(error: type[GFFMergeError], pattern: str, out: Path, *args: object, **kwargs: object) -> None:
    with pytest.raises(error, match=pattern):
        train(args[0], out, *args[1:], **kwargs)  # type: ignore[arg-type]
    assert not out.exists()
    assert not checkpoint_path(out).exists()


@pytest.mark.parametrize("missing", ["energy", "forces"])
def test_frames_without_labels(frame_file, tmp_path: Path, missing: str) -> None:
    path = frame_file("CH3OH")
    frames = read(path, ":")
    for atoms in frames:
        del atoms.calc.results[missing]
    write(path, frames, format="extxyz")
    refused(FramesError, f"frames lack {missing}", tmp_path / "a.safetensors", [path], config())
    good = frame_file("CH3OH", seed=5)
    refused(FramesError, f"frames lack {missing}", tmp_path / "a.safetensors", [good], config(), test=[path])


def test_other_bad_input(frame_file, tmp_path: Path) -> None:
    frames, out = frame_file("CH3OH"), tmp_path / "new" / "a.safetensors"
    refused(FramesError, "does not exist", out, [tmp_path / "none.xyz"], config())
    refused(FramesError, "12 frames, which leaves none", out, [frames], config(validation=12))
    refused(StructureError, "contains N", out, [frames], config(), test=[frame_file("NH3")])
    refused(FramesError, "too few", out, [frames], config(), n_calibration=0)
    refused(GFFMergeError, "unknown architecture", out, [frames], config(model="schnet"))
    refused(GFFMergeError, "do not fit", out, [frames], config(hyper={"chanels": 3}))
    if not torch.cuda.is_available():
        refused(DeviceError, "cuda", out, [frames], config(), device="cuda")
    assert not out.parent.exists()


def test_unwritable_output_is_found_before_training(frame_file, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    calls: list[int] = []
    with pytest.raises(FileFormatError, match="cannot write"):
        train(
            [frame_file("CH3OH")],
            tmp_path / "file" / "a.safetensors",
            config(),
            callback=lambda epoch, _: calls.append(epoch),
        )
    assert not calls


# -- options --


def test_config_file_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("epochs: 7\nhyper: {channels: 8}\n")
    assert load_config(path, epochs=None, seed=4) == TrainConfig(epochs=7, seed=4, hyper={"channels": 8})
    assert load_config(None) == TrainConfig()
    for text, pattern in [
        ("epoch: 7", "did you mean 'epochs'"),
        ("epochs: 0", "epochs"),
        ("- 1", "mapping"),
        ("a: [", "not valid YAML"),
        ("1: 2", "unknown key '1'"),
    ]:
        path.write_text(text)
        with pytest.raises(RecipeError, match=pattern):
            load_config(path)
    with pytest.raises(RecipeError, match="cannot read"):
        load_config(tmp_path / "none.yaml")


def test_differences_name_what_changed() -> None:
    assert differences({"a": {"b": 1}}, {"a": {"b": 1}}) == ""
    assert differences({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b was 1, is 2"
    assert differences({}, {"a": 1}) == "a was not set, is 1"
    assert differences({"a": list(range(99))}, {"a": []}) == "a differs"


def test_one_cycle_rises_and_falls() -> None:
    rates = learning_rates(100)
    assert rates[0] == pytest.approx(0.04)
    assert max(rates) == pytest.approx(1.0)
    assert np.argmax(rates) == 10
    assert len(rates) == 101
    assert rates[-1] == pytest.approx(1e-3)
    assert (np.diff(rates[:11]) > 0).all()
    assert (np.diff(rates[10:]) < 0).all()
    assert learning_rates(100, done=40) == rates[40:]


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 11, 20])
def test_one_cycle_of_few_steps(steps: int) -> None:
    rates = learning_rates(steps)
    assert all(1e-3 * (1 - 1e-9) <= rate <= 1.0 for rate in rates)
    assert steps < 10 or max(rates) > 0.98
    assert rates[-1] == pytest.approx(1e-3)


def learning_rates(steps: int, done: int = 0) -> list[float]:
    """Rate of every step that is left, and of one more."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr_scale": 1.0}], lr=1.0)
    schedule, rates = one_cycle(optimizer, 1.0, steps=steps, done=done), []
    for _ in range(done, steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*rates, optimizer.param_groups[0]["lr"]]


def test_loss_curve(tmp_path: Path) -> None:
    from ase_gffmerge.evaluation.plots import plot_history
    from ase_gffmerge.training.checkpoint import History

    rows = [{"loss": 1 / epoch, "force_mae": 0.5 / epoch, "energy_mae": 0.0} for epoch in range(1, 40)]
    path = plot_history(History(rows), tmp_path / "curve.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_history(History(rows[:1]), path)
        plot_history(History([{"loss": 1.0}]), path)
