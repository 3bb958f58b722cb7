"""The benchmark's own rows: cost of steps, bands and large systems, memory over time, and cost of merging.

Rows of the benchmark about merging: how long it took, its linear algebra, and what a finished merge costs to load.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from ase.mep import NEB
from torch import Tensor, nn

from ase_gffmerge.evaluation.benchmark.harness import Bench, Row, md_step, medians, register
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.graphs.graph import AtomGraph
from ase_gffmerge.least_squares.gram import Gram
from ase_gffmerge.least_squares.ridge import ridge_solve
from ase_gffmerge.merging.report import MergeReport
from ase_gffmerge.models import Potential

RIDGE = 1e-6
FRAMES = 100
SINGLE = "a single force field: nothing was merged"


@register("merge")
def merge_rows(bench: Bench) -> Iterator[Row]:
    """Tell how long the merge took; it is paid once."""
    record = bench.force_field.merged
    if record is None:
        yield Row(what="merge", against="", ratio=None, note=SINGLE)
        return
    seconds = sum(MergeReport.from_dict(record.report).seconds.values())
    yield Row(
        what="merge", against="", ratio=None, milliseconds={"merge": 1000 * seconds}, note="when it was made"
    )


@register("gram")
def gram_rows(bench: Bench) -> Iterator[Row]:
    """Compare Gram statistics and ridge solve of every linear layer with the reference recipe on the same rows.

    The recipe (GffMerge, arXiv 2606.03232) casts the rows of every layer to float64, forms both products in full, solves by
    LU factorisation with an absolute ridge, and evaluates a condition number by singular values.
    """
    layers = linear_rows(bench.specialists[0], n_frames=FRAMES)
    if not layers:
        yield Row(
            what="Gram and solve", against="the reference recipe", ratio=None, note="no nn.Linear layers"
        )
        return
    times = medians(
        {
            "reference": lambda: [reference_solve(x, y) for x, y in layers],
            "Gram": lambda: [
                ridge_solve(Gram.of(x, y), y.new_zeros(x.shape[1], y.shape[1]), ridge=RIDGE)
                for x, y in layers
            ],
        },
        repeats=bench.repeats,
    )
    yield Row(
        what="reference recipe for all linear layers",
        against="Gram statistics and solve",
        ratio=times["reference"] / times["Gram"],
        target=5.0,
        sense="at least",
        milliseconds=times,
        note=f"{len(layers)} layers, {sum(len(x) for x, _ in layers)} rows",
    )


def reference_solve(x: Tensor, y: Tensor) -> Tensor:
    """Solve one layer as the reference does: float64, LU, and a condition number from singular values."""
    rows, targets = x.double(), y.double()
    gram = rows.T @ rows + RIDGE * torch.eye(rows.shape[1], dtype=torch.float64, device=rows.device)
    torch.linalg.cond(gram)
    return torch.linalg.solve(gram, rows.T @ targets)


def linear_rows(force_field: ForceField, *, n_frames: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs with a column of ones (n, d + 1) and outputs (n, m) of every ``nn.Linear`` on calibration frames."""
    potential = force_field.potential
    rows: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2)
            rows[name] = torch.cat([x, x.new_ones(len(x), 1)], dim=1), output.detach().flatten(0, -2)

        return hook

    linears = [(name, layer) for name, layer in potential.named_modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_hook(keep(name)) for name, layer in linears]
    try:
        frames = force_field.calibration[:n_frames]
        graphs = [build_graph(atoms, force_field.cutoff, dtype=potential.dtype) for atoms in frames]
        predict(potential, batch_graphs(graphs).to(potential.device))
    finally:
        for hook in hooks:
            hook.remove()
    return list(rows.values())


@register("cache")
def cache_rows(bench: Bench) -> Iterator[Row]:
    """Compare building the calculator of all specialists from the cache with that of one specialist."""
    what, against = "calculator from the cache", "calculator of one specialist"
    if len(bench.specialists) < 2:
        yield Row(what=what, against=against, ratio=None, note=SINGLE)
        return
    times = medians(
        {
            "cache hit": lambda: bench.from_files(len(bench.specialists)),
            "one specialist": lambda: bench.from_files(1),
        },
        repeats=bench.repeats,
    )
    yield Row(
        what=what,
        against=against,
        ratio=times["cache hit"] / times["one specialist"],
        target=1.2,
        milliseconds=times,
    )


STATM = Path("/proc/self/statm")


@register("step")
def step_rows(bench: Bench) -> Iterator[Row]:
    """Compare a step of the calculator with energy and forces of the bare network on a finished graph."""
    network = bench.force_field.potential.for_inference()
    for n_atoms in bench.sizes:
        atoms = bench.structure(n_atoms)
        graph = build_graph(atoms, bench.force_field.cutoff).to(bench.force_field.potential.device)
        times = medians(
            {
                "calculator": md_step(bench.calculator(bench.force_field, False), atoms),
                "network": partial(_evaluate, network, graph),
            },
            repeats=bench.repeats,
        )
        ratio = times["calculator"] / times["network"]
        yield Row(
            what="MD step",
            against="energy and forces of the network alone",
            ratio=ratio,
            target=1.1,
            milliseconds=times,
            note=f"{len(atoms)} atoms, {graph.n_edges} edges",
        )


def _evaluate(network: Potential, graph: AtomGraph) -> None:
    """Compute energy and forces of a finished graph, without extrapolation grades."""
    predict(network, graph)


@register("compile")
def compile_rows(bench: Bench) -> Iterator[Row]:
    """Compare compiled with eager steps."""
    if not bench.compile:
        yield Row(
            what="MD step, eager", against="compiled", ratio=None, note="say --compile; it takes a minute"
        )
        return
    compiled = bench.calculator(bench.force_field, True)
    for n_atoms in bench.sizes:
        atoms = bench.structure(n_atoms)
        eager = bench.calculator(bench.force_field, False)
        times = medians(
            {"eager": md_step(eager, atoms), "compiled": md_step(compiled, atoms)}, repeats=bench.repeats
        )
        yield Row(
            what="MD step, eager",
            against="compiled",
            ratio=times["eager"] / times["compiled"],
            milliseconds=times,
            note=f"{len(atoms)} atoms",
        )


@register("ensemble")
def ensemble_rows(bench: Bench) -> Iterator[Row]:
    """Compare the specialists, evaluated one after the other, with their merge."""
    k = len(bench.specialists)
    if k < 2:
        yield Row(what="ensemble", against="merged", ratio=None, note=SINGLE)
        return
    known = set.intersection(*(set(s.species) for s in bench.specialists))
    for n_atoms in bench.sizes:
        atoms = bench.structure(n_atoms)
        if not known >= set(atoms.numbers):
            yield Row(
                what="ensemble", against="merged", ratio=None, note="specialists know different elements"
            )
            return
        members = [md_step(bench.calculator(s, False), atoms) for s in bench.specialists]
        times = medians(
            {
                "ensemble": partial(_in_turn, members),
                "merged": md_step(bench.calculator(bench.force_field, False), atoms),
            },
            repeats=bench.repeats,
        )
        yield Row(
            what=f"ensemble of {k} specialists",
            against="merged",
            ratio=times["ensemble"] / times["merged"],
            target=0.9 * k,
            sense="at least",
            milliseconds=times,
            note=f"{len(atoms)} atoms",
        )


def _in_turn(steps: Sequence[Callable[[], object]]) -> None:
    for step in steps:
        step()


@register("scaling")
def scaling_rows(bench: Bench) -> Iterator[Row]:
    """Fit the exponent of the cost of a step against the number of atoms."""
    times = {}
    for n_atoms in bench.scaling:
        atoms = bench.structure(n_atoms)
        step = md_step(bench.calculator(bench.force_field, False), atoms)
        times[str(len(atoms))] = medians({"step": step}, repeats=max(1, bench.repeats // 3))["step"]
    sizes = [float(n) for n in times]
    alone = len(sizes) < 2
    yield Row(
        what="exponent of the cost of an MD step",
        against="the number of atoms",
        ratio=None if alone else float(np.polyfit(np.log(sizes), np.log(list(times.values())), 1)[0]),
        target=1.1,
        milliseconds=times,
        note=f"{min(sizes):.0f} atoms alone have no exponent; give --scaling twice or more, with different numbers"
        if alone
        else f"{min(sizes):.0f} to {max(sizes):.0f} atoms",
    )


@register("memory")
def memory_rows(bench: Bench) -> Iterator[Row]:
    """Compare the resident memory at the end of many steps with that after a fifth of them."""
    what, against = f"memory after {bench.steps} MD steps", "after a fifth of them"
    if not STATM.exists():
        yield Row(what=what, against=against, ratio=None, note="this system does not tell")
        return
    step = md_step(bench.calculator(bench.force_field, False), bench.structure(bench.sizes[0]))
    resident = []
    for count in (max(1, bench.steps // 5), bench.steps - bench.steps // 5):
        for _ in range(count):
            step()
        resident.append(int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    yield Row(
        what=what,
        against=against,
        ratio=resident[1] / resident[0],
        target=1.01,
        note=f"{resident[1] / 2**20:.0f} MiB, torch included",
    )


@register("neb")
def neb_rows(bench: Bench) -> Iterator[Row]:
    """Compare the forces on a band of five images with one evaluation."""
    atoms = bench.structure(bench.sizes[0])
    rng = np.random.default_rng(0)
    images = [atoms.copy() for _ in range(5)]
    for image in images:
        image.positions += rng.normal(scale=0.02, size=image.positions.shape)
        image.calc = bench.calculator(bench.force_field, False)
    band = NEB(images, method="aseneb")
    start = band.get_positions()

    def step() -> None:
        band.set_positions(start + rng.normal(scale=0.002, size=start.shape))
        band.get_forces()

    single = md_step(bench.calculator(bench.force_field, False), atoms)
    times = medians({"band": step, "evaluation": single}, repeats=3 * bench.repeats)
    yield Row(
        what="NEB step, 5 images",
        against="one evaluation",
        ratio=times["band"] / times["evaluation"],
        target=3.3,
        milliseconds=times,
        note=f"{len(atoms)} atoms",
    )
