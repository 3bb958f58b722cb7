"""Another distribution adds an architecture, an integration and a method, with one entry point each."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from ase_gffmerge import __version__
from ase_gffmerge.runtime.registry import own_version

CODE = """
import torch

from ase_gffmerge.integrations import Adapter, ConvertedModel
from ase_gffmerge.methods import MergeOutput, method
from ase_gffmerge.models import build_potential
from ase_gffmerge.models.painn import PaiNN


class Tiny(PaiNN):
    architecture = "tiny"


class TinyAdapter(Adapter):
    vendor, models, package = "tinyvendor", "Tiny", ""
    architectures = {"tiny": "tiny_plugin:Tiny"}

    def read(self, source, *, trust=False):
        state = torch.load(source, weights_only=True)
        potential = build_potential("tiny", {"channels": 4, "n_blocks": 1, "n_radial": 3}, (1, 8))
        potential.load_state_dict(state)
        return ConvertedModel(potential=potential.eval().requires_grad_(False), vendor="tinyvendor")

    def vendor_content(self, potential):
        return potential.state_dict()


ADAPTER = TinyAdapter()


@method("last", citation="none")
def last(merge_inputs, progress):
    progress(1.0, "chosen")
    return MergeOutput(potentials=(merge_inputs.specialists[-1].potential,))
"""

ENTRY_POINTS = """
[ase_gffmerge.models]
tiny = tiny_plugin:Tiny
broken = tiny_plugin_without_module:Nothing

[ase_gffmerge.integrations]
tinyvendor = tiny_plugin:ADAPTER

[ase_gffmerge.methods]
last = tiny_plugin:last
mean = tiny_plugin:last
misnamed = tiny_plugin:last
no_method = tiny_plugin:Tiny
"""

USE = """
import sys
import torch
from ase_gffmerge import ForceField
from ase_gffmerge.errors import GFFMergeError
from ase_gffmerge.integrations.load import export, load_force_field
from ase_gffmerge.methods import METHODS, MergeInputs
from ase_gffmerge.models import architectures, build_potential

assert "tiny_plugin" not in sys.modules
assert architectures()[-1] == "tiny" and architectures()[:3] == ("painn", "nequip", "chgnet")
potential = build_potential("tiny", {"channels": 4, "n_blocks": 1, "n_radial": 3}, (1, 8))
torch.save(potential.state_dict(), "weights.pt")
first = load_force_field("tinyvendor:weights.pt")
assert first.potential.architecture == "tiny" and first.name == "weights"
again = ForceField.load(first.save("first.safetensors"))
assert again.fingerprint == first.fingerprint
export(again, "again.pt")
assert load_force_field("tinyvendor:again.pt").fingerprint == first.fingerprint
output = METHODS["last"].run(MergeInputs(specialists=(first, again)), lambda fraction, text: print(text))
assert output.potentials == (again.potential,)
assert METHODS["ties"].name == "ties"
for table, name in ((METHODS, "mean"), (METHODS, "misnamed"), (METHODS, "no_method"), (METHODS, "lost")):
    try:
        table[name]
    except GFFMergeError as error:
        print(error)
try:
    build_potential("broken", {}, (1,))
except GFFMergeError as error:
    print(error)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What pip would install."""
    (tmp_path / "tiny_plugin.py").write_text(CODE)
    metadata = tmp_path / "tiny_plugin-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-plugin\nVersion: 1.2\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    return tmp_path


def test_entry_points_add_to_the_tables(folder: Path) -> None:
    run = f"import sys; sys.path.append({str(folder)!r})\n{USE}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", run], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    chosen, *errors = done.stdout.splitlines()
    assert chosen == "chosen"
    twice, misnamed, no_method, lost, broken = errors
    assert "method 'mean' exists twice, in ase-gffmerge" in twice
    assert "tiny-plugin 1.2 (tiny_plugin:last); uninstall one" in twice
    assert "calls itself 'last'" in misnamed
    assert "tiny_plugin:Tiny, is no method" in no_method
    assert "no method 'lost'; did you mean 'last'?" in lost
    assert "architecture 'broken' of tiny-plugin 1.2 cannot be imported" in broken
    assert "No module named 'tiny_plugin_without_module'" in broken


def test_without_metadata_the_version_is_unknown(monkeypatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    assert own_version() == __version__
    monkeypatch.setattr("ase_gffmerge.runtime.registry.version", missing)
    assert own_version() == "unknown"
