"""The rows of the benchmark by name; a new one is a function from a :class:`~.benchmark.Bench` to its rows."""

from ase_gffmerge.evaluation.benchmark.harness import Measure
from ase_gffmerge.evaluation.benchmark.md_steps import (
    compile_rows,
    ensemble_rows,
    memory_rows,
    neb_rows,
    scaling_rows,
    step_rows,
)
from ase_gffmerge.evaluation.benchmark.merging import cache_rows, gram_rows, merge_rows
from ase_gffmerge.evaluation.benchmark.nequip import nequip_rows
from ase_gffmerge.evaluation.benchmark.schnetpack import schnetpack_rows
from ase_gffmerge.evaluation.benchmark.torchmdnet import torchmdnet_rows

ROWS: dict[str, Measure] = {
    "merge": merge_rows,
    "gram": gram_rows,
    "cache": cache_rows,
    "step": step_rows,
    "compile": compile_rows,
    "schnetpack": schnetpack_rows,
    "nequip": nequip_rows,
    "torchmd-net": torchmdnet_rows,
    "ensemble": ensemble_rows,
    "neb": neb_rows,
    "memory": memory_rows,
    "scaling": scaling_rows,
}
