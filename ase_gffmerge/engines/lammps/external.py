"""The callback of LAMMPS's ``fix external``: energies, forces and virial of the domains of all processes.

It needs nothing but the packages ``lammps`` and ``mpi4py``. LAMMPS owns domains, ghosts, migration and ensembles.
"""

import logging
import time
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from ase.data import atomic_masses, chemical_symbols
from torch import Tensor

from ase_gffmerge.engines.lammps.mliap import MLIAPModel
from ase_gffmerge.errors import ArgumentError, EvaluationFailed, GFFMergeError

try:
    from mpi4py import MPI as MPI  # before lammps, which then takes the same MPI library

    from ase_gffmerge.engines.lammps.halo import Halo
    from ase_gffmerge.engines.lammps.snapshot import Costs, Neighbors, Snapshot

    from lammps import lammps  # isort: skip
except ImportError as error:
    raise ImportError(
        "LAMMPS or mpi4py is not installed, and ase_gffmerge.engines.lammps needs both; pip install 'ase-gffmerge[lammps]'"
    ) from error

Lammps: TypeAlias = lammps

LOG = logging.getLogger(__name__)
"""Hears of errors before they end the program; where nothing is set up, they stand on stderr."""

FIX, GRADE = "gffmerge", "grade"
"""Name of the fix, and of the property ``d_grade`` of the atoms."""

HALO_MARGIN = 4.0
"""Å of ghosts beyond the receptive field where that is set by hand; LAMMPS's skin must not be wider."""

MASS_TOLERANCE = 0.1
"""Atomic mass units between a type and the element that it is taken for."""


class ExternalForceField:
    """The callback of LAMMPS's ``fix external``.

    Parameters
    ----------
    lmp
        LAMMPS with a box.
    model
        What is evaluated.
    comm
        LAMMPS's communicator.
    elements
        Symbols of the types; default: by their masses.
    stop_at_grade
        Extrapolation grade beyond which all runs of the script end; default: none.

    Attributes
    ----------
    stopped
        Why the runs of the script end early; empty if they do not.
    largest_grade
        Largest extrapolation grade of all steps; ``None`` where the force field has none.
    costs
        Of this process.
    error
        What was raised in a callback, from which no exception can leave.
    """

    def __init__(
        self,
        lmp: Lammps,
        model: MLIAPModel,
        comm: MPI.Intracomm,
        *,
        elements: Sequence[str] | None,
        stop_at_grade: float | None,
    ):
        self.lmp, self.model, self.comm = lmp, model, comm
        self.elements, self.stop_at_grade = elements, stop_at_grade
        self.stopped, self.largest_grade, self.costs = "", None, Costs()
        self.error: BaseException | None = None
        self._began: float | None = None
        wide = model.halo > model.force_field.cutoff
        self._neighbors = Neighbors(model.force_field.cutoff, ghosts_receive=wide)
        self._halo: Halo | None = None
        self._ids = np.zeros(0, dtype=np.int64)
        self._elems: np.ndarray | None = None
        self._attach(wide)

    def _attach(self, wide: bool) -> None:
        """Set what LAMMPS needs for ghosts and forces."""
        cutoff = self.model.force_field.cutoff
        commands = [f"pair_style zero {cutoff}", "pair_coeff * *"]
        commands += [f"fix {FIX} all external pf/callback 1 1", f"fix_modify {FIX} energy yes virial yes"]
        if wide:
            commands.append(f"comm_modify cutoff {self.model.halo + HALO_MARGIN}")
        if self.model.force_field.extrapolation_grade is not None:
            commands.append(f"fix {FIX}_{GRADE} all property/atom d_{GRADE} writedata no")
        for command in commands:
            self.lmp.command(command)
        self.lmp.fix_external_set_vector_length(FIX, 1)
        self.lmp.set_fix_external_callback(FIX, self._called, self)

    def _called(
        self, _: object, step: int, nlocal: int, ids: np.ndarray, x: np.ndarray, forces: np.ndarray
    ) -> None:
        """Evaluate a step; errors end the script, or, where other processes may wait for this one, the program."""
        try:
            if self.error is None:
                self._evaluate(step, forces)
                if (
                    self._began is None
                ):  # what it had to build for its first evaluation is not what a step costs
                    self.costs, self._began = Costs(), time.process_time()
                self.costs.total = time.process_time() - self._began
        except GFFMergeError as error:  # on all processes alike
            self.error = error
            self.lmp.force_timeout()
        except BaseException as error:
            if self.comm.size > 1:
                LOG.error("gffmerge: error: rank %d: %r", self.comm.rank, error)
                self.comm.Abort(1)
            self.error = error
            self.lmp.force_timeout()

    def _evaluate(self, step: int, forces: np.ndarray) -> None:
        """Energies, forces and virial of one step."""
        data = self._snapshot()
        before, start = self.costs.exchange, time.process_time()
        found = self.model.predict(data, torch.as_tensor(data.shifts))
        grades = self.model.grades(data, found)
        self.costs.network += time.process_time() - start - (self.costs.exchange - before)
        forces[:] = self._forces(data, found.gradient)
        virial = -(torch.as_tensor(data.rij).mT @ found.gradient).numpy()
        total = self.comm.allreduce(np.append(0.5 * (virial + virial.T), float(found.energies.sum())))
        if not np.isfinite(total).all():
            raise EvaluationFailed(
                f"energy or virial of step {step} is NaN or infinite; look at the steps before: a too long time step or "
                "overlapping atoms are the usual cause"
            )
        tensor, energy = total[:9].reshape(3, 3), float(total[9])
        self.lmp.fix_external_set_energy_global(FIX, energy)
        self.lmp.fix_external_set_virial_global(FIX, tensor[[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]].tolist())
        if self.lmp.extract_global("eflag_atom") == step:
            self.lmp.fix_external_set_energy_peratom(FIX, found.energies.tolist())
        if grades is not None:
            self._watch(step, grades.double().numpy())

    def _forces(self, data: Snapshot, gradient: Tensor) -> np.ndarray:
        """Forces on own atoms (n_local, 3), those that other domains exert on them included."""
        forces = torch.zeros(data.ntotal, 3, dtype=torch.float64)
        forces.index_add_(0, torch.as_tensor(data.pair_i), gradient)
        forces.index_add_(0, torch.as_tensor(data.pair_j), -gradient)
        total = torch.empty_like(forces)
        data.reverse_exchange(forces, total, 3)
        return total[: data.nlocal].numpy()

    def _snapshot(self) -> Snapshot:
        """Atoms, ghosts and pairs of now."""
        extract = self.lmp.numpy.extract_atom
        nlocal = self.lmp.extract_setting("nlocal")
        n = nlocal + self.lmp.extract_setting("nghost")
        with self.costs.clock("neighbors"):
            x = np.array(extract("x", nelem=n, dim=3)).reshape(n, 3)
            if self._elems is None:
                self._elems = self._elements_of_types()
            halo = self._current_halo(np.array(extract("id", nelem=n)).reshape(n), nlocal)
            types = np.array(extract("type", nelem=n)).reshape(n)
            i, j, vectors, shifts = self._neighbors(x, self._cell(), halo, self.costs)
        self.costs.evaluations += 1
        self.costs.atoms, self.costs.ghosts, self.costs.pairs = nlocal, halo.ntotal - nlocal, len(i)
        return Snapshot(halo, self.costs, self._elems[types[halo.source]], i, j, vectors, shifts)

    def _cell(self) -> np.ndarray:
        """Vectors of LAMMPS's box as rows, Å."""
        low, high, xy, yz, xz, *_ = self.lmp.extract_box()
        x, y, z = np.subtract(high, low)
        return np.array([[x, 0, 0], [xy, y, 0], [xz, yz, z]])

    def _current_halo(self, ids: np.ndarray, nlocal: int) -> Halo:
        """The exchange of the last step, or, if any process has other atoms now, a new one."""
        same = self._halo is not None and self._halo.nlocal == nlocal and np.array_equal(self._ids, ids)
        if self.comm.allreduce(not same, MPI.LOR):
            if self._halo is not None:
                self._halo.free()
            self._halo, self._ids = Halo(self.comm, ids, nlocal, fold=not self._neighbors.ghosts_receive), ids
            self._neighbors.forget()
        assert self._halo is not None
        return self._halo

    def _elements_of_types(self) -> np.ndarray:
        """Position of every type's element in the model's list, type 0 being none."""
        n_types = self.lmp.extract_setting("ntypes")
        symbols = list(self.elements or self._by_mass(n_types))
        if len(symbols) != n_types:
            raise ArgumentError(
                f"--elements names {len(symbols)} elements ({' '.join(symbols)}), and the script has {n_types} atom types; "
                "name one element for each, in their order"
            )
        known = self.model.element_types
        if unknown := sorted({symbol for symbol in symbols if symbol not in known}):
            raise ArgumentError(
                f"{self.model.force_field.name!r} does not know {', '.join(unknown)} (it knows {', '.join(known)}); use a "
                "force field that was trained on these elements, or correct --elements"
            )
        return np.array([-1, *(known.index(symbol) for symbol in symbols)])

    def _by_mass(self, n_types: int) -> list[str]:
        """Symbols of the elements whose masses the types have."""
        masses = self.lmp.numpy.extract_atom("mass")
        found = []
        for number, mass in enumerate([] if masses is None else masses[1 : n_types + 1], start=1):
            nearest = int(np.nanargmin(np.abs(atomic_masses[1:] - mass))) + 1
            if abs(atomic_masses[nearest] - mass) > MASS_TOLERANCE:
                raise ArgumentError(
                    f"no element has the mass {mass:g} of atom type {number}; name the elements of all types with --elements"
                )
            found.append(chemical_symbols[nearest])
        return found

    def _watch(self, step: int, grades: np.ndarray) -> None:
        """Hand grades to LAMMPS, and end all runs beyond the limit."""
        self.lmp.numpy.extract_atom(f"d_{GRADE}", nelem=len(grades))[:] = grades
        largest = self.comm.allreduce(float(grades.max(initial=0)), MPI.MAX)
        self.lmp.fix_external_set_vector(FIX, 1, largest)
        self.largest_grade = max(largest, self.largest_grade or 0.0)
        if self.stop_at_grade is not None and largest > self.stop_at_grade and not self.stopped:
            self.stopped = (
                f"extrapolation grade {largest:.3g} at step {step} is beyond {self.stop_at_grade:g}"
            )
            self.lmp.force_timeout()
