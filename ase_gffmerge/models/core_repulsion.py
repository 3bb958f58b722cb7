r"""Core repulsion: a screened nuclear pair potential where atoms come closer than in any frame that a network knows.

A network may find any energy at distances shorter than those it was fitted to (merged ones of PaiNN: -10^22 eV for two atoms
of carbon at 0.3 Å). For every pair of elements there are an outer radius :math:`r_o` below the shortest distance among the
known frames and an inner one, :math:`r_i = 0.8\,r_o`. With :math:`t = (r - r_i)/(r_o - r_i)` between 0 and 1 and
:math:`s(t) = t^3(10 - 15t + 6t^2)`, the energy of atom i is

.. math::

   E_i = b_{Z_i}\bigl(E_i^{\rm net}(\{\rho(r_{ij})\,\hat{\mathbf r}_{ij}\})\bigr)
       + \tfrac12\sum_{j:\,r_{ij} < r_o} \bigl[V(r_{ij}) - T(r_{ij})\bigr],\qquad
   \rho(r) = r_o - \int_r^{r_o} s(t(r'))\,dr' .

1. V is the universal potential of Ziegler, Biersack and Littmark (The Stopping and Range of Ions in Solids, 1985),

   .. math:: V(r) = \frac{e^2}{4\pi\varepsilon_0}\frac{Z_1 Z_2}{r}\,\varphi(r/a),\qquad
             a = \frac{0.46850\ \text{Å}}{Z_1^{0.23} + Z_2^{0.23}},

   with φ a sum of four exponentials, and T its second-order Taylor polynomial about :math:`r_o`. The difference rises with
   the cube of the way below :math:`r_o` and is convex; it is nowhere stiffer than V, and the usual time steps follow it.
2. The network sees no distance below :math:`(r_o + r_i)/2`, where ρ has become constant: no repulsion outweighs what it may
   say of others.
3. Its energy of an atom without the reference energy is bounded, with knees L below and U above the range among the atoms of
   that element in the known frames: :math:`b(e) = L - w\tanh((L - e)/w)` for :math:`e < L`, and likewise above U. Many atoms
   that are too close together would otherwise leave that range by orders of magnitude.

Energies are twice continuously differentiable. Where all distances are beyond :math:`r_o` and all energies within the knees,
energies and their derivatives are to the last bit what they are without it.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Self

import torch
from ase import Atoms
from ase.data import covalent_radii
from torch import Tensor

from ase_gffmerge.graphs import batch_graphs, build_graph
from ase_gffmerge.graphs.graph import AtomGraph, Topology, edge_vectors
from ase_gffmerge.models.layers.readout import ExactBuffers
from ase_gffmerge.runtime.devices import chunks, in_parts

if TYPE_CHECKING:
    from ase_gffmerge.models.base import Potential

MARGIN = 0.9
"""Outer radius in units of the shortest distance among the frames: hotter dynamics than theirs go a little below it."""

BONDED = 0.7
"""Outer radius in units of the sum of the covalent radii (Cordero et al., doi:10.1039/b801115j) for pairs of elements that
are neighbors in no frame. The shortest bonds there are (N2, CO, C2H2) are at 0.77 to 0.80."""

WIDTH = 0.2
"""From the outer to the inner radius, in units of the outer one."""

KNEE, BROAD_KNEE = 1.0, 10.0
"""From the range of an atom's energies to the knee, and width w there, eV; the second for networks that know far more
compounds than their frames show."""

COULOMB = 14.399645
"""Square of the elementary charge over 4πε0, eV Å."""

SCREENING_LENGTH, EXPONENT = 0.46850, 0.23
"""Å, and power of the atomic numbers."""

SCREENING = ((0.18175, 3.19980), (0.50986, 0.94229), (0.28022, 0.40290), (0.02817, 0.20162))
"""Amplitudes and decay constants of φ."""

MAX_ATOMS = 500
"""Atoms per batch of known frames."""

Pairs = Mapping[tuple[int, int], float]
"""A length in Å for pairs of atomic numbers, the smaller first."""


class CoreRepulsion(ExactBuffers):
    """Pair energies, shortest edges and bounds of energies, in float64 whatever the network's type.

    Parameters
    ----------
    species
        Atomic numbers in the order of the tables.
    shortest : (n_species, n_species)
        Shortest distance of every pair of elements in the known frames, Å; 0 where they are nowhere neighbors.
    outer : (n_species, n_species)
        Outer radii in Å.
    bounds : (3, n_species)
        Lower knees, upper knees and widths of the energies of atoms, without reference energies, eV.
    """

    shortest: Tensor
    outer: Tensor
    bounds: Tensor
    atomic_numbers: Tensor
    onsets: Tensor

    def __init__(self, species: Sequence[int], shortest: Tensor, outer: Tensor, bounds: Tensor):
        super().__init__()
        self.register_buffer("shortest", shortest.double())
        self.register_buffer("outer", outer.double())
        self.register_buffer("bounds", bounds.double())
        self.register_buffer("atomic_numbers", torch.tensor(list(species)).double(), persistent=False)
        self.register_buffer("onsets", self._onsets(), persistent=False)

    @classmethod
    def blank(cls, species: Sequence[int]) -> Self:
        """Make one with tables still to be filled."""
        pairs = torch.zeros(len(species), len(species))
        return cls(species, pairs, pairs.clone(), torch.zeros(3, len(species)))

    @property
    def known(self) -> Pairs:
        """Shortest distances of the pairs that are neighbors in the known frames."""
        numbers = [int(z) for z in self.atomic_numbers]
        table = self.shortest.tolist()
        return {
            (first, second): table[i][j]
            for i, first in enumerate(numbers)
            for j, second in enumerate(numbers[i:], start=i)
            if table[i][j] > 0
        }

    def sound(self, cutoff: float) -> bool:
        """Whether the tables are some that :func:`fit_core_repulsion` can have made for a network with this cutoff."""
        low, high, width = self.bounds
        radii = bool((self.outer > 0).all() and (self.outer <= cutoff).all())
        symmetric = torch.equal(self.outer, self.outer.T) and torch.equal(self.shortest, self.shortest.T)
        return radii and symmetric and bool((low < high).all() and (width > 0).all())

    def guarded(
        self, potential: "Potential", vectors: Tensor, graph: Topology
    ) -> tuple[Tensor, list[Tensor]]:
        """Energies (n_atoms,) in eV and scalars of a potential, as :meth:`.Potential.forward` gives them.

        Parameters
        ----------
        potential
            The one that holds this core repulsion.
        vectors
            Edge vectors (n_edges, 3) in Å, in its floating-point type.
        graph
            Elements, specialists and edges.
        """
        species = potential.species_row[graph.atomic_numbers]
        seen, repulsion = self(vectors, graph, species)
        scalars = potential.features(seen, graph)
        energies = potential.energies(scalars, seen, graph)
        energies = self.bounded(energies, potential.references[species], species)
        return energies if repulsion is None else energies + repulsion, scalars

    def forward(self, vectors: Tensor, graph: Topology, species: Tensor) -> tuple[Tensor, Tensor | None]:
        """Edges as the network sees them, and pair energies.

        Parameters
        ----------
        vectors
            Edge vectors (n_edges, 3) in Å.
        graph
            Which atoms they join.
        species
            Rows of the tables (n_atoms,).

        Returns
        -------
        vectors : (n_edges, 3)
            No shorter than the network may see them; where none is, the tensor that was given.
        energies : (n_atoms,) or None
            In eV, float64; ``None`` where it is known that no atoms are too close.
        """
        sender, receiver = species[graph.edge_index]
        outer = self.outer[sender, receiver]
        squares = vectors.double().square().sum(dim=1)
        close = squares < outer.square()
        if not (_unknown(vectors) or close.any()):
            return vectors, None
        lengths = squares.sqrt()
        t = ((lengths - (1 - WIDTH) * outer) / (WIDTH * outer)).clamp(0.0, 1.0)
        seen = outer * (1 - 0.5 * WIDTH + WIDTH * t**4 * (2.5 + t * (t - 3)))
        factor = torch.where(close, seen / lengths, 1.0).to(vectors.dtype)
        pairs = zbl_energy(lengths, self.atomic_numbers[sender], self.atomic_numbers[receiver])
        value, slope, curvature = self.onsets[:, sender, receiver]
        way = lengths - outer
        halves = torch.where(close, 0.5 * (pairs - value - way * (slope + 0.5 * way * curvature)), 0.0)
        energies = halves.new_zeros(len(species)).index_add(0, graph.edge_index[1], halves)
        return vectors * factor[:, None], energies

    def _onsets(self) -> Tensor:
        """V, V' and V'' at the outer radii (3, n_species, n_species), in eV, eV/Å and eV/Å²; at 1 Å for blank tables."""
        radii = torch.where(self.outer > 0, self.outer, 1.0)
        return torch.stack(zbl_derivatives(radii, self.atomic_numbers[:, None], self.atomic_numbers))

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *arguments: object
    ) -> None:
        """Let the onsets be those of the tables that were loaded."""
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self.onsets = self._onsets()

    def bounded(self, energies: Tensor, references: Tensor, species: Tensor) -> Tensor:
        """Bound the network's energies.

        Parameters
        ----------
        energies, references
            Of the atoms with their reference energies, and these (n_atoms,), eV.
        species
            Rows of the tables (n_atoms,).
        """
        low, high, width = self.bounds[:, species]
        bare = energies - references
        below, above = bare < low, bare > high
        outside = below | above
        if not (_unknown(energies) or outside.any()):
            return energies
        knee = torch.where(below, low, high)
        return torch.where(outside, references + knee + width * torch.tanh((bare - knee) / width), energies)


def _unknown(tensor: Tensor) -> bool:
    """Whether it would cost time to look at values, or is impossible while a function is traced."""
    return torch.compiler.is_compiling() or tensor.device.type != "cpu"


def zbl_energy(lengths: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Universal potential of two nuclei in eV.

    Parameters
    ----------
    lengths
        Distances in Å.
    first, second
        Atomic numbers, of a floating-point type.
    """
    x = lengths * (first**EXPONENT + second**EXPONENT) / SCREENING_LENGTH
    screening = torch.stack([a * torch.exp(-b * x) for a, b in SCREENING]).sum(dim=0)
    return COULOMB * first * second / lengths * screening


def zbl_derivatives(lengths: Tensor, first: Tensor, second: Tensor) -> list[Tensor]:
    """:func:`zbl_energy` and its first and second derivative with respect to the distance, in eV, eV/Å and eV/Å².

    Parameters
    ----------
    lengths, first, second
        As for :func:`zbl_energy`.
    """
    r, decay = torch.broadcast_tensors(lengths, (first**EXPONENT + second**EXPONENT) / SCREENING_LENGTH)
    rates = torch.stack([b * decay for _, b in SCREENING])
    terms = COULOMB * first * second * torch.stack([a * torch.exp(-b * decay * r) for a, b in SCREENING]) / r
    factors = (torch.ones_like(rates), -rates - 1 / r, rates * (rates + 2 / r) + 2 / r**2)
    return [(terms * factor).sum(dim=0) for factor in factors]


@torch.no_grad()
def fit_core_repulsion(
    potential: "Potential",
    calibration: Sequence[Sequence[Atoms]],
    *,
    known: Sequence[Pairs] = (),
    broad: bool = False,
) -> CoreRepulsion | None:
    """Core repulsion that begins beyond all that a potential knows.

    Parameters
    ----------
    potential
        Whose energies are bounded; its own core repulsion, if it has one, is left out of account.
    calibration
        Known frames of every specialist; its position in the sequence is its index for conditioned potentials.
    known
        Further shortest distances, of frames that are not at hand.
    broad
        Whether it knows far more compounds than these frames show, as foundation models do: no radius then reaches chemical
        bonds, and the bounds are wide.

    Returns
    -------
    CoreRepulsion or None
        ``None`` where the architecture has a repulsion of its own, or there are no frames.
    """
    if potential.repulsive or not any(calibration):
        return None
    n, cutoff = len(potential.species), potential.hyper.cutoff
    shortest = torch.full((n, n), torch.inf, dtype=torch.float64)
    low, high = (
        torch.full((2, n), torch.inf, dtype=torch.float64).mul_(torch.tensor([[1.0], [-1.0]])).unbind()
    )
    for distances, pair, energies, species in _observed(potential, calibration):
        shortest.view(-1).scatter_reduce_(0, pair, distances, reduce="amin")
        low.scatter_reduce_(0, species, energies, reduce="amin")
        high.scatter_reduce_(0, species, energies, reduce="amax")
    row = {z: k for k, z in enumerate(potential.species)}
    for pairs in known:
        for (first, second), distance in pairs.items():
            if first in row and second in row:
                i, j = row[first], row[second]
                shortest[i, j] = shortest[j, i] = min(float(shortest[i, j]), distance)
    shortest = torch.minimum(shortest, shortest.T)
    knee = BROAD_KNEE if broad else KNEE
    bounds = torch.stack([low - knee, high + knee, torch.full_like(low, knee)])
    never = torch.tensor([[-1.0], [1.0], [1.0]], dtype=torch.float64) * 2 * BROAD_KNEE
    bounds = torch.where(low.isinf(), never, bounds)
    outer = outer_radii(potential.species, shortest, broad=broad).clamp(max=cutoff)
    found = CoreRepulsion(potential.species, torch.where(shortest.isinf(), 0.0, shortest), outer, bounds)
    return found.eval().to(potential.device)


def _observed(
    potential: "Potential", calibration: Sequence[Sequence[Atoms]]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Edge lengths, their rows in a flat table of pairs, energies without references, and species; batch by batch."""
    n, network = len(potential.species), potential.with_core_repulsion(None)
    cutoff, dtype = potential.hyper.cutoff, potential.dtype

    def observe(frames: Sequence[Atoms], index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        graphs: list[AtomGraph] = [build_graph(a, cutoff, dtype=dtype, specialist=index) for a in frames]
        graph = batch_graphs(graphs).to(potential.device)
        vectors = edge_vectors(graph)
        species = potential.species_row[graph.atomic_numbers]
        energies = network(vectors, graph)[0] - potential.references[species]
        sender, receiver = species[graph.edge_index]
        lengths = vectors.double().norm(dim=1)
        return lengths.cpu(), (sender * n + receiver).cpu(), energies.cpu(), species.cpu()

    for index, frames in enumerate(calibration):
        for chunk in chunks(frames, MAX_ATOMS):
            yield from in_parts(partial(observe, index=index), chunk, device=potential.device)


def outer_radii(species: Sequence[int], shortest: Tensor, *, broad: bool) -> Tensor:
    """Outer radii (n_species, n_species) in Å.

    Parameters
    ----------
    species
        Atomic numbers.
    shortest
        Shortest distances (n_species, n_species) in Å, infinite for pairs that are nowhere neighbors.
    broad
        See :func:`fit_core_repulsion`.
    """
    radii = torch.as_tensor(covalent_radii[list(species)])
    bonded = BONDED * (radii[:, None] + radii)
    known = torch.minimum(MARGIN * shortest, bonded) if broad else MARGIN * shortest
    return torch.where(shortest.isinf(), bonded, known)
