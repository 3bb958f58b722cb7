"""``gffmerge evaluate``: errors of force fields on labelled frames, and how well their dynamics hold (``--md``)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ase_gffmerge.cli.options import (
    DeviceOption,
    DispersionOption,
    DType,
    EnergyKey,
    ExecutorOption,
    ForcesKey,
    JsonOption,
    OverwriteOption,
    SpecialistOption,
    StressKey,
    WorkersOption,
    opened_workers,
)
from ase_gffmerge.cli.output import (
    duration,
    extended_xyz,
    note,
    plain,
    print_json,
    print_table,
    require_outputs,
)
from ase_gffmerge.runtime.progress import part_of, progress_bar

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from ase import Atoms

    from ase_gffmerge.engines.ase.dispersion import Dispersion
    from ase_gffmerge.evaluation.md.evaluate import MDEvaluation
    from ase_gffmerge.evaluation.md.runs import Contestant, Protocol
    from ase_gffmerge.evaluation.table import Reliabilities
    from ase_gffmerge.forcefield.force_field import ForceField
    from ase_gffmerge.inference.errors import Errors

MD = "Dynamics (--md)"


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Files, vendor:checkpoint, or bundled names; one or several.",
            metavar="MODELS",
            show_default=False,
        ),
    ],
    frames: Annotated[
        Path, typer.Argument(help="Labelled frames: extxyz, npz, ...", metavar="FRAMES", show_default=False)
    ],
    specialist: SpecialistOption = None,
    device: DeviceOption = "auto",
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    stress_key: StressKey = None,
    dispersion: DispersionOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the frames with their labels and, as MODEL_energy (eV), MODEL_forces (eV/Å) and MODEL_stress "
            "(nine numbers, eV/Å³), what every model predicts: one extended XYZ file for all models."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw predictions against labels, a row per model (.png, .svg, .pdf)."),
    ] = None,
    uncertainty: Annotated[
        bool,
        typer.Option(
            "--uncertainty",
            help="Hold standard deviations of merged force fields against the errors; --out has MODEL_energy_std (eV) and "
            "MODEL_forces_std (eV/Å), --plot a reliability diagram.",
        ),
    ] = False,
    overwrite: OverwriteOption = False,
    md: Annotated[
        bool, typer.Option("--md", help="Run dynamics with every model and compare.", rich_help_panel=MD)
    ] = False,
    temperature: Annotated[float, typer.Option(help="K.", rich_help_panel=MD)] = 500.0,
    time: Annotated[
        float, typer.Option(help="Of every NVT run, ps; NVE runs are half as long.", rich_help_panel=MD)
    ] = 10.0,
    timestep: Annotated[float, typer.Option(help="fs.", rich_help_panel=MD)] = 0.5,
    seeds: Annotated[int, typer.Option(help="Runs of every model.", rich_help_panel=MD)] = 3,
    reference: Annotated[
        Path | None,
        typer.Option(help="Frames of the true ensemble.", show_default="FRAMES", rich_help_panel=MD),
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Of the networks.", rich_help_panel=MD)] = DType.float32,
    md_out: Annotated[
        Path, typer.Option(help="Folder for plot, table and finished runs.", rich_help_panel=MD)
    ] = Path("gffmerge-md"),
    workers: WorkersOption = None,
    executor: ExecutorOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print errors against labels: forces, also by element, energies per atom, and stresses where frames have them.

    Tables are in meV, Å and GPa; with --json, energies are in eV. Frames of isolated atoms are left out.

    With --md: run dynamics with every model, compare stability, distances of atoms, vibrations, energy conservation.
    """
    from ase_gffmerge.data.labels import have_labels
    from ase_gffmerge.data.readers import read_frames
    from ase_gffmerge.engines.ase.arguments import dispersion_choice
    from ase_gffmerge.errors import ArgumentError, FileFormatError
    from ase_gffmerge.runtime.devices import resolve_device

    target = resolve_device(device)
    if out and out.suffix not in (".extxyz", ".xyz"):
        raise FileFormatError(f"cannot write {out}: predictions are extended XYZ; end the name with .extxyz")
    require_outputs(out, plot=plot, inputs=[*models, frames], overwrite=overwrite)
    if md and dispersion:
        raise ArgumentError(
            "--md runs many structures in one batch, without --dispersion; leave one of them out"
        )
    contestants = load_models(models, specialist)
    for contestant in contestants:
        added = dispersion_choice(dispersion, contestant.force_field)
        contestant.force_field.to(device=target)
    found = read_frames(frames, energy_key=energy_key, forces_key=forces_key, stress_key=stress_key)
    uncertain = with_uncertainty(contestants) if uncertainty else []

    def measured() -> "tuple[dict[str, Errors], Reliabilities]":
        with opened_workers(workers, executor) as opened:
            return errors_by_model(
                contestants,
                found,
                frames,
                dispersion=added,
                out=out,
                plot=plot,
                uncertain=uncertain,
                executor=opened,
            )

    if md:
        from ase_gffmerge.evaluation.md.runs import Protocol

        protocol = Protocol(temperature=temperature, picoseconds=time, timestep=timestep, seeds=seeds)
        wanted = bool(out or plot or uncertainty) or have_labels(found)
        errors = measured()[0] if wanted else {}
        _evaluate_md(
            contestants,
            found,
            protocol,
            errors=errors,
            reference=reference,
            dtype=dtype,
            out=md_out,
            as_json=as_json,
        )
    else:
        print_errors(*measured(), as_json=as_json)
    if out or plot:
        note(f"written: {', '.join(str(path) for path in (out, plot) if path)}")


def errors_by_model(
    models: "Sequence[Contestant]",
    frames: "Sequence[Atoms]",
    source: Path,
    *,
    dispersion: "Dispersion | None" = None,
    out: Path | None = None,
    plot: Path | None = None,
    uncertain: "Sequence[Contestant]" = (),
    executor: "Executor | None" = None,
) -> "tuple[dict[str, Errors], Reliabilities]":
    """Errors by label of the model, and how reliable its standard deviations are.

    Parameters
    ----------
    models
        What is evaluated.
    frames
        Labelled; isolated atoms count only where there is nothing else.
    source
        Their file, for messages.
    dispersion
        Added to what every model predicts.
    out, plot
        Files to be written, see the options.
    uncertain
        Those of the models whose standard deviations are wanted.
    executor
        Workers among which frames are shared out.
    """
    from ase_gffmerge.data.labels import is_isolated_atom, require_labels
    from ase_gffmerge.evaluation.plots import plot_errors_of_frames
    from ase_gffmerge.inference.errors import compare, difference, labels, total, with_predictions
    from ase_gffmerge.inference.predict import predict_frames
    from ase_gffmerge.inference.reliability import predict_deviations, reliability
    from ase_gffmerge.storage.tensor_file import atomic_write

    kept = [k for k, atoms in enumerate(frames) if not is_isolated_atom(atoms)] or list(range(len(frames)))
    labelled = [frames[k] for k in kept]
    require_labels(labelled, source, numbers=kept)
    reference = labels(labelled)
    share = len(models) / (len(models) + len(uncertain))
    with progress_bar("evaluating") as progress:
        predicted = {
            model.label: predict_frames(
                model.force_field.potential,
                labelled,
                specialist=model.specialist,
                names=model.force_field.specialist_names,
                where=[f"{source}, frame {k}" for k in kept],
                executor=executor,
                progress=part_of(progress, share * i / len(models), share * (i + 1) / len(models)),
            )
            for i, model in enumerate(models)
        }
        step = (1 - share) / max(len(uncertain), 1)
        deviations = {
            model.label: predict_deviations(
                model.force_field,
                labelled,
                specialist=model.specialist,
                progress=part_of(progress, share + step * i, share + step * (i + 1)),
            )
            for i, model in enumerate(uncertain)
        }
    if dispersion:
        d3 = dispersion.of_frames(labelled)
        predicted = {label: total(found, d3) for label, found in predicted.items()}
    reliabilities = {
        label: reliability(difference(predicted[label], reference), found)
        for label, found in deviations.items()
    }
    if out:
        atomic_write(out, extended_xyz(with_predictions(labelled, predicted, deviations)))
    if plot:
        groups = [group_of(atoms) for atoms in labelled]
        plot_errors_of_frames(reference, predicted, groups, plot, reliabilities=reliabilities)
    return {label: compare(found, reference) for label, found in predicted.items()}, reliabilities


def with_uncertainty(models: "Sequence[Contestant]") -> "list[Contestant]":
    """Those of the models that know their uncertainty; the first one says why there is none at all."""
    from ase_gffmerge.errors import MissingUncertaintyError

    found, reasons = [], []
    for model in models:
        try:
            model.force_field.require_uncertainty()
        except MissingUncertaintyError as error:
            reasons.append(error)
        else:
            found.append(model)
    if not found:
        raise reasons[0]
    return found


def group_of(atoms: "Atoms") -> str:
    """What a frame's points are colored by: its specialist where it names one for all atoms, else its formula."""
    specialist = atoms.info.get("specialist")
    return atoms.get_chemical_formula(empirical=True) if specialist is None else str(specialist)


def print_errors(errors: "Mapping[str, Errors]", reliabilities: "Reliabilities", *, as_json: bool) -> None:
    """Errors of one model as they are, of several by model.

    Parameters
    ----------
    errors, reliabilities
        By label of the model; the second may be empty.
    as_json
        Instead of a table.
    """
    if not as_json:
        from ase_gffmerge.evaluation.table import error_table

        print_table(error_table(errors, reliabilities))
        return
    documents: dict[str, dict[str, object]] = {label: {**found.to_dict()} for label, found in errors.items()}
    for label, known in reliabilities.items():
        documents[label]["uncertainty"] = {name: found.to_dict() for name, found in known.items()}
    print_json(next(iter(documents.values())) if len(errors) == 1 else {"models": documents})


def load_models(sources: Sequence[str], specialist: str | None) -> "list[Contestant]":
    """Load every source; ``specialist`` concerns those with one surface per specialist."""
    from ase_gffmerge.evaluation.md.runs import Contestant
    from ase_gffmerge.integrations.load import load_force_field

    loaded = [load_force_field(source) for source in sources]
    names = [force_field.name for force_field in loaded]
    several = [force_field for force_field in loaded if force_field.potential.hyper.n_embeddings > 1]
    return [
        Contestant(
            label=name if names.count(name) == 1 else source,
            force_field=force_field,
            specialist=None
            if several and force_field not in several
            else known_specialist(force_field, specialist),
        )
        for source, name, force_field in zip(sources, names, loaded, strict=True)
    ]


def known_specialist(force_field: "ForceField", name: str | None) -> str | None:
    """The same name, if a potential with one embedding per specialist knows it; without a name, frames must say it."""
    from ase_gffmerge.errors import StructureError

    if name is None:
        return None
    if force_field.potential.hyper.n_embeddings == 1:
        raise StructureError(
            f"--specialist {name} has no effect: {force_field.name!r} has one surface for all"
        )
    if name not in force_field.specialist_names:
        raise StructureError(
            f"there is no specialist {name!r}: {force_field.name!r} was merged from "
            f"{', '.join(force_field.specialist_names)}; name one"
        )
    return name


def _evaluate_md(
    models: "Sequence[Contestant]",
    starts: "Sequence[Atoms]",
    protocol: "Protocol",
    *,
    errors: "Mapping[str, Errors]",
    reference: Path | None,
    dtype: DType,
    out: Path,
    as_json: bool,
) -> None:
    """Run, compare, write ``md.json`` and ``md.png`` into ``out``, and print."""
    import torch

    from ase_gffmerge.data.readers import read_frames
    from ase_gffmerge.evaluation.md.evaluate import evaluate_dynamics, matching_frames, starting_structures
    from ase_gffmerge.evaluation.md.report import dynamics_table
    from ase_gffmerge.evaluation.md.runs import estimated_seconds
    from ase_gffmerge.storage.tensor_file import require_writable

    truth = matching_frames(read_frames(reference) if reference else starts, starts[0])
    for model in models:
        model.force_field.to(dtype=getattr(torch, dtype.value))
        model.force_field.prepared(starts[0], specialist=model.specialist)
    require_writable(out / "md.json")
    seconds = estimated_seconds(models, starting_structures(starts, protocol.seeds), protocol)
    note(f"{describe(protocol, len(models))}: about {duration(seconds)}; finished runs are kept in {out}")
    try:
        with progress_bar("dynamics") as progress:
            evaluation = evaluate_dynamics(
                models,
                starts,
                protocol=protocol,
                reference=truth,
                errors=errors,
                folder=out / "runs",
                progress=progress,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {out} holds the finished runs, and the same command goes on from there"
        ) from None
    write_results(evaluation, out)
    if as_json:
        print_json(evaluation.to_dict())
    else:
        print_table(dynamics_table(evaluation))
    note(f"written: {out} (md.json, md.png)")


def describe(protocol: "Protocol", n_models: int) -> str:
    """Say in one line what will be run."""
    return (
        f"{n_models} model(s) x {protocol.seeds} seed(s) x ({protocol.length('nvt'):g} ps NVT + "
        f"{protocol.length('nve'):g} ps NVE) at {protocol.temperature:g} K"
    )


def write_results(evaluation: "MDEvaluation", out: Path) -> None:
    """Write numbers and plot."""
    from ase_gffmerge.evaluation.md.report import plot_dynamics
    from ase_gffmerge.storage.tensor_file import atomic_write

    text = json.dumps(plain(evaluation.to_dict()), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(out / "md.json", text)
    plot_dynamics(evaluation, out / "md.png")
