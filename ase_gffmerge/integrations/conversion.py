"""Steps from another package's network to a potential that are the same whichever package it is."""

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import torch
from ase import Atoms
from torch import Tensor

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.graphs import batch_graphs, build_graph
from ase_gffmerge.graphs.graph import AtomGraph, edge_vectors
from ase_gffmerge.models import Potential

P = TypeVar("P", bound=Potential)

SAME = 1e-3
"""Of energies per atom, relative to their spread and size: far above round-off, far below a missing part."""


def one_number_of_scalars(numbers: Collection[int], *, of: str) -> int:
    """The number of scalars after every block.

    Raises
    ------
    FileFormatError
        When blocks differ.
    """
    different = sorted(set(numbers))
    if len(different) > 1:
        raise FileFormatError(
            f"the model's {of} have different numbers of scalars {different}, which is not read"
        )
    return different[0]


def converted(
    build: Callable[[], P],
    copy_weights: Callable[[P], None],
    *,
    dtype: torch.dtype,
    vendor_energies: Callable[[AtomGraph], Tensor],
    vendor: str,
) -> P:
    """A potential with a network's weights, frozen, that was seen to compute the same.

    Parameters
    ----------
    build
        Makes it with any weights.
    copy_weights
        Writes the network's weights into it.
    dtype
        Of the network's weights.
    vendor_energies
        Energies (n_atoms,) in eV by the network itself.
    vendor
        For the message.

    Raises
    ------
    FileFormatError
        When the energies differ.
    """
    with torch.random.fork_rng(devices=[]):
        potential = build()
    with torch.no_grad():
        copy_weights(potential)
    potential.to(dtype).eval().requires_grad_(False)
    _require_same(potential, vendor_energies, vendor=vendor)
    return potential


def rows_of_elements(species: Sequence[int]) -> Tensor:
    """Rows (n_species,) of a table with one row per entry of ``species`` in the order of atomic numbers."""
    return torch.tensor(sorted(range(len(species)), key=species.__getitem__))


def per_element(values: Tensor, species: Sequence[int]) -> Tensor:
    """One number for all elements or one for each, in the order of atomic numbers, float64."""
    ones = torch.ones(len(species), dtype=torch.float64)
    return (ones * values.flatten().double())[rows_of_elements(species)]


def _require_same(
    potential: Potential, vendor_energies: Callable[[AtomGraph], Tensor], *, vendor: str
) -> None:
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
    with torch.no_grad():
        theirs, ours = vendor_energies(graph).double(), potential(edge_vectors(graph), graph)[0].double()
    rows = potential.species_row[graph.atomic_numbers]
    size = (theirs - potential.references[rows]).abs().mean()
    difference = float((ours - theirs).abs().max())
    if not difference <= SAME * size + 1e-5:
        raise FileFormatError(
            f"this {vendor} model has a part that is not known here: converted, its energies differ by {difference:.2g} eV "
            "per atom from its own; leave it out of the merge"
        )
