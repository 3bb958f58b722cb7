"""Fewer channels and blocks in closed form."""

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ase_gffmerge import ForceField, compress, merge
from ase_gffmerge.cli import app
from ase_gffmerge.errors import FramesError, IncompatibleSpecialistsError, RecipeError
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.merging.calibration import calibration_graphs
from ase_gffmerge.merging.pruning import Pruned, column_subset, kept_blocks
from ase_gffmerge.models.affine_maps import affine_maps
from ase_gffmerge.models.channel_groups import channel_groups, permuted, renamed
from helpers.toys import SMALL, family, moved, rattled, toy

ARCHITECTURES = ("painn", "nequip", "escaip")
PLAIN = {"preset": "closed-form", "readout": None, "directions": 2}


def forces(potential, frames) -> np.ndarray:
    return np.concatenate(predict_frames(potential, frames).forces)


def teacher(architecture: str, **hyper) -> ForceField:
    """Weights that are not at their initial values, with frames of two molecules."""
    made = toy(architecture, {**SMALL[architecture], **hyper})
    moved(made.potential, seed=1, size=0.2)
    return made.with_calibration(rattled("CH3CH2OH", 4) + rattled("HCOOH", 4, seed=1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_width_gives_the_model_back(architecture):
    given = teacher(architecture)
    same, report = compress(given, channels=given.potential.hyper.channels, recipe=PLAIN)
    frames = rattled("CH3CHO", 3, seed=5)
    np.testing.assert_allclose(forces(same.potential, frames), forces(given.potential, frames), atol=1e-10)
    assert report.n_parameters == report.teacher_parameters
    assert not any(report.lost.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.slow_for("escaip", "nequip")
def test_half_the_channels_come_closer_by_every_solve(architecture):
    given = teacher(architecture)
    half = given.potential.hyper.channels // 2
    frames = given.calibration
    expected = forces(given.potential, frames)
    errors = []
    for recipe in (
        PLAIN | {"messages": False},
        PLAIN,
        PLAIN | {"readout": {"width": 48, "copies": 1}},
    ):
        small, report = compress(given, channels=half, recipe=recipe)
        errors.append(np.square(forces(small.potential, frames) - expected).mean() ** 0.5)
        assert report.disagreement.force_rmse == pytest.approx(errors[-1])
    cut = pruned(given, half).student
    assert errors[2] < errors[1] < np.square(forces(cut, frames) - expected).mean() ** 0.5
    assert errors[1] < 1.2 * errors[0]
    assert report.n_parameters < 0.7 * report.teacher_parameters


def pruned(given: ForceField, channels: int, blocks: int | None = None) -> Pruned:
    sizes = given.potential.hyper.to_dict() | {"channels": channels}
    if blocks:
        sizes |= {"n_blocks": blocks}
    return Pruned.of(given.potential, list(calibration_graphs(given)), sizes)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_and_the_last_block_and_the_most_active_ones_stay(architecture):
    given = teacher(architecture, n_blocks=4)
    with torch.no_grad():  # the second block does (nearly) nothing
        for name, parameter in given.potential.named_parameters():
            if architecture == "painn" and name.startswith(("stages.2.out", "stages.3.out")):
                parameter.zero_()
            if architecture == "escaip" and name.startswith(("stages.2.out_node", "stages.2.ffn_node.out")):
                parameter.zero_()
    blocks = kept_blocks(given.potential, list(calibration_graphs(given)), 3)
    assert blocks[0] == 0
    assert blocks[-1] == 3
    if architecture != "nequip":
        assert blocks == (0, 2, 3)
    cut = pruned(given, given.potential.hyper.channels, 3)
    assert len(cut.names) >= len(cut.student.stages)
    assert [cut.names[name] for name, _ in cut.student.named_stages()][-1] == [
        name for name, _ in given.potential.named_stages()
    ][-1]


def test_what_a_block_did_that_is_left_out_the_next_one_learns():
    given = teacher("painn", n_blocks=3)
    whole = given.potential.hyper.channels
    frames, recipe = given.calibration, PLAIN
    small, _ = compress(given, channels=whole, blocks=2, recipe=recipe)
    cut = pruned(given, whole, 2).student
    expected = forces(given.potential, frames)
    errors = [np.square(forces(p, frames) - expected).mean() for p in (small.potential, cut)]
    assert errors[0] < 0.5 * errors[1]


def test_a_merge_with_a_wide_readout_is_compressed_on_the_frames_that_are_given():
    pair = family("painn", 2, frames=5)
    wide = {"preset": "closed-form", "readout": {"width": 24, "blocks": 2, "copies": 1}, "directions": 2}
    merged, _ = merge(pair, {**wide, "select": False})
    frames = [atoms for specialist in pair for atoms in specialist.calibration]
    small, report = compress(
        merged,
        channels=6,
        frames=frames,
        recipe={"preset": "closed-form", "readout": {"width": 32, "copies": 1}},
    )
    assert small.potential.hyper.readout_width == 32
    assert report.disagreement.force_rmse < 0.5 * report.disagreement.force_rms
    assert small.extrapolation_grade is not None
    assert small.provenance.lineage[-1] == merged.fingerprint
    with pytest.raises(RecipeError, match="force-matched readout"):
        compress(merged, channels=6, frames=frames, recipe=PLAIN)
    with pytest.raises(FramesError, match="no calibration frames"):
        compress(merged, channels=6)


@pytest.mark.parametrize(
    ("sizes", "recipe"),
    [
        ({"channels": 9}, PLAIN),
        ({"channels": 0}, PLAIN),
        ({"channels": 4, "blocks": 1}, PLAIN),
        ({"channels": 4, "blocks": 3}, PLAIN),
        ({"channels": 4}, "mean"),
    ],
)
def test_what_cannot_be_left_is_refused(sizes, recipe):
    with pytest.raises(RecipeError):
        compress(teacher("painn"), recipe=recipe, **sizes)


@pytest.mark.parametrize("hyper", [{"cutoff": 3.0}, {"n_radial": 3}])
def test_what_is_no_channel_cannot_be_left_out(hyper):
    teacher = toy("painn", SMALL["painn"]).with_calibration(rattled("CH4", 2))
    with pytest.raises(RecipeError, match=f"would change here .{next(iter(hyper))} "):
        compress(teacher, channels=4, hyper=hyper, recipe={"readout": None})


def test_a_single_channel_is_enough():
    teacher = toy("painn", SMALL["painn"]).with_calibration(rattled("CH4", 2))
    small, _ = compress(teacher, channels=1, recipe={"readout": None})
    assert np.isfinite(predict_frames(small.potential, teacher.calibration).energies).all()


def test_architectures_without_declared_channels_are_refused():
    given = replace(toy("chgnet"), calibration=rattled("CH3CH2OH", 2))
    with pytest.raises(IncompatibleSpecialistsError, match="chgnet"):
        compress(given, channels=3, recipe=PLAIN)


def test_greedy_columns_are_good_and_exact_where_columns_repeat():
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    rows = torch.cat(
        [basis, basis[:, [0, 2]], basis @ torch.randn(3, 2, generator=generator).double()], dim=1
    )
    chosen, lost = column_subset(rows.T @ rows, 3)
    assert lost < 1e-12
    assert torch.linalg.matrix_rank(rows[:, chosen]) == 3
    noisy = torch.randn(40, 7, generator=generator, dtype=torch.float64) * torch.arange(1.0, 8.0)

    def left(columns) -> float:
        some = noisy[:, list(columns)]
        return float((noisy - some @ torch.linalg.lstsq(some, noisy).solution).square().sum())

    chosen, lost = column_subset(noisy.T @ noisy, 3)
    assert lost == pytest.approx(left(chosen.tolist()) / float(noisy.square().sum()), rel=1e-9)
    assert left(chosen.tolist()) < 1.2 * min(map(left, combinations(range(7), 3)))


def test_names_of_parts():
    names = {"stages.1": "stages.3", "readout.out.0": "readout.out.2"}
    assert renamed("stages.1.linear_up[0e]", names) == "stages.3.linear_up[0e]"
    assert renamed("stages.11.out", names) == "stages.11.out"
    assert renamed("readout.out.0", names) == "readout.out.2"


def test_channels_of_escaip_may_be_permuted():
    given = teacher("escaip")
    groups = channel_groups(given.potential)
    assert set(groups.maps) == set(affine_maps(given.potential))
    orders = {group: torch.randperm(n) for group, n in groups.sizes.items()}
    moved_channels = permuted(given.potential, orders)
    frames = given.calibration[:2]
    np.testing.assert_allclose(forces(moved_channels, frames), forces(given.potential, frames), atol=1e-12)


def test_the_command(tmp_path):
    teacher("painn").save(tmp_path / "large.safetensors")
    (tmp_path / "plain.yaml").write_text("preset: closed-form\nreadout: null\ndirections: 1\n")
    out = tmp_path / "small.safetensors"
    call = ["compress", str(tmp_path / "large.safetensors"), "--channels", "4", "--out", str(out), "--json"]
    result = CliRunner().invoke(app, [*call, "--recipe", str(tmp_path / "plain.yaml")])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["hyper"]["channels"] == 4
    assert ForceField.load(out).potential.hyper.channels == 4
