"""One structure cut into domains that exchange features in one process, as LAMMPS's processes do."""

import threading
from dataclasses import dataclass, field
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from ase import Atoms

from ase_gffmerge.engines.lammps.mliap import MLIAPModel
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import build_graph, predict
from helpers.toys import SMALL, toy

SPECIES = (1, 6, 8)


class Board:
    """Where the domains of one process meet: what all have put there can be read by all."""

    def __init__(self, n_domains: int, n_atoms: int):
        self.n_atoms, self.barrier = n_atoms, threading.Barrier(n_domains, timeout=60)
        self.rows: dict[int, tuple[np.ndarray, torch.Tensor]] = {}

    def total(self, domain: int, atoms: np.ndarray, rows: torch.Tensor) -> torch.Tensor:
        """Sum over all domains of the rows that they hold of every atom (n_atoms, width)."""
        self.rows[domain] = atoms, rows.clone()
        self.barrier.wait()
        whole = rows.new_zeros(self.n_atoms, rows.shape[1])
        for held, values in self.rows.values():
            whole.index_add_(0, torch.as_tensor(held), values)
        self.barrier.wait()
        return whole


@dataclass
class FakeData:
    """What LAMMPS would hand over for one domain."""

    domain: int
    board: Board
    atoms: np.ndarray
    """Of the structure, for own atoms and ghosts."""
    nlocal: int
    elems: np.ndarray
    pair_i: np.ndarray
    pair_j: np.ndarray
    rij: np.ndarray
    calls: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.ntotal = len(self.atoms)
        self.eatoms = np.zeros(self.nlocal)
        self.forces = np.zeros((self.ntotal, 3))
        self.energy = 0.0

    def forward_exchange(self, features: torch.Tensor, out: torch.Tensor, width: int) -> None:
        assert features.is_contiguous()
        assert features.shape == out.shape == (self.ntotal, width)
        self.calls.append("forward")
        own = slice(self.nlocal)
        out.copy_(self.board.total(self.domain, self.atoms[own], features[own])[self.atoms])

    def reverse_exchange(self, features: torch.Tensor, out: torch.Tensor, width: int) -> None:
        assert features.is_contiguous()
        assert features.shape == out.shape == (self.ntotal, width)
        self.calls.append("reverse")
        out.fill_(np.nan)  # rows of ghosts mean nothing afterwards
        out[: self.nlocal] = self.board.total(self.domain, self.atoms, features)[self.atoms[: self.nlocal]]

    def update_pair_forces(self, gradient: np.ndarray) -> None:
        np.add.at(self.forces, self.pair_i, gradient)
        np.add.at(self.forces, self.pair_j, -gradient)


def domains(model: MLIAPModel, atoms: Atoms, bounds: list[float]) -> list[FakeData]:
    """Cut a periodic box along x at ``bounds`` (Å); ghosts are all images within the halo of a domain."""
    atoms = atoms.copy()
    atoms.wrap()
    x, lengths, halo = atoms.positions, atoms.cell.lengths(), model.halo
    elems = np.array([model.element_types.index(s) for s in atoms.symbols])
    board = Board(len(bounds) - 1, len(atoms))
    reach = [range(-n, n + 1) for n in np.ceil(halo / lengths).astype(int)]
    found = []
    for k, (low, high) in enumerate(pairwise(bounds)):
        own = np.flatnonzero((x[:, 0] >= low) & (x[:, 0] < high))
        corner, opposite = np.array([low, 0, 0]) - halo, np.array([high, *lengths[1:]]) + halo
        index, places = [own], [x[own]]
        for shift in product(*reach):
            y = x + np.array(shift) * lengths
            inside = ((y >= corner) & (y <= opposite)).all(axis=1)
            inside[own] &= any(shift)
            index.append(np.flatnonzero(inside))
            places.append(y[inside])
        y = np.concatenate(places)
        gaps = np.linalg.norm(y[:, None] - y, axis=2)
        i, j = np.nonzero((gaps < model.force_field.cutoff) & ~np.eye(len(y), dtype=bool))
        if model.halo == model.force_field.cutoff:  # ML-IAP has the pairs of own atoms
            i, j = i[i < len(own)], j[i < len(own)]
        every = np.concatenate(index)
        found.append(FakeData(k, board, every, len(own), elems[every], i, j, y[j] - y[i]))
    return found


def evaluate(model: MLIAPModel, parts: list[FakeData]) -> None:
    """All domains at once, each in a thread; autograd's reverse pass on a CPU runs in the thread that asks for it."""
    errors: list[BaseException] = []

    def work(data: FakeData) -> None:
        try:
            model.compute_forces(data)
        except BaseException as error:
            errors.append(error)
            data.board.barrier.abort()

    threads = [threading.Thread(target=work, args=(data,)) for data in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def crowd(lengths: tuple[float, ...], n: int, *, apart: float = 0.9) -> Atoms:
    """Atoms at random places of a periodic box, no two closer than ``apart``."""
    rng, places = np.random.default_rng(3), [np.zeros(3)]
    while len(places) < n:
        new = rng.uniform(0, lengths)
        gaps = np.array(places) - new
        gaps -= np.round(gaps / lengths) * lengths
        if np.linalg.norm(gaps, axis=1).min() > apart:
            places.append(new)
    return Atoms(np.resize(SPECIES, n), places, cell=lengths, pbc=True)


SHORT = {"chgnet": {"cutoff": 2.5, "bond_cutoff": 2.0, "n_blocks": 2}}
"""Of an architecture whose domains have all atoms within cutoff times blocks."""


def toy_with_everything(architecture: str, **hyper: int) -> ForceField:
    """A small random force field with a core repulsion and an extrapolation grade."""
    size = {**SMALL[architecture], "n_blocks": 3, **SHORT.get(architecture, {}), **hyper}
    known = toy(architecture, size).with_calibration([crowd((9.0, 5.0, 5.0), 12, apart=1.2)])
    return known.with_core_repulsion().with_extrapolation_grade()


def assert_same(model: MLIAPModel, atoms: Atoms, parts: list[FakeData], tolerance: float = 1e-12) -> None:
    graph = build_graph(atoms, model.force_field.cutoff)
    expected = predict(model.force_field.potential, graph)
    forces, energies = np.zeros((len(atoms), 3)), np.zeros(len(atoms))
    for data in parts:
        np.add.at(forces, data.atoms, data.forces)
        energies[data.atoms[: data.nlocal]] = data.eatoms
    scale = expected.forces.abs().max().item()
    np.testing.assert_allclose(forces, expected.forces, rtol=0, atol=tolerance * max(scale, 1))
    np.testing.assert_allclose(energies, expected.energies, rtol=1e-13, atol=tolerance * max(scale, 1))
    total = sum(data.energy for data in parts)
    assert total == pytest.approx(expected.energy.item(), abs=10 * tolerance * max(scale, 1))


BOX, FOUR = (11.0, 4.5, 5.0), [0, 3, 6, 8, 11]


def assert_cut_into_domains(force_field: ForceField, bounds: list[float] = FOUR) -> list[FakeData]:
    """Domains give the forces and energies of the structure; gives the domains."""
    model, atoms = MLIAPModel(force_field), crowd(BOX, 24)
    parts = domains(model, atoms, bounds)
    evaluate(model, parts)
    assert_same(model, atoms, parts)
    return parts
