"""ASE's integrators of molecular dynamics by ensemble, initial momenta, and the files that a run is restarted from.

Initial momenta, and the degrees of freedom that carry them.

Restart files of molecular dynamics: everything needed to go on as if the run had not stopped.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from ase import Atoms, units
from ase.md import MTKNPT, Bussi, Langevin, VelocityVerlet, thermalize_momenta
from ase.md.md import MolecularDynamics
from ase.md.nose_hoover_chain import IsotropicMTKNPT, NoseHooverChainNVT
from ase.md.velocitydistribution import Stationary, ZeroRotation

from ase_gffmerge.dynamics.trajectory import Sample
from ase_gffmerge.errors import DynamicsError, FileFormatError, StructureError
from ase_gffmerge.storage.tensor_file import read_file, write_file

ENSEMBLES = ("nve", "nvt", "npt")
THERMOSTATS = ("langevin", "bussi", "nose-hoover")
BAROSTATS = ("anisotropic", "isotropic")


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Under which conditions molecular dynamics runs, and by which of ASE's integrators.

    Attributes
    ----------
    ensemble
        ``nve`` (velocity Verlet), ``nvt`` (the thermostat) or ``npt`` (Martyna-Tobias-Klein).
    temperature, final_temperature
        K; with the latter the thermostat's temperature moves linearly from one to the other during the run.
    timestep
        fs.
    thermostat
        Of ``nvt``: ``langevin``, ``bussi`` (stochastic velocity rescaling, J. Chem. Phys. 126, 014101) or ``nose-hoover``
        (a chain of three).
    friction
        Of Langevin dynamics, 1/fs.
    thermostat_time, barostat_time
        Time constants of the other thermostats and of the barostat, fs; default: 100 and 1000 time steps.
    barostat
        Of ``npt``: ``anisotropic`` (all lengths and angles of the cell move) or ``isotropic`` (its volume alone).
    pressure
        External pressure of ``npt``, GPa.
    """

    ensemble: str
    temperature: float
    timestep: float
    final_temperature: float | None = None
    thermostat: str = "langevin"
    friction: float = 0.01
    thermostat_time: float | None = None
    barostat_time: float | None = None
    barostat: str = "anisotropic"
    pressure: float = 0.0

    def __post_init__(self) -> None:
        """Raise :class:`DynamicsError` for conditions that are impossible."""
        for what, chosen, known in (
            ("ensemble", self.ensemble, ENSEMBLES),
            ("thermostat", self.thermostat, THERMOSTATS),
            ("barostat", self.barostat, BAROSTATS),
        ):
            if chosen not in known:
                raise DynamicsError(f"unknown {what} {chosen!r}; choose one of {', '.join(known)}")
        if not 0 < self.timestep < np.inf:
            raise DynamicsError(
                f"a time step of {self.timestep} fs is impossible; it must be positive and finite"
            )
        for value in (self.temperature, self.final_temperature):
            if value is not None and not 0 <= value < np.inf:
                raise DynamicsError(f"{value} K are impossible; a temperature is not negative, and finite")
        if not 0 <= self.friction < np.inf:
            raise DynamicsError(
                f"a friction of {self.friction}/fs is impossible; it must not be negative, and finite"
            )
        for value in (self.thermostat_time, self.barostat_time):
            if value is not None and not 0 < value < np.inf:
                raise DynamicsError(
                    f"a time constant of {value} fs is impossible; it must be positive and finite"
                )
        if not np.isfinite(self.pressure):
            raise DynamicsError(f"a pressure of {self.pressure} GPa is impossible; it must be finite")
        self._check_temperature()

    def _check_temperature(self) -> None:
        needs = self.ensemble == "npt" or (self.ensemble == "nvt" and self.thermostat != "langevin")
        if needs and self.temperature == 0:
            raise DynamicsError(
                f"{self.ensemble} has no thermostat for 0 K; give a positive temperature, or use nve"
            )
        ramps = self.ensemble == "nvt" and self.thermostat in ("langevin", "bussi")
        if self.final_temperature is not None and not ramps:
            raise DynamicsError(
                "the temperature can be ramped in nvt by the thermostats langevin and bussi; choose one of them"
            )

    @property
    def rests(self) -> bool:
        """Whether the centre of mass of free atoms is held at rest."""
        return self.ensemble == "nvt" and self.thermostat != "nose-hoover"

    def check_structure(self, atoms: Atoms) -> None:
        """Raise :class:`StructureError` or :class:`DynamicsError` for a structure that cannot move like this."""
        if len(atoms) == 0:
            raise StructureError("the structure has no atoms; give one with at least one")
        if self.ensemble == "npt" and not (atoms.pbc.all() and atoms.cell.rank == 3):
            raise StructureError(
                f"{atoms.get_chemical_formula()} is not periodic in three directions, so it has no pressure; use "
                "nvt, or give it a cell and pbc=True"
            )
        chained = self.ensemble == "npt" or (self.ensemble == "nvt" and self.thermostat == "nose-hoover")
        if chained and atoms.constraints:
            name = "npt" if self.ensemble == "npt" else "the thermostat nose-hoover"
            raise DynamicsError(
                f"{name} does not support constraints; remove them with atoms.set_constraint(), or use nvt with langevin "
                "or bussi"
            )

    def temperature_at(self, fraction: float) -> float:
        """Temperature of the thermostat in K after a fraction (0 to 1) of the run."""
        if self.final_temperature is None:
            return self.temperature
        return self.temperature + fraction * (self.final_temperature - self.temperature)

    def integrator(self, atoms: Atoms, rng: np.random.Generator) -> MolecularDynamics:
        """Give ASE's integrator for a structure with momenta, whose random numbers come from ``rng``."""
        dt = self.timestep * units.fs
        t_damp = dt * 100 if self.thermostat_time is None else self.thermostat_time * units.fs
        p_damp = dt * 1000 if self.barostat_time is None else self.barostat_time * units.fs
        if self.ensemble == "nve":
            return VelocityVerlet(atoms, dt)
        if self.ensemble == "npt":
            kind = MTKNPT if self.barostat == "anisotropic" else IsotropicMTKNPT
            return kind(
                atoms,
                dt,
                temperature_K=self.temperature,
                pressure_au=self.pressure * units.GPa,
                tdamp=t_damp,
                pdamp=p_damp,
            )
        if self.thermostat == "nose-hoover":
            return NoseHooverChainNVT(atoms, dt, temperature_K=self.temperature, tdamp=t_damp)
        if self.thermostat == "bussi":
            return Bussi(atoms, dt, temperature_K=self.temperature, taut=t_damp, rng=rng)
        friction = self.friction / units.fs
        return Langevin(atoms, dt, temperature_K=self.temperature, friction=friction, fixcm=False, rng=rng)


def set_temperature(dynamics: MolecularDynamics, temperature: float) -> None:
    """Change the temperature (K) of a Langevin or Bussi thermostat."""
    if isinstance(dynamics, Langevin):
        dynamics.set_temperature(temperature_K=temperature)
    elif isinstance(dynamics, Bussi):
        dynamics.temp = temperature * units.kB
        dynamics.target_kinetic_energy = 0.5 * dynamics.temp * dynamics.ndof


def inner_state(dynamics: MolecularDynamics) -> dict[str, np.ndarray]:
    """Everything numeric that an integrator and its thermostat and barostat chains remember, by dotted name."""
    return {name: np.array(getattr(owner, key)) for name, owner, key in _numbers(dynamics, "")}


def restore_inner_state(dynamics: MolecularDynamics, state: Mapping[str, np.ndarray]) -> None:
    """Set what :func:`inner_state` gave, in an integrator of the same kind.

    Raises
    ------
    DynamicsError
        When the state is that of another kind of integrator.
    """
    found = {name: (owner, key) for name, owner, key in _numbers(dynamics, "")}
    if not found.keys() <= state.keys():  # some are there only after a step
        raise DynamicsError(
            "the restart file is that of another integrator or of another version of ASE; begin a new run"
        )
    for name, (owner, key) in found.items():
        kind = type(getattr(owner, key))
        setattr(owner, key, state[name].copy() if kind is np.ndarray else kind(state[name]))


def _numbers(owner: object, prefix: str) -> Iterator[tuple[str, object, str]]:
    """Dotted name, owner and attribute of every number and array, chains included."""
    for key, value in sorted(vars(owner).items()):
        if isinstance(value, float | int | np.ndarray) and not isinstance(value, bool):
            yield f"{prefix}{key}", owner, key
        elif type(value).__module__ == NoseHooverChainNVT.__module__:
            yield from _numbers(value, f"{prefix}{key}.")


def new_momenta(atoms: Atoms, temperature: float, *, rng: np.random.Generator) -> None:
    """Draw Maxwell-Boltzmann momenta in place; without constraints, stop overall motion and, of molecules, rotation.

    Parameters
    ----------
    atoms
        The structure.
    temperature
        Of every internal vibration, K: the energy removed is not given to them.
    rng
        Source of randomness.
    """
    thermalize_momenta(atoms, temperature, rng=rng)
    if atoms.constraints or len(atoms) == 1:
        return
    Stationary(atoms, preserve_temperature=False)
    if not atoms.pbc.any():
        with np.errstate(divide="ignore", invalid="ignore"):
            ZeroRotation(atoms, preserve_temperature=False)


def degrees_of_freedom(atoms: Atoms, *, at_rest: bool) -> int:
    """Degrees of freedom that carry kinetic energy; ``at_rest``: (angular) momentum stays zero."""
    n = atoms.get_number_of_degrees_of_freedom()
    if at_rest and not atoms.constraints and len(atoms) > 1:
        n -= 3 if atoms.pbc.any() else 3 + np.count_nonzero(atoms.get_moments_of_inertia() > 1e-6)
    return max(int(n), 1)


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
    seconds
        Wall time so far.
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
    seconds: float

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
        seconds: float,
    ) -> Self:
        """Take down the present moment of a run.

        Parameters
        ----------
        dynamics
            The integrator, with its structure.
        identity, samples, broken_bonds, n_frames, seconds
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
            seconds=seconds,
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
            "seconds": self.seconds,
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
        if not path.exists():
            raise FileFormatError(
                f"there is no restart file {path}, and so no run to continue; check the name, or begin the run without "
                "restart"
            )
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
            seconds=float(metadata["seconds"]),
            **arrays,
        )
