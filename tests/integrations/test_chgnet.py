"""CHGNet: the vendor's results, the vendor's files, and merges."""

import json
import pickle
import warnings
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from ase_gffmerge import ForceField, GFFMergeCalculator, merge, merge_calculators
from ase_gffmerge.errors import ArgumentError, CompileWarning, FileFormatError, MergeWarning
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.integrations import ADAPTERS, chgnet
from ase_gffmerge.integrations.load import export, from_vendor, load_force_field
from ase_gffmerge.testing import check_calculator, check_integration
from helpers.vendor_models import STRIPPED_AND_DEFAULT, assert_same, merged_saved_cached_and_exported, moved

pytest.importorskip("chgnet", reason="needs the package chgnet: pip install chgnet")
warnings.filterwarnings("ignore", category=DeprecationWarning)


def rocksalt(seed: int, *, symbols: str = "NaCl", a: float = 5.6) -> Atoms:
    crystal = bulk(symbols, "rocksalt", a, cubic=True)
    crystal.rattle(0.15, seed=seed)
    return crystal


def primitive(symbols: str, a: float, *, seed: int) -> Atoms:
    crystal = bulk(symbols, "rocksalt", a)
    crystal.rattle(0.15, seed=seed)  # angles of 180 degrees have no derivative
    return crystal


def phosphate() -> Atoms:
    """Three elements, angles, a skewed cell."""
    atoms = molecule("PH3")
    atoms.numbers[1:] = (8, 8, 3)
    atoms.positions *= 1.2
    atoms.set_cell([[5.0, 0, 0], [1.0, 5.5, 0], [0.4, -0.3, 4.8]])
    atoms.pbc = True
    return atoms


STRUCTURES = {"salt": lambda: rocksalt(1), "phosphate": phosphate, "metal": lambda: bulk("Cu", a=3.7)}


@pytest.fixture(scope="module")
def vendor_calculator():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from chgnet.model import CHGNet, CHGNetCalculator

        return CHGNetCalculator(CHGNet.load(verbose=False), use_device="cpu", return_site_energies=True)


@pytest.mark.filterwarnings("ignore")
def test_the_other_pretrained_weights_give_the_vendors_results():
    from chgnet.model import CHGNet, CHGNetCalculator

    theirs, ours = rocksalt(1), rocksalt(1)
    theirs.calc = CHGNetCalculator(CHGNet.load(model_name="r2scan", verbose=False), use_device="cpu")
    ours.calc = GFFMergeCalculator("chgnet:r2scan", device="cpu")
    np.testing.assert_allclose(ours.get_forces(), theirs.get_forces(), atol=1e-4)
    assert ours.get_potential_energy() == pytest.approx(theirs.get_potential_energy(), abs=2e-6 * len(ours))


def test_compiling_is_refused_once_with_the_same_results(original):
    with pytest.warns(CompileWarning, match="not compiled") as caught:
        calc = GFFMergeCalculator(original, device="cpu", compile=True)
    assert len(caught) == 1
    plain = GFFMergeCalculator(original, device="cpu")
    assert calc.get_potential_energy(rocksalt(1)) == plain.get_potential_energy(rocksalt(1))


@pytest.fixture(scope="module")
def original() -> ForceField:
    return from_vendor("chgnet", "0.3.0")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", STRIPPED_AND_DEFAULT)
def test_relatives_of_the_published_network_are_merged_saved_cached_and_exported(recipe, tmp_path):
    from chgnet.model import CHGNetCalculator

    relatives = [moved(published(), seed=seed, size=0.01) for seed in (1, 2)]
    crystals = [primitive("NaCl", 5.6, seed=1), primitive("LiF", 4.0, seed=2)]
    calc, path = merged_saved_cached_and_exported("chgnet", relatives, crystals, recipe, tmp_path)
    for crystal in crystals:
        theirs = CHGNetCalculator.from_file(str(path), use_device="cpu")
        assert_same(calc, theirs, crystal, tolerance=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_the_adapter_does_what_its_users_rely_on(tmp_path):
    from chgnet.model import CHGNetCalculator

    path = checkpoint(tmp_path / "small.pth.tar", build())

    def served(path):
        return CHGNetCalculator.from_file(str(path), use_device="cpu")

    check_integration(
        ADAPTERS["chgnet"],
        path,
        [rocksalt(1), rocksalt(2, symbols="LiF", a=4.0)],
        calculator=served(path),
        served_by=served,
        suffix=".pth.tar",
        tolerance=1e-4,
    ).raise_if_failed()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(STRUCTURES))
def test_results_are_the_vendors(original, vendor_calculator, name):
    theirs, ours = STRUCTURES[name](), STRUCTURES[name]()
    theirs.calc, ours.calc = vendor_calculator, GFFMergeCalculator(original, device="cpu")
    n = len(ours)
    assert ours.get_potential_energy() == pytest.approx(theirs.get_potential_energy(), abs=2e-6 * n)
    np.testing.assert_allclose(ours.get_forces(), theirs.get_forces(), atol=1e-4)
    np.testing.assert_allclose(ours.get_stress(), theirs.get_stress(), atol=1e-6)
    np.testing.assert_allclose(ours.get_potential_energies(), theirs.get_potential_energies(), atol=1e-5)


@pytest.mark.slow
def test_the_contract_holds():
    """Tolerances of a short-ranged network with steep third derivatives."""
    calc = GFFMergeCalculator("chgnet:0.3.0", device="cpu", dtype="float64")
    check_calculator(
        calc, bulk("NaCl", "rocksalt", a=5.5), forces_tol=1e-5, stress_tol=1e-6
    ).raise_if_failed()


SMALL = {
    f"{kind}_dim": 16
    for kind in ("atom_fea", "bond_fea", "angle_fea", "atom_conv_hidden", "bond_conv_hidden")
}
SMALL |= {"mlp_hidden_dims": [16], "num_radial": 7, "num_angular": 7, "n_conv": 3, "atom_graph_cutoff": 4.0}


def build(*, scale: float = 1.0, **changes) -> torch.nn.Module:
    """A small random network, its energies but for those of the elements multiplied."""
    from chgnet.model import CHGNet

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CHGNet(**(SMALL | changes))
    model.mlp.layers[-1].weight.data *= scale
    return model


def published() -> torch.nn.Module:
    from chgnet.model import CHGNet

    return CHGNet.load(verbose=False)


def checkpoint(path: Path, model: torch.nn.Module, **arguments) -> Path:
    """What the vendor's trainer saves: fine-tuned weights, optimiser and history beside them."""
    content = model.as_dict()
    content["model_args"] = {**content["model_args"], **arguments}
    torch.save({"model": content, "optimizer": {}, "trainer_args": {"targets": "efsm"}}, path)
    return path


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_goes_in_and_out_bitwise(tmp_path):
    model = moved(published(), seed=3, size=0.02)
    path = checkpoint(tmp_path / "fine tuned é.pth.tar", model)
    specialist = load_force_field(f"chgnet:{path}")
    assert specialist.name == "fine tuned é"
    assert specialist.provenance.origin.startswith("chgnet")
    written = export(specialist, tmp_path / "again.pth.tar")
    from chgnet.model import CHGNet

    again = CHGNet.from_file(str(written))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    copy = load_force_field(specialist.save(tmp_path / "copy.safetensors"))
    assert copy.fingerprint == specialist.fingerprint
    assert copy.provenance.origin == specialist.provenance.origin
    assert from_vendor("chgnet", again).fingerprint == specialist.fingerprint


class Trap:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.filterwarnings("ignore")
def test_files_that_are_no_chgnet_are_refused(tmp_path, capsys):
    good = checkpoint(tmp_path / "good.pth.tar", model := published())
    capsys.readouterr()
    torch.save({"model": Trap()}, tmp_path / "trap.pth.tar")
    torch.save({"weights": 1}, tmp_path / "other.pth.tar")
    torch.save([1], tmp_path / "list.pth.tar")
    (tmp_path / "cut.pth.tar").write_bytes(good.read_bytes()[:1000])
    (tmp_path / "pickle.pth.tar").write_bytes(pickle.dumps({"model": 1}, protocol=0))
    checkpoint(tmp_path / "gelu.pth.tar", model, non_linearity="gelu")
    checkpoint(tmp_path / "narrow.pth.tar", model, bond_fea_dim=32)
    content = torch.load(good)
    content["model"]["state_dict"]["atom_embedding.embedding.weight"][0, 0] = torch.nan
    torch.save(content, tmp_path / "nan.pth.tar")
    capsys.readouterr()
    for name, words in {
        "trap": "trust=True",
        "cut": "cannot be read",
        "other": "no CHGNet",
        "list": "not a dictionary",
        "pickle": "no CHGNet|cannot be read",
        "gelu": "non_linearity",
        "narrow": "widths",
        "missing": "no file",
        "nan": "NaN or infinity",
    }.items():
        with pytest.raises(FileFormatError, match=words):
            load_force_field(f"chgnet:{tmp_path / name}.pth.tar")
    with pytest.raises(FileFormatError, match="is a folder"):
        load_force_field(f"chgnet:{tmp_path}")
    with pytest.raises(FileFormatError, match="a list is no CHGNet"):
        from_vendor("chgnet", [good])
    assert capsys.readouterr().out == ""
    assert next(iter(ADAPTERS)) == "chgnet"


def perturbed(original: ForceField, seed: int, frames: list[Atoms]) -> ForceField:
    potential = deepcopy(original.potential)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in potential.named_parameters():
        if not name.endswith("frequencies"):
            size = 0.1 * parameter.abs().mean()
            parameter.data.add_(size * torch.randn(parameter.shape, generator=generator))
    return ForceField(name=f"s{seed}", potential=potential, calibration=tuple(frames))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> ForceField:
    """A small random CHGNet, which merges in seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = checkpoint(tmp_path_factory.mktemp("small") / "small.pth.tar", build())
    return load_force_field(f"chgnet:{path}")


@pytest.fixture(scope="module")
def pair(small) -> list[ForceField]:
    """Two children with salts of their own."""
    salts = (("NaCl", 5.6), ("LiF", 4.0))
    return [
        perturbed(small, k, [rocksalt(10 * k + i, symbols=symbols, a=a) for i in range(5)])
        for k, (symbols, a) in enumerate(salts)
    ]


QUICK = {"preset": "closed-form", "select": False, "readout": {"width": 64}, "directions": 1}


@pytest.mark.filterwarnings("ignore")
def test_copies_merge_into_the_original(small):
    frames = tuple(rocksalt(seed) for seed in range(2))
    potential = deepcopy(small.potential).double()
    potential.readout.out.weight.data *= 1000  # random weights alone make forces like round-off
    copies = [ForceField(name=n, potential=potential, calibration=frames) for n in "ab"]
    merged, report = merge(copies, {**QUICK, "allow_identical": True}, device="cpu")
    before, after = (predict_frames(p, frames) for p in (potential, merged.potential))
    scale = np.abs(np.concatenate(before.forces)).max()
    np.testing.assert_allclose(np.concatenate(after.forces), np.concatenate(before.forces), atol=1e-6 * scale)
    assert report.verdict == "good"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_default_beats_paper_beats_mean(pair, tmp_path):
    """On frames of both salts that the merge did not see, against each specialist's own forces."""
    tests = [[rocksalt(100, symbols="NaCl")], [rocksalt(101, symbols="LiF", a=4.0)]]

    def error(recipe) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MergeWarning)
            merged, _ = merge(pair, recipe, device="cpu")
        errors = []
        for specialist, frames in zip(pair, tests, strict=True):
            theirs, ours = (predict_frames(s.potential, frames).forces[0] for s in (specialist, merged))
            errors.append(np.abs(ours - theirs).mean() / np.abs(theirs).mean())
        return max(errors)

    default, paper, mean = error(QUICK), error("paper"), error("mean")
    assert default < paper
    assert default < 0.7 * mean


@pytest.mark.parametrize(
    "recipe", ["paper", pytest.param({**QUICK, "readout": None}, marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings("ignore")
def test_crystals_without_angles_merge(small, recipe):
    """No three atoms of sparse sodium are near enough: the layers of angles see no rows, and keep the mean."""
    frames = []
    for seed in range(2):
        atoms = bulk("Na", "bcc", a=4.3, cubic=True)
        atoms.rattle(0.05, seed=seed)
        frames.append(atoms)
    pair = [perturbed(small, seed, frames) for seed in (1, 2)]
    merged, _ = merge(pair, recipe, device="cpu")
    assert np.isfinite(predict_frames(merged.potential, frames).forces).all()
    a, b, ours = (s.potential.get_parameter("stages.3.gated.core.weight") for s in (*pair, merged))
    torch.testing.assert_close(ours, (a + b) / 2)


@pytest.mark.filterwarnings("ignore")
def test_vendor_files_are_merged_served_and_exported(tmp_path, vendor_calculator):
    relatives = [moved(build(), seed=k, size=0.02) for k in (1, 2)]
    paths = [checkpoint(tmp_path / f"{k}.pth.tar", model) for k, model in enumerate(relatives, 1)]
    frames = [[rocksalt(seed) for seed in range(2)], [rocksalt(seed, a=5.4) for seed in range(2)]]
    calc = GFFMergeCalculator(
        [f"chgnet:{path}" for path in paths],
        calibration=frames,
        recipe={"preset": "closed-form", "readout": None, "directions": 1},
        cache_dir=tmp_path / "cache",
        device="cpu",
    )
    assert calc.report is not None
    exported = export(calc.force_field, tmp_path / "merged.pth.tar")
    from chgnet.model import CHGNetCalculator

    theirs, ours = rocksalt(7), rocksalt(7)
    theirs.calc, ours.calc = CHGNetCalculator.from_file(str(exported), use_device="cpu"), calc
    np.testing.assert_allclose(ours.get_forces(), theirs.get_forces(), atol=1e-4)
    again = GFFMergeCalculator(**calc.parameters)
    assert again.cache_hit is None  # the cached file itself
    assert again.get_potential_energy(rocksalt(7)) == ours.get_potential_energy()


def test_the_command_line_converts(small, tmp_path, capsys):
    from ase.io import write

    from ase_gffmerge.cli import app

    def run(*arguments) -> str:
        app([str(argument) for argument in arguments], standalone_mode=False)
        return capsys.readouterr().out

    checkpoint_file = export(small, tmp_path / "small.pth.tar")
    write(tmp_path / "salt.xyz", [rocksalt(seed) for seed in range(5)], format="extxyz")
    options = ("--calibration", tmp_path / "salt.xyz", "--frames", 3, "--level-of-theory", "PBE", "--json")
    facts = json.loads(run("convert", f"chgnet:{checkpoint_file}", tmp_path / "small.safetensors", *options))
    assert facts["frames"] == 3
    specialist = load_force_field(tmp_path / "small.safetensors")
    assert specialist.fingerprint == small.fingerprint
    assert specialist.level_of_theory == "PBE"
    assert "chgnet" in run("info", tmp_path / "small.safetensors")
    run("convert", tmp_path / "small.safetensors", tmp_path / "again.pth.tar")
    assert load_force_field(f"chgnet:{tmp_path / 'again.pth.tar'}").fingerprint == small.fingerprint


def test_calibration_is_one_entry_per_specialist(small, tmp_path):
    with pytest.raises(ArgumentError, match="each of the 2 specialists"):
        GFFMergeCalculator([small, small], calibration=[[rocksalt(0)]], cache_dir=tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_the_vendors_calculators_merge_through_hooks(tmp_path):
    """The way for packages without an adapter, on one that has one."""
    from chgnet.model import CHGNetCalculator

    relatives = [moved(build(n_conv=2), seed=k, size=0.02) for k in (1, 2)]
    files = [checkpoint(tmp_path / f"{k}.pth.tar", model) for k, model in enumerate(relatives, 1)]
    calculators = [CHGNetCalculator.from_file(str(file), use_device="cpu") for file in files]
    frames = [[rocksalt(0)], [rocksalt(1, symbols="LiF", a=4.0)]]
    result = merge_calculators(calculators, frames, module=lambda calc: calc.model)
    ours, theirs = (
        sum(row.energy_mae for row in result.disagreements if row.model == kind)
        for kind in ("merged", "mean")
    )
    assert ours < theirs
    assert "atom_embedding.embedding" in [row.name for row in result.layers]


def test_exports_that_compute_something_else_are_not_written(small, tmp_path, monkeypatch):
    path = export(small, tmp_path / "small.pth.tar")
    before = path.read_bytes()
    for name, said in (
        ("composition_model.fc.weight", "energies differ"),
        ("mlp.layers.0.weight", "no CHGNet"),
    ):

        def without(potential, *, whole=chgnet._vendor_state, name=name):
            state = whole(potential)
            return state | {name: 0 * state[name]} if "fc" in name else {**state, name: None}

        with monkeypatch.context() as patch:
            patch.setattr(chgnet, "_vendor_state", without)
            with pytest.raises(FileFormatError, match=f"small.pth.tar is not written.*{said}"):
                export(small, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_what_the_vendors_format_cannot_hold_is_not_exported(pair, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged, _ = merge(
            pair,
            {"preset": "closed-form", "messages": False, "readout": {"width": 8, "copies": 1}},
            device="cpu",
        )
    with pytest.raises(FileFormatError, match="widened readout"):
        export(merged, tmp_path / "no.pth.tar")
    with pytest.raises(FileFormatError, match="no format but"):
        export(load_force_field("rmd17-ethanol"), tmp_path / "no.pth.tar")
    assert list(ADAPTERS["chgnet"].architectures) == [merged.potential.architecture]


@pytest.mark.filterwarnings("ignore")
def test_advice_about_a_pickled_model_can_be_followed(small, tmp_path):
    from chgnet.model import CHGNet

    model = CHGNet.from_file(str(export(small, tmp_path / "small.pth.tar")))
    path = tmp_path / "whole.pth.tar"
    torch.save(model, path)
    with pytest.raises(FileFormatError, match=r"CHGNet\).*trust=True.*convert chgnet:.*--trust.*as_dict"):
        load_force_field(f"chgnet:{path}")
    assert load_force_field(f"chgnet:{path}", trust=True).fingerprint == small.fingerprint
    torch.save(model.as_dict(), path)
    assert load_force_field(f"chgnet:{path}").fingerprint == small.fingerprint
    with pytest.raises(FileFormatError, match=r"give one of 0\.3\.0"):
        load_force_field("chgnet:0.4.0")
    with pytest.raises(FileFormatError, match=r"did you mean chgnet:0\.3\.0"):
        load_force_field("chgnett:0.3.0")
