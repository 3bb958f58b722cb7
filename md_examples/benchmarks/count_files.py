"""How many files of the package take part in building a calculator, and in one step of molecular dynamics.

    python md_examples/benchmarks/count_files.py [--recipe mean] [--json]

A file counts where one of its functions runs; what runs only because a module is imported does not count. Three cases, all
for the bundled ethanol and malonaldehyde specialists, on the CPU, not compiled:

- ``miss``: ``GFFMergeCalculator([a, b])`` with an empty cache, so that the specialists are merged (by ``--recipe``);
- ``hit``: the same again, which finds the merge in the cache;
- ``step``: one step of velocity Verlet after a few others, the neighbor list within its skin.

Before the redesign of 2026-11 these were 50 (by ``paper``; 44 by ``mean``), 27 and 22.
"""

import argparse
import inspect
import json
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

import numpy as np
import torch
from ase import units
from ase.md import thermalize_momenta
from ase.md.verlet import VelocityVerlet

import ase_gffmerge
from ase_gffmerge import GFFMergeCalculator

PACKAGE = str(Path(ase_gffmerge.__file__).parent) + "/"
PAIR = ("rmd17-ethanol", "rmd17-malonaldehyde")
TARGETS = {"hit": 30, "step": 15}


def files_of(work: Callable[[], object]) -> dict[str, list[str]]:
    """Run ``work``; names of the functions that ran in each file of the package."""
    codes: set[CodeType] = set()
    importing = 0

    def note(frame: FrameType, event: str, _: object) -> None:
        nonlocal importing
        if event not in ("call", "return"):
            return
        code = frame.f_code
        if code.co_name == "<module>":
            importing += 1 if event == "call" else -1
        elif event == "call" and not importing and code.co_flags & inspect.CO_OPTIMIZED:  # no class's body
            codes.add(code)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    found: dict[str, list[str]] = {}
    for code in codes:
        if not code.co_filename.startswith(PACKAGE):
            continue
        found.setdefault(code.co_filename.removeprefix(PACKAGE), []).append(code.co_qualname)
    return {name: sorted(found[name]) for name in sorted(found)}


def measure(recipe: str) -> dict[str, dict[str, list[str]]]:
    """The three cases."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")

        def build() -> GFFMergeCalculator:
            options = {"device": "cpu", "compile": False, "cache_dir": folder}
            return GFFMergeCalculator(PAIR, recipe=recipe, **options)

        cases = {"miss": files_of(build), "hit": files_of(build)}
        atoms = ase_gffmerge.ForceField.load(PAIR[0]).calibration[0].copy()
        atoms.calc = build()
        thermalize_momenta(atoms, 300, rng=np.random.default_rng(0))
        dynamics = VelocityVerlet(atoms, 0.1 * units.fs)
        dynamics.run(5)
        return {**cases, "step": files_of(lambda: dynamics.run(1))}


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="mean", help="of the merge that is not in the cache [mean]")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = measure(arguments.recipe)
    if arguments.json:
        print(json.dumps(cases, indent=1))
        return
    for case, files in cases.items():
        goal = f" (at most {TARGETS[case]} wanted)" if case in TARGETS else ""
        print(f"{case}: {len(files)} files{goal}")
        for name, functions in files.items():
            print(f"  {name}: {', '.join(functions)}")


if __name__ == "__main__":
    main()
