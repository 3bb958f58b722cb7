"""The ASE calculator: the contract between a force field and ASE, nothing else."""

import copy
import html
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from ase_gffmerge.engines.ase.arguments import (
    DTYPES,
    atom_indices,
    compile_choice,
    dispersion_choice,
    dtype_name,
    isolated_torch,
    served_force_field,
    skin_width,
    specialist_choice,
    weight_tuple,
)
from ase_gffmerge.engines.ase.dispersion import Results
from ase_gffmerge.engines.ase.results import (
    ExtrapolationNotice,
    ase_results,
    computing,
    evaluate_structures,
    require_finite,
    require_structure,
    require_volume,
    trust,
)
from ase_gffmerge.errors import ArgumentError
from ase_gffmerge.forcefield.conditioning import KEY, same_choice
from ase_gffmerge.forcefield.force_field import symbols
from ase_gffmerge.graphs import AtomGraph, hessian
from ase_gffmerge.graphs.verlet import VerletCache
from ase_gffmerge.inference.compiled import Compile
from ase_gffmerge.inference.predict import Predictor, force_disagreement
from ase_gffmerge.integrations.load import Source
from ase_gffmerge.runtime.devices import ForkSafeLock, resolve_device
from ase_gffmerge.runtime.progress import Progress, no_progress
from ase_gffmerge.workflows.load_or_merge import MergeOptions, resolve

if TYPE_CHECKING:
    from ase_gffmerge.merging.recipe import Recipe
    from ase_gffmerge.merging.report import MergeReport
    from ase_gffmerge.sampling.on_request import Calibration

STATE = ("positions", "numbers", "cell", "pbc")
PROPERTIES = ("energy", "free_energy", "energies", "forces", "stress")


class GFFMergeCalculator(Calculator):
    """ASE calculator of one machine-learned force field, or of several specialists merged into a single one.

    Energy and energies per atom in eV, forces in eV/Å, stress in eV/Å^3 (xx, yy, zz, yz, xz, xy; positive under tension)::

        atoms = ase.build.molecule("CH3CH2OH")
        atoms.calc = GFFMergeCalculator(["rmd17-ethanol", "rmd17-malonaldehyde"])
        atoms.get_forces()

    Parameters
    ----------
    specialists
        One or several force fields: bundled names, paths of ``.safetensors`` files, files of other packages as
        ``vendor:path`` (for example ``chgnet:fine-tuned.pth.tar``), or :class:`~ase_gffmerge.ForceField` objects. Several
        are merged, once: the result is kept in the cache. A single one, merged or not, is used as it is.
    calibration
        For each specialist, unlabelled frames of what it was trained on, a list or a file; ``None`` where its own file holds
        some, as those of other packages do not; ``sample:FILE``: it makes them by its dynamics from structures in a file.
    recipe
        How to merge: ``gffmerge``, ``paper``, ``mean``, a YAML file, a mapping, or a :class:`~ase_gffmerge.Recipe`.
    conditioning
        ``shared``: one energy surface; ``per-specialist``: each atom says whose embeddings it uses. Default: recipe or file.
    device
        ``cpu``, ``cuda``, ``cuda:N``, or ``auto``: a GPU if there is one.
    dtype
        ``float32`` or ``float64`` (phonons, tight relaxations), of the network; geometry and results are float64 always.
    skin
        How far beyond the cutoff neighbors are searched, in Å; it changes the speed, never a result.
    cache_dir
        Folder of merged force fields; default: ``GFFMERGE_CACHE``, else the user's cache folder.
    weights, allow_unrelated
        Relative weight of each specialist in the merge; merge also those without a common base.
    keep_base
        Do not forget what the specialists' common base knew: ``True`` where it is found by its fingerprint (bundled or in an
        installed package), else the base itself, a source like theirs; a number says with how many structures (200).
    core_repulsion
        ``auto``: atoms closer than in all calibration frames repel each other; ``none``: not. Default: of recipe or file.
    specialist
        With per-specialist conditioning, name or index for structures without ``specialist`` in arrays or info.
    compile
        Fuse the network (``torch.compile``); ``auto``: on a GPU after 200 evaluations, never on a CPU. Unless ``False``, a
        GPU also replays small structures as CUDA graphs.
    dispersion
        Grimme's D3 correction for force fields whose labels lack it, as ``d3bj:pbe`` (needs dftd3); no energies per atom.
    forces_std
        Whether ``extras`` hold standard deviations of the forces, too, at the cost of 6 to 10 evaluations.
    max_memory, progress
        Most memory of a merge, such as ``"4GB"``; called during one with a fraction (0 to 1) and a description.

    Attributes
    ----------
    force_field : ForceField
        The force field in use (without calibration frames).
    cache_hit : bool or None
        Whether the merge was found in the cache; ``None`` when there was nothing to merge.
    extras : dict
        About the last calculation: ``n_edges``, ``seconds``; where calibration frames were known ``extrapolation``, a grade
        per atom (at most 1 within them, infinite for elements they lack), ``energy_std`` (eV), on request ``forces_std``.

    Raises
    ------
    GFFMergeError
        For unusable input; every such error is also ASE's ``CalculatorSetupError``.
    """

    implemented_properties: ClassVar[list[str]] = list(PROPERTIES)  # type: ignore[misc]
    ignored_changes: ClassVar[set[str]] = {"initial_charges", "initial_magmoms"}  # type: ignore[misc]
    discard_results_on_any_change = True
    nolabel = True

    def __init__(
        self,
        specialists: Source | Iterable[Source],
        *,
        calibration: "str | Sequence[Calibration] | None" = None,
        recipe: "str | Path | Mapping[str, Any] | Recipe" = "gffmerge",
        conditioning: Literal["shared", "per-specialist"] | None = None,
        device: str | torch.device = "auto",
        dtype: Literal["float32", "float64"] | torch.dtype = "float32",
        skin: float = 1.0,
        cache_dir: str | Path | None = None,
        weights: Sequence[float] | None = None,
        allow_unrelated: bool = False,
        keep_base: bool | int | Source | None = None,
        core_repulsion: Literal["auto", "none"] | None = None,
        specialist: str | int | None = None,
        compile: Compile = "auto",
        dispersion: str | None = None,
        forces_std: bool = False,
        max_memory: str | float | None = None,
        progress: Progress | None = None,
    ):
        super().__init__()
        vars(self).pop("get_spin_polarized", None)  # a reference cycle that would keep the weights alive
        self.extras: dict[str, Any] = {}
        self._lock = ForkSafeLock()
        precision, skin, compile = dtype_name(dtype), skin_width(skin), compile_choice(compile)
        options = MergeOptions(
            recipe=recipe,
            conditioning=conditioning,
            weights=weight_tuple(weights),
            allow_unrelated=allow_unrelated,
            keep_base=keep_base,
            core_repulsion=core_repulsion,
            cache_dir=cache_dir,
            max_memory=max_memory,
        )
        with isolated_torch():
            target = resolve_device(device)
            resolved = resolve(
                specialists, options, device=target, calibration=calibration, progress=progress
            )
            self.force_field = served_force_field(resolved, target, DTYPES[precision], forces_std)
            self._dispersion = dispersion_choice(dispersion, self.force_field)
            self._predictor = Predictor(self.force_field, compile=compile)
            self._specialists = resolved.specialists
        self.cache_hit = resolved.cache_hit
        self._notice = ExtrapolationNotice(self.force_field.name)
        self._list_properties()
        self._neighbors = VerletCache(cutoff=self.force_field.cutoff, skin=skin, device=target)
        self.parameters.update(
            resolved.arguments,
            conditioning=conditioning,
            device=str(device),
            dtype=precision,
            skin=skin,
            cache_dir=str(Path(cache_dir).absolute()) if cache_dir is not None else None,
            allow_unrelated=allow_unrelated,
            core_repulsion=core_repulsion,
            specialist=specialist_choice(specialist, self.force_field),
            compile=compile,
            dispersion=dispersion,
            forces_std=bool(forces_std),
        )

    def _list_properties(self) -> None:
        """Say what is served, in a list of its own; D3 has no energies per atom."""
        names = [name for name in PROPERTIES if self._dispersion is None or name != "energies"]
        self.implemented_properties = names  # type: ignore[misc]

    @property
    def specialist_names(self) -> tuple[str, ...]:
        """Names of the specialists, in the order of their indices."""
        return self.force_field.specialist_names

    @property
    def report(self) -> "MergeReport | None":
        """Report of the merge; ``None`` for a single specialist."""
        if self.force_field.merged is None:
            return None
        from ase_gffmerge.merging.report import MergeReport

        return MergeReport.from_dict(self.force_field.merged.report)

    def _get_name(self) -> str:
        return "gffmerge"

    def __repr__(self) -> str:
        names, field = " + ".join(self.specialist_names), self.force_field
        where = f"{self.parameters['dtype']} on {field.potential.device}"
        return f"GFFMergeCalculator({names}; elements {symbols(field.species)}; {where})"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{self.report._repr_html_() if self.report else ''}"

    def set(self, **kwargs: Any) -> dict[str, Any]:
        """Change ``specialist``; everything else needs a new calculator."""
        fixed = sorted(set(kwargs) - {KEY})
        if fixed:
            raise ArgumentError(
                f"{', '.join(fixed)} cannot be changed by set(); make a new GFFMergeCalculator"
            )
        if KEY in kwargs:
            kwargs[KEY] = specialist_choice(kwargs[KEY], self.force_field)
        return super().set(**kwargs)

    def reset(self) -> None:
        """Forget the last calculation; waits for one that another thread has under way."""
        with self._lock:
            super().reset()

    def set_atoms(self, atoms: Atoms) -> None:
        """Check the elements when ASE attaches the calculator (``atoms.calc = calc``)."""
        self.force_field.check_species(atoms)

    def check_state(self, atoms: Atoms, tol: float = 0.0) -> list[str]:
        """List what changed since the last calculation, including the choice of specialists if it matters."""
        if self.atoms is None or tol > 0:
            changes = super().check_state(atoms, tol=tol)
        else:
            changes = [
                name for name in STATE if not np.array_equal(getattr(self.atoms, name), getattr(atoms, name))
            ]
        conditioned = self.force_field.potential.hyper.n_embeddings > 1
        if conditioned and self.atoms is not None and not same_choice(self.atoms, atoms):
            changes.append(KEY)
        return changes

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:
        """Return a property, to any thread; what is not served, or has no volume, is a PropertyNotImplementedError."""
        if name == "stress" and (structure := self.atoms if atoms is None else atoms) is not None:
            require_volume(structure)
        with self._lock:
            return super().get_property(name, atoms, allow_calculation)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] | None = None,
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Compute everything the calculator serves, whatever ``properties`` asks for.

        Raises
        ------
        ase.calculators.calculator.CalculatorSetupError
            For an empty structure, an unknown element or specialist, a missing cell vector.
        ase.calculators.calculator.CalculationFailed
            When positions, cell, energies or forces are not finite, or the device's memory does not suffice.
        """
        started = time.perf_counter()
        self.results, self.extras = {}, {}
        super().calculate(atoms, properties, system_changes)
        structure = require_structure(self.atoms)
        if KEY in structure.info:  # ASE copies the dictionary, not what is in it
            structure.info[KEY] = copy.deepcopy(structure.info[KEY])
        with torch.inference_mode(False), computing(structure, self.force_field.potential.device):
            graph = self._graph(structure)
            prediction, grades = self._predictor(graph, forces_std=self.parameters["forces_std"])
        results = ase_results(prediction, structure)
        require_finite(results, structure)
        self.results = results if self._dispersion is None else self._dispersion.added(results, structure)
        self.extras |= trust(prediction, grades) | {"n_edges": graph.n_edges}
        if grades is not None:
            self._notice(structure, self.extras["extrapolation"])
        self.extras["seconds"] = time.perf_counter() - started

    def _graph(self, atoms: Atoms) -> AtomGraph:
        """Graph in float64 on the device, with specialist indices if the potential reads them."""
        prepared = self.force_field.prepared(atoms, specialist=self.parameters.get(KEY))
        return self._neighbors.graph(prepared)

    def evaluate(
        self,
        structures: Iterable[Atoms],
        properties: Sequence[str] | None = None,
        *,
        max_edges: int | None = None,
    ) -> list[Results]:
        """Evaluate many structures in batches; faster than one after the other, and from any thread.

        Parameters
        ----------
        structures
            Of any sizes and boundary conditions; neither they nor what this calculator remembers is changed.
        properties
            Default: everything, the stress where there is a volume. On request also what :attr:`extras` hold:
            ``extrapolation``, ``energy_std``, ``forces_std``.
        max_edges
            Edges (pairs of neighbors) of a batch, 13 to 42 kB each; default: 2,000 on a CPU, 200,000 on a GPU.

        Returns
        -------
        list of dict
            One for each structure in their order, with keys, units and shapes of ``results``.

        Raises
        ------
        PropertyNotImplementedError
            For what is not served, and for a stress asked of a structure without volume.
        ase.calculators.calculator.CalculatorSetupError, ase.calculators.calculator.CalculationFailed
            As for a single structure, with its index; setup is checked before anything is evaluated.
        """
        return evaluate_structures(
            self.force_field,
            structures,
            predictor=self._predictor,
            served=self.implemented_properties,
            dispersion=self._dispersion,
            properties=properties,
            specialist=self.parameters.get(KEY),
            max_edges=max_edges,
        )

    def get_hessian(
        self, atoms: Atoms, *, indices: Sequence[int] | None = None, progress: Progress = no_progress
    ) -> np.ndarray:
        """Hessian (3 n_atoms, 3 n_atoms) in eV/Å^2 from second derivatives; memory does not grow with its size.

        Parameters
        ----------
        atoms
            The structure; constraints are not heard. ``dtype="float64"`` gives all digits.
        indices
            Atoms whose rows (3 n_indices, 3 n_atoms) are wanted; each row costs the same.
        progress
            Called with a fraction (0 to 1) and a description.
        """
        structure, indices = require_structure(atoms), atom_indices(indices, len(atoms))
        prepared = self.force_field.prepared(structure, specialist=self.parameters.get(KEY))
        with isolated_torch(), computing(structure, self.force_field.potential.device):
            graph = self._neighbors.fresh().graph(prepared)
            matrix = hessian(self.force_field.potential, graph, indices=indices, progress=progress)
        return matrix if self._dispersion is None else matrix + self._dispersion.hessian(structure, indices)

    def disagreement(self, atoms: Atoms) -> np.ndarray:
        """Standard deviation of the specialists' forces per atom, (n_atoms,) in eV/Å; costs one evaluation of each.

        Raises
        ------
        ase.calculators.calculator.CalculatorSetupError
            When the calculator was not made from several specialists, or fewer than two know all elements.
        """
        if self._specialists is None:
            raise ArgumentError(f"{self.force_field.name!r} was given alone; make it from the specialists")
        with torch.inference_mode(False), self._lock:
            return force_disagreement(self._specialists.load(), require_structure(atoms))

    def spawn(self) -> Self:
        """Return a calculator with the same weights and results of its own: one per NEB image, phonon run or thread."""
        twin = copy.copy(self)
        twin.reset()
        twin.extras = {}
        twin._neighbors = self._neighbors.fresh()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in vars(self).items() if key != "_lock"}
        return state | {"_neighbors": self._neighbors.fresh()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._list_properties()
        self.parameters = copy.deepcopy(self.parameters)
        self._lock = ForkSafeLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the state, share the weights."""
        twin = memo[id(self)] = self.spawn()
        for name in ("atoms", "results", "extras"):
            setattr(twin, name, copy.deepcopy(getattr(self, name), memo))
        return twin
