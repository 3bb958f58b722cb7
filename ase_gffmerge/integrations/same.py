"""The check that a converted potential computes what the vendor's model computes."""

from collections.abc import Callable

import torch
from ase import Atoms
from torch import Tensor
from torch_geometric.data import Data

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.graphs import batch_graphs, build_graph
from ase_gffmerge.graphs.graph import edge_vectors
from ase_gffmerge.models import Potential

TOLERANCE = 1e-3
"""Of energies per atom, relative to their spread and size: far above round-off, far below a missing part."""


def require_same(potential: Potential, vendor_energies: Callable[[Data], Tensor], *, vendor: str) -> None:
    """Compare the energies of a few atoms of every element (five at most) at random places.

    Raises
    ------
    FileFormatError
        When they differ.
    """
    generator = torch.Generator().manual_seed(0)
    numbers = 2 * list(potential.species[:5]) + [potential.species[0]]
    places = torch.rand(len(numbers), 3, generator=generator, dtype=torch.float64) * potential.hyper.cutoff
    atoms = Atoms(numbers, positions=1.2 * places.numpy())
    graph = batch_graphs([build_graph(atoms, potential.hyper.cutoff, dtype=potential.dtype)])
    graph.edge_vectors = edge_vectors(graph)
    with torch.no_grad():
        theirs, ours = vendor_energies(graph).double(), potential(graph).double()
    rows = potential.species_row[graph.atomic_numbers]
    size = (theirs - potential.references[rows]).abs().mean()
    difference = float((ours - theirs).abs().max())
    if not difference <= TOLERANCE * size + 1e-5:
        raise FileFormatError(
            f"this {vendor} model has a part that is not known here: converted, its energies differ by {difference:.2g} eV "
            "per atom from its own; leave it out of the merge"
        )
