"""``gffmerge train``: from labelled frames to a specialist."""

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ase_gffmerge.cli.options import (
    CoreRepulsionChoice,
    DeviceOption,
    EnergyKey,
    ForcesKey,
    JsonOption,
    OverwriteOption,
    StressKey,
)
from ase_gffmerge.cli.output import EpochWatch, print_json, print_values, require_outputs, with_unit
from ase_gffmerge.runtime.progress import is_first, progress_bar

if TYPE_CHECKING:
    from ase_gffmerge.forcefield.force_field import ForceField
    from ase_gffmerge.inference.errors import Errors
    from ase_gffmerge.training.checkpoint import History

FRAMES_HELP = "Labelled frames: extxyz or another file ASE reads, rMD17 or MD17 npz, DeePMD folder."


def train(
    frames: Annotated[list[Path], typer.Argument(help=FRAMES_HELP, show_default=False)],
    out: Annotated[
        Path,
        typer.Option(
            help="Force-field file to write (.safetensors); with any other ending, the format of --init's package.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="painn, nequip, escaip, m3gnet, tensornet or mattersim.",
            show_default="of --init, else painn",
        ),
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="Start from this specialist (file or bundled name).")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the frames.", show_default="100")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with further options.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of initial weights, split and order.", show_default="0")
    ] = None,
    device: DeviceOption = "auto",
    keep: Annotated[
        int, typer.Option("--frames", help="Training frames kept, unlabelled, for merging.")
    ] = 100,
    test: Annotated[list[Path] | None, typer.Option(help="Labelled frames to test on; repeatable.")] = None,
    references: Annotated[
        str,
        typer.Option(
            help="Energies per element: a JSON file (eV), or auto: of --init, else of isolated atoms and a fit."
        ),
    ] = "auto",
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    stress_key: StressKey = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the specialist.", show_default="name of --out")
    ] = None,
    core_repulsion: Annotated[
        CoreRepulsionChoice | None,
        typer.Option(
            help="auto: let atoms repel each other that are closer than in any training frame.",
            show_default="of --init, else none",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a specialist; a killed training continues when the same command is run again.

    Several processes share the batches when torchrun starts them, as for merge.
    """
    from ase_gffmerge.evaluation.plots import plot_history
    from ase_gffmerge.integrations.load import load_force_field
    from ase_gffmerge.runtime.distributed import sharing
    from ase_gffmerge.training import train as training
    from ase_gffmerge.training.config import load_config
    from ase_gffmerge.training.initialization import load_references

    repulsion = core_repulsion.value if core_repulsion else None
    options = load_config(config, model=model, epochs=epochs, seed=seed, core_repulsion=repulsion)
    curve = out.with_name(f"{out.name.removesuffix('.safetensors')}.png")
    require_outputs(curve, model=out, inputs=[*frames, *(test or ()), init], overwrite=overwrite)
    started = perf_counter()
    with sharing(), progress_bar("training") as progress:
        watch = EpochWatch(options.epochs, progress)
        try:
            trained = training.train(
                frames,
                out,
                options,
                name=name,
                init=load_force_field(init) if init else None,
                references=None if references == "auto" else load_references(Path(references)),
                n_calibration=keep,
                test=test or (),
                keys={"energy": energy_key, "forces": forces_key, "stress": stress_key},
                device=device,
                callback=watch,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(watch.farewell()) from None
    if not is_first():
        return
    plot_history(trained[1], curve)
    report(_summary(trained, out, curve, perf_counter() - started), as_json)


def _summary(
    trained: "tuple[ForceField, History, Errors | None]", out: Path, curve: Path, seconds: float
) -> dict[str, object]:
    """Describe the result as one JSON-able document."""
    specialist, history, errors = trained
    return {
        "out": str(out),
        "loss_curve": str(curve),
        "name": specialist.name,
        "fingerprint": specialist.fingerprint,
        "n_train": specialist.provenance.n_train,
        "epochs": len(history.rows),
        "seconds": seconds,
        "last_epoch": history.rows[-1],
        "test_errors": errors.totals() if errors else None,
    }


def report(document: dict[str, Any], as_json: bool) -> None:
    """Print the result."""
    if as_json:
        print_json(document)
        return
    rows = {key: document[key] for key in ("out", "loss_curve", "epochs", "seconds")} | document["last_epoch"]
    rows = {with_unit(key): value for key, value in rows.items()}
    rows |= {f"test {with_unit(key)}": value for key, value in (document["test_errors"] or {}).items()}
    print_values(rows)
