"""What a force field costs on this machine: a registry of rows, each some ratios measured in one run."""

from ase_gffmerge.evaluation.benchmark import md_steps as md_steps
from ase_gffmerge.evaluation.benchmark import merging as merging
from ase_gffmerge.evaluation.benchmark.harness import ROWS as ROWS
