"""A force field as a model of TorchSim, which moves or relaxes many structures at once on one device.

Needs ``torch-sim-atomistic`` (``pip install "ase-gffmerge[torchsim]"``)::

    import torch_sim
    from ase_gffmerge import GFFMergeCalculator
    from ase_gffmerge.engines.torchsim import TorchSimModel

    model = TorchSimModel(GFFMergeCalculator(["rmd17-ethanol", "rmd17-malonaldehyde"]).force_field)
    relaxed = torch_sim.optimize(structures, model, optimizer=torch_sim.Optimizer.fire)  # 0.3: optimizers.fire
"""

from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs.graph import AtomGraph
from ase_gffmerge.graphs.verlet import VerletGraph
from ase_gffmerge.inference.predict import Predictor

try:
    from torch_sim.models.interface import ModelInterface
    from torch_sim.state import SimState
except ModuleNotFoundError as error:
    raise ImportError(
        "TorchSim is not installed, and ase_gffmerge.engines.torchsim is a model for it; pip install torch-sim-atomistic"
    ) from error


class TorchSimModel(ModelInterface):
    """Energies, forces and stresses of a batch of structures, as TorchSim asks for them.

    States are float64, whatever type the weights have. All systems of a state share their boundary conditions; a system
    without volume has a stress of NaN.

    Parameters
    ----------
    force_field
        A specialist or a merged force field on its device and in its floating-point type, for example
        ``calculator.force_field``.
    specialist
        With per-specialist conditioning, name or index of the specialist that all atoms belong to.
    skin
        Of the neighbor lists, Å; it changes the speed, not the result.
    forces_std
        Whether standard deviations of the forces are wanted, too, at the cost of 6 to 10 evaluations.
    """

    def __init__(
        self,
        force_field: ForceField,
        *,
        specialist: str | int | None = None,
        skin: float = 1.0,
        forces_std: bool = False,
    ):
        super().__init__()
        if forces_std:
            force_field.require_uncertainty()
        self.forces_std = forces_std
        self.force_field, self.specialist, self.skin = force_field, specialist, skin
        self._predictor = Predictor(force_field, compile=False)
        self._device, self._dtype = force_field.potential.device, torch.float64
        self._compute_forces = self._compute_stress = True
        self._memory_scales_with = "n_atoms_x_density"
        self._last: tuple[tuple[Tensor, ...], VerletGraph] | None = None

    def forward(self, state: Any, **_: Any) -> dict[str, Tensor]:
        """Evaluate a state, or a dictionary of what makes one.

        Returns
        -------
        dict
            ``energy`` (n_systems,) eV, ``forces`` (n_atoms, 3) eV/Å, ``stress`` (n_systems, 3, 3) eV/Å^3, positive under
            tension, and, if the force field has them, ``extrapolation`` (n_atoms,), ``energy_std`` (n_systems,) and, if
            they were asked for, ``forces_std`` (n_atoms, 3).

        Raises
        ------
        StructureError
            For unknown elements or specialists, positions that are not finite, missing cell vectors.
        """
        if isinstance(state, dict):
            state = SimState(**state, masses=torch.ones_like(state["positions"][:, 0]))
        with torch.inference_mode(False):
            graph = self._graph(state)
            prediction, grades = self._predictor(graph, forces_std=self.forces_std)
        volume = torch.linalg.det(graph.cell).abs()[:, None, None]
        stress = torch.where(volume > 0, prediction.strain_derivative / volume, torch.nan)
        results = {"energy": prediction.energy, "forces": prediction.forces, "stress": stress}
        if grades is not None:
            results["extrapolation"] = grades
        for name in ("energy_std", "forces_std"):
            if (deviations := getattr(prediction, name)) is not None:
                results[name] = deviations
        return {name: values.to(state.positions.dtype) for name, values in results.items()}

    def _graph(self, state: SimState) -> AtomGraph:
        """Batch graph of a state, with the neighbor lists of the one before wherever these are exact."""
        pbc = torch.as_tensor(state.pbc).broadcast_to(3).clone()
        topology = (state.atomic_numbers.clone(), state.system_idx.clone(), pbc)
        positions, cells = (x.detach().double().clone() for x in (state.positions, state.row_vector_cell))
        last, self._last = self._last, None
        if last is None or not all(map(torch.equal, last[0], topology)):
            last = topology, self._candidates(self._structures(positions, cells, *topology))
        graph = last[1].at(positions, cells)
        self._last = last
        return graph

    def _candidates(self, structures: list[Atoms]) -> VerletGraph:
        return VerletGraph(
            [self.force_field.prepared(atoms, specialist=self.specialist) for atoms in structures],
            cutoff=self.force_field.cutoff,
            skin=self.skin,
            device=self.device,
            specialist=[0] * len(structures),
        )

    def _structures(self, *tensors: Tensor) -> list[Atoms]:
        """The systems of a state, whose atoms stand one system after the other."""
        positions, cells, numbers, index, pbc = (x.cpu().numpy() for x in tensors)
        ends = np.bincount(index, minlength=len(cells)).cumsum()[:-1]
        return [
            Atoms(own, positions=places, cell=cell, pbc=pbc)
            for own, places, cell in zip(
                np.split(numbers, ends), np.split(positions, ends), cells, strict=True
            )
        ]
