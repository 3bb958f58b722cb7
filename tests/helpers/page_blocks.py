"""Code blocks of pages in Markdown, each under a line that says what it is."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"<!-- (runs|file|shown): ([^\n]+) -->\n```(bash|python|yaml)\n(.*?)```", re.DOTALL)
"""``runs`` and who runs it, ``file`` and its name, or ``shown`` and why it is not run; language; code."""
SECONDS = 900
DONE = ".page-is-done"


@dataclass(frozen=True)
class Page:
    """A page with blocks, by its path in the repository."""

    name: str

    @property
    def text(self) -> str:
        return (ROOT / self.name).read_text(encoding="utf-8")

    @property
    def blocks(self) -> list[tuple[str, str, str, str]]:
        return BLOCK.findall(self.text)

    @property
    def unmarked(self) -> int:
        """Blocks of code without a line that says what they are."""
        return len(re.findall(r"^```(?:bash|python|yaml)$", self.text, re.MULTILINE)) - len(self.blocks)

    @property
    def slow(self) -> bool:
        return "<!-- slow -->\n" in self.text

    @property
    def continues(self) -> "Page | None":
        """The page whose files it begins with."""
        found = re.search(r"^<!-- continues: (\S+) -->$", self.text, re.MULTILINE)
        return Page(found[1]) if found else None

    @property
    def needs(self) -> list[str]:
        """Modules of other packages without which it does not run."""
        found = re.search(r"^<!-- needs: ([\w ]+) -->$", self.text, re.MULTILINE)
        return found[1].split() if found else []

    def run(self, folder: Path, cache: Path) -> None:
        """Write its files and run its blocks in order."""
        for kind, target, language, code in self.blocks:
            if kind == "file":
                (folder / target).write_text(code)
            elif (kind, target) == ("runs", "test"):
                run_block(language, code, folder=folder, cache=cache)

    def finished(self, shared: Path, cache: Path) -> Path:
        """Folder in which it was run, once for all workers, after the page that it continues."""
        folder = shared / f"page-{self.name.removesuffix('.md').replace('/', '-')}"
        with FileLock(f"{folder}.lock"):
            if not (folder / DONE).exists():
                shutil.rmtree(folder, ignore_errors=True)
                if self.continues:
                    shutil.copytree(self.continues.finished(shared, cache), folder)
                    (folder / DONE).unlink()
                folder.mkdir(exist_ok=True)
                self.run(folder, cache)
                (folder / DONE).touch()
        return folder


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A temporary folder that all workers of a run see."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def run_block(language: str, code: str, *, folder: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run a block as a reader in a folder would, and ask for success."""
    environment = {
        **os.environ,
        "GFFMERGE_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"
    return done
