"""All methods side by side: right numbers, reasons for what is missing, no leaks, nothing measured twice."""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from hypothesis import given, settings
from hypothesis import strategies as st

from ase_gffmerge.data.frames import geometry_keys
from ase_gffmerge.errors import FramesError, IncompatibleSpecialistsError, RecipeError
from ase_gffmerge.evaluation.comparison import measurement
from ase_gffmerge.evaluation.comparison import measurement as comparison_store
from ase_gffmerge.evaluation.comparison.compare import Comparison, compare_methods
from ase_gffmerge.evaluation.comparison.inputs import (
    LabelledSet,
    check_leaks,
    frames_seen,
    make_merge_inputs,
    read_tests,
)
from ase_gffmerge.evaluation.comparison.measurement import RowStore, n_parameters, relative_cost
from ase_gffmerge.evaluation.comparison.report import footnotes, markdown, method_tables, plot_comparison
from ase_gffmerge.evaluation.table import Best
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.forcefield.provenance import Provenance
from ase_gffmerge.inference.errors import evaluate
from ase_gffmerge.merging.selection import known_ancestor
from ase_gffmerge.methods import METHODS, MergeInputs, MergeOutput, Method, Requirement
from ase_gffmerge.models import build_potential
from ase_gffmerge.storage.results import ResultStore
from helpers.structures import OWN_ARCHITECTURES
from helpers.toys import SHALLOW, labelled, rattled, relative, toy

NAMES = ("methanol", "water")


def frames(name: str, n: int, seed: int) -> tuple[Atoms, ...]:
    return tuple(labelled(atoms) for atoms in rattled(name, n, seed=seed, size=0.05))


def family(architecture: str = "painn") -> tuple[ForceField, list[ForceField]]:
    """A base, and two specialists whose weights differ a little from it."""
    base = toy(architecture, SHALLOW[architecture], dtype=torch.float32, level_of_theory="EMT")
    children = []
    for seed, (name, formula) in enumerate(zip(NAMES, ("CH3OH", "H2O"))):
        seen = frames(formula, 6, seed)
        provenance = Provenance(lineage=(base.fingerprint,), seen_frames=geometry_keys(seen))
        children.append(relative(base, name, seen[:4], seed=seed, provenance=provenance))
    return base, children


def unseen() -> tuple[LabelledSet, ...]:
    return tuple(
        LabelledSet(source=f"{name}.xyz", frames=frames(formula, 3, 10))
        for name, formula in zip(NAMES, ("CH3OH", "H2O"))
    )


@pytest.fixture
def tests() -> tuple[LabelledSet, ...]:
    return unseen()


@pytest.fixture
def merge_inputs() -> MergeInputs:
    return make_merge_inputs(family()[1], device="cpu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Other methods than the real ones, for the time of a test; the names of those that ran."""
    ran: list[str] = []

    def enter(name: str, run: Callable[[MergeInputs], MergeOutput], **traits: object) -> None:
        def noted(merge_inputs: MergeInputs, progress: object) -> MergeOutput:
            ran.append(name)
            progress(0.5, "half")  # type: ignore[operator]
            return run(merge_inputs)

        options = {"needs": frozenset(), "trains": False, "per_specialist": False, **traits}
        METHODS[name] = Method(name=name, citation="none", run=noted, **options)  # type: ignore[arg-type]

    def refuse(merge_inputs: MergeInputs) -> MergeOutput:
        raise IncompatibleSpecialistsError("these do not\nfit")

    saved = dict(METHODS)
    METHODS.clear()
    enter("first", lambda m: MergeOutput(potentials=(m.specialists[0].potential,), settings={"scale": 0.25}))
    enter(
        "apart",
        lambda m: MergeOutput(potentials=tuple(s.potential for s in m.specialists)),
        per_specialist=True,
    )
    enter(
        "rooted", lambda m: MergeOutput(potentials=(m.base.potential,)), needs=frozenset({Requirement.BASE})
    )  # type: ignore[union-attr]
    enter(
        "joint",
        lambda m: MergeOutput(potentials=(m.specialists[1].potential,)),
        trains=True,
        needs=frozenset({Requirement.LABELS}),
    )
    enter("picky", refuse)
    yield ran
    METHODS.clear()
    METHODS.update(saved)


@pytest.mark.parametrize("architecture", OWN_ARCHITECTURES)
def test_errors_are_those_of_the_potentials(architecture: str, tests, calls) -> None:
    _, specialists = family(architecture)
    comparison = compare_methods(make_merge_inputs(specialists, device="cpu"), tests)
    first, second = (s.potential for s in specialists)
    expected = {
        "specialist": [evaluate(first, tests[0].frames), evaluate(second, tests[1].frames)],
        "first": [evaluate(first, tests[0].frames), evaluate(first, tests[1].frames)],
        "apart": [evaluate(first, tests[0].frames), evaluate(second, tests[1].frames)],
    }
    for kind in ("force_mae", "force_rmse", "energy_mae"):
        for model, errors in comparison.errors(kind).items():
            values = [getattr(e, kind) for e in expected[model]]
            np.testing.assert_allclose([errors[name] for name in NAMES], values, rtol=1e-5)
    n = sum(p.numel() for p in first.parameters())
    assert comparison.to_dict()["parameters"] == {"specialist": n, "first": n, "apart": 2 * n}
    assert comparison.worst_ratio("specialist") == comparison.worst_ratio("apart") == 1
    assert comparison.told_apart == ("apart",)


def test_document(merge_inputs: MergeInputs, tests, calls) -> None:
    document = json.loads(json.dumps(compare_methods(merge_inputs, tests).to_dict()))
    assert list(document["force_mae"]) == ["specialist", "first", "apart"]
    for kind in ("force_mae", "force_rmse", "energy_mae"):
        assert all(list(row) == list(NAMES) and min(row.values()) > 0 for row in document[kind].values())
        assert kind in document["units"]
    assert set(document["seconds"]) == {"first", "apart"}
    assert min(document["seconds"].values()) >= 0
    assert set(document["cost"]) == {"specialist", "first", "apart"}
    assert document["cost"]["specialist"] == 1
    assert document["settings"] == {"first": {"scale": 0.25}}
    assert document["frames"] == {"methanol": 3, "water": 3}


def test_reasons_for_what_is_missing(merge_inputs: MergeInputs, tests, calls) -> None:
    skipped = compare_methods(merge_inputs, tests).skipped
    assert set(skipped) == {"rooted", "joint", "picky"}
    assert "--base" in skipped["rooted"]
    assert "--methods joint" in skipped["joint"]
    assert skipped["picky"] == "these do not fit"
    asked = compare_methods(merge_inputs, tests, ["joint", "first", "joint"])
    assert list(asked.rows) == ["specialist", "first"]
    assert "--labels" in asked.skipped["joint"]
    assert calls.count("first") == 2
    assert "joint" not in calls
    with pytest.raises(RecipeError, match="did you mean 'first'"):
        compare_methods(merge_inputs, tests, ["frist"])


def test_base_and_labels_when_they_are_at_hand(tests, calls) -> None:
    base, specialists = family()
    labelled = [
        LabelledSet(source=f"{k}", frames=frames(formula, 2, 77))
        for k, formula in enumerate(("CH3OH", "H2O"))
    ]
    merge_inputs = make_merge_inputs(specialists, base=base, labelled=labelled, device="cpu")
    comparison = compare_methods(merge_inputs, tests, ["rooted", "joint"], labelled=labelled)
    assert list(comparison.rows) == ["specialist", "rooted", "joint"]
    assert comparison.base == "base"
    with pytest.raises(IncompatibleSpecialistsError, match="'methanol' is not the base of water"):
        make_merge_inputs(specialists, base=specialists[0])


def test_bundled_base_is_found_by_its_fingerprint() -> None:
    pair = [ForceField.load(name) for name in ("rmd17-ethanol", "rmd17-malonaldehyde")]
    found = known_ancestor(pair)
    assert found is not None
    assert found.name == "rmd17-base"
    assert known_ancestor(family()[1]) is None


def test_mixtures_that_no_method_can_use() -> None:
    first, second = family()[1]
    with pytest.raises(IncompatibleSpecialistsError, match="at least two"):
        make_merge_inputs([first])
    with pytest.raises(IncompatibleSpecialistsError, match="levels of theory"):
        make_merge_inputs([first, replace(second, level_of_theory="DFT")])
    namesakes = make_merge_inputs([first, replace(second, name="methanol")], device="cpu")
    assert [s.name for s in namesakes.specialists] == ["methanol", "methanol-2"]


def test_notes_on_what_could_not_be_checked(tests, calls) -> None:
    specialists = [replace(s, provenance=Provenance()) for s in family()[1]]
    comparison = compare_methods(make_merge_inputs(specialists, device="cpu"), tests, ["first"])
    assert "training of methanol, water saw" in comparison.notes[0]
    assert any("training of methanol" in line for line in footnotes(comparison))


# -- cost and size --


def test_cost_is_the_ratio_of_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    base, (first, _) = family()
    rng = np.random.default_rng(0)

    def seconds(potential: object, graph: object) -> float:
        disturbed = 100.0 * (rng.random() < 0.2)
        return (3.0 if potential is first.potential else 2.0) + disturbed

    monkeypatch.setattr(measurement, "_seconds", seconds)
    assert relative_cost(first.potential, base.potential, frames("H2O", 1, 0)[0]) == 1.5


def test_measured_cost_of_twice_the_blocks_is_higher() -> None:
    small, large = (
        build_potential("painn", {**SHALLOW["painn"], "n_blocks": n}, (1, 6, 8)).eval() for n in (1, 6)
    )
    assert relative_cost(large, small, frames("CH3OH", 1, 0)[0]) > 1.5


def test_shared_parameters_count_once() -> None:
    potential = family()[0].potential
    n = sum(p.numel() for p in potential.parameters())
    assert n_parameters([potential, potential]) == n
    assert n_parameters([potential, deepcopy(potential)]) == 2 * n


# -- leaks --


SEEN = frames_seen(MergeInputs(specialists=tuple(family()[1])))


def moved(atoms: Atoms, seed: int, angle: float, shift: float) -> Atoms:
    """The same geometry, rotated, moved, with its atoms in another order."""
    copy = Atoms(atoms.numbers, atoms.positions)
    copy.rotate(angle, (1, 2, 3))
    copy.translate((shift, -shift, 1.0))
    return copy[np.random.default_rng(seed).permutation(len(copy))]


@given(seed=st.integers(0, 99), angle=st.floats(-180, 180), shift=st.floats(-50, 50), place=st.integers(0, 5))
@settings(deadline=None, max_examples=10)
def test_moved_training_frames_are_refused(seed: int, angle: float, shift: float, place: int) -> None:
    seen, (first, second) = frames("CH3OH", 6, 0), unseen()
    leaky = replace(second, frames=(*second.frames, moved(seen[place], seed, angle, shift)))
    with pytest.raises(FramesError, match=r"1 of 4 frames in water\.xyz \(frames 3\).*of 'methanol'"):
        check_leaks([first, leaky], SEEN)
    check_leaks([first, second], SEEN)


def test_every_place_of_seen_frames_is_searched(tests) -> None:
    base, specialists = family()
    base = replace(base, provenance=Provenance(seen_frames=geometry_keys(frames("CH3OH", 2, 50))))
    labelled = [LabelledSet(source=f"labels-{k}", frames=frames("H2O", 2, 60 + k)) for k in range(2)]
    unrecorded = [replace(s, provenance=replace(s.provenance, seen_frames=())) for s in specialists]
    merge_inputs = make_merge_inputs(unrecorded, base=base, labelled=labelled, device="cpu")
    seen = frames_seen(merge_inputs, labelled)
    check_leaks(tests, seen)
    for leaked, where in (
        (frames("CH3OH", 1, 0), "calibration frames of 'methanol'"),
        (frames("CH3OH", 1, 50), "training frames of 'base'"),
        (frames("H2O", 1, 61), "labelled training frames in labels-1"),
    ):
        with pytest.raises(FramesError, match=where):
            check_leaks([LabelledSet(source="x", frames=leaked)], seen)


def test_leaks_and_foreign_elements_stop_before_anything_runs(
    merge_inputs: MergeInputs, tests, calls
) -> None:
    leaky = LabelledSet(source="mine.xyz", frames=frames("H2O", 6, 1))
    with pytest.raises(FramesError, match=r"6 of 6 frames in mine\.xyz \(frames 0, 1, 2, 3, 4, \.\.\.\)"):
        compare_methods(merge_inputs, (tests[0], leaky))
    converted = LabelledSet(source="salt.xyz", frames=frames("NH3", 1, 1))
    with pytest.raises(FramesError, match=r"salt\.xyz cannot be used for 'water'.*contains N"):
        compare_methods(merge_inputs, (tests[0], converted))
    assert calls == []


def test_merged_potentials_have_seen_what_their_parents_saw() -> None:
    from ase_gffmerge.workflows.merge import merge

    pair = family()[1]
    merged, _ = merge(pair, "mean", device="cpu")
    assert set(merged.provenance.seen_frames) == {k for s in pair for k in s.provenance.seen_frames}


def test_bundled_specialists_and_their_test_frames_do_not_leak() -> None:
    names = ("rmd17-base", "rmd17-ethanol", "rmd17-malonaldehyde")
    merge_inputs = make_merge_inputs([ForceField.load(name) for name in names], device="cpu")
    seen = frames_seen(merge_inputs)
    check_leaks(read_tests(names), seen)
    assert [len(seen[f"the training frames of {name!r} or its ancestors"]) for name in names] == [
        4000,
        5000,
        5000,
    ]
    for specialist in merge_inputs.specialists:
        assert set(geometry_keys(specialist.calibration)) <= set(specialist.provenance.seen_frames)
    assert set(merge_inputs.specialists[0].provenance.seen_frames) < set(
        merge_inputs.specialists[1].provenance.seen_frames
    )


# -- resuming --


def test_finished_rows_are_not_measured_again(
    merge_inputs: MergeInputs, tests, calls, tmp_path: Path
) -> None:
    before = compare_methods(merge_inputs, tests, store=RowStore(tmp_path, merge_inputs, tests))
    assert sorted(calls) == ["apart", "first", "picky"]
    after = compare_methods(merge_inputs, tests, store=RowStore(tmp_path, merge_inputs, tests))
    assert sorted(calls) == ["apart", "first", "picky", "picky"], "only the one without a row runs again"
    assert after == before
    compare_methods(merge_inputs, tests, ["first"], store=RowStore(tmp_path, merge_inputs, tests, fresh=True))
    assert calls.count("first") == 2


def test_interrupted_comparison_goes_on(merge_inputs: MergeInputs, tests, calls, tmp_path: Path) -> None:
    def stop(fraction: float, text: str) -> None:
        if text.startswith("apart"):
            raise KeyboardInterrupt

    store = RowStore(tmp_path, merge_inputs, tests)
    with pytest.raises(KeyboardInterrupt):
        compare_methods(merge_inputs, tests, ["first", "apart"], store=store, progress=stop)
    assert calls == ["first"]
    compare_methods(merge_inputs, tests, ["first", "apart"], store=store)
    assert calls == ["first", "apart"]


def test_rows_of_something_else_are_not_taken(
    merge_inputs: MergeInputs, tests, calls, tmp_path: Path
) -> None:
    compare_methods(merge_inputs, tests, ["first"], store=RowStore(tmp_path, merge_inputs, tests))
    other_tests = (tests[0], replace(tests[1], frames=tests[1].frames[:2]))
    compare_methods(merge_inputs, other_tests, ["first"], store=RowStore(tmp_path, merge_inputs, other_tests))
    other = make_merge_inputs(family()[1][::-1], device="cpu")
    compare_methods(other, tests[::-1], ["first"], store=RowStore(tmp_path, other, tests[::-1]))
    assert calls == ["first"] * 3


def test_base_counts_only_for_methods_that_need_it(
    merge_inputs: MergeInputs, tests, calls, tmp_path: Path
) -> None:
    compare_methods(merge_inputs, tests, ["first"], store=RowStore(tmp_path, merge_inputs, tests))
    based = make_merge_inputs(family()[1], base=family()[0], device="cpu")
    compare_methods(based, tests, ["first", "rooted"], store=RowStore(tmp_path, based, tests))
    assert calls == ["first", "rooted"]


def test_version_of_the_merge_counts_only_for_methods_that_merge(
    merge_inputs: MergeInputs, tests, calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    METHODS["apart"] = replace(METHODS["apart"], merges=True)
    methods = ["first", "apart"]
    compare_methods(merge_inputs, tests, methods, store=RowStore(tmp_path, merge_inputs, tests))
    monkeypatch.setattr(comparison_store, "MERGE_VERSION", -1)
    compare_methods(merge_inputs, tests, methods, store=RowStore(tmp_path, merge_inputs, tests))
    assert calls == ["first", "apart", "apart"]


def test_methods_that_call_the_merge_say_so() -> None:
    """Methods that run the layer-wise solves are measured again when these change."""
    merging = {name for name, method in METHODS.items() if method.merges}
    assert merging == {"mean", "paper", "gffmerge", "regmean", "regmean++", "closed-form"}


def test_garbled_rows_are_measured_again(merge_inputs: MergeInputs, tests, calls, tmp_path: Path) -> None:
    store = RowStore(tmp_path, merge_inputs, tests)
    compare_methods(merge_inputs, tests, ["first"], store=store)
    key = store.key("first", METHODS["first"])
    for spoil in (
        lambda path: path.write_text("{"),
        lambda path: ResultStore(tmp_path).keep({key: {"errors": []}}),
    ):
        for path in tmp_path.glob("*.safetensors"):
            spoil(path)
        assert list(compare_methods(merge_inputs, tests, ["first"], store=store).rows) == [
            "specialist",
            "first",
        ]
    assert calls == ["first"] * 3


# -- tables and plot --


def test_tables_mark_the_best(merge_inputs: MergeInputs, tests, calls) -> None:
    comparison = compare_methods(merge_inputs, tests)
    force_mae, chosen, *_ = method_tables(comparison)
    assert [cells[0] for cells in force_mae.rows] == [
        "specialist", "first", "apart†", "rooted", "joint", "picky",
    ]  # fmt: skip
    assert all(len(cells) == len(force_mae.columns) for cells in force_mae.rows)
    columns = list(zip(*force_mae.rows, strict=True))
    errors = comparison.errors("force_mae")
    for name, column in zip(NAMES, columns[1:3]):
        assert column[0] == 1000 * errors["specialist"][name], "the specialists are the measure, not a method"
        marked = {cell.value for cell in column if isinstance(cell, Best)}
        assert marked == {1000 * min(errors["first"][name], errors["apart"][name])}
    text = markdown(comparison)
    assert "| scale 0.25 |" in text
    assert "skipped: these do not fit" in text
    best = min(errors["first"]["water"], errors["apart"]["water"])
    assert f" **{1000 * best:.1f}** |" in text
    assert "† must be told" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {len(force_mae.columns) + 1, len(NAMES) + 2, 3}
    assert [cells[0] for cells in chosen.rows] == ["first", "rooted", "joint", "picky"]


def many(k: int) -> Comparison:
    _, specialists = family()
    merge_inputs = make_merge_inputs(specialists, device="cpu")
    row = measurement.measure_specialists(merge_inputs, unseen())
    names = tuple(f"specialist number {i}" for i in range(k))
    wide = replace(row, errors=tuple(row.errors[i % 2] for i in range(k)))
    return Comparison(
        names=names, rows={"specialist": wide, "mean": wide}, skipped={}, frames=dict.fromkeys(names, 3)
    )


@pytest.mark.parametrize("k", [2, 4])
def test_plot(k: int, tmp_path: Path) -> None:
    path = plot_comparison(many(k), tmp_path / "new" / "bars.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_of_nothing_but_the_specialists(tmp_path: Path) -> None:
    alone = many(2)
    bare = replace(alone, rows={"specialist": alone.rows["specialist"]}, skipped={"mean": "no"})
    assert plot_comparison(bare, tmp_path / "bars.png").stat().st_size > 1000
    assert "skipped: no" in markdown(bare)
