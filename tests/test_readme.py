"""The README says nothing that does not run: each block is run here or by ``.ci/run``."""

import re
from pathlib import Path

import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.io import write

from ase_gffmerge.merging.recipe import load_recipe
from ase_gffmerge.merging.report import GOOD, USABLE
from ase_gffmerge.training.config import load_config
from helpers.page_blocks import BLOCK, run_block

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = BLOCK.findall(TEXT)
TINY = """
hyper: {channels: 16, n_blocks: 2, n_radial: 8, cutoff: 4.0}
epochs: 30
validation: 5
"""


def test_every_block_is_marked() -> None:
    assert TEXT.count("\n```") == 2 * len(BLOCKS)
    assert {target for kind, target, *_ in BLOCKS if kind == "runs"} == {"ci", "test"}


def test_ci_runs_its_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    commands = [code.strip() for _, target, _, code in BLOCKS if target == "ci"]
    assert len(commands) == 2
    assert all(command in script for command in commands)


def test_thresholds_are_those_of_the_report() -> None:
    stated = re.findall(r"below\s+(\d+) %", TEXT)
    assert stated == [f"{100 * GOOD:.0f}", f"{100 * USABLE:.0f}"]


def test_links_and_files_exist() -> None:
    named = re.findall(r"\]\(([^)#:]+)\)", TEXT) + re.findall(r"`(md_examples/\S+?)`", TEXT)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_longest_tests_begin_first(request) -> None:
    """Here, since the blocks of the README take longest: no other worker waits for them at the end."""
    names = [item.path.name for item in request.session.items]
    assert names[: names.count("test_readme.py")] == names.count("test_readme.py") * ["test_readme.py"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Frames and files with the names that the README uses; training options are tiny ones."""
    rng = np.random.default_rng(0)
    for name, formula in (("methanol", "CH3OH"), ("formaldehyde", "H2CO")):
        for part, n in (("", 30), ("-test", 5)):
            frames = []
            for _ in range(n):
                atoms = molecule(formula)
                atoms.rattle(0.08, rng=rng)
                atoms.calc = EMT()
                atoms.get_forces()
                frames.append(atoms)
            write(tmp_path / f"{name}{part}.xyz", frames, format="extxyz")
    molecule("CH3CH2OH").write(tmp_path / "ethanol.xyz")
    for kind, target, _, code in BLOCKS:
        if kind == "file":
            (tmp_path / target).write_text(code)
    load_config(tmp_path / "train.yaml")
    load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "train.yaml").write_text(TINY)
    return tmp_path


def test_blocks_run_in_order(folder: Path, merge_cache: Path) -> None:
    for _, _, language, code in (block for block in BLOCKS if block[:2] == ("runs", "test")):
        cache = folder / "cache" if "cache clear" in code else merge_cache
        done = run_block(language, code, folder=folder, cache=cache)
        assert done.stdout.strip()
    for name in ("merged.html", "report.html", "report.png", "md.traj", "relaxed.xyz", "both.safetensors"):
        assert (folder / name).stat().st_size > 0
