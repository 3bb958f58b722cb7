"""Each vendor's page shows a way from two checkpoints to dynamics that runs, in the environment of that vendor."""

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from ase.io import write

from ase_gffmerge import ForceField
from ase_gffmerge.integrations import ADAPTERS
from ase_gffmerge.merging.report import MergeReport
from helpers.page_blocks import BLOCK, run_block
from helpers.vendor_models import moved

pytestmark = pytest.mark.filterwarnings("ignore")

FOLDER = Path(__file__).parents[2] / "docs" / "how_to" / "vendors"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.md"))}
CHANGES = {
    "mace": {"num_interactions": 1, "correlation": 2, "max_ell": 1, "atomic_inter_scale": 0.6},
    "matgl": {"variant": "tensornet smooth"},
    "chgnet": {"scale": 300.0},
}
"""Arguments of the networks: a page takes a few seconds less, or random weights make forces above round-off, or so weak that
atoms, which nothing binds here, do not meet at speeds beyond a step of 0.5 fs."""

BUNDLED = {"ethanol": "rmd17", "malonaldehyde": "rmd17", "copper": "emt", "silver": "emt"}
"""Whose frames are those of a specialist's name."""


def module_of(page: str) -> ModuleType:
    """The module of that vendor's tests."""
    path = Path(__file__).with_name(f"test_{page}.py")
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_of(page: str) -> str:
    """Its only block that is to be run, which is its last; the others show how to fine-tune, which takes a GPU."""
    *shown, (kind, target, language, code) = BLOCK.findall(PAGES[page])
    assert (kind, target, language) == ("runs", "test", "python")
    assert {kind for kind, *_ in shown} == {"shown"}
    return code


def names_in(page: str) -> tuple[str, ...]:
    """The specialists of its code."""
    (names,) = re.findall(r"for name in \((.*)\)", code_of(page))
    return tuple(re.findall(r"\w+", names))


def fine_tuned(page: str, package: ModuleType, folder: Path) -> None:
    """Files with the names in the code: two models that were moved away from one, and frames of each."""
    (suffix,) = set(re.findall(r"\{name\}([\w.]+)", code_of(page))) - {".xyz"}
    for seed, name in enumerate(names_in(page)):
        model, path = package.build(**CHANGES.get(page, {})), folder / f"{name}{suffix}"
        moved(model, seed=seed, size=0.1)
        if suffix == ".model":
            torch.save(model, path)
        else:
            package.checkpoint(path, model)
        write(folder / f"{name}.xyz", ForceField.load(f"{BUNDLED[name]}-{name}").calibration[:5])


@pytest.mark.parametrize("page", PAGES)
def test_two_checkpoints_become_one_calculator(page, tmp_path):
    package, code = module_of(page), code_of(page)
    fine_tuned(page, package, tmp_path)
    output = run_block("python", code, folder=tmp_path, cache=tmp_path / "cache").stdout
    assert abs(float(re.search(r"changed by (\S+) eV", output)[1])) < 0.05
    merged = ForceField.load(tmp_path / "merged.safetensors")
    assert merged.specialist_names == names_in(page)
    errors = {"mean": [], "merged": []}
    for row in MergeReport.from_dict(merged.merged.report).disagreements:
        errors.setdefault(row.model, []).append(row.force_mae / row.force_rms)
    assert max(errors["merged"]) <= max(errors["mean"])  # equal where held-out frames speak for the mean
    if found := re.search(r"(\S+) eV here, (\S+) eV by MACE", output):
        np.testing.assert_allclose(*map(float, found.groups()), atol=1e-5)
    if written := re.search(r'export\("(\S+)"\)', code):
        assert (tmp_path / written[1]).stat().st_size > 0


@pytest.mark.parametrize("page", PAGES)
def test_it_begins_with_a_training_and_ends_with_dynamics(page):
    first, *_, last = re.findall(r"^## (.*)$", PAGES[page], re.MULTILINE)
    assert (first, last) == ("Fine-tune", "From two checkpoints to dynamics")


def test_every_vendor_has_a_page():
    named = {word for text in PAGES.values() for word in re.findall(r"named `(\w+):", text)}
    assert named == set(ADAPTERS)
    for page, text in PAGES.items():
        assert f"vendor_environments.py {page}`" in text
        assert f'".[{page}]"' in text
