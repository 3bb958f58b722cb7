"""Build a fresh virtual environment for every package whose force fields can be merged, and run its tests there.

    python md_examples/vendor_environments.py                      # all of them
    python md_examples/vendor_environments.py nequip sevennet --folder environments

What is installed besides: this checkout with the package's optional extra, and pytest. Options after ``--`` go to pip, for
example ``-- --index-url https://download.pytorch.org/whl/cpu`` for a torch without CUDA.
"""

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES, LINEAR = "tests/integrations/test_pages.py", "tests/models/test_element_linear.py"
TESTS = {
    "chgnet": ["tests/integrations/test_chgnet.py"],
    "nequip": ["tests/integrations/test_nequip_package.py", PAGES, LINEAR],
    "sevennet": ["tests/integrations/test_sevennet.py", PAGES, LINEAR],
    "orb": ["tests/integrations/test_orb.py", PAGES],
    "mace": ["tests/integrations/test_mace.py", PAGES, LINEAR],
}
TOOLS = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100")
SHOWN = ("torch", "e3nn", "ase", "numpy", "chgnet", "nequip", "sevenn", "orb-models", "mace-torch")


def build(vendor: str, folder: Path, pip_options: list[str]) -> Path:
    """Make the environment and return its Python; one that is there is kept and brought up to date."""
    python = folder / vendor / "bin" / "python"
    if not python.exists():
        venv.create(folder / vendor, with_pip=True)
    install = [str(python), "-m", "pip", "install", "--quiet", *pip_options]
    subprocess.run([*install, "--editable", f"{ROOT}[{vendor}]", *TOOLS], check=True)
    return python


def versions(python: Path) -> str:
    """What was installed, for the record."""
    listing = subprocess.run(
        [str(python), "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True, text=True
    ).stdout
    wanted = [line for line in listing.splitlines() if line.partition("==")[0].lower() in SHOWN]
    return ", ".join(wanted)


def run_tests(python: Path, vendor: str) -> int:
    """Run the tests with one thread; 0 when all of them pass."""
    command = [str(python), "-m", "pytest", "-q", "-rs", *TESTS[vendor]]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


def main() -> int:
    """Return the number of packages whose tests failed."""
    own, pip_options = sys.argv[1:], []
    if "--" in own:
        cut = own.index("--")
        own, pip_options = own[:cut], own[cut + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("vendors", nargs="*", help=f"of {', '.join(TESTS)}; default: all")
    parser.add_argument("--folder", type=Path, default=Path("environments"))
    arguments = parser.parse_args(own)
    if unknown := set(arguments.vendors) - set(TESTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(TESTS)}")
    failed = []
    for vendor in arguments.vendors or TESTS:
        python = build(vendor, arguments.folder.resolve(), pip_options)
        print(f"{vendor}: {versions(python)}", flush=True)
        if run_tests(python, vendor):
            failed.append(vendor)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
