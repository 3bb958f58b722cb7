"""The object that LAMMPS's ``pair_style mliap unified model.pt 0`` loads (ML-IAP-Kokkos), and what our own driver evaluates.

LAMMPS calls ``compute_forces`` with an object that has the pairs of a domain and exchanges features between domains::

    gffmerge convert merged.safetensors model.pt --to lammps

    pair_style mliap unified model.pt 0
    pair_coeff * * H C O
"""

import pickle
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor

from ase_gffmerge.engines.lammps.domain import (
    DomainPrediction,
    Exchange,
    halo_width,
    predict_domain,
    require_decomposable,
)
from ase_gffmerge.errors import ArgumentError
from ase_gffmerge.forcefield.conditioning import specialist_indices
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs.graph import Topology
from ase_gffmerge.storage.tensor_file import atomic_write

Array = np.ndarray | Tensor


class DomainData(Exchange, Protocol):
    """What LAMMPS hands over (``MLIAPDataPy``): arrays of numpy, or of cupy where LAMMPS computes on a GPU.

    Attributes
    ----------
    elems : (n_total,)
        Positions of the atoms' elements in ``element_types``.
    pair_i, pair_j : (n_pairs,)
        Own atoms and their neighbours within the cutoff, in both directions.
    rij : (n_pairs, 3)
        Vectors from i to j, Å.
    """

    elems: Array
    pair_i: Array
    pair_j: Array
    rij: Array


class MLIAPModel:
    """A force field behind LAMMPS's ML-IAP interface.

    Pickled, it is the bytes of a force-field file: loading it needs this package, and the other package whose architecture
    it may have.

    Parameters
    ----------
    force_field
        Frozen, in the floating-point type in which it is to compute; calibration frames are left out.
    elements
        Symbols in the order of ``elems``; default: all that it knows.
    specialist
        With per-specialist conditioning, the one that all atoms belong to.

    Attributes
    ----------
    element_types, ndescriptors, nparams, rcutfac, interface
        As LAMMPS wants them; ``rcutfac`` is half the cutoff.

    Raises
    ------
    ArgumentError
        For a potential that cannot be evaluated domain by domain, or elements that it does not know.
    """

    def __init__(
        self,
        force_field: ForceField,
        *,
        elements: Sequence[str] | None = None,
        specialist: str | int | None = None,
    ):
        require_decomposable(force_field.potential, force_field.name)
        known = [chemical_symbols[z] for z in force_field.species]
        self.element_types = list(elements or known)
        if unknown := [symbol for symbol in self.element_types if symbol not in known]:
            raise ArgumentError(
                f"{force_field.name!r} does not know {', '.join(unknown)} (it knows {', '.join(known)}); use a force field "
                "that was trained on these elements"
            )
        self.force_field = force_field.with_calibration(())
        self.ndescriptors = self.nparams = 1
        self.rcutfac = 0.5 * force_field.cutoff
        self.interface: object = None
        self._specialist = _specialist_index(force_field, specialist)
        self._potential = force_field.potential.for_inference()
        self._numbers = torch.tensor([atomic_numbers[symbol] for symbol in self.element_types])

    @property
    def halo(self) -> float:
        """Distance in Å up to which a domain needs atoms of others."""
        return halo_width(self.force_field.potential)

    def predict(self, data: DomainData, shifts: Tensor | None = None) -> DomainPrediction:
        """Energies and gradients of a domain, on the device of its arrays; all domains do it together.

        ``shifts`` (n_pairs, 3) tell images of an atom apart where these have no rows of their own.
        """
        vectors = torch.as_tensor(data.rij)
        edges = torch.stack([torch.as_tensor(pair).long() for pair in (data.pair_j, data.pair_i)])
        self._move(vectors.device)
        numbers = self._numbers[torch.as_tensor(data.elems)[: data.ntotal].long()]
        zeros = torch.zeros_like(numbers)
        graph = Topology(
            atomic_numbers=numbers,
            specialist=zeros + self._specialist,
            edge_index=edges,
            shifts=vectors.new_zeros(len(vectors), 3) if shifts is None else shifts,
            structure_index=zeros,
        )
        return predict_domain(self._potential, vectors, graph, data)

    def grades(self, data: DomainData, prediction: DomainPrediction) -> Tensor | None:
        """Extrapolation grades (n_local,) of what was predicted; ``None`` where the force field has none."""
        grade = self.force_field.extrapolation_grade
        if grade is None:
            return None
        numbers = self._numbers[torch.as_tensor(data.elems)[: data.nlocal].long()]
        with torch.no_grad():
            return grade(prediction.scalars, numbers)

    def compute_forces(self, data: "WritableData") -> None:
        """Write energies per atom, their sum and the gradients of all pairs into LAMMPS's object."""
        found = self.predict(data)
        _write_energies(data, found.energies)
        data.energy = float(found.energies.sum())
        gradient = found.gradient.contiguous()
        data.update_pair_forces(gradient.numpy() if gradient.device.type == "cpu" else gradient)

    def compute_gradients(self, data: DomainData) -> None:
        """Do nothing: of the steps of an ML-IAP model this one needs ``compute_forces`` alone."""

    def compute_descriptors(self, data: DomainData) -> None:
        """Do nothing, see :meth:`compute_gradients`."""

    def _move(self, device: torch.device) -> None:
        """Bring the weights to where LAMMPS has its arrays."""
        if self._numbers.device != device:
            self.force_field.to(device=device)
            self._potential = self.force_field.potential.for_inference()
            self._numbers = self._numbers.to(device)

    def __reduce__(self) -> tuple[object, tuple[bytes, list[str], int]]:
        with TemporaryDirectory() as folder:
            data = self.force_field.save(Path(folder) / "model.safetensors").read_bytes()
        return _restore, (data, self.element_types, self._specialist)


class WritableData(DomainData, Protocol):
    """LAMMPS's object, which also takes what was computed."""

    eatoms: Array
    energy: float

    def update_pair_forces(self, gradient: Array) -> None:
        """Add gradients (n_pairs, 3) float64 to the forces of i, and subtract them from those of j."""


def _write_energies(data: WritableData, energies: Tensor) -> None:
    """Energies per atom: the coupling with Kokkos gives an array to be filled, the plain one only takes one."""
    try:
        written = torch.as_tensor(data.eatoms)
    except AttributeError:
        data.eatoms = energies.cpu().numpy()
    else:
        written.copy_(energies)


def _specialist_index(force_field: ForceField, specialist: str | int | None) -> int:
    """Row of the embedding tables."""
    if force_field.potential.hyper.n_embeddings == 1:
        return 0
    return int(specialist_indices(Atoms("X"), force_field.specialist_names, default=specialist)[0])


def _restore(data: bytes, elements: list[str], specialist: int) -> MLIAPModel:
    """Rebuild the object from the bytes of a force-field file."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(data)
        force_field = ForceField.load(path)
    return MLIAPModel(force_field, elements=elements, specialist=specialist)


def write_model(model: MLIAPModel, path: Path) -> Path:
    """Write the file for ``pair_style mliap unified``: by ``torch.save`` for .pt and .pth, else by ``pickle``.

    Raises
    ------
    ArgumentError
        For a potential that needs more than one cutoff of halo, which that pair style does not have.
    FileFormatError
        When the file cannot be written.
    """
    if model.halo > model.force_field.cutoff:
        raise ArgumentError(
            f"{model.force_field.name!r} ({model.force_field.potential.architecture}) needs atoms within {model.halo:g} Å, "
            f"and pair_style mliap gives those within {model.force_field.cutoff:g} Å; run `gffmerge lammps` instead"
        )

    def write(temporary: Path) -> None:
        if path.suffix in (".pt", ".pth"):  # as LAMMPS reads them
            torch.save(model, temporary)
        else:
            temporary.write_bytes(pickle.dumps(model))

    atomic_write(path, write)
    return path
