"""Family ``trunk``: options of steps 1-4, and other ways to walk the stages."""

from collections.abc import Callable, Sequence
from typing import Any

from ase_gffmerge.merging.calibration import CalibrationSet, run_stage, stage_inputs
from ase_gffmerge.merging.layerwise import align_layers
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.models.base import Stage
from research.bench import Bench, MergeOutput, Trial
from research.closing_maps import align_messages, closing_maps
from research.readout_fit import Setting, fitted
from research.trunk import SolveStage, build_trunk, standard_stage

FAMILY = "trunk"


def filters_too(
    name: str,
    stage: Stage,
    originals: Sequence[Stage],
    calibration_sets: Sequence[CalibrationSet],
    recipe: Recipe,
) -> Stage:
    """Message-level solves for ``out`` and then for the filter network, in which PaiNN's messages are linear too."""
    align_layers(name, stage, originals, calibration_sets, recipe, run=run_stage, inputs=stage_inputs)
    closing = (*closing_maps(stage), *("filters",) * hasattr(stage, "filters"))
    align_messages(name, stage, originals, calibration_sets, recipe, closing=closing)
    return stage


def messages_only_in(*wanted: str) -> SolveStage:
    """Message-level solves in the named stages only."""

    def solve(
        name: str,
        stage: Stage,
        originals: Sequence[Stage],
        calibration_sets: Sequence[CalibrationSet],
        recipe: Recipe,
    ) -> Stage:
        own = recipe.model_copy(update={"messages": name in wanted})
        return standard_stage(name, stage, originals, calibration_sets, own)

    return solve


def walked(
    solve_stage: SolveStage = standard_stage, *, sweeps: int = 1, anchor: str = "mean", **options: Any
) -> Callable[[Bench], MergeOutput]:
    """A trunk of its own, then the cheap readout."""
    recipe = Recipe(**options)
    return lambda bench: fitted(
        build_trunk(bench.specialists, recipe, solve_stage=solve_stage, sweeps=sweeps, anchor=anchor),
        Setting(),
    )


def anchored_at_specialist(k: int) -> Callable[[Bench], MergeOutput]:
    """Solves that begin at a specialist and are pulled to it."""
    return lambda bench: walked(anchor=bench.specialists[k].name)(bench)


def messages_in_last_block(bench: Bench) -> MergeOutput:
    """Message-level solves in the stages of the last block only."""
    potential = bench.specialists[0].potential
    per_block = len(potential.stages) // potential.hyper.n_blocks
    last = [name for name, _ in potential.named_stages()][-per_block:]
    return walked(messages_only_in(*last))(bench)


def trials() -> list[Trial]:
    """All trials of this family."""
    rows: list[tuple[str, str, Callable[[Bench], MergeOutput], int]] = [
        ("filters", "filter network as a further closing map", walked(filters_too), 21),
        ("two sweeps", "second sweep anchored at the first", walked(sweeps=2), 22),
        ("anchor base", "solves start at the base, to which the ridge pulls", walked(anchor="base"), 23),
        ("anchor task arithmetic", "the same with task arithmetic", walked(anchor="task arithmetic"), 23),
        ("anchor first specialist", "the same with the first specialist", anchored_at_specialist(0), 23),
        ("anchor second specialist", "the same with the second specialist", anchored_at_specialist(1), 23),
        ("messages none", "no message-level solves", walked(messages=False), 55),
        ("messages last", "message-level solves in the last block only", messages_in_last_block, 56),
        ("slopes off", "layers agree in values only", walked(directions=0), 57),
        ("slope directions 8", "slopes along 8 displacements", walked(directions=8), 58),
        ("slope weight 0.25", "slopes weigh a quarter of values", walked(derivative_weight=0.25), 59),
        ("slope weight 4", "slopes weigh four times values", walked(derivative_weight=4.0), 51),
    ]
    rows += [
        (f"ridge {ridge:.0e}", f"ridge of layers and messages {ridge:.0e}", walked(ridge=ridge), 60)
        for ridge in (1e-2, 1e-3, 1e-5, 1e-6)
    ]
    return [Trial(name=n, family=FAMILY, changes=c, run=run, order=order) for n, c, run, order in rows]
