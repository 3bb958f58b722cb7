"""Point 20: the entry point by which ASE finds the calculator."""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from ase._4.plugins import PluginCollection, plugin_collection
from ase.calculators.calculator import get_calculator_class, register_calculator_class

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.engines import ase as ase_plugin

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]


@pytest.fixture
def found(monkeypatch) -> PluginCollection:
    """What ASE finds when this package is the only one with plug-ins."""
    declared = PROJECT["entry-points"]["ase.plugins"]
    points = [metadata.EntryPoint(name, value, "ase.plugins") for name, value in declared.items()]
    monkeypatch.setattr(plugin_collection, "entry_points", lambda group: points)
    return PluginCollection.from_entry_points()


def test_20_ase_finds_the_calculator(found):
    (plugin,) = found.calculators
    assert plugin.name == "gffmerge"
    assert plugin.implementation is GFFMergeCalculator


def test_20_ase_can_show_it(found):
    """``ase info --plugins`` asks the distribution of the module's package for its version."""
    assert PROJECT["name"].replace("-", "_") == ase_plugin.__name__.split(".")[0]
    assert "gffmerge" in found.display()
    assert metadata.version("ase_gffmerge") in found.display()
    assert list(found.by_package) == ["ase_gffmerge"]


def test_20_looking_for_it_imports_no_torch():
    code = "import sys, ase_gffmerge.engines.ase as p; print(len(p.__ase_plugins__), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]


@pytest.mark.parametrize("interface", [None, object(), type("Old", (), {"CalculatorPlugin": lambda: None})])
def test_20_it_never_raises(interface, monkeypatch):
    """Whatever the experimental interface turns into."""

    def load(home):
        if interface is None:
            raise RuntimeError("moved")
        return interface

    monkeypatch.setattr(ase_plugin, "import_module", load)
    assert ase_plugin._plugins() == ()


def test_20_registered_by_name_in_one_process(monkeypatch):
    """``ase run`` knows no plug-ins; a script can register the class."""
    monkeypatch.setattr("ase.calculators.calculator.external_calculators", {})
    monkeypatch.setattr("ase.calculators.calculator.names", [])
    register_calculator_class("gffmerge", GFFMergeCalculator)
    assert get_calculator_class("gffmerge") is GFFMergeCalculator
