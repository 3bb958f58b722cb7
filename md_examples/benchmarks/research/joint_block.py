"""Family ``trunk``: all affine maps of a stage at once, as the product does it (``merging.align_block``)."""

import time
from collections.abc import Callable, Sequence

from ase_gffmerge.merging.blockwise import align_block
from ase_gffmerge.merging.calibration import CalibrationSet, run_stage, stage_inputs
from ase_gffmerge.merging.layerwise import align_layers
from ase_gffmerge.merging.readout_fit import match_forces
from ase_gffmerge.merging.recipe import ReadoutOptions, Recipe
from ase_gffmerge.models.base import Stage
from research.bench import Bench, MergeOutput, Trial, shared
from research.closing_maps import align_messages
from research.copies import Dynamics
from research.stages import walked
from research.trunk import SolveStage, build_trunk


def jointly(*, iterations: int = 15, messages: bool = False) -> SolveStage:
    """Layers in turn, with ``messages`` the closing maps again, then one step on all maps of the stage."""

    def solve(
        name: str,
        stage: Stage,
        originals: Sequence[Stage],
        calibration_sets: Sequence[CalibrationSet],
        recipe: Recipe,
    ) -> Stage:
        align_layers(name, stage, originals, calibration_sets, recipe, run=run_stage, inputs=stage_inputs)
        if messages:
            align_messages(name, stage, originals, calibration_sets, recipe)
        align_block(name, stage, originals, calibration_sets, recipe, iterations=iterations)
        return stage

    return solve


def with_visited_copies(bench: Bench) -> MergeOutput:
    """Joint solves, then the readout on copies that the specialists' dynamics visit."""
    dynamics = Dynamics(copies=8, steps=10, timestep=2.0, equal_masses=True)
    return dynamics.on(build_trunk(bench.specialists, Recipe(), solve_stage=jointly()))


def with_product_readout(bench: Bench) -> MergeOutput:
    """Closing maps alone, then the product's readout with its defaults."""
    trunk = build_trunk(bench.specialists, Recipe())
    start = time.process_time()
    potential, _, _ = match_forces(trunk.potential, trunk.calibration_sets, ReadoutOptions())
    spent = time.process_time() - start
    return MergeOutput(
        potentials=shared(potential, bench.specialists),
        seconds=trunk.seconds + spent,
        note=f"readout {spent:.0f} s",
    )


def trials() -> list[Trial]:
    """All trials of this module."""
    what = "Gauss-Newton iterations on all maps of a stage instead of its closing maps"
    rows: list[tuple[str, str, Callable[[Bench], MergeOutput], int]] = [
        ("joint block", f"15 {what}", walked(jointly()), 25),
        ("joint block 5", f"5 {what}", walked(jointly(iterations=5)), 25),
        ("joint block 30", f"30 {what}", walked(jointly(iterations=30)), 25),
        ("joint block after messages", f"15 {what}, and after them", walked(jointly(messages=True)), 25),
        ("joint block + MD 8 x 20 fs", f"15 {what}; visited copies", with_visited_copies, 25),
        ("closing maps + product", "the product's readout", with_product_readout, 25),
    ]
    return [Trial(name=n, family="trunk", changes=c, run=run, order=order) for n, c, run, order in rows]
