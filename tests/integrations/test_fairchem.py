"""eSEN of the package fairchem-core: the vendor's results, the vendor's files, and merges."""

import logging
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch

from helpers.vendor_models import (
    assert_copies_merge_into,
    assert_same,
    merges,
    solves_that_beat_paper_and_mean,
    structures,
)

fairchem = pytest.importorskip("fairchem.core", reason="needs the package: pip install fairchem-core")
pytestmark = pytest.mark.filterwarnings("ignore")

from ase_gffmerge import ForceField, GFFMergeCalculator  # noqa: E402
from ase_gffmerge.errors import FileFormatError  # noqa: E402
from ase_gffmerge.integrations import ADAPTERS  # noqa: E402
from ase_gffmerge.integrations.load import export, from_vendor, load_force_field  # noqa: E402
from ase_gffmerge.testing import check_integration, check_potential  # noqa: E402

logging.getLogger().setLevel(logging.ERROR)

CORE = "fairchem.core."
SIZES = {
    "sphere_channels": 8,
    "hidden_channels": 8,
    "edge_channels": 8,
    "num_distance_basis": 16,
    "cutoff": 4.0,
    "max_num_elements": 10,
    "chg_spin_emb_type": "rand_emb",
}
VARIANTS = {
    "spectral": {"ff_type": "spectral", "dataset_mapping": {"omol": "omol"}},
    "grid": {"ff_type": "grid", "use_dataset_embedding": False, "chg_spin_emb_type": "pos_emb"},
    "of fewer orders": {
        "ff_type": "spectral",
        "use_dataset_embedding": False,
        "lmax": 3,
        "mmax": 2,
        "num_layers": 1,
    },
}


def task(name, level, size, *, datasets=("omol",), rmsd=2.0, mean=0.0):
    norm = f"{CORE}modules.normalization"
    references = {
        "_target_": f"{norm}.element_references.ElementReferences",
        "element_references": {"_target_": "torch.DoubleTensor", "_args_": [[-float(z) for z in range(10)]]},
    }
    unit = f"{CORE}units.mlip_unit.mlip_unit"
    return {
        "_target_": f"{unit}.Task",
        "name": name,
        "level": level,
        "property": name.split("_")[-1],
        "out_spec": {"_target_": f"{unit}.OutputSpec", "dim": [size], "dtype": "float32"},
        "normalizer": {"_target_": f"{norm}.normalizer.Normalizer", "mean": mean, "rmsd": rmsd},
        "element_references": references if level == "system" else None,
        "datasets": list(datasets),
    }


TASKS = (task("energy", "system", 1), task("forces", "atom", 3))


def written(path, variant="spectral", seed=0, *, size=0.0, tasks=TASKS, kind="eSCNMDBackbone", **changes):
    """A checkpoint for inference with random weights, as the package converts them after a training."""
    from fairchem.core.models.base import HydraModel
    from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint

    backbone = {**SIZES, **VARIANTS[variant], "direct_forces": False, "otf_graph": True, **changes}
    module = "escn_md" if kind == "eSCNMDBackbone" else "escn_moe"
    config = {
        "pass_through_head_outputs": True,
        "otf_graph": True,
        "backbone": {"model": f"{CORE}models.uma.{module}.{kind}", "always_use_pbc": False, **backbone},
        "heads": {"efs": {"module": f"{CORE}models.uma.escn_md.MLP_EFS_Head"}},
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = HydraModel(**config).state_dict()
        torch.manual_seed(seed)
        for value in state.values():
            if value.is_floating_point():
                value.add_(size * value.abs().mean() * torch.randn(value.shape))
    content = MLIPInferenceCheckpoint(
        model_config={"_target_": f"{CORE}models.base.HydraModel", **config},
        model_state_dict=state,
        ema_state_dict={"n_averaged": torch.tensor(1), **{f"module.{k}": v for k, v in state.items()}},
        tasks_config=list(tasks),
    )
    torch.save(content, path)
    return path


def build(size=0.1):
    """A calculator whose network the page's test moves; its file is written by :func:`checkpoint`."""
    return served(written(Path(mkdtemp()) / "base.pt", size=size)).predictor.model.module


def checkpoint(path, model):
    """The same with the weights of a network."""
    written(path)
    content = torch.load(path, weights_only=False)
    content.model_state_dict = model.state_dict()
    content.ema_state_dict |= {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save(content, path)
    return f"fairchem:{path}"


def served(path, *, double=False, task_name="omol"):
    """The package's calculator of a file."""
    from fairchem.core import FAIRChemCalculator
    from fairchem.core.units.mlip_unit import load_predict_unit
    from fairchem.core.units.mlip_unit.api.inference import InferenceSettings

    settings = InferenceSettings(
        activation_checkpointing=False,
        base_precision_dtype=torch.float64 if double else torch.float32,
        external_graph_gen=False,
    )
    unit = load_predict_unit(str(path), device="cpu", inference_settings=settings)
    return FAIRChemCalculator(unit, task_name=task_name)


@pytest.fixture(autouse=True)
def _default_type():
    """The package's calculator in double precision changes it."""
    yield
    torch.set_default_dtype(torch.float32)


def read(path, **options):
    return load_force_field(f"fairchem:{path}", trust=True, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_are_the_vendors_in_double_precision(variant, tmp_path):
    path = written(tmp_path / "a.pt", variant)
    ours = GFFMergeCalculator(read(path), dtype="float64", device="cpu")
    for atoms in structures():
        assert_same(ours, served(path, double=True), atoms, tolerance=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_are_the_vendors(variant, tmp_path):
    path = written(tmp_path / "a.pt", variant)
    ours = GFFMergeCalculator(read(path), device="cpu")
    for atoms in structures():
        assert_same(ours, served(path), atoms, tolerance=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_exports_are_the_vendors_checkpoints(variant, tmp_path):
    path = written(tmp_path / "a.pt", variant)
    again = export(read(path), tmp_path / "again.pt")
    for atoms in structures():
        assert_same(served(path, double=True), served(again, double=True), atoms, tolerance=1e-6)


def test_the_adapter_does_what_its_users_rely_on(tmp_path):
    path = written(tmp_path / "a.pt")
    calculator = served(path)
    check_integration(
        ADAPTERS["fairchem"],
        calculator,
        structures(),
        calculator=calculator,
        served_by=served,
        suffix=".pt",
        tolerance=2e-5,
    ).raise_if_failed()


def test_all_but_reflections_holds(tmp_path):
    potential = read(written(tmp_path / "a.pt")).potential.double()
    report = check_potential(potential, structures()[0])
    assert {result.name for result in report.failed} == {"rotations_and_reflections"}, str(report)
    calc = GFFMergeCalculator(
        ForceField(name="a", potential=potential, calibration=()), dtype="float64", device="cpu"
    )
    turned, atoms = structures()[0], structures()[0]
    turned.rotate(37.0, (1, 2, 3))
    for one in (turned, atoms):
        one.calc = calc
    np.testing.assert_allclose(turned.get_potential_energy(), atoms.get_potential_energy(), rtol=0, atol=1e-9)


def test_checkpoints_are_read_if_they_are_trusted(tmp_path):
    path = written(tmp_path / "a.pt")
    with pytest.raises(FileFormatError, match=r"MLIPInferenceCheckpoint.*trust=True"):
        load_force_field(f"fairchem:{path}")
    found = read(path)
    assert found.fingerprint == from_vendor("fairchem", served(path)).fingerprint
    assert (found.name, found.species) == ("a", tuple(range(1, 10)))
    assert found.potential.references.tolist() == [-float(z) for z in range(1, 10)]
    assert ForceField.load(found.save(tmp_path / "a.safetensors")).fingerprint == found.fingerprint
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(FileFormatError, match="no checkpoint that fairchem-core"):
        read(tmp_path / "other.pt")


def test_a_task_is_chosen(tmp_path):
    tasks = (task("energy", "system", 1, datasets=("omol", "omat")), task("forces", "atom", 3))
    mapping = {"omol": "omol", "omat": "omat"}
    path = written(tmp_path / "a.pt", tasks=tasks, dataset_mapping=mapping)
    for words, wrong in {
        "several tasks; there are omol, omat": path,
        "no task oc20": f"{path}#task=oc20",
    }.items():
        with pytest.raises(FileFormatError, match=words):
            read(wrong)
    first, second = (read(f"{path}#task={name}") for name in mapping)
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("predicted directly", {"direct_forces": True}),
        ("balanced to charge", {"charge_balanced_channels": [0]}),
        ("mean energy per structure", {"tasks": (task("energy", "system", 1, mean=1.0), TASKS[1])}),
        ("experts of UMA", {"kind": "eSCNMDMoeBackbone", "num_experts": 2}),
    ],
)
def test_other_models_are_refused(words, changes, tmp_path):
    path = written(tmp_path / "a.pt", **changes)
    with pytest.raises(FileFormatError, match=words):
        read(path)
    with pytest.raises(FileFormatError, match="no model of fairchem"):
        from_vendor("fairchem", torch.nn.Linear(2, 2))


def pair(folder, *, size, n_frames=5):
    found = []
    for seed, name in enumerate(("rmd17-ethanol", "rmd17-malonaldehyde")):
        path = written(folder / f"{seed}.pt", seed=seed, size=size)
        frames = ForceField.load(name).calibration[:n_frames]
        found.append(read(path, calibration=frames, name=name).to(dtype=torch.float64))
    return found


def test_copies_merge_into_the_original(tmp_path):
    assert_copies_merge_into(pair(tmp_path, size=0.0)[0])


def test_the_solves_beat_paper_and_mean(tmp_path):
    merged, _ = solves_that_beat_paper_and_mean(pair(tmp_path, size=0.1, n_frames=10))
    with pytest.raises(FileFormatError, match="widened readout"):
        export(merged, tmp_path / "merged.pt")


def test_the_default_beats_the_mean(tmp_path):
    found = merges(pair(tmp_path, size=0.1), {"mean": "mean", "default": "gffmerge"})
    assert found["default"][2] < 0.9 * found["mean"][2]
