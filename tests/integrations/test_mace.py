"""MACE of the package mace-torch: the vendor's results, the vendor's files, and merges."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule

from helpers.lammps_domains import assert_cut_into_domains
from helpers.vendor_models import (
    Trap,
    assert_copies_have_the_constants_of,
    assert_copies_merge_into,
    assert_same,
    relatives,
    solves_that_beat_paper_and_mean,
    structures,
)

pytest.importorskip(
    "mace", reason="needs the package mace-torch, which pins e3nn 0.4.4: pip install mace-torch"
)
pytestmark = pytest.mark.filterwarnings("ignore")

from e3nn.o3 import Irreps  # noqa: E402
from mace import modules  # noqa: E402
from mace.calculators import MACECalculator  # noqa: E402
from mace.tools.scripts_utils import extract_config_mace_model  # noqa: E402

from ase_gffmerge import ForceField, GFFMergeCalculator, merge  # noqa: E402
from ase_gffmerge.errors import FileFormatError  # noqa: E402
from ase_gffmerge.integrations import ADAPTERS  # noqa: E402
from ase_gffmerge.integrations.load import export, from_vendor, load_force_field  # noqa: E402
from ase_gffmerge.models.layers import package_mode  # noqa: E402
from ase_gffmerge.testing import check_calculator, check_integration  # noqa: E402

TYPES = (8, 1, 6)


def interactions(first: str, others: str) -> dict:
    names = {"interaction_cls_first": first, "interaction_cls": others}
    return {
        key: modules.interaction_classes[f"RealAgnostic{name}InteractionBlock"] for key, name in names.items()
    }


CONFIG = {
    "r_max": 4.0,
    "num_bessel": 6,
    "num_polynomial_cutoff": 5,
    "max_ell": 2,
    **interactions("", "Residual"),
    "num_interactions": 2,
    "num_elements": len(TYPES),
    "hidden_irreps": Irreps("8x0e+8x1o"),
    "MLP_irreps": Irreps("6x0e"),
    "gate": torch.nn.functional.silu,
    "atomic_energies": np.array([-2.0, -1.0, -3.0]),
    "avg_num_neighbors": 8.0,
    "atomic_numbers": list(TYPES),
    "correlation": 3,
    "radial_MLP": [8, 8],
    "atomic_inter_scale": 1.7,
    "atomic_inter_shift": 0.3,
}
SCALARS = {"hidden_irreps": Irreps("8x0e"), "correlation": 2}
VARIANTS = {
    "plain": {},
    "Materials Project": {
        **interactions("Residual", "Residual"),
        "hidden_irreps": Irreps("6x0e+6x1o+6x2e"),
        "num_interactions": 3,
        "correlation": [3, 2, 2],
        "edge_irreps": Irreps("4x0e+4x1o"),
    },
    "repulsion": {**SCALARS, "pair_repulsion": True, "distance_transform": "Agnesi"},
    "density": interactions("Density", "DensityResidual"),
    "nonlinear": {**interactions("ResidualNonLinear", "ResidualNonLinear"), "apply_cutoff": False},
    "one layer": {**SCALARS, "num_interactions": 1},
    "agnostic": {
        **SCALARS,
        "use_agnostic_product": True,
        "use_last_readout_only": True,
        "radial_type": "gaussian",
    },
}
TWO_HEADS = {
    "heads": ["mp", "Default"],
    "atomic_energies": np.array([[-2.0, -1.0, -3.0], [-5.0, -4.0, -6.0]]),
    "atomic_inter_scale": [1.7, 0.6],
    "atomic_inter_shift": [0.3, -0.2],
}


def build(kind: str = "ScaleShiftMACE", **changes) -> torch.nn.Module:
    """A model in float64 by the package's own constructor."""
    config = {**CONFIG, **changes}
    if kind == "MACE":
        config = {key: value for key, value in config.items() if not key.startswith("atomic_inter")}
    with package_mode():
        torch.manual_seed(0)
        return getattr(modules, kind)(**config).eval()


def calculator(model: torch.nn.Module, **options) -> MACECalculator:
    return MACECalculator(models=model, device="cpu", default_dtype="float64", **options)


def check_same(model: torch.nn.Module, **options) -> None:
    theirs = calculator(model, **options)
    ours = GFFMergeCalculator(from_vendor("mace", theirs), dtype="float64", device="cpu")
    for atoms in structures():
        assert_same(ours, theirs, atoms, tolerance=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_are_the_vendors(variant):
    check_same(build(**VARIANTS[variant]))


def test_results_are_the_vendors_without_scale_and_shift():
    check_same(build("MACE", pair_repulsion=True, **SCALARS))


@pytest.mark.parametrize(("head", "reference"), [("mp", -1.0 + 0.3), (None, -4.0 - 0.2)])
def test_a_head_is_chosen(head, reference):
    model = build(**SCALARS, **TWO_HEADS)
    check_same(model, head=head)
    potential = from_vendor("mace", calculator(model, head=head)).potential
    assert potential.references[0] == pytest.approx(reference)


def test_a_head_of_a_file_is_chosen(tmp_path):
    """By its name, never silently, also where one is called Default; its results are the vendor's."""
    model = build(**SCALARS, **TWO_HEADS)
    source = checkpoint(tmp_path / "two.pt", model)
    torch.save(model, tmp_path / "two.model")
    for words, wrong in {
        "heads mp, Default; choose one.*#head=Default": source,
        "and no dft; choose one": f"{source}#head=dft",
        "have no modality; write #head=mp": f"{source}#modality=mp",
    }.items():
        with pytest.raises(FileFormatError, match=words):
            load_force_field(wrong)
    chosen = load_force_field(f"{source}#head=mp")
    assert chosen.name == "two-mp"
    trusted = from_vendor("mace", f"{tmp_path / 'two.model'}#head=mp", trust=True)
    assert trusted.fingerprint == chosen.fingerprint
    ours = GFFMergeCalculator(chosen, dtype="float64", device="cpu")
    for atoms in structures():
        assert_same(ours, calculator(model, head="mp"), atoms, tolerance=1e-11)


def test_low_rank_changes_are_read_as_the_weights_that_they_stand_for():
    from mace.modules.lora import inject_LoRAs, merge_lora_weights

    plain = build()
    with package_mode():
        changed = inject_LoRAs(deepcopy(plain), rank=2, alpha=4)
    with torch.no_grad():
        for name, value in changed.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(3)))
    read = from_vendor("mace", changed)
    assert any("lora" in name for name, _ in changed.named_parameters())
    assert read.fingerprint == from_vendor("mace", merge_lora_weights(changed, inplace=False)).fingerprint
    assert read.fingerprint != from_vendor("mace", plain).fingerprint
    ours = GFFMergeCalculator(read, dtype="float64", device="cpu")
    for atoms in structures():
        assert_same(ours, calculator(changed), atoms, tolerance=1e-10)


def test_reading_leaves_the_process_alone():
    torch.manual_seed(3)
    before = torch.get_default_dtype(), torch.get_rng_state()
    potential = from_vendor("mace", build(**SCALARS).float()).potential
    assert torch.get_default_dtype() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert potential.dtype == torch.float32
    assert potential.species == (1, 6, 8)


def test_casts_change_weights_alone():
    potential = from_vendor("mace", build()).potential
    exact = {name: buffer.clone() for name, buffer in potential.named_buffers()}
    assert any("U_matrix" in name for name in exact)
    copy = deepcopy(potential).float().double()
    for name, buffer in copy.named_buffers():
        assert torch.equal(buffer, exact[name]), name
    assert not any("U_matrix" in name for name in copy.state_dict())


def test_the_adapter_does_what_its_users_rely_on():
    theirs = calculator(build())
    check_integration(
        ADAPTERS["mace"],
        theirs,
        structures(),
        calculator=theirs,
        served_by=lambda path: MACECalculator(model_paths=str(path), device="cpu", default_dtype="float64"),
        suffix=".model",
    ).raise_if_failed()


def test_the_contract_holds(tmp_path):
    specialist = from_vendor("mace", build(num_interactions=1, **SCALARS))
    calc = GFFMergeCalculator(specialist.save(tmp_path / "s.safetensors"), dtype="float64", device="cpu")
    check_calculator(calc, bulk("C", a=3.6)).raise_if_failed()


def checkpoint(path, model: torch.nn.Module, **changes) -> str:
    """Configuration and weights, as the documentation of the adapter says."""
    config = extract_config_mace_model(model) | changes
    torch.save({"config": config, "state_dict": model.state_dict()}, path)
    return f"mace:{path}"


def test_files_are_read_without_code(tmp_path, capsys):
    model = build(pair_repulsion=True, **SCALARS)
    torch.save(model, tmp_path / "whole.model")
    torch.save({"config": Trap(), "state_dict": {}}, tmp_path / "trap.pt")
    torch.save({"model": model.state_dict()}, tmp_path / "training.pt")
    sources = {
        "pickled model.*trust=True": f"mace:{tmp_path / 'whole.model'}",
        "executes code.*extract_config_mace_model": f"mace:{tmp_path / 'trap.pt'}",
        "holds no MACE": f"mace:{tmp_path / 'training.pt'}",
        "can build": checkpoint(tmp_path / "wide.pt", model, num_bessel=7),
        "not a ScaleShiftMACE": checkpoint(tmp_path / "plain.pt", build("MACE", **SCALARS)),
        "no file": "mace:medium",
    }
    capsys.readouterr()
    for words, source in sources.items():
        with pytest.raises(FileFormatError, match=words):
            load_force_field(source)
    assert "executed" not in capsys.readouterr().out
    read = load_force_field(checkpoint(tmp_path / "fine é.pt", model))
    assert read.name == "fine é"
    assert read.provenance.origin.startswith("mace-torch 0.")
    trusted = from_vendor("mace", tmp_path / "whole.model", trust=True)
    assert read.fingerprint == trusted.fingerprint == from_vendor("mace", model).fingerprint
    assert load_force_field(read.save(tmp_path / "a.safetensors")).fingerprint == read.fingerprint


def test_what_is_not_read_is_refused():
    first, second, other = build(**SCALARS), build("MACE", **SCALARS), build(**SCALARS)
    other.interactions[1].linear_up = torch.nn.Linear(8, 8).double()
    for words, source in {
        "Linear is not read": torch.nn.Linear(2, 2),
        "choose one": build(**SCALARS, **TWO_HEADS | {"heads": ["a", "b"]}),
        "committee of 2": calculator([first, second]),
        "parts that mace-torch": other,
        "converts units": calculator(first, energy_units_to_eV=27.2),
        "NonLinearBiasReadoutBlock": build(**SCALARS, readout_cls=modules.NonLinearBiasReadoutBlock),
        "embedding_specs": build(
            **SCALARS,
            embedding_specs={"charge": {"type": "continuous", "per": "graph", "in_dim": 1, "emb_dim": 4}},
        ),
    }.items():
        with pytest.raises(FileFormatError, match=words):
            ADAPTERS["mace"].read(source)


@pytest.mark.parametrize("variant", ["repulsion", "nonlinear"])
def test_exports_are_the_vendors_models(variant, tmp_path):
    specialist = from_vendor("mace", build(**VARIANTS[variant]))
    path = export(specialist, tmp_path / "again.model")
    theirs = MACECalculator(model_paths=str(path), device="cpu", default_dtype="float64")
    ours = GFFMergeCalculator(specialist, dtype="float64", device="cpu")
    assert_same(ours, theirs, structures()[1], tolerance=1e-11)


def test_vendor_files_are_merged_served_and_exported(tmp_path):
    """The scale, folded but for that of the repulsion, and number of neighbours differ, which is no reason to refuse."""
    changes = ({}, {"avg_num_neighbors": 6.0, "atomic_inter_scale": 1.2})
    sources = [
        checkpoint(tmp_path / f"{k}.pt", build_repulsive(**change)) for k, change in enumerate(changes)
    ]
    calc = GFFMergeCalculator(
        sources,
        calibration=[[atoms] for atoms in structures()],
        recipe={"preset": "closed-form", "readout": None, "messages": False, "directions": 0},
        cache_dir=tmp_path / "cache",
        device="cpu",
        dtype="float64",
    )
    assert calc.report is not None
    path = export(calc.force_field, tmp_path / "merged.model")
    theirs = MACECalculator(model_paths=str(path), device="cpu", default_dtype="float64")
    for atoms in structures():
        assert_same(calc, theirs, atoms, tolerance=1e-11)


def build_repulsive(**changes):
    return build(**VARIANTS["repulsion"], **changes)


def build_small():
    return build(max_ell=1, correlation=2)


def test_copies_have_the_constants_of_the_original():
    assert_copies_have_the_constants_of(from_vendor("mace", build()).potential)


def test_copies_merge_into_the_original():
    original, _ = relatives("mace", build_repulsive, size=0.0)
    assert_copies_merge_into(original.with_calibration(original.calibration[:2]))


def test_the_solves_beat_paper_and_mean(tmp_path):
    merged, report = solves_that_beat_paper_and_mean(relatives("mace", build_small, size=0.1))
    assert "embedding" in report.averaged
    assert any("skip_tp[O, 0e]" in row.name for row in report.layers)
    assert load_force_field(merged.save(tmp_path / "m.safetensors")).fingerprint == merged.fingerprint
    with pytest.raises(FileFormatError, match="widened readout"):
        export(merged, tmp_path / "merged.model")


def of_different_elements(**variant) -> list[ForceField]:
    """Water and methane: fine-tuning leaves the elements of its data."""
    config = {**SCALARS, **variant, "atomic_energies": np.array([-2.0, -1.0]), "num_elements": 2}
    models = [build(**config, atomic_numbers=numbers) for numbers in ([8, 1], [1, 6])]
    frames = [molecule("H2O"), molecule("CH4")]
    return [from_vendor("mace", m, calibration=[a]) for m, a in zip(models, frames, strict=True)]


@pytest.mark.parametrize("variant", ["plain", "nonlinear"])
def test_weights_of_an_element_are_those_of_who_knows_it(variant):
    water, methane = of_different_elements(**VARIANTS[variant])
    mean, _ = merge([water, methane], "mean", device="cpu")
    by_element = (*mean.potential.element_parameters(), "embedding")
    for name in by_element:
        rows = [s.potential.get_parameter(name) for s in (mean, water, methane)]
        merged, one, other = [row[0] if name == "embedding" else row for row in rows]
        torch.testing.assert_close(merged[1], other[1])
        torch.testing.assert_close(merged[2], one[1])
    assert any("symmetric_contractions" in name for name in by_element)


def test_models_of_different_elements_merge():
    merged, report = merge(
        of_different_elements(),
        {"preset": "closed-form", "readout": None, "messages": False, "directions": 0},
        device="cpu",
    )
    assert merged.species == (1, 6, 8)
    assert {"skip_tp[C, 0e]", "skip_tp[O, 0e]"} <= {row.name.rpartition(".")[2] for row in report.layers}


@pytest.mark.parametrize("variant", VARIANTS)
def test_domains_of_lammps_give_what_the_structure_gives(variant):
    assert_cut_into_domains(from_vendor("mace", build(**VARIANTS[variant])).to(dtype=torch.float64))
