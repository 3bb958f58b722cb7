"""A force field with everything a merge needs, in one file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor

from ase_gffmerge.errors import FileFormatError, StructureError, first_line
from ase_gffmerge.forcefield.calibration_tensors import pack_frames, require_sound, unpack_frames
from ase_gffmerge.forcefield.conditioning import with_indices, without_choice
from ase_gffmerge.forcefield.leverage import ExtrapolationGrade
from ase_gffmerge.forcefield.provenance import (
    MergeRecord,
    Provenance,
    pack_seen,
    require_kind,
    unpack_merge_record,
    unpack_provenance,
)
from ase_gffmerge.integrations.registry import vendor_source
from ase_gffmerge.models import Potential, build_potential
from ase_gffmerge.storage.tensor_file import digest, read_file, write_file

UNITS = {"energy": "eV", "length": "Å"}
BUNDLED = ("rmd17-base", "rmd17-ethanol", "rmd17-malonaldehyde")
_BUNDLED_FOLDER = Path(str(files("ase_gffmerge") / "bundled"))


@dataclass(frozen=True, kw_only=True)
class ForceField:
    """A potential, its calibration frames and its history.

    Attributes
    ----------
    name
        Short name; the key for per-specialist conditioning and in reports.
    potential
        Weights and architecture, in evaluation mode.
    calibration
        Unlabelled frames typical of what the specialist knows; what they say about specialists is taken off them.
    level_of_theory
        For example ``PBE/def2-SVP``.
    provenance
        Training history.
    merged
        Present when this force field is itself the result of a merge.
    gauge
        Tells how far atoms are from the calibration frames; it belongs to these weights.
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

    @property
    def cutoff(self) -> float:
        """Neighbour radius in Å."""
        return self.potential.hyper.cutoff

    @property
    def species(self) -> tuple[int, ...]:
        """Atomic numbers the potential knows."""
        return self.potential.species

    @property
    def fingerprint(self) -> str:
        """SHA-256 of architecture and weights, whatever device they are on."""
        return digest(f"{self.potential.architecture}{self.potential.hyper}", self.potential.state_dict())

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

    @property
    def specialist_names(self) -> tuple[str, ...]:
        """Names of the specialists it was merged from, in the order of their indices; its own if it was not merged."""
        return self.merged.parents if self.merged else (self.name,)

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
        return with_indices(
            atoms, self.potential.hyper.n_embeddings, names=self.specialist_names, default=specialist
        )

    def save(self, path: str | Path) -> Path:
        """Write one ``.safetensors`` file atomically; weights keep their floating-point type.

        Raises
        ------
        FileFormatError, FramesError
            When a weight or a calibration frame is not finite, which no file may hold, or the file cannot be written; one
            that was there stays as it was.
        """
        if broken := first_not_finite(self.potential):
            raise FileFormatError(
                f"{self.name!r} is not written to {path}: its parameter {broken!r} contains NaN or infinity; its training "
                "diverged, or something wrote over it"
            )
        require_sound(self.calibration, self.name)
        tensors = {f"potential.{name}": value for name, value in self.potential.state_dict().items()}
        tensors |= pack_frames(self.calibration) | pack_seen(self.provenance)
        if self.extrapolation_grade is not None:
            tensors |= {
                f"gauge.{name}": value for name, value in self.extrapolation_grade.state_dict().items()
            }
        metadata: dict[str, Any] = {
            "name": self.name,
            "architecture": self.potential.architecture,
            "hyper": self.potential.hyper.to_dict(),
            "species": list(self.species),
            "units": UNITS,
            "level_of_theory": self.level_of_theory,
            "provenance": self.provenance.to_dict(),
            "merged": vars(self.merged) if self.merged else None,
        }
        write_file(Path(path), metadata, tensors)
        return Path(path)

    @classmethod
    def load(
        cls, source: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> Self:
        """Load a specialist or merged file, or a bundled specialist by name.

        Parameters
        ----------
        source
            Path of a ``.safetensors`` file, one of the bundled names, or ``vendor:what`` (see :meth:`from_vendor`).
        dtype
            Floating-point type of the weights; default: as stored.
        device
            Where to put them.

        Raises
        ------
        FileFormatError
            When the file is missing, truncated, altered, of an unknown version, or not what it says.
        """
        if converted := vendor_source(source):
            return cls.from_vendor(*converted).to(device=device, dtype=dtype)
        path = bundled_path(source)
        metadata, tensors = read_file(path)
        if "checkpoint" in metadata:
            raise FileFormatError(
                f"{path} is the checkpoint of an unfinished training, not a model; run the same "
                "`gffmerge train` or `gffmerge distill` command again to finish it"
            )
        try:
            with torch.random.fork_rng(devices=[]):
                potential = _fresh_potential(metadata, tensors)
            merged = metadata["merged"]
            specialist = cls(
                name=require_kind(metadata["name"], str, "name"),
                potential=potential,
                calibration=unpack_frames(tensors),
                level_of_theory=require_kind(metadata["level_of_theory"], str, "level_of_theory"),
                provenance=unpack_provenance(metadata["provenance"], tensors),
                merged=unpack_merge_record(merged) if merged else None,
                extrapolation_grade=_unpack_extrapolation_grade(tensors, potential),
            )
            units = metadata["units"]
        except FileFormatError as error:
            raise FileFormatError(f"{path}: {first_line(error)}") from None
        except _GARBLED as error:
            raise FileFormatError(
                f"{path}: metadata lack or garble {first_line(error)}; write the file again"
            ) from None
        if units != UNITS:
            raise FileFormatError(
                f"{path} is in units {units}, not {UNITS}; convert the model before saving it"
            )
        _load_weights(potential, tensors, path)
        potential.eval().requires_grad_(False)
        if dtype is None and torch.device(device) == potential.device:
            return specialist
        return specialist.to(device=device, dtype=dtype)

    @classmethod
    def from_vendor(
        cls,
        vendor: str,
        source: Any,
        *,
        calibration: Sequence[Atoms] = (),
        name: str | None = None,
        level_of_theory: str | None = None,
        trust: bool = False,
    ) -> Self:
        """Make a specialist of another package's force field.

        Parameters
        ----------
        vendor
            One of :data:`ase_gffmerge.integrations.ADAPTERS`.
        source
            Path of the vendor's file, a name of its pretrained weights, or its model in memory.
        calibration
            Unlabelled frames typical of what it was fine-tuned on; a merge needs some.
        name
            Default: stem of the file.
        level_of_theory
            Of its labels; default: what the adapter knows.
        trust
            Load files that execute code.

        Raises
        ------
        FileFormatError
            When there is no such file, it holds code and is not trusted, or a model that the adapter cannot read.
        """
        from ase_gffmerge.integrations import ADAPTERS

        converted = ADAPTERS[vendor].read(source, trust=trust)
        if broken := first_not_finite(converted.potential):
            raise FileFormatError(
                f"{vendor}:{source}: its parameter {broken!r} contains NaN or infinity; the training diverged"
            )
        stem = (
            Path(source).name.split(".")[0]
            if isinstance(source, str | Path) and Path(source).exists()
            else ""
        )
        return cls(
            name=name
            or converted.name
            or stem
            or f"{vendor}-{source if isinstance(source, str) else 'model'}",
            potential=converted.potential,
            calibration=tuple(calibration),
            level_of_theory=level_of_theory or converted.level_of_theory,
            provenance=Provenance(origin=f"{converted.vendor} {converted.version}".strip()),
        )

    @classmethod
    def from_chgnet(cls, source: Any, **options: Any) -> Self:
        """Make a specialist of a ``CHGNet``, its checkpoint or ``"0.3.0"``; options as in :meth:`from_vendor`."""
        return cls.from_vendor("chgnet", source, **options)

    def export(self, path: str | Path) -> Path:
        """Write another package's format, for force fields that came from it.

        Raises
        ------
        FileFormatError
            When the architecture is no other package's, or holds what its format cannot.
        """
        from ase_gffmerge.integrations import adapter_for

        return adapter_for(self.potential.architecture).write(self.potential, Path(path))

    def to(self, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Self:
        """Cast and move the weights in place; returns self."""
        self.potential.to(device=device, dtype=dtype)
        if self.extrapolation_grade is not None:
            self.extrapolation_grade.to(device=device, dtype=dtype)
        return self

    def with_calibration(self, frames: Sequence[Atoms]) -> Self:
        """Return a copy with other calibration frames (weights are shared)."""
        return replace(self, calibration=tuple(frames))


_GARBLED = (
    KeyError,
    TypeError,
    ValueError,
    IndexError,
    AttributeError,
    RuntimeError,
    OverflowError,
    MemoryError,
)


def symbols(numbers: Sequence[int]) -> str:
    """Element symbols of atomic numbers, comma-separated."""
    return ", ".join(chemical_symbols[number] for number in numbers)


def bundled_path(source: str | Path) -> Path:
    """Path of a bundled specialist, or the path itself."""
    if str(source) in BUNDLED and not Path(source).exists():
        return _BUNDLED_FOLDER / f"{source}.safetensors"
    return Path(source)


def first_not_finite(potential: Potential) -> str | None:
    """Name of the first parameter or buffer that contains NaN or infinity."""
    state = potential.state_dict().items()
    return next((name for name, value in state if not _is_finite(value)), None)


def _is_finite(value: Tensor) -> bool:
    """Whether there is neither NaN nor infinity: with one of them no sum is finite, and sums are fast."""
    return math.isfinite(value.sum()) or bool(value.isfinite().all())


def _fresh_potential(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Potential:
    """Potential with random weights, no larger than those in the file: the header may claim any size."""
    hyper, species = metadata["hyper"], metadata["species"]
    n_weights = sum(value.numel() for name, value in tensors.items() if name.startswith("potential."))
    too_large = sorted(
        name for name, value in hyper.items() if isinstance(value, int) and value > max(n_weights, 1)
    )
    if too_large or ("n_blocks" in hyper and hyper["n_blocks"] > len(tensors)):
        raise FileFormatError(
            f"the hyper-parameters do not belong to these weights: {', '.join(too_large) or 'n_blocks'} is larger than "
            "a file of this size can be; write the file again"
        )
    return build_potential(metadata["architecture"], hyper, tuple(species))


def _unpack_extrapolation_grade(
    tensors: Mapping[str, Tensor], potential: Potential
) -> ExtrapolationGrade | None:
    """The gauge of a file; files of older merges, and of most specialists, have none."""
    if "gauge.species" not in tensors:
        return None
    species, whitening = tensors["gauge.species"], tensors["gauge.whitening"]
    size = whitening.shape[-1]
    known = species.dtype == torch.int64 and set(species.tolist()) <= set(potential.species)
    if not known or len(species.unique()) != len(species) or not whitening.dtype.is_floating_point:
        raise ValueError("the extrapolation gauge (its elements are not those of the potential)")
    fits = whitening.shape == (len(species), size, size)
    if not (
        fits and 0 < size <= potential.hyper.channels * potential.hyper.n_blocks and _is_finite(whitening)
    ):
        raise ValueError("the extrapolation gauge (its matrices do not fit its elements or are not finite)")
    aligned = whitening.clone()  # as torch allocates: sums in BLAS may depend on it
    return ExtrapolationGrade(species, aligned).eval().to(device=potential.device)


def _load_weights(potential: Potential, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy weights after checking names, types, shapes and values."""
    stored = {
        name.removeprefix("potential."): value
        for name, value in tensors.items()
        if name.startswith("potential.")
    }
    dtype = stored["embedding"].dtype if "embedding" in stored else potential.dtype
    if dtype in _WEIGHT_TYPES and dtype != potential.dtype:
        potential.to(dtype=dtype)
    expected = potential.state_dict()
    for name, value in expected.items():
        if name not in stored:
            raise FileFormatError(f"{path} lacks the tensor {name!r}; write the file again")
        _check_weight(name, stored[name], value, path)
    if extra := sorted(stored.keys() - expected.keys()):
        raise FileFormatError(f"{path} has unexpected tensors {extra[:3]}; write the file again")
    potential.load_state_dict(stored)


_WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_weight(name: str, stored: Tensor, expected: Tensor, path: Path) -> None:
    if stored.shape != expected.shape:
        raise FileFormatError(
            f"{path}: tensor {name!r} has shape {tuple(stored.shape)}, the architecture needs {tuple(expected.shape)}; "
            "the hyper-parameters in the file do not belong to these weights"
        )
    if not stored.dtype.is_floating_point:
        raise FileFormatError(
            f"{path}: tensor {name!r} holds {stored.dtype}, not real numbers; write it again"
        )
    if stored.dtype != expected.dtype:
        raise FileFormatError(
            f"{path}: tensor {name!r} holds {stored.dtype}, beside others {expected.dtype} is needed; write it again"
        )
    if not _is_finite(stored):
        raise FileFormatError(f"{path}: tensor {name!r} contains NaN or infinity; the training diverged")
