"""Orb of the package orb_models: the vendor's results, the vendor's files, and merges."""

from inspect import signature

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule

from helpers.vendor_models import (
    QUICK,
    Trap,
    assert_copies_merge_into,
    assert_same,
    relatives,
    solves_that_beat_paper_and_mean,
    structures,
)

pytest.importorskip("orb_models", reason="needs the package orb_models: pip install orb-models")
pytestmark = pytest.mark.filterwarnings("ignore")

from orb_models.forcefield import pretrained  # noqa: E402

try:
    from orb_models.forcefield.forcefield_adapter import ForcefieldAtomsAdapter as SystemConfig
    from orb_models.forcefield.inference.calculator import ORBCalculator
except ModuleNotFoundError:  # 0.5
    from orb_models.forcefield.atomic_system import SystemConfig
    from orb_models.forcefield.calculator import ORBCalculator

from ase_gffmerge import GFFMergeCalculator, merge, merge_calculators  # noqa: E402
from ase_gffmerge.cli import app  # noqa: E402
from ase_gffmerge.errors import FileFormatError  # noqa: E402
from ase_gffmerge.integrations import ADAPTERS  # noqa: E402
from ase_gffmerge.integrations.load import export, from_vendor, load_force_field  # noqa: E402
from ase_gffmerge.testing import check_calculator, check_integration  # noqa: E402

NAME = "orb-v3-conservative-20-omat"
BESIDE = "atoms_adapter" if "atoms_adapter" in signature(ORBCalculator).parameters else None
"""The calculator's argument that says which neighbours an atom attends to, since 0.6."""
SMALL = {
    "latent_dim": 16,
    "base_mlp_hidden_dim": 16,
    "head_mlp_hidden_dim": 8,
    "num_message_passing_steps": 2,
    "device": "cpu",
}
VARIANTS = {
    "20 neighbours": {"limit": 20},
    "all neighbours": {"activation": "ssp", "base_mlp_depth": 1, "head_mlp_depth": 2},
}


def build(kind: str = "conservative", *, seed: int = 0, limit: int = 120, scale: float = 1.0, **changes):
    """A network whose labels had other statistics than a new one's; a scale of its layers makes it less linear."""
    make = getattr(pretrained, f"orb_v3_{kind}_architecture")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make(**{**SMALL, **changes}).eval()
    configure(model, SystemConfig(6.0, limit))
    if hasattr(model, "pair_repulsion_fn"):
        model.pair_repulsion_fn.node_aggregation = "mean"  # as loaders of published models do since 0.6
    statistics = model.heads["energy"].normalizer.bn
    statistics.running_mean.fill_(-0.4)
    statistics.running_var.fill_(2.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".NN-" in name and name.endswith("weight"):
                parameter.mul_(scale)
    return model


def configure(model, config) -> None:
    """The model's own in 0.5; since 0.6 the vendor's loaders return it beside the model, which is tested by itself."""
    setattr(model, "_system_config" if BESIDE is None else "system_config", config)


def vendor_calculator(model, **options) -> ORBCalculator:
    if BESIDE is not None:
        options[BESIDE] = model.system_config
    return ORBCalculator(model, device="cpu", **options)


def test_model_and_what_its_loader_returns_beside_it():
    model = build(limit=20)
    expected, config = from_vendor("orb", model).fingerprint, model.system_config
    configure(model, None)
    assert from_vendor("orb", (model, config)).fingerprint == expected
    model.pair_repulsion_fn.node_aggregation = "sum"
    with pytest.raises(FileFormatError, match="no mean over the atoms"):
        from_vendor("orb", (model, config))


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_are_the_vendors(variant):
    model = build(**VARIANTS[variant], scale=1.5)
    ours = GFFMergeCalculator(from_vendor("orb", model), device="cpu")
    pressed = bulk("C", cubic=True, a=3.1)  # neighbours beyond either limit, and the repulsion acts
    pressed.rattle(0.1, seed=3)
    for atoms in [*structures(), pressed]:
        assert_same(ours, vendor_calculator(model), atoms, tolerance=5e-6)


def test_all_that_is_kept_decides():
    """What the vendor's calculator and model say beside the weights."""
    atoms = structures()[1]
    model = build(limit=20)
    limited = vendor_calculator(model, max_num_neighbors=7)
    energies = []
    for source in (model, limited, build(limit=20, seed=1)):
        specialist = from_vendor("orb", source)
        energies.append(GFFMergeCalculator(specialist, device="cpu").get_potential_energy(atoms))
    assert energies[1] == pytest.approx(limited.get_potential_energy(atoms), abs=3e-5)
    assert min(np.abs(np.diff(energies))) > 1e-3


def test_the_adapter_does_what_its_users_rely_on():
    model = build(scale=1.5)

    def served(path):
        other = build(seed=1)
        other.load_state_dict(torch.load(path, weights_only=True))
        return vendor_calculator(other)

    check_integration(
        ADAPTERS["orb"],
        model,
        structures(),
        calculator=vendor_calculator(model),
        served_by=served,
        suffix=".ckpt",
        tolerance=5e-6,
    ).raise_if_failed()


def test_the_contract_holds_but_for_rotations(tmp_path):
    """The vendor's network learns what a rotation is; nothing in it makes it invariant."""
    path = from_vendor("orb", build().double()).save(tmp_path / "s.safetensors")
    calc = GFFMergeCalculator(path, dtype="float64", device="cpu")
    report = check_calculator(calc, bulk("NaCl", "rocksalt", a=5.6))
    assert [result.name for result in report.results if result.outcome == "failed"] == ["rotation"]


def checkpoint(path, model, **extra) -> str:
    """What the vendor's training saves, or the dictionary that says more."""
    state = model.state_dict()
    torch.save({"state_dict": state, **extra} if extra else state, path)
    return f"orb:{path}"


def test_files_say_what_a_model_is(tmp_path, monkeypatch):
    model = build(limit=20)
    plain = checkpoint(tmp_path / "a.ckpt", model).removeprefix("orb:")
    named = checkpoint(tmp_path / "b.ckpt", model, architecture=NAME)
    told = checkpoint(tmp_path / "c.ckpt", model, architecture={"max_num_neighbors": 20, "radius": 6})
    expected = from_vendor("orb", model)
    monkeypatch.setattr("cached_path.cached_path", lambda address: plain)
    underscores = NAME.replace("-", "_")
    for source in (f"orb:{NAME}@{plain}", f"orb:{underscores}@{plain}", named, told, f"orb:{NAME}"):
        read = load_force_field(source)
        assert read.fingerprint == expected.fingerprint
        assert ("OMat24" in read.level_of_theory) == (source != told)
    assert load_force_field(named).name == "b"
    assert load_force_field(f"orb:{NAME}@{plain}").name == "a"
    monkeypatch.chdir(tmp_path)
    calc = GFFMergeCalculator(f"orb:{NAME}@a.ckpt", device="cpu")
    assert calc.todict()["specialists"] == [f"orb:{NAME}@{plain}"]
    assert load_force_field(read.save(tmp_path / "a.safetensors")).fingerprint == read.fingerprint

    def unreachable(address):
        raise ConnectionError("no route")

    monkeypatch.setattr("cached_path.cached_path", unreachable)
    with pytest.raises(FileFormatError, match=r"cannot be downloaded .*no route"):
        load_force_field(f"orb:{NAME}")


def test_what_is_not_read_is_refused(tmp_path, capsys):
    model, direct = build(), build("direct")
    charged = build(has_charge_spin_cond=True)
    torch.save({"state_dict": Trap()}, tmp_path / "trap.ckpt")
    torch.save({"state_dict": [1]}, tmp_path / "empty.ckpt")
    cut = {k: v for k, v in model.state_dict().items() if "gnn_stacks.1._edge_mlp" not in k}
    torch.save(cut, tmp_path / "cut.ckpt")
    settings = {"max_num_neighbors": 20, "activation": "relu"}
    files = {
        "trust=True": f"orb:{NAME}@{tmp_path / 'trap.ckpt'}",
        "no weights of Orb": f"orb:{tmp_path / 'empty.ckpt'}",
        "can build": f"orb:{NAME}@{tmp_path / 'cut.ckpt'}",
        "how many neighbours": checkpoint(tmp_path / "bare.ckpt", model),
        "not known": checkpoint(tmp_path / "v2.ckpt", model, architecture="orb-v2"),
        "architecture that": f"orb:orb-v4@{tmp_path / 'bare.ckpt'}",
        "relu": checkpoint(tmp_path / "relu.ckpt", model, architecture=settings),
        "merge_calculators": f"orb:{NAME}"
        + checkpoint(tmp_path / "direct.ckpt", direct).replace("orb:", "@"),
        "no file": f"orb:{NAME}@nowhere.ckpt",
    }
    for words, source in files.items():
        with pytest.raises(FileFormatError, match=words):
            load_force_field(source)
    assert "executed" not in capsys.readouterr().out
    summed = build()
    summed.heads["energy"].atom_avg = False
    homeless = build()
    configure(homeless, None)
    objects = {
        "directly": direct,
        "charge and spin": charged,
        "mean latent": summed,
        "system_config": homeless,
        "no Orb model": torch.nn.Linear(2, 2),
    }
    for words, source in objects.items():
        with pytest.raises(FileFormatError, match=words):
            ADAPTERS["orb"].read(source)


def test_weights_go_out_and_in_again(tmp_path):
    model = build()
    specialist = from_vendor("orb", model)
    path = export(specialist, tmp_path / "again.ckpt")
    other = build(seed=1)
    other.load_state_dict(torch.load(path, weights_only=True))
    written, changed = other.state_dict(), ("grad_", "heads.energy.normalizer", "heads.energy.mlp.NN-1")
    for name, value in model.state_dict().items():
        rows = slice(1, 118) if "atom_emb" in name or "reference" in name else ...
        assert name.startswith(changed) or torch.equal(written[name][rows], value[rows]), name
    for atoms in structures():
        assert_same(vendor_calculator(other), vendor_calculator(model), atoms, tolerance=5e-6)
    app(
        ["convert", f"orb:orb-v3-conservative-inf-mpa@{path}", str(tmp_path / "again.safetensors")],
        standalone_mode=False,
    )
    again = load_force_field(tmp_path / "again.safetensors")
    assert again.potential.hyper == specialist.potential.hyper
    assert "Alexandria" in again.level_of_theory


def build_double():
    return build(scale=1.5).double()


def test_copies_merge_into_the_original():
    assert_copies_merge_into(relatives("orb", build_double, size=0.0)[0])


def test_the_solves_beat_paper_and_mean(tmp_path):
    merged, report = solves_that_beat_paper_and_mean(relatives("orb", build_double, size=0.1))
    assert "unused.decoder.node_fn.mlp.NN-0.weight" in report.averaged
    solved = {row.name for row in report.layers}
    assert {"stages.0.module.encoder._edge_fn.mlp.NN-0", "stages.2.module.network._send_attn"} <= solved
    assert load_force_field(merged.save(tmp_path / "m.safetensors")).fingerprint == merged.fingerprint
    with pytest.raises(FileFormatError, match="widened readout"):
        export(merged, tmp_path / "no.ckpt")


def test_vendor_files_are_merged_served_and_exported(tmp_path):
    sources = [
        checkpoint(tmp_path / f"{k}.ckpt", model, architecture=NAME)
        for k, model in enumerate(moved(build(scale=1.5), build(scale=1.5)))
    ]
    frames = [[rattled("CH3CH2OH", 1)], [rattled("CH3CHO", 2)]]
    recipe = {"preset": "closed-form", "readout": None, "directions": 1, "messages": False}
    calc = GFFMergeCalculator(
        sources, calibration=frames, recipe=recipe, cache_dir=tmp_path / "cache", device="cpu"
    )
    model = build(limit=20)
    model.load_state_dict(torch.load(export(calc.force_field, tmp_path / "merged.ckpt"), weights_only=True))
    for atoms in structures():
        assert_same(calc, vendor_calculator(model), atoms, tolerance=5e-6)


def test_direct_models_merge_through_hooks():
    pair = [build("direct", scale=1.5) for _ in range(2)]
    calculators = [vendor_calculator(model) for model in moved(*pair)]
    frames = [[rattled("CH3CH2OH", seed) for seed in (0, 1)], [rattled("CH3CHO", seed) for seed in (2, 3)]]
    result = merge_calculators(calculators, frames, module=lambda calc: calc.model)
    errors = {(row.specialist, row.model): row.energy_mae for row in result.disagreements}
    for k in "01":
        assert errors[k, "merged"] < 0.1 * errors[k, "mean"]
    assert any("heads.forces" in row.name for row in result.layers)
    assert "model.atom_emb.embeddings" in [row.name for row in result.layers]
    assert "heads.energy.reference.linear.weight" in result.averaged


def moved(*models):
    """The same models with every weight but reference energies moved by a random tenth of its tensor's size."""
    for k, model in enumerate(models):
        generator = torch.Generator().manual_seed(k)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "reference" not in name:
                    p.add_(0.1 * p.abs().mean() * torch.randn(p.shape, generator=generator))
    return models


def rattled(name: str, seed: int):
    atoms = molecule(name)
    atoms.rattle(0.05, seed=seed)
    return atoms


def test_the_default_runs_on_float32_weights():
    pair = [
        from_vendor("orb", model, calibration=[rattled("CH3CH2OH", k)], name=str(k))
        for k, model in enumerate(moved(build(scale=1.5), build(scale=1.5)))
    ]
    merged, report = merge(pair, QUICK, device="cpu")
    assert merged.potential.dtype == torch.float32
    assert np.isfinite(report.relative_disagreement)
