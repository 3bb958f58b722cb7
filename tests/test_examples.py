"""Every numbered example runs, asserts its own result, says something, and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "md_examples"
EXAMPLES = sorted(FOLDER.glob("[0-9]*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, merge_cache: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "GFFMERGE_CACHE": str(merge_cache), "OMP_NUM_THREADS": "1"}
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


def test_the_readme_lists_every_example() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(EXAMPLES) == 13
    assert [path.name for path in FOLDER.glob("*.py") if f"`{path.name}`" not in text] == []
