"""The scripts in md_examples/benchmarks as modules; they import their neighbours by name."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "md_examples" / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """``script(name)`` imports a script of md_examples/benchmarks."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module
