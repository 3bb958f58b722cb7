r"""Compression in closed form: a force field with fewer channels and blocks that computes nearly the same.

The smaller potential keeps some channels of every group (:mod:`.pruning`) and begins with their weights. Then it is
treated as a merge of the one specialist that the larger potential is, stage by stage: every affine map is solved on what
enters the smaller potential, with the outputs of the larger one at the kept channels as targets and with the rows of
derivatives (:mod:`.layerwise`); all maps of a stage are corrected together on the kept channels of the state after it
(:mod:`.blockwise`), and all maps of the readout on the energies of the atoms; at last a force-matched readout may be fitted
(:mod:`.readout_fit`). Where blocks are left out, the target is the state after the next one that is kept. With all channels
and blocks every residual is zero, and the force field is what it was.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from torch import Tensor, nn

from ase_gffmerge.data.frames import bare
from ase_gffmerge.errors import FramesError, RecipeError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.forcefield.uncertainty import fit_uncertainty
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.merging.average import working_copies
from ase_gffmerge.merging.blockwise import align_block
from ase_gffmerge.merging.calibration import (
    CalibrationBatch,
    CalibrationSet,
    advance,
    build_calibration,
    calibration_graphs,
    run_stage,
    stage_inputs,
)
from ase_gffmerge.merging.disagreement import disagreement
from ase_gffmerge.merging.layerwise import align_layers
from ase_gffmerge.merging.pruning import Pruned, plain_hyper
from ase_gffmerge.merging.readout_fit import match_forces
from ase_gffmerge.merging.recipe import ReadoutOptions, Recipe, load_recipe
from ase_gffmerge.merging.report import Disagreement, LayerReport
from ase_gffmerge.merging.tangents import Dual, pushforward
from ase_gffmerge.models import Potential
from ase_gffmerge.models.affine_maps import adjustable_maps
from ase_gffmerge.models.base import Geometry, Stage, State
from ase_gffmerge.models.layers.readout import RandomFeatureReadout
from ase_gffmerge.runtime.devices import memory_errors, resolve_device
from ase_gffmerge.runtime.progress import Clock, Progress, no_progress, part_of

RECIPE = Recipe(readout=ReadoutOptions(width=512))
"""What is done by default: a narrower readout than a merge's, as the result is to be fast."""

SCALED = {"nequip": ("tensor_channels", "radial_hidden")}
"""Hyper-parameters that shrink with the number of channels."""


@dataclass(frozen=True, kw_only=True)
class CompressionReport:
    """Diagnosis of a compression.

    Attributes
    ----------
    teacher
        Name of the larger force field.
    hyper, teacher_hyper
        Hyper-parameters of both.
    n_parameters, teacher_parameters
        Numbers of parameters of both.
    blocks
        Which blocks of the teacher are kept.
    lost
        For every group of channels the share of its activations that no linear map of the kept channels gives back.
    layers
        Least-squares problems in the order they were solved.
    disagreement
        Between both on the calibration frames.
    held_out
        Relative force error on held-out calibration frames, when a readout was fitted.
    seconds
        Wall time per phase.
    """

    teacher: str
    hyper: Mapping[str, Any]
    teacher_hyper: Mapping[str, Any]
    n_parameters: int
    teacher_parameters: int
    blocks: tuple[int, ...]
    lost: Mapping[str, float]
    layers: tuple[LayerReport, ...]
    disagreement: Disagreement
    held_out: float | None
    seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dictionary."""
        return asdict(self)

    def summary(self) -> str:
        """A few lines for a terminal."""
        row, worst = self.disagreement, max(self.lost.values(), default=0.0)
        sizes = [
            f"{hyper['channels']} channels x {hyper['n_blocks']}"
            for hyper in (self.teacher_hyper, self.hyper)
        ]
        return "\n".join(
            [
                f"{self.teacher}: {sizes[0]} -> {sizes[1]}, {self.teacher_parameters} -> {self.n_parameters} parameters",
                f"  differs by {1000 * row.force_mae:.1f} meV/Å, {1000 * row.energy_mae:.2f} meV/atom "
                f"(forces {1000 * row.force_rms:.0f} meV/Å); at most {100 * worst:.1f} % of a group's activations lost",
                "  " + ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items()),
            ]
        )


def compress(
    force_field: ForceField,
    *,
    channels: int,
    blocks: int | None = None,
    hyper: Mapping[str, object] | None = None,
    frames: Sequence[Atoms] = (),
    recipe: str | Path | Mapping[str, object] | Recipe = RECIPE,
    device: str | torch.device = "auto",
    progress: Progress = no_progress,
) -> tuple[ForceField, CompressionReport]:
    """Make a force field smaller by least squares; no labels are read and nothing is trained.

    Parameters
    ----------
    force_field
        PaiNN, NequIP or EScAIP, a specialist or a merge of one surface. It is not changed.
    channels, blocks
        Of the smaller one; default: all blocks.
    hyper
        Further hyper-parameters of the smaller one; those that grow with the channels shrink with them by default.
    frames
        Typical structures, beside the calibration frames of the force field; a merge has none of its own.
    recipe
        λ, derivatives, corrections and the readout, as of a merge.
    device
        Where statistics and solves run.
    progress
        Called with a fraction (0 to 1) and a description.

    Returns
    -------
    compressed : ForceField
        With the same calibration frames.
    report : CompressionReport

    Raises
    ------
    IncompatibleSpecialistsError, FramesError, RecipeError, DeviceError, DeviceMemoryError
        With the reason and the remedy.
    """
    chosen, clock, target = load_recipe(recipe), Clock(), resolve_device(device)
    sizes = smaller_hyper(force_field.potential, channels, blocks, hyper or {})
    typical = (*force_field.calibration, *map(bare, frames))
    _require(force_field, typical, chosen)
    bare_network = replace(force_field.without_core_repulsion(), calibration=typical)
    (teacher,) = working_copies([bare_network], target)
    with memory_errors(f"compressing {force_field.name}", device=target, remedy="give fewer frames"):
        with clock("channels"), torch.no_grad():
            progress(0.0, "channels")
            pruned = Pruned.of(teacher.potential, list(calibration_graphs(teacher)), sizes)
        with clock("layers"), torch.no_grad():
            sets = build_calibration([teacher], pruned.student, [1.0], directions=chosen.directions)
            layers = _align(pruned, teacher, sets, chosen, part_of(progress, 0.1, 0.6))
        student, held_out = pruned.student, None
        if chosen.readout is not None:
            with clock("readout"):
                student, row, held_out = match_forces(
                    student, sets, chosen.readout, progress=part_of(progress, 0.6, 0.95)
                )
                layers.append(row)
        with clock("report"):
            difference = disagreement(
                force_field.name,
                "compressed",
                predict_frames(student, typical),
                predict_frames(teacher.potential, typical),
            )
            grade = fit_uncertainty(student, [typical], [teacher.potential])
    progress(1.0, "done")
    report = CompressionReport(
        teacher=force_field.name,
        hyper=student.hyper.to_dict(),
        teacher_hyper=force_field.potential.hyper.to_dict(),
        n_parameters=_count(student),
        teacher_parameters=_count(force_field.potential),
        blocks=pruned.blocks,
        lost=pruned.lost,
        layers=tuple(layers),
        disagreement=difference,
        held_out=held_out,
        seconds=clock.seconds,
    )
    provenance = replace(
        force_field.provenance,
        data_set=f"compressed from {force_field.name}",
        lineage=(*force_field.provenance.lineage, force_field.fingerprint),
        errors={},
    )
    compressed = ForceField(
        name=f"{force_field.name}-{student.hyper.channels}x{student.hyper.n_blocks}",
        potential=student.requires_grad_(False).eval(),
        calibration=typical,
        level_of_theory=force_field.level_of_theory,
        provenance=provenance,
        extrapolation_grade=grade,
    )
    repels = force_field.potential.core_repulsion is not None
    return compressed.with_core_repulsion() if repels else compressed, report


def _count(potential: Potential) -> int:
    return sum(parameter.numel() for parameter in potential.parameters())


def smaller_hyper(
    potential: Potential, channels: int, blocks: int | None, given: Mapping[str, object]
) -> dict[str, object]:
    """Hyper-parameters of the smaller potential, with a plain readout.

    Parameters
    ----------
    potential
        The larger one.
    channels, blocks, given
        See :func:`compress`.

    Raises
    ------
    RecipeError
        For a size that cannot be made by leaving something out.
    """
    old = potential.hyper
    n_blocks = old.n_blocks if blocks is None else blocks
    for name, size in (("channels", channels), ("blocks", n_blocks)):
        if not isinstance(size, Integral) or isinstance(size, bool):
            raise RecipeError(
                f"{name}={size!r} is no number of {name}; give a whole one, such as 32 channels"
            )
    if not (1 <= channels <= old.channels and min(2, old.n_blocks) <= n_blocks <= old.n_blocks):
        raise RecipeError(
            f"{channels} channels and {n_blocks} blocks cannot be left of {old.channels} and {old.n_blocks}: "
            "choose no more than there are; the first and the last block stay"
        )
    whole = plain_hyper(potential)
    scaled = {
        name: max(1, round(whole[name] * channels / old.channels))
        for name in SCALED.get(potential.architecture, ())
    }
    return {**whole, **scaled, "channels": channels, "n_blocks": n_blocks, **given}


def _require(force_field: ForceField, frames: Sequence[Atoms], recipe: Recipe) -> None:
    """Raise for what compression cannot do."""
    potential = force_field.potential
    if not frames:
        raise FramesError(
            f"{force_field.name!r} has no calibration frames; give structures of what it is used for as frames"
        )
    if recipe.method != "closed-form":
        raise RecipeError(f"compression has no method {recipe.method!r}; take the recipe 'closed-form'")
    if potential.hyper.n_embeddings > 1:
        raise RecipeError(
            f"{force_field.name!r} has a surface per specialist; compress a merge of conditioning 'shared'"
        )
    if potential.hyper.readout_width and recipe.readout is None:
        raise RecipeError(
            f"{force_field.name!r} has a force-matched readout, which a plain one cannot follow; leave readout: null out"
        )


class _KeptChannels(Stage):
    """A stage of the larger potential, of whose state only some columns are given on."""

    def __init__(self, stage: Stage, columns: Sequence[Tensor]):
        super().__init__()
        self.stage, self.columns = stage, columns

    def forward(self, state: State, geometry: Geometry) -> State:
        """State with the kept columns."""
        return tuple(x[..., kept] for x, kept in zip(self.stage(state, geometry), self.columns, strict=True))


class _Energies(Stage):
    """A readout as a last stage, from the scalars after all blocks to the energies (n_atoms, 1) in eV."""

    def __init__(self, readout: nn.Module):
        super().__init__()
        self.readout = readout.mlp if isinstance(readout, RandomFeatureReadout) else readout

    def forward(self, state: State, geometry: Geometry) -> State:
        """Energies; a plain readout is the same for all elements."""
        return (self.readout(list(state), state[0].new_zeros(len(state[0]), dtype=torch.long))[:, None],)


def _align(
    pruned: Pruned, teacher: ForceField, sets: list[CalibrationSet], recipe: Recipe, progress: Progress
) -> list[LayerReport]:
    """Solve and correct one stage after the other, then the readout."""
    student, larger, outputs = pruned.student, teacher.potential, pruned.outputs()
    reports: list[LayerReport] = []
    waiting = iter(larger.named_stages())
    for i, (name, stage) in enumerate(student.named_stages()):
        progress(i / len(student.stages), name)
        for theirs, original in waiting:
            if theirs == pruned.names[name]:
                break
            for batch in sets[0].batches:
                _advance_target(larger, original, batch)
        own = {key.removeprefix(f"{name}."): x for key, x in outputs.items() if key.startswith(f"{name}.")}
        reports += align_layers(
            name, stage, [original], sets, recipe, run=run_stage, inputs=stage_inputs, outputs=own
        )
        if recipe.messages and adjustable_maps(stage):
            kept = _KeptChannels(original, pruned.state(theirs))
            reports.append(align_block(name, stage, [kept], sets, recipe))
        for batch in sets[0].batches:
            _advance_target(larger, original, batch)
            batch.merged = advance(stage, batch.merged, batch)
            if stage.emits_scalars:
                batch.merged_scalars.append(pushforward(lambda *x: student.scalars(x), batch.merged))
    return reports + _align_readout(pruned, teacher, sets, recipe)


def _advance_target(larger: Potential, stage: Stage, batch: CalibrationBatch) -> None:
    batch.target = advance(stage, batch.target, batch)
    if stage.emits_scalars:
        batch.target_scalars.append(pushforward(lambda *x: larger.scalars(x), batch.target))


def _align_readout(
    pruned: Pruned, teacher: ForceField, sets: list[CalibrationSet], recipe: Recipe
) -> list[LayerReport]:
    """Solve the plain readout layer by layer, then correct it on the energies that all blocks of the larger one give."""
    ours, theirs = _Energies(pruned.student.readout), _Energies(teacher.potential.readout)
    nothing = Dual((), ())
    for batch in sets[0].batches:
        batch.merged = sum(batch.merged_scalars, start=nothing)
        batch.target = sum((batch.target_scalars[block] for block in pruned.blocks), start=nothing)
    reports = align_layers(
        "student",
        ours,
        [_Energies(_of_blocks(theirs.readout, pruned.blocks))],
        sets,
        recipe,
        run=run_stage,
        inputs=stage_inputs,
        outputs=pruned.outputs(),
    )
    for batch in sets[0].batches:
        batch.target = sum(batch.target_scalars, start=nothing)
    if recipe.messages:
        reports.append(align_block("readout", ours, [theirs], sets, recipe))
    return reports


def _of_blocks(readout: nn.Module, blocks: Sequence[int]) -> nn.Module:
    """The readouts of some blocks, where every block has one; else the readout itself."""
    twin = copy(readout)
    twin._modules = {
        name: nn.ModuleList(module[block] for block in blocks)
        if isinstance(module, nn.ModuleList)
        else module
        for name, module in readout._modules.items()
    }
    return twin
