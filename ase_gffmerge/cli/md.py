"""``gffmerge md``: molecular dynamics with ASE's integrators."""

import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ase_gffmerge.cli.options import (
    DeviceOption,
    DispersionOption,
    DType,
    FixOption,
    JsonOption,
    ModelArgument,
    OverwriteOption,
    SpecialistOption,
    StructureArgument,
    fix_atoms,
    prepared_frames,
)
from ase_gffmerge.cli.output import note, print_json, print_values, require_outputs
from ase_gffmerge.runtime.progress import progress_bar

if TYPE_CHECKING:
    from ase import Atoms

    from ase_gffmerge.dynamics.extrapolation_monitor import ExtrapolationMonitor
    from ase_gffmerge.dynamics.trajectory import Sample


class Ensemble(StrEnum):
    """Thermodynamic ensembles."""

    nve = "nve"
    nvt = "nvt"
    npt = "npt"


class Thermostat(StrEnum):
    """Thermostats of nvt."""

    langevin = "langevin"
    bussi = "bussi"
    nose_hoover = "nose-hoover"


class Barostat(StrEnum):
    """What npt lets move: all lengths and angles of the cell, or its volume alone."""

    anisotropic = "anisotropic"
    isotropic = "isotropic"


class Extrapolation(StrEnum):
    """What to do about structures beyond the calibration frames."""

    warn = "warn"
    stop = "stop"
    record = "record"
    off = "off"


def md(
    model: ModelArgument,
    structure: StructureArgument,
    ensemble: Annotated[Ensemble, typer.Option(help="Kind of dynamics.", show_default=False)],
    temperature: Annotated[float, typer.Option(help="K.", show_default=False)],
    steps: Annotated[int, typer.Option(help="Number of steps.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Trajectory (.traj, .xyz, .extxyz).", show_default=False)],
    timestep: Annotated[float, typer.Option(help="fs.")] = 0.5,
    final_temperature: Annotated[
        float | None, typer.Option(help="K; heat or cool linearly to it during the run (langevin, bussi).")
    ] = None,
    thermostat: Annotated[Thermostat, typer.Option(help="Of nvt.")] = Thermostat.langevin,
    friction: Annotated[float, typer.Option(help="Of Langevin dynamics, 1/fs.")] = 0.01,
    thermostat_time: Annotated[
        float | None,
        typer.Option(help="Time constant of bussi, nose-hoover and npt, fs.", show_default="100 time steps"),
    ] = None,
    pressure: Annotated[float, typer.Option(help="External pressure for npt, GPa.")] = 0.0,
    barostat: Annotated[Barostat, typer.Option(help="Of npt.")] = Barostat.anisotropic,
    barostat_time: Annotated[
        float | None, typer.Option(help="Time constant of the barostat, fs.", show_default="1000 time steps")
    ] = None,
    fix: FixOption = None,
    seed: Annotated[int, typer.Option(help="Of velocities and thermostat.")] = 0,
    interval: Annotated[int, typer.Option(help="Steps between frames of the trajectory.")] = 10,
    dtype: Annotated[DType, typer.Option(help="Of the network.")] = DType.float32,
    device: DeviceOption = "auto",
    specialist: SpecialistOption = None,
    dispersion: DispersionOption = None,
    extrapolation: Annotated[
        Extrapolation | None,
        typer.Option(
            help="When a sampled structure is beyond the calibration frames; record writes it beside the trajectory.",
            show_default="warn, where the model can tell",
        ),
    ] = None,
    threshold: Annotated[float, typer.Option(help="Extrapolation grade to act on; 1 is the edge.")] = 2.0,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart", help="Continue the run in --out exactly where it stopped; --steps counts all steps."
        ),
    ] = False,
    append: Annotated[bool, typer.Option("--append", help="Add frames to the trajectory --out.")] = False,
    log: Annotated[
        Path | None, typer.Option(help="Text file with time, energies and temperature of every frame.")
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run molecular dynamics from fresh velocities and write a trajectory with energies and forces.

    nve: velocity Verlet; nvt: a thermostat; npt: Martyna-Tobias-Klein. A killed run is continued by the same command with
    --restart. A run that explodes stops, keeps what came before, and ends with exit code 1.
    """
    from ase_gffmerge.dynamics.ase_md import run_md
    from ase_gffmerge.dynamics.integrators import Conditions, restart_path
    from ase_gffmerge.errors import ExtrapolationWarning

    goes_on = restart or append
    require_outputs(
        None if goes_on else out, None if restart else log, inputs=[structure, model], overwrite=overwrite
    )
    require_outputs(out, inputs=[structure, model], overwrite=True)
    (atoms,) = prepared_frames(
        model,
        structure,
        device=device,
        dtype=dtype.value,
        specialist=specialist,
        dispersion=dispersion,
        first=True,
    )
    # --extrapolation decides what is said about structures beyond the calibration frames, not the calculator
    warnings.filterwarnings("ignore", message=".*This is said once", category=ExtrapolationWarning)
    fix_atoms(atoms, fix)
    conditions = Conditions(
        ensemble=ensemble.value,
        temperature=temperature,
        final_temperature=final_temperature,
        timestep=timestep,
        thermostat=thermostat.value,
        friction=friction,
        thermostat_time=thermostat_time,
        pressure=pressure,
        barostat=barostat.value,
        barostat_time=barostat_time,
    )
    monitor = _extrapolation_monitor(atoms, extrapolation, threshold=threshold, trajectory=out)
    with progress_bar(f"{ensemble.value} at {temperature:g} K") as progress:
        last: list[Sample] = []

        def watch(sample: "Sample") -> None:
            last[:] = [sample]
            progress(sample.step / steps, describe(sample, steps))
            if monitor is not None:
                monitor()

        try:
            result = run_md(
                atoms,
                conditions,
                steps=steps,
                seed=seed,
                interval=interval,
                trajectory=out,
                append=append,
                restart=restart_path(out),
                resume=restart,
                log=log,
                on_sample=watch,
            )
        except KeyboardInterrupt:
            done = (
                f"{out} holds {last[0].step} of {steps} steps; the same command with --restart continues"
                if last
                else "nothing was written"
            )
            raise KeyboardInterrupt(f"interrupted; {done}") from None
    document: dict[str, object] = {**result.to_dict(), "trajectory": str(out)}
    if monitor is not None and monitor.n_calls:  # none where a run that is over was continued
        document |= {"extrapolation_largest": monitor.largest, "extrapolation_beyond": monitor.n_beyond}
    if as_json:
        print_json(document)
    if result.stopped:
        note(f"gffmerge: stopped: {result.detail}; {out} holds what came before")
        raise typer.Exit(1)
    if as_json:
        return
    document |= {"broken_bonds": len(result.broken_bonds)}
    labels = LABELS | ({key: f"{LABELS[key]} since the restart" for key in OF_THE_MONITOR} if restart else {})
    print_values({labels.get(key, key): value for key, value in document.items() if value is not None})
    note(
        f"written: {', '.join(str(path) for path in (out, log) if path)}; "
        "the same command with more --steps and --restart goes on"
    )
    if result.broken_bonds:
        note(
            f"{len(result.broken_bonds)} bond(s) were at some time longer than 1.5 times their initial length"
        )


LABELS = {
    "n_atoms": "atoms",
    "timestep": "timestep (fs)",
    "steps_per_second": "steps per second",
    "broken_bonds": "broken bonds",
    "temperature_mean": "mean temperature (K)",
    "volume_mean": "mean volume (Å³)",
    "pressure_mean": "mean pressure (GPa)",
    "potential_energy": "potential energy (eV)",
    "total_energy": "total energy (eV)",
    "drift_per_atom": "energy drift (eV/atom)",
    "drift_slope_per_atom": "energy slope (eV/atom/ps)",
    "extrapolation_largest": "largest extrapolation grade",
    "extrapolation_beyond": "samples above the threshold",
}
OF_THE_MONITOR = ("extrapolation_largest", "extrapolation_beyond")
"""What is known of the steps of this process alone."""


def describe(sample: "Sample", steps: int) -> str:
    """Describe a moment of the run in one line."""
    return f"step {sample.step}/{steps}  T {sample.temperature:6.1f} K  E {sample.total_energy:.5f} eV"


def _extrapolation_monitor(
    atoms: "Atoms", choice: Extrapolation | None, *, threshold: float, trajectory: Path
) -> "ExtrapolationMonitor | None":
    """Watch the run as asked for; by default warn where the model has an extrapolation grade."""
    from ase_gffmerge.dynamics.extrapolation_monitor import ExtrapolationMonitor

    if choice is Extrapolation.off or (choice is None and atoms.calc.force_field.extrapolation_grade is None):
        return None
    action = (choice or Extrapolation.warn).value
    file = trajectory.with_name(f"{trajectory.stem}-extrapolation.extxyz") if action == "record" else None
    return ExtrapolationMonitor(atoms, action=action, threshold=threshold, file=file)  # type: ignore[arg-type]
