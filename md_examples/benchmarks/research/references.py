"""Family ``reference``: what the trials are to be held against."""

import time

import torch

from ase_gffmerge.merging.average import align_references, mean_potential, working_copies
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.workflows.merge import merge
from research.bench import Bench, MergeOutput, Trial, shared

FAMILY = "reference"


def specialists(bench: Bench) -> MergeOutput:
    """Every specialist on its own territory."""
    return MergeOutput(potentials=tuple(s.potential for s in bench.specialists), seconds=0.0)


@torch.no_grad()
def mean(bench: Bench) -> MergeOutput:
    """The mean of all weights."""
    start = time.process_time()
    parents = working_copies(bench.specialists, torch.device("cpu"))
    align_references(parents)
    potential = mean_potential(parents, Recipe())
    return MergeOutput(potentials=shared(potential, parents), seconds=time.process_time() - start)


def narrow(bench: Bench) -> MergeOutput:
    """Steps 1-4 alone."""
    return MergeOutput(
        potentials=shared(bench.trunk.potential, bench.specialists), seconds=bench.trunk.seconds
    )


def product(bench: Bench) -> MergeOutput:
    """The product's default merge as a user calls it, its report included."""
    start = time.process_time()
    merged, _ = merge(bench.specialists, device="cpu")
    seconds = time.process_time() - start
    return MergeOutput(potentials=shared(merged.potential, bench.specialists), seconds=seconds)


def trials() -> list[Trial]:
    """All trials of this family."""
    return [
        Trial(
            name="specialists", family=FAMILY, changes="each on its own territory", run=specialists, order=0
        ),
        Trial(name="mean", family=FAMILY, changes="mean of the weights", run=mean, order=0),
        Trial(name="narrow", family=FAMILY, changes="steps 1-4, no widened readout", run=narrow, order=0),
        Trial(
            name="product", family=FAMILY, changes="the default of `gffmerge merge`", run=product, order=70
        ),
    ]
