"""The README says nothing that does not run: each block is run here or by ``.ci/run``."""

import re

import pytest

from ase_gffmerge.merging.recipe import load_recipe
from ase_gffmerge.training.config import load_config
from helpers.page_blocks import ROOT, Page, shared_folder

README = Page("README.md")


def test_every_block_is_marked() -> None:
    assert README.unmarked == 0
    assert {target for kind, target, *_ in README.blocks if kind == "runs"} == {"ci", "test"}
    assert len(README.text.splitlines()) <= 150


def test_ci_runs_its_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    commands = [code.strip() for _, target, _, code in README.blocks if target == "ci"]
    assert len(commands) == 2
    assert all(any(line.startswith(command) for line in script) for command in commands)


def test_links_and_files_exist() -> None:
    text = README.text + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(
        r"[` ]((?:md_examples|docs|tests)/[\w/]+\.\w+)", text
    )
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_longest_tests_begin_first(request: pytest.FixtureRequest) -> None:
    """Here, since the blocks of the README take longest: no other worker waits for them at the end."""
    names = [item.path.name for item in request.session.items]
    assert names[: names.count("test_readme.py")] == names.count("test_readme.py") * ["test_readme.py"]


def test_blocks_run_in_order(tmp_path_factory: pytest.TempPathFactory, merge_cache) -> None:
    folder = README.finished(shared_folder(tmp_path_factory), merge_cache)
    for name in ("merged.html", "merged.safetensors", "md.traj"):
        assert (folder / name).stat().st_size > 0
    load_config(folder / "train.yaml")
    load_recipe(folder / "quick.yaml")
