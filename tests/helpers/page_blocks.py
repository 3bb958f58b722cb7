"""Code blocks of pages in Markdown, each under a line that says what it is."""

import os
import re
import subprocess
import sys
from pathlib import Path

BLOCK = re.compile(r"<!-- (runs|file): (\S+) -->\n```(bash|python|yaml)\n(.*?)```", re.DOTALL)
"""``runs`` and who runs it, or ``file`` and its name; language; code."""


def run_block(language: str, code: str, *, folder: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run a block as a reader in a folder would, and ask for success."""
    environment = {
        **os.environ,
        "GFFMERGE_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"
    return done
