"""The research script on few frames of the bundled specialists: its pieces agree with the product's, and it resumes."""

import importlib
import json
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from ase_gffmerge.forcefield.force_field import ForceField, bundled_test_frames
from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.inference.errors import evaluate
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.merging.calibration import run_stage, stage_inputs
from ase_gffmerge.merging.layerwise import align_layers
from ase_gffmerge.merging.readout_fit import match_forces
from ase_gffmerge.merging.recipe import ReadoutOptions, Recipe
from ase_gffmerge.merging.tangents import Directions

NAMES = ("rmd17-ethanol", "rmd17-malonaldehyde")
SMALL = ReadoutOptions(width=12, inputs=192, copies=1, temperature=0.0)


@pytest.fixture(scope="module")
def research():
    """``research(name)`` imports a module of the research package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "md_examples" / "benchmarks")
        yield lambda name: importlib.import_module(f"research.{name}")


@pytest.fixture(scope="module")
def bench(research, tmp_path_factory):
    """Five calibration frames, five further frames and three test frames of each bundled specialist, in float64."""
    specialists = [ForceField.load(name, dtype=torch.float64) for name in NAMES]
    return research("bench").Bench(
        specialists=tuple(s.with_calibration(s.calibration[:5]) for s in specialists),
        pools=tuple(s.calibration[5:10] for s in specialists),
        tests=tuple(tuple(bundled_test_frames(name)[:3]) for name in NAMES),
        folder=tmp_path_factory.mktemp("research"),
    )


def dot(a, b):
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))


def assert_adjoint(problem, generator):
    """⟨J v, u⟩ = ⟨v, Jᵀ u⟩ for random v and u, and J v is the change of the residual."""
    v = {k: torch.randn(p.shape, generator=generator).to(p) for k, p in problem.parameters.items()}
    u = [torch.randn(r.shape, generator=generator).to(r) for r in problem.residual()]
    forward, back = problem.forward(v), problem.transpose(u)
    assert dot(forward, u) == pytest.approx(sum(float((v[k] * back[k]).sum()) for k in v), rel=1e-8)


def test_the_open_readout_fit_is_the_products(research, bench):
    trunk = bench.trunk
    setting = research("readout_fit").Setting(options=SMALL)
    ours = research("readout_fit").fitted(trunk, setting).potentials
    product, _, _ = match_forces(trunk.potential, trunk.calibration_sets, SMALL)
    frames = bench.tests[0]
    assert ours[0] is ours[1]
    found, expected = (predict_frames(p, frames) for p in (ours[0], product))
    np.testing.assert_allclose(np.concatenate(found.forces), np.concatenate(expected.forces), atol=1e-6)


def test_features_differentiated_forward_give_the_products_rows(research, bench):
    features, fit = research("features"), research("readout_fit")

    class Plain(features.FeatureReadout):
        def phi(self, z, species):
            return torch.nn.functional.silu(self.lift(z))

    plain = fit.with_wide_readout(bench.trunk.potential, SMALL)
    general = features.with_readout(Plain, bench.trunk.potential, SMALL)
    general.readout.lift.load_state_dict(plain.readout.lift.state_dict())
    graph = batch_graphs([build_graph(a, plain.hyper.cutoff, dtype=plain.dtype) for a in bench.pools[0][:2]])
    target = predict(bench.specialists[0].potential, graph)
    directions = Directions.draw(graph, 4, stress_weight=0.0, seed=0)
    weights = dict(elements=torch.arange(4), frame_weights=torch.ones(2).double(), energy_weight=3.0)
    rows = [features.feature_rows(p, graph, target, directions, **weights) for p in (plain, general)]
    torch.testing.assert_close(rows[0], rows[1])


@pytest.mark.parametrize("kind", ["norms", "gated", "elements"])
def test_rows_of_every_kind_of_features_predict_what_the_fit_changes(research, bench, kind):
    """Energies and forces are linear in θ and c, so rows times the solution are their changes, of energies and of work."""
    features, readout, fit = research("features"), research("readout"), research("readout_fit")
    settings = {
        "norms": {"with_random_feature_readout": features.with_norms},
        "gated": {
            "with_random_feature_readout": partial(features.with_readout, features.GatedReadout),
            "lift": readout.gated,
        },
        "elements": {
            "with_random_feature_readout": partial(features.with_readout, features.ElementReadout),
            "lift": readout.per_element,
        },
    }
    before = bench.trunk.potential
    after = fit.fitted(bench.trunk, fit.Setting(options=SMALL, **settings[kind])).potentials[0]
    frames, elements = bench.tests[1][:2], torch.arange(len(after.species))
    graph = batch_graphs([build_graph(a, after.hyper.cutoff, dtype=after.dtype) for a in frames])
    directions = Directions.draw(graph, 5, stress_weight=0.0, seed=1)
    old, new = predict(before, graph), predict(after, graph)
    ones = torch.ones(len(frames)).double()
    rows, _ = features.feature_rows(
        after, graph, new, directions, elements=elements, frame_weights=ones, energy_weight=1.0
    )
    coefficients = torch.cat([after.readout.theta.flatten(), after.readout.constants])
    slopes, energies = (rows @ coefficients).split([5 * len(frames), len(frames)])
    assert energies.abs().max() > 0
    torch.testing.assert_close(slopes.view(5, -1), directions.work(graph, new) - directions.work(graph, old))
    torch.testing.assert_close(energies * len(frames[0]) ** 0.5, new.energy - old.energy)


def test_shared_theta_is_one_vector_for_all_elements(research, bench):
    fit = research("readout_fit")
    potential = fit.fitted(bench.trunk, fit.Setting(options=SMALL, shared_theta=True)).potentials[0]
    present = torch.as_tensor([potential.species.index(z) for z in (1, 6, 8)])
    theta = potential.readout.theta[present]
    assert theta.abs().max() > 0
    torch.testing.assert_close(theta, theta[:1].expand_as(theta))


def test_rotation_onto_undoes_a_rotation(research, rng):
    points = rng.standard_normal((6, 3))
    turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    turn *= np.sign(np.linalg.det(turn))
    np.testing.assert_allclose(
        points @ turn @ research("copies").rotation_onto(points @ turn, points), points
    )


def test_thermal_copies_move_stiff_bonds_least(research, bench):
    calibration_set = bench.trunk.calibration_sets[0]
    options = SMALL.model_copy(update={"copies": 50})
    frames = calibration_set.specialist.calibration
    changes = {}
    for name in ("thermal", "rattled"):
        make = (
            partial(research("copies").thermal, scale=0.2)
            if name == "thermal"
            else research("copies").rattled
        )
        copies = make(frames[:1], calibration_set, options)
        distances = np.array([copy.get_all_distances() for copy in copies]) - frames[0].get_all_distances()
        changes[name] = distances.std(0)
    bonded = (frames[0].get_all_distances() < 1.6) & (frames[0].get_all_distances() > 0)
    far = frames[0].get_all_distances() > 2.6
    ratio = {name: change[bonded].mean() / change[far].mean() for name, change in changes.items()}
    assert ratio["thermal"] < 0.7 * ratio["rattled"]


def test_layers_with_unit_weights_are_the_products(research, bench):
    stage = bench.trunk.potential.stages[0]
    recipe, layerwise = Recipe(), research("layerwise")
    trunk = research("trunk").build_trunk(
        bench.specialists, recipe, solve_stage=lambda name, stage, *_: stage
    )
    calibration_sets = layerwise.build_calibration(
        bench.specialists, trunk.potential, [1.0, 1.0], directions=2
    )
    originals = [s.potential.stages[0] for s in bench.specialists]
    ours, product = deepcopy(trunk.potential.stages[0]), deepcopy(trunk.potential.stages[0])
    with torch.no_grad():
        layerwise.solve_layers("stages.0", ours, originals, calibration_sets, recipe)
        align_layers(
            "stages.0", product, originals, calibration_sets, recipe, run=run_stage, inputs=stage_inputs
        )
    assert not torch.equal(ours.out.weight, trunk.potential.stages[0].out.weight)
    torch.testing.assert_close(ours.state_dict(), product.state_dict(), rtol=1e-6, atol=1e-9)
    assert stage is not ours


@pytest.mark.parametrize("anchor", ["mean", "base", "task arithmetic", NAMES[1]])
def test_where_the_solves_start(research, bench, anchor):
    """Without a step towards the specialists, the trunk is its starting point."""
    trunk = research("trunk").build_trunk(
        bench.specialists, Recipe(), solve_stage=lambda name, stage, *rest: stage, anchor=anchor
    )
    base = ForceField.load("rmd17-base", dtype=torch.float64)
    models = [base.potential, *(s.potential for s in bench.specialists)]
    weights = [model.stages[2].out.weight for model in models]
    expected = {"mean": (weights[1] + weights[2]) / 2, "base": weights[0], NAMES[1]: weights[2]}
    found = trunk.potential.stages[2].out.weight
    if anchor in expected:
        torch.testing.assert_close(found, expected[anchor])
    else:
        change, (one, other) = found - weights[0], [w - weights[0] for w in weights[1:]]
        scale = (change * (one + other)).sum() / (one + other).square().sum()
        torch.testing.assert_close(change, scale * (one + other))
        assert scale > 0


@pytest.mark.parametrize("index", [2, 3])
def test_a_stage_with_random_hidden_features_starts_as_it_was(research, bench, index):
    potential, hidden = bench.trunk.potential, research("hidden_width")
    scene = bench.trunk.calibration_sets[0].batches[0]
    state, edges = potential.embed(scene.graph), scene.split(scene.geometry.value)[1]
    for stage in potential.stages[:index]:
        state = stage(state, edges)
    stage = potential.stages[index]
    with torch.no_grad():
        wide = hidden.widened_stage(stage, hidden.hidden_rows(stage, state), 7)
        torch.testing.assert_close(wide(state, edges), stage(state, edges))
        wide.out.weight[:, -7:] = 0.1
        assert not torch.allclose(wide(state, edges)[0], stage(state, edges)[0])


def test_widened_stages_are_solved_to_their_end(research, bench):
    trunk = research("trunk").build_trunk(
        bench.specialists, Recipe(), solve_stage=research("hidden_width").with_random_hidden(4)
    )
    kinds = [type(stage).__name__ for stage in trunk.potential.stages]
    assert kinds == ["Message", "WideUpdate", *["WideMessage", "WideUpdate"] * 2]
    assert all(torch.isfinite(p).all() for p in trunk.potential.parameters())


def test_low_rank_corrections_have_that_rank(research, bench):
    trunk = bench.trunk
    own = research("layerwise").corrected(trunk.potential, trunk.calibration_sets[1], Recipe(), 2)
    change = own.stages[1].U.weight - trunk.potential.stages[1].U.weight
    assert torch.linalg.matrix_rank(change, rtol=1e-8) == 2


def test_linearisations_are_adjoint(research, bench):
    generator = torch.Generator().manual_seed(0)
    gauss_newton, trunk = research("gauss_newton"), bench.trunk
    batches = gauss_newton.labelled(trunk.calibration_sets[0], bench.pools[0][:2], torch.float64)
    assert_adjoint(gauss_newton.ForceProblem(trunk.potential, batches), generator)


def test_a_gauss_newton_step_lowers_the_residual(research, bench):
    gauss_newton, trunk = research("gauss_newton"), bench.trunk
    moved = gauss_newton.linearised(
        trunk.potential, trunk.calibration_sets, iterations=3, copies=0, damping=1e-3
    )
    for k, calibration_set in enumerate(trunk.calibration_sets):
        batches = gauss_newton.labelled(
            calibration_set, calibration_set.specialist.calibration, torch.float64
        )
        norms = [
            dot(r, r)
            for r in (gauss_newton.ForceProblem(p, batches).residual() for p in (trunk.potential, moved))
        ]
        assert norms[1] < 0.5 * norms[0], k


def test_rows_are_kept_and_not_run_again(research, script, bench):
    runner, trial = script("research_convex"), research("bench").Trial
    fit = research("readout_fit")
    calls = []

    def run(bench):
        calls.append(bench)
        return fit.fitted(bench.trunk, fit.Setting(options=SMALL))

    trials = [trial(name="tiny", family="test", changes="width 12", run=run, costs=True)]
    for _ in range(2):
        rows = runner.run_trials(bench, trials)
    assert len(calls) == 1
    row = json.loads((bench.folder / "trials.json").read_text())[bench.identity]["tiny"]
    assert row == rows.found["tiny"]
    expected = 1000 * evaluate(run(bench).potentials[0], bench.tests[0]).force_mae
    assert row["force_mae"]["rmd17-ethanol"] == pytest.approx(expected)
    assert f"{expected:.1f}" in research("rows").markdown([row])
    assert research("rows").plot([row], bench.folder / "plot.png").stat().st_size > 1000


def test_trials_have_distinct_names_and_unknown_ones_are_refused(research, script, tmp_path, capsys):
    names = [trial.name for trial in research("catalogue").all_trials()]
    assert len(set(names)) == len(names)
    main = script("research_convex").main
    assert main(["nowhere", "--out", str(tmp_path), "--list"]) == 0
    assert "copies 2" in capsys.readouterr().out
    assert main(["nowhere", "--out", str(tmp_path), "--trials", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_closing_maps_match_dense_least_squares_of_the_weighted_rows(research):
    """Two terms with two state parts each; the oracle builds the Jacobian column by column and calls lstsq."""
    messages = research("messages")
    generator = torch.Generator().manual_seed(0)
    d, m = 4, 3
    maps = [torch.randn(11, d * m, generator=generator, dtype=torch.float64) for _ in range(4)]
    offsets = [torch.randn(11, generator=generator, dtype=torch.float64) for _ in range(4)]
    targets = [torch.randn(11, generator=generator, dtype=torch.float64) for _ in range(4)]
    scales = [(1.0, 0.3), (2.0, 0.5)]

    def output(k: int):
        return lambda theta: tuple(maps[2 * k + c] @ theta.flatten() + offsets[2 * k + c] for c in range(2))

    terms = [
        messages.MessageTerm(output(k), (targets[2 * k], targets[2 * k + 1]), scales[k]) for k in range(2)
    ]
    prior = torch.zeros(d, m, dtype=torch.float64)
    metric = torch.eye(d, dtype=torch.float64)
    solution = messages.solve_messages(
        terms, prior, metric=metric, ridge=0.0, iterations=200, tolerance=1e-12
    )
    factors = np.sqrt([1.0, 0.3, 2.0, 0.5])
    a = np.vstack([f * x.numpy() for f, x in zip(factors, maps)])
    b = np.concatenate([f * (y - o).numpy() for f, y, o in zip(factors, targets, offsets)])
    expected, rest, *_ = np.linalg.lstsq(a, b, rcond=None)
    np.testing.assert_allclose(solution.theta.flatten().numpy(), expected, rtol=1e-8, atol=1e-10)
    target = sum(f**2 * float(y.square().sum()) for f, y in zip(factors, targets))
    np.testing.assert_allclose(solution.residual_after, rest[0] / target, rtol=1e-8)
    assert solution.residual_after < solution.residual_before
