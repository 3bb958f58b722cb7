"""Restart files of molecular dynamics: everything needed to go on as if the run had not stopped."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from ase import Atoms
from ase.md.md import MolecularDynamics

from ase_gffmerge.dynamics.integrators import inner_state, restore_inner_state
from ase_gffmerge.dynamics.trajectory import Sample
from ase_gffmerge.errors import DynamicsError, FileFormatError
from ase_gffmerge.storage.tensor_file import read_file, write_file


def restart_path(trajectory: Path) -> Path:
    """Where the restart file of a trajectory lies: beside it, ``run.traj`` has ``run.traj.restart``."""
    return trajectory.with_name(f"{trajectory.name}.restart")


@dataclass(frozen=True, kw_only=True)
class RestartPoint:
    """A moment of a run, complete to the last bit.

    Attributes
    ----------
    identity
        JSON-able description of structure and conditions: only a run of the same identity goes on from here.
    samples
        All samples so far, the last of which is this moment.
    positions, momenta : (n_atoms, 3)
        Å and ASE's unit of momentum.
    cell : (3, 3)
        Å.
    start_positions, start_cell
        Of the first structure, by whose bonds broken ones are counted.
    broken_bonds : (n, 2)
        Bonds that were broken at some time so far.
    integrator
        What :func:`~ase_gffmerge.dynamics.integrators.inner_state` gave.
    random
        State of the random numbers.
    n_frames
        Frames of the trajectory file so far.
    """

    identity: Mapping[str, object]
    samples: tuple[Sample, ...]
    positions: np.ndarray
    momenta: np.ndarray
    cell: np.ndarray
    start_positions: np.ndarray
    start_cell: np.ndarray
    broken_bonds: np.ndarray
    integrator: Mapping[str, np.ndarray]
    random: Mapping[str, object]
    n_frames: int

    @property
    def step(self) -> int:
        """Steps done."""
        return self.samples[-1].step

    @classmethod
    def of(
        cls,
        dynamics: MolecularDynamics,
        *,
        identity: Mapping[str, object],
        samples: Sequence[Sample],
        start: Atoms,
        broken_bonds: Sequence[tuple[int, int]],
        rng: np.random.Generator,
        n_frames: int,
    ) -> Self:
        """Take down the present moment of a run.

        Parameters
        ----------
        dynamics
            The integrator, with its structure.
        identity, samples, broken_bonds, n_frames
            See the attributes.
        start
            The first structure.
        rng
            Where the integrator's random numbers come from.
        """
        atoms = dynamics.atoms
        return cls(
            identity=identity,
            samples=tuple(samples),
            positions=atoms.get_positions(),
            momenta=atoms.get_momenta(),
            cell=np.array(atoms.cell.array),
            start_positions=start.get_positions(),
            start_cell=np.array(start.cell.array),
            broken_bonds=np.array(sorted(broken_bonds), dtype=np.int64).reshape(-1, 2),
            integrator=inner_state(dynamics),
            random=rng.bit_generator.state,
            n_frames=n_frames,
        )

    def place(self, atoms: Atoms) -> None:
        """Move ``atoms`` to this moment; constraints do not hold them back."""
        atoms.set_cell(self.cell)
        atoms.set_positions(self.positions, apply_constraint=False)
        atoms.set_momenta(self.momenta, apply_constraint=False)

    def resume(self, dynamics: MolecularDynamics, rng: np.random.Generator) -> None:
        """Give a fresh integrator, and its random numbers, the state they had."""
        restore_inner_state(dynamics, self.integrator)
        rng.bit_generator.state = dict(self.random)

    def save(self, path: Path) -> None:
        """Write the file atomically: a run killed at any time leaves this moment or the one before."""
        arrays = {
            name: getattr(self, name)
            for name in ("positions", "momenta", "cell", "start_positions", "start_cell", "broken_bonds")
        }
        arrays |= {f"integrator.{name}": value for name, value in self.integrator.items()}
        arrays["samples"] = np.array([astuple(sample) for sample in self.samples])
        metadata = {
            "restart": dict(self.identity),
            "random": dict(self.random),
            "n_frames": self.n_frames,
        }
        write_file(path, metadata, {name: torch.as_tensor(value) for name, value in arrays.items()})

    @classmethod
    def load(cls, path: Path, identity: Mapping[str, object]) -> Self:
        """Read the file of a run of the same identity.

        Raises
        ------
        FileFormatError
            When there is no such file, or it is damaged or of another kind.
        DynamicsError
            When it belongs to a run of another structure or other conditions; the differences are named.
        """
        metadata, tensors = read_file(path)
        if "restart" not in metadata:
            raise FileFormatError(f"{path} is no restart file of molecular dynamics")
        known = metadata["restart"]
        different = sorted(
            key for key in known.keys() | identity.keys() if known.get(key) != identity.get(key)
        )
        if different:
            listed = "; ".join(f"{key} was {known.get(key)}, now {identity.get(key)}" for key in different)
            raise DynamicsError(
                f"{path} is the restart file of another run ({listed}); give the same options, or begin a new run with "
                "another trajectory"
            )
        arrays = {name: tensor.numpy().copy() for name, tensor in tensors.items()}
        samples = tuple(Sample(int(row[0]), *map(float, row[1:])) for row in arrays.pop("samples"))
        inner = {
            name.removeprefix("integrator."): arrays.pop(name)
            for name in list(arrays)
            if name.startswith("integrator.")
        }
        return cls(
            identity=known,
            samples=samples,
            integrator=inner,
            random=metadata["random"],
            n_frames=int(metadata["n_frames"]),
            **arrays,
        )
