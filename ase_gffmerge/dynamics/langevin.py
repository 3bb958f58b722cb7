r"""Many structures in motion at once: one set of tensors, one evaluation of the potential per step.

A step is BAOAB (Leimkuhler & Matthews, doi:10.1093/amrx/abs010) with :math:`c = e^{-\gamma\,\Delta t}`:

.. math::

   \mathbf p &\leftarrow \mathbf p + \tfrac{\Delta t}{2}\mathbf F(\mathbf r), \qquad
   \mathbf r \leftarrow \mathbf r + \tfrac{\Delta t}{2}\,\mathbf p/m, \\
   \mathbf p &\leftarrow c\,\mathbf p + \sqrt{(1-c^2)\,m\,k_B T}\;\boldsymbol\xi, \\
   \mathbf r &\leftarrow \mathbf r + \tfrac{\Delta t}{2}\,\mathbf p/m, \qquad
   \mathbf p \leftarrow \mathbf p + \tfrac{\Delta t}{2}\mathbf F(\mathbf r).

Without friction that is velocity Verlet.
"""

from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms, units
from torch import Tensor

from ase_gffmerge.forcefield.conditioning import with_indices
from ase_gffmerge.graphs import Prediction, predict
from ase_gffmerge.graphs.verlet import VerletGraph
from ase_gffmerge.models import Potential


class BatchedLangevin:
    """Positions, momenta and forces of a batch of replicas, float64 on the potential's device, in ASE's units.

    Parameters
    ----------
    potential
        Evaluated in its own floating-point type.
    structures
        With their momenta.
    temperatures
        Of the thermostat, one per structure, K.
    generators
        Source of the thermostat's noise, one per structure.
    specialist
        Of every structure, for one that does not say which specialist it belongs to.
    names
        Of the specialists in the order of their indices, for structures that name theirs.
    skin
        Of the neighbour lists, Å.

    Attributes
    ----------
    positions, momenta, forces : (n_atoms, 3)
    masses : (n_atoms, 1)
    energies : (n_replicas,)
    graph
        Of the last evaluation.
    leapt : (n_replicas,) bool
        Whether an atom would have moved further than the cutoff in the last step; such a replica stays where it was.
    """

    def __init__(
        self,
        potential: Potential,
        structures: Sequence[Atoms],
        *,
        temperatures: Sequence[float],
        generators: Sequence[np.random.Generator],
        specialist: Sequence[str | int | None],
        names: Sequence[str] | None = None,
        skin: float,
    ) -> None:
        self.potential, self.device = potential.for_inference(), potential.device
        hyper = potential.hyper
        prepared = [
            with_indices(atoms, hyper.n_embeddings, names=names, default=default)
            for atoms, default in zip(structures, specialist, strict=True)
        ]
        self.neighbours = VerletGraph(
            prepared, cutoff=hyper.cutoff, skin=skin, device=self.device, specialist=[0] * len(prepared)
        )
        self.positions = self._tensor(np.concatenate([atoms.positions for atoms in structures]))
        self.momenta = self._tensor(np.concatenate([atoms.get_momenta() for atoms in structures]))
        self.masses = self._tensor(np.concatenate([atoms.get_masses() for atoms in structures]))[:, None]
        self.temperatures = self._tensor(np.asarray(temperatures))
        self.generators = list(generators)
        self.leapt = torch.zeros(len(structures), dtype=torch.bool, device=self.device)
        self.evaluate()

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(array, dtype=torch.float64, device=self.device)

    def __len__(self) -> int:
        return len(self.generators)

    @property
    def structure_index(self) -> Tensor:
        """Which replica every atom (n_atoms,) belongs to."""
        return self.neighbours.structure_index

    @property
    def slices(self) -> list[slice]:
        """Rows of every replica."""
        return self.neighbours.slices

    def per_replica(self, values: Tensor) -> Tensor:
        """Sum values (n_atoms,) over the atoms of every replica."""
        return values.new_zeros(len(self)).index_add(0, self.structure_index, values)

    def any_atom(self, flags: Tensor) -> Tensor:
        """Flags (n_replicas,) of the replicas in which any atom is flagged (n_atoms,)."""
        return self.per_replica(flags.double()) > 0

    def kinetic_energies(self) -> Tensor:
        """Kinetic energy (n_replicas,) in eV."""
        return self.per_replica((self.momenta.square() / (2 * self.masses)).sum(dim=1))

    def evaluate(self) -> None:
        """Energies and forces at the current positions."""
        self.graph = self.neighbours.at(self.positions)
        prediction: Prediction = predict(self.potential, self.graph)
        self.energies, self.forces = prediction.energy, prediction.forces

    def step(self, timestep: float, *, friction: float) -> None:
        """One step of ``timestep`` fs with ``friction`` in 1/fs."""
        dt = timestep * units.fs
        self.momenta = self.momenta + dt / 2 * self.forces
        middle = self.positions + dt / 2 * self.momenta / self.masses
        if friction > 0:
            self._thermostat(np.exp(-friction * timestep))
        self._move(middle + dt / 2 * self.momenta / self.masses)
        self.evaluate()
        self.momenta = self.momenta + dt / 2 * self.forces

    def _thermostat(self, c: float) -> None:
        noise = [
            generator.standard_normal((part.stop - part.start, 3))
            for generator, part in zip(self.generators, self.slices, strict=True)
        ]
        kt = units.kB * self.temperatures[self.structure_index][:, None]
        width = torch.sqrt((1 - c**2) * self.masses * kt)
        self.momenta = c * self.momenta + width * self._tensor(np.concatenate(noise))

    def _move(self, positions: Tensor) -> None:
        """Accept new positions of the replicas in which no atom leaps or gets lost."""
        short = (positions - self.positions).abs().amax(dim=1) <= self.potential.hyper.cutoff
        self.leapt = self.any_atom(~short)
        stay = self.leapt[self.structure_index][:, None]
        self.positions = torch.where(stay, self.positions, positions)

    def keep(self, kept: Sequence[int]) -> None:
        """Go on with the replicas of these indices."""
        chosen = torch.zeros(len(self), dtype=torch.bool, device=self.device)
        chosen[list(kept)] = True
        atoms = chosen[self.structure_index]
        for name in ("positions", "momenta", "forces", "masses"):
            setattr(self, name, getattr(self, name)[atoms])
        for name in ("temperatures", "energies", "leapt"):
            setattr(self, name, getattr(self, name)[chosen])
        self.generators = [self.generators[k] for k in kept]
        self.neighbours.keep(kept)
