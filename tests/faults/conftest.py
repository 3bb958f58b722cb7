"""Tiny specialists, a cache with one entry, and cheap processes to hurt."""

import multiprocessing
from pathlib import Path

import pytest

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.workflows.cache import MergeCache
from ase_gffmerge.workflows.merge import merge
from helpers.faults import RECIPE, key_of, tiny_specialists

PRELOADED = [
    "pytest",
    "ase_gffmerge.engines.ase.calculator",
    "ase_gffmerge.merging.merge",
    "ase_gffmerge.training.train",
]


@pytest.fixture
def specialists() -> list[ForceField]:
    """Two relatives with calibration frames."""
    return tiny_specialists()


@pytest.fixture(scope="session")
def merged() -> ForceField:
    """Their mean, with a report and an extrapolation grade."""
    return merge(tiny_specialists(), RECIPE, device="cpu")[0]


@pytest.fixture
def files(specialists, tmp_path) -> list[Path]:
    """Their files."""
    return [s.save(tmp_path / f"{s.name}.safetensors") for s in specialists]


@pytest.fixture
def model(specialists, tmp_path) -> Path:
    """A file with everything a file can hold: weights, frames, provenance, extrapolation grade."""
    return specialists[0].with_extrapolation_grade().save(tmp_path / "model.safetensors")


@pytest.fixture
def entry(specialists, merged, tmp_path) -> Path:
    """The entry of their merge in the cache ``tmp_path / "cache"``."""
    cache = MergeCache(tmp_path / "cache")
    cache.get_or_build(specialists, RECIPE, lambda: merged)
    return cache.path(key_of(specialists, RECIPE))


@pytest.fixture(scope="session")
def processes():
    """Context of processes that start within a fraction of a second, with torch loaded and nothing else inherited."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this platform has no fork server")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
