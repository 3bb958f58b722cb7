"""Every method of the registry on one mixture: run once, measured, remembered, and shown as a table."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from training_plan import say

from ase_gffmerge.evaluation.comparison.measurement import run_timed
from ase_gffmerge.merging.recipe import MERGE_VERSION
from ase_gffmerge.methods import METHODS, MergeInputs, MergeOutput

Results = dict[str, dict[str, Any]]
Column = Callable[[dict[str, Any]], float | None]


def default_methods(merge_inputs: MergeInputs) -> list[str]:
    """Methods that need no training and nothing that the mixture lacks."""
    return [
        name for name, method in METHODS.items() if not method.trains and not method.missing(merge_inputs)
    ]


def references(merge_inputs: MergeInputs) -> Iterator[tuple[str, MergeOutput]]:
    """Every specialist on its own territory, and each of them everywhere."""
    yield "specialist", MergeOutput(potentials=tuple(s.potential for s in merge_inputs.specialists))
    for specialist in merge_inputs.specialists:
        yield f"{specialist.name} alone", MergeOutput(potentials=(specialist.potential,))


def method_results(
    merge_inputs: MergeInputs,
    measure: Callable[[MergeOutput], dict[str, Any]],
    folder: Path,
    *,
    methods: Sequence[str],
) -> Results:
    """Measure the specialists and every method; what ``folder`` remembers of the same weights is not run again.

    Parameters
    ----------
    mixture
        What the methods are given.
    measure
        Errors of an outcome, JSON-able.
    folder
        Where one JSON file per method is kept.
    methods
        Names in the registry.
    """
    results = {name: measure(merge_output) for name, merge_output in references(merge_inputs)}
    for name in methods:
        results[name] = _remembered(name, merge_inputs, measure, folder / f"{name}.json")
        say(f"{name}: {results[name]['seconds']:.1f} s")
    return results


def _remembered(
    name: str, merge_inputs: MergeInputs, measure: Callable[[MergeOutput], dict[str, Any]], path: Path
) -> dict[str, Any]:
    identity = {
        "merge_version": MERGE_VERSION if METHODS[name].merges else None,
        "specialists": [[s.fingerprint, len(s.calibration)] for s in merge_inputs.specialists],
    }
    if path.exists() and (saved := json.loads(path.read_text()))["identity"] == identity:
        return saved["result"]
    say(f"{name} ...")
    merge_output, seconds = run_timed(METHODS[name], merge_inputs)
    result = {**measure(merge_output), "seconds": seconds, "settings": dict(merge_output.settings)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"identity": identity, "result": result}, indent=1))
    return result


def table(results: Results, columns: Mapping[str, Column]) -> str:
    """Markdown table: a row per method, a column per number; what does not apply is a dash."""
    rows = [["method", *columns], ["---"] + ["---:"] * len(columns)]
    for name, result in results.items():
        values = [column(result) for column in columns.values()]
        rows.append([name, *("–" if value is None else f"{value:.4g}" for value in values)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows)
