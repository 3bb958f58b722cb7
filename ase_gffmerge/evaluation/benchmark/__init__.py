"""What a force field costs on this machine: a registry of rows, each some ratios measured in one run."""

from ase_gffmerge.evaluation.benchmark import rows as rows
from ase_gffmerge.evaluation.benchmark.harness import ROWS as ROWS
