import html
import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.data import chemical_symbols

from ase_gffmerge import ForceField, merge
from ase_gffmerge.errors import (
    DeviceError,
    FramesError,
    IncompatibleSpecialistsError,
    MergeWarning,
    RecipeError,
)
from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.merging.recipe import PRESETS, Recipe, load_recipe
from ase_gffmerge.merging.report import MergeReport
from ase_gffmerge.merging.report_plot import save_figure, save_html

pytestmark = pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.MergeWarning")

SMALL_READOUT = {"select": False, "readout": {"width": 24, "blocks": 2, "copies": 1}, "directions": 2}


def forces(specialist: ForceField, frames, index: int = 0) -> np.ndarray:
    return np.concatenate(predict_frames(specialist.potential, frames, specialist=index).forces)


def recipe(name: str, **options) -> Recipe:
    small = SMALL_READOUT if name == "closed-form" else {}
    return load_recipe({"preset": name, **small, **options})


@pytest.mark.parametrize("name", ["closed-form", "mean"])
def test_merging_copies_returns_the_specialist(family, architecture, name) -> None:
    """The paper preset is left out: its absolute ridge pulls rank-deficient layers to zero."""
    original = family(architecture, 1)[0]
    copies = [replace(original, name=f"copy{i}") for i in range(3)]
    merged, report = merge(copies, recipe(name, allow_identical=True))
    assert report.verdict == "good"
    np.testing.assert_allclose(
        forces(merged, original.calibration), forces(original, original.calibration), atol=1e-10
    )


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"gffmerge"}))  # which goes on to train in some order
@pytest.mark.parametrize("conditioning", ["shared", "per-specialist"])
@pytest.mark.slow_for("per-specialist", "nequip")
def test_order_of_specialists_is_irrelevant(family, architecture, name, conditioning) -> None:
    specialists = family(architecture, 3)
    frames = specialists[0].calibration
    ahead, _ = merge(specialists, recipe(name, conditioning=conditioning))
    back, _ = merge(specialists[::-1], recipe(name, conditioning=conditioning))
    index = (0, 2) if conditioning == "per-specialist" else (0, 0)
    scale = np.abs(forces(specialists[0], frames)).max()
    np.testing.assert_allclose(
        forces(ahead, frames, index[0]), forces(back, frames, index[1]), atol=1e-6 * scale
    )


def test_merged_potential_is_equivariant(family, architecture) -> None:
    specialists = family(architecture, 2)
    merged, _ = merge(specialists, recipe("closed-form"))
    atoms = specialists[0].calibration[0]
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    turned = atoms.copy()
    turned.positions = atoms.positions @ rotation.T
    straight, rotated = (predict_frames(merged.potential, [a]) for a in (atoms, turned))
    assert rotated.energies[0] == pytest.approx(straight.energies[0], abs=1e-10)
    np.testing.assert_allclose(rotated.forces[0], straight.forces[0] @ rotation.T, atol=1e-10)


@pytest.mark.slow_for("nequip")
def test_specialists_are_not_changed_and_merging_is_reproducible(family, architecture) -> None:
    specialists = family(architecture, 2)
    before = [deepcopy(s.potential.state_dict()) for s in specialists]
    first, second = (merge(specialists, recipe("closed-form"))[0] for _ in range(2))
    for specialist, state in zip(specialists, before):
        for name, value in specialist.potential.state_dict().items():
            assert torch.equal(value, state[name])
    assert first.fingerprint == second.fingerprint


@pytest.mark.slow_for("nequip")
def test_per_specialist_conditioning_keeps_every_table(family, architecture) -> None:
    specialists = family(architecture, 3)
    merged, _ = merge(specialists, recipe("closed-form", conditioning="per-specialist"))
    assert merged.potential.hyper.n_embeddings == 3
    for k, specialist in enumerate(specialists):
        assert torch.equal(merged.potential.embedding[k], specialist.potential.embedding[0])


@pytest.mark.slow_for("nequip")
def test_weights_pull_towards_the_heavier_specialist(family, architecture) -> None:
    specialists = family(architecture, 2, size=0.2)
    light, heavy = (
        merge(specialists, recipe("closed-form", weights=weights, readout=None))[1]
        for weights in ((1, 1), (1000, 1))
    )
    mae = [
        next(d.force_mae for d in report.disagreements if d.model == "merged" and d.specialist == "s0")
        for report in (light, heavy)
    ]
    assert mae[1] < mae[0]


def test_an_element_only_one_specialist_knows_keeps_its_row(family) -> None:
    first, second = family("painn", 2)
    from ase_gffmerge.models import build_potential

    wider = build_potential("painn", first.potential.hyper.to_dict(), (1, 6, 7, 8)).double()
    state = {k: v for k, v in second.potential.state_dict().items() if k not in ("embedding", "references")}
    wider.load_state_dict(wider.state_dict() | state)
    with torch.no_grad():
        wider.embedding[0, [0, 1, 3]] = second.potential.embedding[0]
    second = replace(second, potential=wider.eval().requires_grad_(False))
    merged, _ = merge([first, second], recipe("closed-form"))
    assert merged.species == (1, 6, 7, 8)
    torch.testing.assert_close(merged.potential.embedding[0, 2], wider.embedding[0, 2])


TABLE = torch.tensor([10.0, 1000.0, 2000.0], dtype=torch.float64)


@pytest.mark.slow_for("nequip")
def test_different_zeros_of_energy_are_aligned_and_reported(family, architecture) -> None:
    specialists = family(architecture, 2)
    specialists[1].potential.references.add_(TABLE)
    merged, report = merge(specialists, recipe("closed-form"))
    assert report.energy_shifts == {"s1": pytest.approx({"H": 10.0, "C": 1000.0, "O": 2000.0})}
    for specialist, shift in zip(specialists, (0.0, 2 * 1000 + 4 * 10 + 2000)):
        frames = specialist.calibration
        energies = predict_frames(merged.potential, frames).energies
        own = predict_frames(specialist.potential, frames).energies
        np.testing.assert_allclose(energies, own - shift, atol=1.0)


def test_tables_that_differ_while_the_energies_agree_are_left_alone(family) -> None:
    """The network makes up for its table: a constant per element in the readout's last bias."""
    specialists = family("painn", 2)
    specialists[1].potential.references.add_(5.0)
    specialists[1].potential.readout.out.bias.add_(-5.0)
    assert not merge(specialists, recipe("closed-form"))[1].energy_shifts


@pytest.mark.slow_for("nequip")
def test_report_is_complete_round_trips_and_shows(family, architecture, tmp_path) -> None:
    merged, report = merge(family(architecture, 2), recipe("closed-form"))
    assert MergeReport.from_dict(json.loads(report.to_json())) == report
    assert {(d.specialist, d.model) for d in report.disagreements} == {
        ("s0", "mean"),
        ("s0", "merged"),
        ("s0", "s1"),
        ("s1", "mean"),
        ("s1", "merged"),
        ("s1", "s0"),
    }
    assert all(row.residual_after <= row.residual_before * (1 + 1e-6) + 1e-12 for row in report.layers)
    assert {row.kind for row in report.layers} == {"layer", "message", "readout"}
    assert set(report.seconds) == {"mean", "layers", "readout", "report", "extrapolation"}
    page = save_html(merged, tmp_path / "report.html").read_text()
    assert f"{report.verdict}: {html.escape(report.advice)}" in page
    assert all(
        word in page for word in (report.version, report.date, "toy", "H, C, O", "s0 6, s1 6", architecture)
    )
    assert "<details><summary>Least-squares problems" in page
    assert ("What was tried" in page) == bool(report.trials)
    assert f"directions: {merged.merged.recipe['directions']}" in page, "the recipe, folded"
    assert "http" not in page.replace("http-equiv", "")
    assert report.elements == tuple(chemical_symbols[number] for number in merged.species)
    assert repr(report).startswith(f"<MergeReport s0 + s1: {report.verdict}, ")
    assert "\n" not in repr(report)
    assert len(repr(report)) < 120
    card = report._repr_html_()
    assert all(
        word in card for word in ("Merge of s0, s1", ", ".join(report.elements), report.verdict, "<img ")
    )
    assert save_figure(report, tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_namesakes_get_distinct_names(family) -> None:
    specialists = [replace(s, name="model") for s in family("painn", 3)]
    merged, report = merge(specialists, recipe("mean"))
    assert report.specialists == merged.merged.specialists == ("model", "model-2", "model-3")


def test_a_bad_merge_warns(family) -> None:
    with pytest.warns(MergeWarning, match="failed|usable after distillation"):
        merge(family("painn", 2, size=0.5), recipe("paper"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s[:1], IncompatibleSpecialistsError, "at least two"),
        (lambda s: [s[0], s[0]], IncompatibleSpecialistsError, "given twice"),
        (
            lambda s: [s[0], replace(s[1], level_of_theory="other")],
            IncompatibleSpecialistsError,
            "levels of theory",
        ),
        (lambda s: [s[0], replace(s[1], calibration=())], FramesError, "'s1' carries no calibration frames"),
        (
            lambda s: [s[0], s[1].with_calibration([*s[1].calibration, Atoms("Xe")])],
            FramesError,
            "calibration frame 6 of 's1' contains Xe",
        ),
        (lambda s: [s[0].with_calibration([Atoms()]), s[1]], FramesError, "frame 0 of 's0' is empty"),
    ],
)
def test_what_cannot_be_merged_is_refused_with_the_reason(family, change, error, message) -> None:
    with pytest.raises(error, match=message):
        merge(change(family("painn", 2)), recipe("closed-form"))


def test_different_architecture_cutoff_and_units_are_refused(family) -> None:
    from ase_gffmerge.models import build_potential

    first, second = family("painn", 2)
    other = build_potential(
        "painn", {**second.potential.hyper.to_dict(), "cutoff": 5.0}, second.species
    ).double()
    with pytest.raises(IncompatibleSpecialistsError, match=r"cutoff 4\.0 / 5\.0"):
        merge([first, replace(second, potential=other)], recipe("closed-form"))
    with pytest.raises(IncompatibleSpecialistsError, match="architectures"):
        merge([first, family("nequip", 2)[1]], recipe("closed-form"))


def test_unrelated_specialists_are_refused_unless_allowed(family, architecture) -> None:
    first, second = family(architecture, 2)
    torch.manual_seed(99)
    from ase_gffmerge.models import build_potential

    stranger = build_potential(architecture, second.potential.hyper.to_dict(), second.species).double()
    stranger.eval().requires_grad_(False)
    second = replace(
        second, potential=stranger, provenance=replace(second.provenance, lineage=("another root",))
    )
    with pytest.raises(IncompatibleSpecialistsError, match="common base"):
        merge([first, second], recipe("closed-form"))
    merge([first, second], recipe("closed-form", allow_unrelated=True))


def test_a_merged_potential_is_not_a_specialist(family) -> None:
    specialists = family("painn", 2)
    merged, _ = merge(specialists, recipe("closed-form"))
    with pytest.raises(IncompatibleSpecialistsError, match="itself a merged potential"):
        merge([merged, specialists[0]], recipe("closed-form"))


def test_cuda_that_is_not_there_is_refused(family, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="cuda"):
        merge(family("painn", 2), recipe("closed-form"), device="cuda")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"rigde": 1.0}, "did you mean 'ridge'"),
        ({"readout": {"widht": 3}}, "did you mean 'width'"),
        ({"ridge": -1}, "ridge"),
        ({"preset": "best"}, "unknown preset"),
        ("nonsense", "neither a recipe file nor one of the recipes"),
        ("papr", "did you mean 'paper'"),
        ({"weights": "heavy"}, "weights"),
        ({"preset": "paper", "messages": True}, "the method 'paper' has no messages, no readout"),
        ({"method": "mean", "readout": {"width": 8}}, "take the method 'closed-form'"),
    ],
)
def test_bad_recipes_say_what_is_wrong(source, message) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(source)


def test_wrong_number_of_weights_is_refused(family) -> None:
    with pytest.raises(RecipeError, match="one per specialist"):
        merge(family("painn", 2), recipe("closed-form", weights=(1.0,)))


def test_recipe_from_yaml(tmp_path) -> None:
    path = tmp_path / "my recipe.yaml"
    path.write_text("preset: paper\nridge: 0.5\n")
    assert load_recipe(path) == PRESETS["paper"].model_copy(update={"ridge": 0.5})
    path.write_text("- not\n- a mapping\n")
    with pytest.raises(RecipeError, match="mapping"):
        load_recipe(path)


def test_a_method_without_its_preset_is_the_preset() -> None:
    assert load_recipe({"method": "paper"}) == PRESETS["paper"]
    assert load_recipe(PRESETS["paper"].model_dump()) == PRESETS["paper"]


def strained_crystals(n: int, seed: int) -> list[Atoms]:
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(n):
        atoms = bulk("C", "diamond", a=3.6, cubic=True)
        atoms.numbers[::2] = 8
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.03 * rng.standard_normal((3, 3))), scale_atoms=True)
        atoms.positions += 0.08 * rng.standard_normal(atoms.positions.shape)
        frames.append(atoms)
    return frames


@pytest.mark.slow_for("nequip")
def test_stress_of_crystals_is_matched_with_energies_and_forces(family, architecture) -> None:
    specialists = [
        s.with_calibration(strained_crystals(10, seed=k))
        for k, s in enumerate(family(architecture, 2, size=0.1))
    ]
    frames = strained_crystals(6, seed=9)
    graphs = batch_graphs([build_graph(atoms, specialists[0].cutoff) for atoms in frames])
    target = predict(specialists[0].potential, graphs).strain_derivative
    errors = []
    for weight in (0.0, 1.0):
        readout = {"width": 24, "blocks": 2, "copies": 2, "stress_weight": weight}
        merged, _ = merge(specialists, recipe("closed-form", readout=readout, weights=(1000.0, 1.0)))
        found = predict(merged.potential, graphs).strain_derivative
        errors.append(float((found - target).square().mean().sqrt()))
    assert errors[1] < 0.9 * errors[0]
