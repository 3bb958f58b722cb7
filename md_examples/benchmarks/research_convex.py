"""How close to joint training can convex solves alone get? One row per trial, all on the same pair of specialists.

    python md_examples/benchmarks/research_convex.py DATA_FOLDER --out FOLDER [--trials NAME ...] [--list] [--json]
        [--pair ethanol malonaldehyde] [--specialists FILE FILE] [--test-frames 300]

DATA_FOLDER holds the rMD17 files ``rmd17_<molecule>_{train,test}_01.npz``. Every finished row is written at once to
FOLDER/trials.json and skipped when the script runs again; names in ``--trials`` may be those of families. Errors are on test
frames that no specialist saw. Seconds are processor seconds of the merge on one thread (run with OMP_NUM_THREADS=1), so that
a busy machine does not distort them; trials that change only the readout share one trunk, whose seconds each includes.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from research.bench import Bench, Trial, measure
from research.catalogue import all_trials
from research.rows import Rows, markdown, plot

from ase_gffmerge import ForceField
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.errors import GFFMergeError, MergeWarning


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def chosen(trials: Sequence[Trial], names: Sequence[str] | None) -> list[Trial]:
    """Trials whose name or family is among the names; all without names."""
    known = {t.name for t in trials} | {t.family for t in trials}
    if unknown := sorted(set(names or ()) - known):
        raise GFFMergeError(f"no trial or family is called {', '.join(unknown)}; --list shows them")
    return [t for t in trials if not names or t.name in names or t.family in names]


def run_trials(bench: Bench, trials: Sequence[Trial]) -> Rows:
    """Run what has no row yet."""
    bench.folder.mkdir(parents=True, exist_ok=True)
    rows = Rows(bench.folder / "trials.json", bench.identity)
    for i, trial in enumerate(trials):
        if trial.name in rows.found:
            continue
        say(f"{i + 1}/{len(trials)} {trial.name}: {trial.changes} ...")
        try:
            row = measure(trial, bench)
        except (ValueError, RuntimeError) as error:
            say(f"    failed: {error}")
            continue
        rows.keep(row)
        errors = ", ".join(f"{name} {mae:.1f} meV/Å" for name, mae in row["force_mae"].items())
        say(f"    {errors}; {row['seconds']:.0f} s; {row['note']}")
    return rows


def load_bench(
    data: Path, pair: Sequence[str], specialists: Sequence[str] | None, n: int, out: Path
) -> Bench:
    """Specialists of a pair of molecules, their training frames as pools, and the first ``n`` test frames."""
    sources = specialists or [f"rmd17-{molecule}" for molecule in pair]
    if len(sources) != len(pair):
        raise GFFMergeError(f"{len(sources)} specialists for {len(pair)} molecules; give one file for each")
    return Bench(
        specialists=tuple(ForceField.load(source) for source in sources),
        pools=tuple(tuple(read_frames(data / f"rmd17_{m}_train_01.npz")) for m in pair),
        tests=tuple(tuple(read_frames(data / f"rmd17_{m}_test_01.npz", index=slice(0, n))) for m in pair),
        folder=out,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trials", nargs="+")
    parser.add_argument("--list", action="store_true", help="show the trials and stop")
    parser.add_argument("--pair", nargs=2, default=("ethanol", "malonaldehyde"))
    parser.add_argument("--specialists", nargs=2)
    parser.add_argument("--test-frames", type=int, default=300)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    warnings.simplefilter("ignore", MergeWarning)
    try:
        trials = chosen(all_trials(), options.trials)
        if options.list:
            print("\n".join(f"{t.family:12s} {t.name:34s} {t.changes}" for t in trials))
            return 0
        bench = load_bench(options.data, options.pair, options.specialists, options.test_frames, options.out)
        rows = run_trials(bench, trials)
    except GFFMergeError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("stopped; the same command goes on after the last finished trial")
        return 130
    found = [rows.found[t.name] for t in trials if t.name in rows.found]
    if found:
        (options.out / "trials.md").write_text(markdown(found) + "\n")
        plot(found, options.out / "trials.png")
    print(json.dumps(found, indent=1) if options.json else markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
