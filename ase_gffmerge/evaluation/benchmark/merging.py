"""Rows of the benchmark about merging: how long it took, its linear algebra, and what a finished merge costs to load."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ase_gffmerge.evaluation.benchmark.harness import Bench, Row, medians, register
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import batch_graphs, build_graph, predict
from ase_gffmerge.least_squares.gram import Gram
from ase_gffmerge.least_squares.ridge import ridge_solve
from ase_gffmerge.merging.report import MergeReport

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
