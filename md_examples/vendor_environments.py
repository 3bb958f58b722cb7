"""Build a fresh virtual environment for every package whose force fields can be merged, and run its tests there.

``workflows`` is the one of matcalc and janus-core, which take the calculator instead.

    python md_examples/vendor_environments.py                      # all of them
    python md_examples/vendor_environments.py nequip sevennet --folder environments

What is installed besides: this checkout with the package's optional extra, and pytest. Options after ``--`` go to pip, for
example ``-- --index-url https://download.pytorch.org/whl/cpu`` for a torch without CUDA.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TOOLS = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100")


def tests_of(vendor: str) -> list[str]:
    """Files of tests that belong to a vendor: its own, its page's, and those of layers that several vendors share."""
    own, page = f"tests/integrations/test_{vendor}.py", ROOT / "docs" / "how_to" / "vendors" / f"{vendor}.md"
    shared = ["tests/integrations/test_pages.py", "tests/models/test_element_linear.py"]
    return [own, *(shared if page.exists() else [])]


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GFFMERGE_VENDOR_ENVIRONMENT": "1"}
"""One thread, and merges of published networks by the default recipe."""

VENDORS = [extra for extra in EXTRAS if (ROOT / tests_of(extra)[0]).exists()]
"""A vendor is an optional extra of the package that has tests of its own."""


def build(vendor: str, folder: Path, pip_options: list[str]) -> Path:
    """Make the environment and return its Python; one that is there is kept and brought up to date."""
    python = folder / vendor / "bin" / "python"
    if not python.exists():
        venv.create(folder / vendor, with_pip=True)
    install = [str(python), "-m", "pip", "install", "--quiet", *pip_options]
    subprocess.run([*install, "--editable", f"{ROOT}[{vendor}]", *TOOLS], check=True)
    return python


def versions(python: Path, vendor: str) -> str:
    """What was installed, for the record."""
    shown = {"torch", "e3nn", "ase", "numpy", *(re.split(r"[<>=]", name)[0] for name in EXTRAS[vendor])}
    listing = subprocess.run(
        [str(python), "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True, text=True
    ).stdout
    wanted = [line for line in listing.splitlines() if line.partition("==")[0].lower() in shown]
    return ", ".join(wanted)


def run_tests(python: Path, vendor: str) -> int:
    """Run the tests with one thread, slow and nightly ones, too; 0 when all of them pass."""
    command = [str(python), "-m", "pytest", "-q", "-rs", "-m", "", *tests_of(vendor)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}).returncode


def main() -> int:
    """Return the number of packages whose tests failed."""
    own, pip_options = sys.argv[1:], []
    if "--" in own:
        cut = own.index("--")
        own, pip_options = own[:cut], own[cut + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("vendors", nargs="*", help=f"of {', '.join(VENDORS)}; default: all")
    parser.add_argument("--folder", type=Path, default=Path("environments"))
    arguments = parser.parse_args(own)
    if unknown := set(arguments.vendors) - set(VENDORS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(VENDORS)}")
    failed = []
    for vendor in arguments.vendors or VENDORS:
        python = build(vendor, arguments.folder.resolve(), pip_options)
        print(f"{vendor}: {versions(python, vendor)}", flush=True)
        if run_tests(python, vendor):
            failed.append(vendor)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
