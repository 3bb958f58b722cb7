"""Every numbered example runs, asserts its own result, says something, and leaves nothing behind."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "md_examples"
EXAMPLES = sorted(FOLDER.glob("[0-9]*.py"))
QUICK = ("04_",)
"""Those that run by default, on a quick merge; ``pytest -m slow`` runs the others, on the default one."""
NIGHTLY = ("03", "06", "11", "13")
"""Too long for ``.ci/run``."""


def marks(name: str) -> list[pytest.MarkDecorator]:
    """Slow unless quick, nightly if that is too long for ``.ci/run``."""
    return [pytest.mark.slow] * (not name.startswith(QUICK)) + [pytest.mark.nightly] * name.startswith(
        NIGHTLY
    )


PARAMETERS = [pytest.param(path, id=path.stem, marks=marks(path.name)) for path in EXAMPLES]


@pytest.mark.parametrize("path", PARAMETERS)
def test_example(path: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    cache = request.getfixturevalue("merge_cache" if path.name.startswith(QUICK) else "full_merge_cache")
    environment = {**os.environ, "GFFMERGE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    assert "deprecat" not in done.stderr.lower()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.stem)
def test_what_a_script_imports_from_the_package_exists(path: Path) -> None:
    """Every script, also those that take hours and those that need packages that are not installed."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ase_gffmerge":
            try:
                module = importlib.import_module(node.module)
            except ImportError as error:
                assert "is not installed" in str(error)  # noqa: PT017
                continue
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


def test_the_readme_lists_every_example() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(EXAMPLES) == 14
    assert [path.name for path in FOLDER.glob("*.py") if f"`{path.name}`" not in text] == []
