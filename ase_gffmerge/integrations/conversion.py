"""Steps from another package's network to a potential that are the same whichever package it is."""

from collections.abc import Callable, Collection, Sequence
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor
from torch_geometric.data import Data

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.integrations.same import require_same
from ase_gffmerge.models import Potential

P = TypeVar("P", bound=Potential)


def require_package(package: str, *, models: str, distribution: str | None = None) -> None:
    """Raise :class:`FileFormatError` when a package is not installed.

    Parameters
    ----------
    package
        Its name in Python.
    models
        What its models are called.
    distribution
        Its name for pip; default: the same.
    """
    if find_spec(package) is None:
        name = distribution or package
        raise FileFormatError(
            f"models of {models} need the package {name}, which is not installed; pip install {name}"
        )


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
    vendor_energies: Callable[[Data], Tensor],
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
    require_same(potential, vendor_energies, vendor=vendor)
    return potential


def rows_of_elements(species: Sequence[int]) -> Tensor:
    """Rows (n_species,) of a table with one row per entry of ``species`` in the order of atomic numbers."""
    return torch.tensor(sorted(range(len(species)), key=species.__getitem__))


def per_element(values: Tensor, species: Sequence[int]) -> Tensor:
    """One number for all elements or one for each, in the order of atomic numbers, float64."""
    ones = torch.ones(len(species), dtype=torch.float64)
    return (ones * values.flatten().double())[rows_of_elements(species)]
