"""A force field with everything that a merge needs, and those that come with the package.

The specialists that come with the package, and labelled frames that they were not trained on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Self, cast

import torch
from ase import Atoms
from ase.data import chemical_symbols

from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.errors import FileFormatError, FramesError, MissingUncertaintyError, StructureError
from ase_gffmerge.forcefield.conditioning import KEY, with_indices, without_choice
from ase_gffmerge.forcefield.leverage import ExtrapolationGrade, fit_extrapolation_grade
from ase_gffmerge.forcefield.provenance import MergeRecord, Provenance
from ase_gffmerge.forcefield.serialization import (
    Contents,
    pack,
    read_contents,
    require_finite,
    require_same_again,
    require_sound,
)
from ase_gffmerge.forcefield.uncertainty import calibrated_deviations, labelled
from ase_gffmerge.models import Potential
from ase_gffmerge.models.core_repulsion import fit_core_repulsion
from ase_gffmerge.storage.tensor_file import content_digest, write_file

BUNDLED = ("rmd17-base", "rmd17-ethanol", "rmd17-malonaldehyde", "emt-copper", "emt-silver")
SUFFIX = ".safetensors"
"""Of every file of a force field."""

_FOLDER = Path(str(files("ase_gffmerge") / "bundled"))


def bundled_path(source: str | Path) -> Path:
    """Path of a bundled specialist, or the path itself."""
    if str(source) in BUNDLED and not Path(source).exists():
        return _FOLDER / f"{source}{SUFFIX}"
    return Path(source)


def bundled_test_frames(name: str) -> list[Atoms]:
    """Frames that the bundled specialist ``name`` was not trained on.

    Parameters
    ----------
    name
        One of :data:`BUNDLED`.

    Returns
    -------
    list of ase.Atoms
        With energy (eV), forces (eV/Å) and, of crystals, stress (eV/Å^3).

    Raises
    ------
    FramesError
        When there is no bundled specialist of that name.
    """
    if name not in BUNDLED:
        raise FramesError(f"no test frames are bundled for {name!r}; choose one of {', '.join(BUNDLED)}")
    return read_frames(_FOLDER / f"{name}-test.extxyz")


@dataclass(frozen=True, kw_only=True)
class ForceField:
    """A potential, its calibration frames and its history: a specialist, or what specialists were merged into.

    Attributes
    ----------
    name
        Short name; the key for per-specialist conditioning and in reports.
    potential
        Weights and architecture, in evaluation mode.
    calibration
        Unlabelled frames typical of what the force field knows; what they say about specialists is taken off them.
    level_of_theory
        For example ``PBE/def2-SVP``.
    provenance
        Training history.
    merged
        How it was merged; ``None`` for a specialist.
    extrapolation_grade
        Measures how far atoms are from the calibration frames; with ``deviations``, also standard deviations of energies
        and forces. It belongs to these weights.
    """

    name: str
    potential: Potential
    calibration: tuple[Atoms, ...] = ()
    level_of_theory: str = "unknown"
    provenance: Provenance = field(default_factory=Provenance)
    merged: MergeRecord | None = None
    extrapolation_grade: ExtrapolationGrade | None = None

    def __post_init__(self) -> None:
        """Take what calibration frames say about specialists off them: they are this one's."""
        object.__setattr__(self, "calibration", tuple(map(without_choice, self.calibration)))

    def __repr__(self) -> str:
        """One line; the weights and frames would take a hundred thousand characters."""
        hyper, elements = self.potential.hyper, " ".join(chemical_symbols[number] for number in self.species)
        model = f"{self.potential.architecture}, {hyper.channels} channels, {elements}"
        return f"<ForceField {self.name}: {model}, {len(self.calibration)} calibration frames>"

    @property
    def cutoff(self) -> float:
        """Neighbor radius in Å."""
        return self.potential.hyper.cutoff

    @property
    def species(self) -> tuple[int, ...]:
        """Atomic numbers the potential knows."""
        return self.potential.species

    @property
    def fingerprint(self) -> str:
        """SHA-256 of architecture, elements and weights, whatever device they are on."""
        potential = self.potential
        model = {
            "architecture": potential.architecture,
            "hyper": potential.hyper.to_dict(),
            "species": list(potential.species),
        }
        return content_digest(model, potential.state_dict())

    @property
    def content_digest(self) -> str:
        """SHA-256 of everything that :meth:`save` writes; the file's header holds the same."""
        return content_digest(*pack(self._contents()))

    @property
    def specialist_names(self) -> tuple[str, ...]:
        """Names of the specialists it was merged from, in the order of their indices; its own if it was not merged."""
        return self.merged.specialists if self.merged else (self.name,)

    def require_uncertainty(self) -> ExtrapolationGrade:
        """Give the extrapolation grade, or raise :class:`MissingUncertaintyError` unless it is calibrated."""
        grade = self.extrapolation_grade
        if grade is None or grade.deviations is None:
            raise MissingUncertaintyError(
                f"{self.name!r} has no calibrated uncertainty: it is a single specialist, or a merge by an older version or "
                "of too few frames; merge again, or give the calculator ForceField.load(...).with_uncertainty(labelled)"
            )
        return grade

    def check_species(self, atoms: Atoms) -> None:
        """Raise :class:`StructureError` when ``atoms`` holds elements that the potential does not know."""
        unknown = sorted(set(atoms.numbers.tolist()) - set(self.species))
        if unknown and not 0 <= unknown[0] <= unknown[-1] < len(chemical_symbols):
            raise StructureError(f"some of the atomic numbers {unknown} do not exist; look at atoms.numbers")
        if unknown:
            raise StructureError(
                f"{atoms.get_chemical_formula()} contains {symbols(unknown)}, which {self.name!r} does not "
                f"know (it knows {symbols(self.species)}); use a model that was trained on these elements"
            )

    def prepared(self, atoms: Atoms, *, specialist: str | int | None = None) -> Atoms:
        """What a graph is built from: known elements, with specialist indices if, and only if, the potential reads them.

        Parameters
        ----------
        atoms
            Not changed, but perhaps returned.
        specialist
            For structures that do not say which specialist they belong to.

        Raises
        ------
        StructureError
            For elements or specialists that the potential does not know.
        """
        self.check_species(atoms)
        n_embeddings = self.potential.hyper.n_embeddings
        if n_embeddings == 1 and KEY not in atoms.arrays:
            return atoms
        return with_indices(atoms, n_embeddings, names=self.specialist_names, default=specialist)

    def save(self, path: str | Path) -> Path:
        """Write one ``.safetensors`` file atomically; weights keep their floating-point type.

        Raises
        ------
        FileFormatError, FramesError
            When the name does not end in ``.safetensors``, a weight or a calibration frame is not finite, which no file may
            hold, or the file cannot be written or not be read back; one that was there stays as it was.
        """
        if Path(path).suffix != SUFFIX and not os.path.isdir(path):
            raise FileFormatError(
                f"{path} is no name for a file of this package: end it in {SUFFIX}; what another package reads is written "
                "by export of ase_gffmerge.integrations.load, and by gffmerge convert"
            )
        require_finite(self.potential, f"{self.name!r} is not written to {path}")
        require_sound(self.calibration, self.name)
        write_file(Path(path), *pack(self._contents()), read_back=require_same_again)
        return Path(path)

    def _contents(self) -> Contents:
        return cast("Contents", vars(self))

    @classmethod
    def load(
        cls, source: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> Self:
        """Load a file that :meth:`save` wrote, or a bundled specialist by name.

        For force fields of other packages there is :func:`~ase_gffmerge.integrations.load.load_force_field`.

        Parameters
        ----------
        source
            Path of a ``.safetensors`` file, or one of the bundled names.
        dtype
            Floating-point type of the weights; default: as stored.
        device
            Where to put them.

        Raises
        ------
        FileFormatError
            When the file is missing, truncated, altered, of an unknown version, or not what it says.
        """
        return cls(**read_contents(bundled_path(source))).to(device=device, dtype=dtype)

    def to(self, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Self:
        """Cast and move the weights in place; returns self."""
        grade = self.extrapolation_grade
        held = [self.potential.embedding, *([grade.whitening] if grade else [])]
        if all(value.dtype == (dtype or value.dtype) for value in held) and (
            device is None or all(value.device == torch.device(device) for value in held)
        ):
            return self  # moving modules to where they are takes as long as reading them
        self.potential.to(device=device, dtype=dtype)
        if grade is not None:
            grade.to(device=device, dtype=dtype)
        return self

    def with_calibration(self, frames: Sequence[Atoms]) -> Self:
        """Return a copy with other calibration frames (weights are shared)."""
        return replace(self, calibration=tuple(frames))

    def with_extrapolation_grade(self) -> Self:
        """Return a copy with an extrapolation grade fitted to its own calibration frames (weights are shared).

        Use it for a specialist, and again after anything that changes a potential's weights: the old grade no longer fits.
        """
        return replace(self, extrapolation_grade=fit_extrapolation_grade(self.potential, [self.calibration]))

    def with_uncertainty(self, frames: Sequence[Atoms]) -> Self:
        """Return a copy with standard deviations of energies and forces that labels calibrate (weights are shared).

        Parameters
        ----------
        frames
            Labelled frames that nothing was fitted to; twenty are enough. Those of several specialists count by their
            number.

        Raises
        ------
        FramesError
            Without calibration frames of its own, which say what is well known, or where the labels determine nothing.
        """
        own = self if self.extrapolation_grade is not None else self.with_extrapolation_grade()
        if own.extrapolation_grade is None:
            raise FramesError(
                f"{self.name!r} carries no calibration frames, which say what it knows well; add some with "
                "ForceField.with_calibration(frames)"
            )
        grade = deepcopy(own.extrapolation_grade)
        grade.deviations = None
        prepared = [self.prepared(atoms) for atoms in frames]
        for one, atoms in zip(prepared, frames, strict=True):
            one.calc = atoms.calc
        grade.deviations = calibrated_deviations(grade, self.potential, [prepared], [labelled])
        if grade.deviations is None:
            raise FramesError(
                f"the {len(frames)} frames calibrate no uncertainty of {self.name!r}; give labelled frames of elements "
                "that its calibration frames contain"
            )
        return replace(self, extrapolation_grade=grade)

    def with_core_repulsion(self) -> Self:
        """Return a copy with a core repulsion that begins beyond its own calibration frames (weights are shared).

        Raises
        ------
        FramesError
            When it has no calibration frames.
        """
        if not self.calibration and not self.potential.repulsive:
            raise FramesError(
                f"{self.name!r} carries no calibration frames, which say where a core repulsion may begin; add some with "
                "ForceField.with_calibration(frames)"
            )
        return replace(self, potential=repelling(self.potential, [self]))

    def without_core_repulsion(self) -> Self:
        """Return a copy without core repulsion (weights are shared)."""
        return replace(self, potential=self.potential.with_core_repulsion(None))


MANY_COMPOUNDS = 10
"""Compositions among the frames of a force field that knows more than these."""


def repelling(potential: Potential, specialists: Sequence[ForceField]) -> Potential:
    """Potential that knows what specialists know, with a core repulsion that begins beyond it (weights are shared).

    Parameters
    ----------
    potential
        A specialist's own, or one merged from them in this order.
    specialists
        With their calibration frames and, where they were trained with a core repulsion, the distances stored in it. One of
        another package's origin, or with frames of many compounds, knows more than its frames show.
    """
    compounds = {atoms.get_chemical_formula(empirical=True) for s in specialists for atoms in s.calibration}
    cores = [s.potential.core_repulsion for s in specialists]
    found = fit_core_repulsion(
        potential,
        [s.calibration for s in specialists],
        known=[core.known for core in cores if core is not None],
        broad=any(s.provenance.origin for s in specialists) or len(compounds) >= MANY_COMPOUNDS,
    )
    return potential.with_core_repulsion(found)


def symbols(numbers: Sequence[int]) -> str:
    """Element symbols of atomic numbers, comma-separated."""
    return ", ".join(chemical_symbols[number] for number in numbers)
