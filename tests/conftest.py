"""Structures and potentials that several test folders use."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from hypothesis import HealthCheck, settings

from ase_gffmerge import ForceField, load_force_field, merge
from ase_gffmerge.errors import MergeWarning
from ase_gffmerge.merging.recipe import load_recipe
from ase_gffmerge.models import Potential, build_potential
from ase_gffmerge.workflows.cache import MergeCache
from helpers.structures import WITH_ESCAIP, rattled_slab, skewed_crystal

torch.set_num_threads(1)
settings.register_profile(
    "same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")
"""The same examples everywhere, and none fails because a machine is busy; ``--hypothesis-profile default`` draws new."""

HYPER = {
    "painn": {"cutoff": 4.0, "channels": 8, "n_blocks": 2, "n_radial": 6},
    "nequip": {"cutoff": 4.0, "channels": 8, "tensor_channels": 4, "n_blocks": 2, "n_radial": 6},
    "chgnet": {
        "cutoff": 4.0,
        "channels": 8,
        "n_blocks": 2,
        "n_radial": 6,
        "n_angular": 5,
        "readout_layers": 1,
    },
    "escaip": {"cutoff": 4.0, "channels": 8, "n_blocks": 2, "n_radial": 6, "atten_num_heads": 2},
    "m3gnet": {
        "cutoff": 4.0,
        "channels": 8,
        "n_blocks": 2,
        "edge_channels": 6,
        "width": 7,
        "three_body_cutoff": 3.0,
    },
    "tensornet": {"cutoff": 4.0, "channels": 8, "n_blocks": 2, "n_radial": 6},
    "mattersim": {
        "cutoff": 4.0,
        "channels": 8,
        "n_blocks": 2,
        "n_radial": 3,
        "l_max": 2,
        "three_body_cutoff": 3.0,
    },
}

CACHE = os.environ.get("GFFMERGE_CACHE")

LONGEST = ("test_readme.py", "test_docs.py", "test_demo.py")
"""Modules that run for minutes begin first, so that no worker waits for them at the end."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``slow_for("nequip")`` makes a test slow where one of its parameters has this value; so does ``nightly_for``."""
    for item in items:
        values = getattr(item, "callspec", None) and item.callspec.params.values()
        for name in ("slow", "nightly"):
            for mark in item.iter_markers(f"{name}_for"):
                if any(value in mark.args for value in values or () if isinstance(value, str)):
                    item.add_marker(name)
    items.sort(key=lambda item: (*LONGEST, item.path.name).index(item.path.name))


def shared_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder of this name that all workers of the run share."""
    own = factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name


@pytest.fixture(scope="session")
def full_merge_cache(tmp_path_factory) -> Path:
    """One cache for all workers: a merge is paid once, or was when ``GFFMERGE_CACHE`` names a cache."""
    return Path(CACHE) if CACHE else shared_folder(tmp_path_factory, "full-merge-cache")


@pytest.fixture(scope="session")
def merge_cache(tmp_path_factory) -> Path:
    """One cache for all workers, with a quick merge of the bundled pair: of five frames each, with a narrow readout.

    It stands in for the default merge, which takes minutes of processor time; that one is made by ``gffmerge demo`` in
    ``.ci/run`` (whose cache is then used here too) and by the slow tests.
    """
    if CACHE:
        return Path(CACHE)
    pair = [load_force_field(name) for name in ("rmd17-ethanol", "rmd17-malonaldehyde")]

    def build() -> ForceField:
        few = [s.with_calibration(s.calibration[::20]) for s in pair]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MergeWarning)
            return merge(few, {"preset": "closed-form", "readout": {"width": 256}}, device="cpu")[0]

    cache = MergeCache(shared_folder(tmp_path_factory, "merge-cache"))
    cache.get_or_build(pair, load_recipe(), build)
    return cache.directory


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(params=WITH_ESCAIP)
def architecture(request) -> str:
    return request.param


@pytest.fixture
def potential(architecture) -> Potential:
    """A small random potential in float64 that knows H, C, O and Al."""
    torch.manual_seed(0)
    potential = build_potential(architecture, HYPER[architecture], (1, 6, 8, 13)).double()
    potential.references += torch.tensor([-13.6, -1029.0, -2041.0, -6600.0], dtype=torch.float64)
    return potential.eval().requires_grad_(False)


STRUCTURES = {"molecule": lambda: molecule("CH3CH2OH"), "slab": rattled_slab, "crystal": skewed_crystal}


@pytest.fixture
def structures() -> list[Atoms]:
    return [make() for make in STRUCTURES.values()]


@pytest.fixture(params=sorted(STRUCTURES))
def atoms(request) -> Atoms:
    """One structure per kind of periodicity."""
    return STRUCTURES[request.param]()
