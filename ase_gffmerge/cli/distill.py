"""``gffmerge distill``: a merged potential learns from its specialists, without labels."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ase_gffmerge.cli.options import (
    CacheDirOption,
    CalibrationOption,
    DeviceOption,
    JsonOption,
    MaxMemoryOption,
    OverwriteOption,
    SpecialistsArgument,
    load_specialists,
)
from ase_gffmerge.cli.output import EpochWatch, note, print_json, recipe_for, require_outputs
from ase_gffmerge.runtime.progress import is_first, progress_bar

if TYPE_CHECKING:
    from ase_gffmerge.forcefield.force_field import ForceField
    from ase_gffmerge.workflows.load_or_merge import MergeOptions

CHANNELS, BLOCKS = 32, 3
"""Size of a student by default."""


def distill(
    specialists: SpecialistsArgument,
    out: Annotated[
        Path,
        typer.Option(
            help="Distilled file to write (.safetensors); with any other ending, the format of the specialists' package.",
            show_default=False,
        ),
    ],
    init: Annotated[
        str | None,
        typer.Option(help="Start from this merge of the specialists.", show_default="merge them now"),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the frames.", show_default="of the recipe")
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            help="Teach a student of this architecture (painn, nequip, escaip, ...): the compressed merge, or a new one.",
            show_default="the merge itself",
        ),
    ] = None,
    channels: Annotated[
        int | None, typer.Option(help="Scalar features per atom of the student.", show_default=str(CHANNELS))
    ] = None,
    blocks: Annotated[
        int | None, typer.Option(help="Interaction blocks of the student.", show_default=str(BLOCKS))
    ] = None,
    calibration: CalibrationOption = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="gffmerge, closed-form, fast, paper, mean, or a YAML file (its refine holds the options)."
        ),
    ] = "gffmerge",
    max_memory: MaxMemoryOption = None,
    device: DeviceOption = "auto",
    cache_dir: CacheDirOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a merge, or teach a student, on specialists' own energies and forces; no labels are needed.

    Frames that --calibration names are added to those that a specialist's file holds.
    A killed distillation continues when the same command is run again. Several processes share the work when torchrun starts
    them, as for merge.
    """
    from ase_gffmerge.evaluation.plots import plot_history
    from ase_gffmerge.integrations.load import format_of, load_force_field, write_force_field
    from ase_gffmerge.merging.recipe import DistillOptions, load_recipe
    from ase_gffmerge.runtime.distributed import sharing
    from ase_gffmerge.runtime.memory import memory_bound
    from ase_gffmerge.sampling.on_request import file_of_frames
    from ase_gffmerge.training.checkpoint import checkpoint_path
    from ase_gffmerge.training.distill import distill
    from ase_gffmerge.training.student import make_student
    from ase_gffmerge.workflows.load_or_merge import MergeOptions
    from ase_gffmerge.workflows.memory import estimate_distillation
    from ase_gffmerge.workflows.merge import without_refinement

    if not student and (channels is not None or blocks is not None):
        raise typer.BadParameter(
            "--channels and --blocks are those of a student; give --student, such as --student painn."
        )
    bound, chosen = memory_bound(max_memory), load_recipe(recipe)
    plain = DistillOptions(feature_weight=0.0) if student else DistillOptions()
    options = (chosen.refine or plain).model_copy(update={"epochs": epochs} if epochs else {})
    chosen = chosen.model_copy(update={"refine": options})
    curve = out.with_name(f"{out.name.removesuffix('.safetensors')}.png")
    frames = map(file_of_frames, calibration or ())
    require_outputs(curve, model=out, inputs=[*specialists, *frames, init], overwrite=overwrite)
    with sharing():
        own = [load_force_field(source) for source in specialists]
        begun = load_force_field(init) if init else None
        if adapter := format_of(out, student or (begun or own[0]).potential.architecture):
            adapter.require_exportable(begun.potential) if begun else recipe_for(out, own, chosen)
        given = load_specialists(own, calibration, device=device)
        loaded = [held if held.calibration else named for held, named in zip(own, given, strict=True)]
        extra = [
            () if named is kept else named.calibration for kept, named in zip(loaded, given, strict=True)
        ]
        merging = MergeOptions(recipe=without_refinement(chosen), cache_dir=cache_dir, max_memory=max_memory)
        start = begun or _start(loaded, merging, student=student, device=device)
        if student:
            start = make_student(
                start,
                loaded,
                architecture=student,
                channels=CHANNELS if channels is None else channels,
                blocks=BLOCKS if blocks is None else blocks,
                frames=extra,
                seed=options.seed,
                device=device,
            )
        everything = [
            teacher.with_calibration([*teacher.calibration, *more])
            for teacher, more in zip(loaded, extra, strict=True)
        ]
        estimate = estimate_distillation(start, everything, options, device=device, bound=bound)
        note(str(estimate))
        with progress_bar("distilling") as progress:
            progress(0.0, "the specialists label their frames")
            watch = EpochWatch(options.suited_epochs(len(loaded)), progress)
            try:
                distilled, history = distill(
                    start,
                    loaded,
                    options,
                    frames=extra if calibration else None,
                    checkpoint=checkpoint_path(out),
                    device=device,
                    callback=watch,
                    on_plan=watch.plan,
                    max_edges=estimate.portions.edges,
                )
            except KeyboardInterrupt:
                raise KeyboardInterrupt(watch.farewell()) from None
    if not is_first():
        return
    write_force_field(distilled.to(device="cpu"), out)
    checkpoint_path(out).unlink(missing_ok=True)
    plot_history(history, curve)
    run = {"out": str(out), "loss_curve": str(curve), "epochs": len(history.rows)}
    _report(distilled, run, history.start, as_json=as_json)


def _start(
    specialists: "Sequence[ForceField]", merging: "MergeOptions", *, student: str | None, device: str
) -> "ForceField":
    """What is distilled, or what a student is made of: the first specialist where there is nothing to merge.

    A merge goes through the cache; the verdict on it does not matter.
    """
    from ase_gffmerge.errors import MergeWarning
    from ase_gffmerge.merging.average import check_compatible
    from ase_gffmerge.runtime.devices import resolve_device
    from ase_gffmerge.workflows.load_or_merge import resolve

    if student and (len(specialists) == 1 or {s.potential.architecture for s in specialists} != {student}):
        return specialists[0]
    check_compatible(specialists, merging.load_recipe())
    with progress_bar("merging") as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)
        return resolve(specialists, merging, device=resolve_device(device), progress=progress).force_field


def _report(
    distilled: "ForceField", run: dict[str, object], start: dict[str, float], *, as_json: bool
) -> None:
    """Print the result."""
    from ase_gffmerge.merging.report import MergeReport

    assert distilled.merged is not None
    result = MergeReport.from_dict(distilled.merged.report)
    if as_json:
        print_json({**run, "start": start, **result.to_dict()})
        return
    typer.echo(result.summary())
    note(f"written: {run['out']}, {run['loss_curve']} ({run['epochs']} epochs)")
