"""``gffmerge demo``: merge the bundled specialists, compare, run dynamics, write what came out."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ase_gffmerge.cli.options import CacheDirOption, DeviceOption, DType, JsonOption, OverwriteOption
from ase_gffmerge.cli.output import note, plain, print_json, print_table, require_outputs
from ase_gffmerge.runtime.progress import Progress, progress_bar

if TYPE_CHECKING:
    from ase_gffmerge.engines.ase.calculator import GFFMergeCalculator
    from ase_gffmerge.evaluation.comparison.demo import DemoResult

NAMES = ("rmd17-ethanol", "rmd17-malonaldehyde")


def demo(
    out: Annotated[Path, typer.Option(help="Folder for table, plot and trajectories.")] = Path(
        "gffmerge-demo"
    ),
    nvt_ps: Annotated[float, typer.Option(min=0.001, help="Length of NVT at 500 K, ps.")] = 2.0,
    nve_ps: Annotated[float, typer.Option(min=0.001, help="Length of NVE at 300 K, ps.")] = 1.0,
    dtype: Annotated[DType, typer.Option(help="Of the merged network.")] = DType.float32,
    device: DeviceOption = "auto",
    cache_dir: CacheDirOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Merge the bundled specialists, compare with the baselines, run both molecules with one calculator."""
    from ase_gffmerge.evaluation.comparison.demo import DemoResult, compare_models, demo_table, run_dynamics
    from ase_gffmerge.integrations.load import load_force_field

    require_outputs(out / "demo.json", out / "demo.md", out / "parity.png", overwrite=overwrite)
    with progress_bar("merging") as progress:
        calc, seconds = _merged_calculator(
            dtype=dtype, device=device, cache_dir=cache_dir, progress=_section(progress, 0.0, 0.3)
        )
        progress(0.3, "comparing with mean, paper and ensemble")
        target = calc.force_field.potential.device
        comparison = compare_models(
            [load_force_field(name) for name in NAMES], calc.force_field, seconds, device=target
        )
        lengths = {"nvt": nvt_ps, "nve": nve_ps}
        runs = run_dynamics(calc, NAMES, lengths, out, progress=_section(progress, 0.4, 1.0))
    result = DemoResult(comparison=comparison, cache_hit=bool(calc.cache_hit), runs=runs)
    write_results(result, out)
    if as_json:
        print_json(result.to_dict())
    else:
        print_table(demo_table(result))
    note(f"written: {out} (demo.md, demo.json, errors.png, parity.png and {2 * len(NAMES)} trajectories)")


def _section(progress: Progress, start: float, end: float) -> Progress:
    """Give a part of a progress bar to a step that counts from 0 to 1."""
    return lambda fraction, text: progress(start + (end - start) * fraction, text)


def _merged_calculator(
    *, dtype: DType, device: str, cache_dir: Path | None, progress: Progress
) -> "tuple[GFFMergeCalculator, float]":
    """Merge through the cache; returns the seconds of merging or loading as well, without imports."""
    from time import perf_counter

    from ase_gffmerge.engines.ase.calculator import GFFMergeCalculator

    start = perf_counter()
    calc = GFFMergeCalculator(NAMES, dtype=dtype.value, device=device, cache_dir=cache_dir, progress=progress)
    return calc, perf_counter() - start


def write_results(result: "DemoResult", out: Path) -> None:
    """Write the table (Markdown and JSON) and both plots."""
    from ase_gffmerge.evaluation.comparison.demo import markdown
    from ase_gffmerge.evaluation.plots import plot_errors, plot_parity
    from ase_gffmerge.storage.tensor_file import atomic_write

    texts = {
        "demo.md": markdown(result),
        "demo.json": json.dumps(plain(result.to_dict()), indent=1, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        atomic_write(out / name, text)
    plot_errors(result.comparison.force_mae, out / "errors.png")
    plot_parity(result.comparison.reference, result.comparison.predicted, out / "parity.png")
