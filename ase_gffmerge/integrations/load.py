"""From names, paths and other packages' models to force fields, and back to other packages' files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import torch
from ase import Atoms

from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.errors import ArgumentError, ExportWarning, FileFormatError
from ase_gffmerge.forcefield.force_field import BUNDLED, SUFFIX, ForceField, bundled_path
from ase_gffmerge.forcefield.provenance import Provenance
from ase_gffmerge.forcefield.serialization import require_finite
from ase_gffmerge.integrations.base import (
    ADAPTERS,
    Adapter,
    adapter_for,
    adapters_by_architecture,
    vendor_source,
)

Source = str | Path | ForceField
"""A bundled name, the path of a ``.safetensors`` file, ``vendor:what``, or a force field in memory."""

Frames = str | Path | Sequence[Atoms]
"""Structures, or a file of them."""


def load_force_field(
    source: str | Path,
    *,
    calibration: Frames = (),
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust: bool = False,
    name: str | None = None,
    level_of_theory: str | None = None,
) -> ForceField:
    """Load a force field: bundled, from a file of this package, or from another package.

    Parameters
    ----------
    source
        A bundled name, the path of a ``.safetensors`` file, or ``vendor:what``: the path of the vendor's file or a name
        of its pretrained weights (``chgnet:0.3.0``). Where a file holds several force fields, ``#head=NAME`` or
        ``#modality=NAME`` behind it says which one.
    calibration
        Unlabelled frames typical of what the force field knows, or a file of them; a merge needs some. Default: those in
        the file.
    dtype
        Floating-point type of the weights; default: as stored.
    device
        Where to put them.
    trust
        Load files of other packages that execute code.
    name, level_of_theory
        Default: what the file says.

    Raises
    ------
    FileFormatError
        For names that do not exist, with the nearest one that does, and for files that cannot be used.
    """
    if parts := vendor_source(source):
        found = from_vendor(*parts, trust=trust).to(device=device, dtype=dtype)
    else:
        found = _own(local_file(source), device=device, dtype=dtype)
    changes = {"name": name, "level_of_theory": level_of_theory, "calibration": structures(calibration)}
    return replace(found, **{key: value for key, value in changes.items() if value})  # type: ignore[arg-type]


def from_vendor(
    vendor: str,
    source: object,
    *,
    calibration: Frames = (),
    name: str | None = None,
    level_of_theory: str | None = None,
    trust: bool = False,
) -> ForceField:
    """Make a specialist of another package's force field.

    Parameters
    ----------
    vendor
        One of :data:`~ase_gffmerge.integrations.base.ADAPTERS`.
    source
        Path of the vendor's file, a name of its pretrained weights (both perhaps with ``#head=NAME``, as for
        :func:`load_force_field`), or its model in memory.
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
    adapter = ADAPTERS[vendor]
    path, kind, chosen = split_choice(source) if isinstance(source, str | Path) else (source, "", "")
    if kind and adapter.choice and kind != adapter.choice:
        raise FileFormatError(f"{adapter.models} files have no {kind}; write #{adapter.choice}={chosen}")
    converted = adapter.read_chosen(path, chosen, trust=trust) if kind else adapter.read(path, trust=trust)
    require_finite(converted.potential, f"{vendor}:{source}")
    in_file = isinstance(path, str | Path) and Path(path).exists()
    stem = "-".join(filter(None, (Path(str(path)).name.split(".")[0], chosen))) if in_file else ""
    label = "-".join(filter(None, (str(path), chosen))) if isinstance(source, str) else "model"
    return ForceField(
        name=name or converted.name or stem or f"{vendor}-{label}",
        potential=converted.potential,
        calibration=structures(calibration),
        level_of_theory=level_of_theory or converted.level_of_theory,
        provenance=Provenance(origin=f"{converted.vendor} {converted.version}".strip()),
    )


def split_choice(source: str | Path) -> tuple[str, str, str]:
    """Split ``FILE#head=NAME`` into file, kind and name of the choice, which are empty where nothing is chosen."""
    text = str(source)
    path, _, choice = text.rpartition("#")
    kind, equals, name = choice.partition("=")
    return (path, kind, name) if path and equals and not Path(text).exists() else (text, "", "")


def shipped(architecture: str) -> Iterator[ForceField]:
    """Force fields of an architecture whose weights come with an installed package."""
    if adapter := adapters_by_architecture().get(architecture):
        for name in adapter.shipped:
            with suppress(FileFormatError):  # not installed, or of a version without these weights
                yield from_vendor(adapter.vendor, name)


def export(force_field: ForceField, path: str | Path) -> Path:
    """Write another package's format, for force fields that came from it; a core repulsion is left out, with a warning.

    Raises
    ------
    FileFormatError
        When the architecture is no other package's, or holds what its format cannot.
    """
    bare = force_field.potential.with_core_repulsion(None)
    written = adapter_for(bare.architecture).write(bare, Path(path))
    if force_field.potential.core_repulsion is not None:
        warnings.warn(
            f"{path} is without the core repulsion, which only .safetensors holds: atoms that come too close may collapse",
            ExportWarning,
            stacklevel=2,
        )
    return written


def write_force_field(force_field: ForceField, path: str | Path) -> Path:
    """Write the format that a name's ending says; what another package's cannot hold after all is kept in ours, beside it.

    Raises
    ------
    FileFormatError
        See :meth:`.ForceField.save` and :func:`export`.
    """
    path = Path(path)
    if (adapter := format_of(path, force_field.potential.architecture)) is None:
        return force_field.save(path)
    try:
        return export(force_field, path)
    except FileFormatError as error:
        kept = force_field.save(path.with_name(f"{path.name}{SUFFIX}"))
        raise FileFormatError(f"{error}; what {adapter.models}'s format cannot hold is in {kept}") from None


def format_of(path: Path, architecture: str) -> Adapter | None:
    """What writes a file of this name: nothing but ourselves, ``None``, if it ends in ``.safetensors``, else an adapter.

    Raises
    ------
    FileFormatError
        When no package but this one has potentials of that architecture, or a folder is where a file is to be.
    """
    adapter = None if path.suffix == SUFFIX else adapter_for(architecture)
    if path.is_dir() and not (adapter and adapter.files):
        raise FileFormatError(f"cannot write {path}: it is a folder; give the name of a file")
    return adapter


def holds_model(folder: Path) -> bool:
    """Whether a folder holds the files of one force field of another package, and nothing else."""
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    return bool(names) and any(names == set(adapter.files) for adapter in adapters_by_architecture().values())


def _own(path: Path, *, device: str | torch.device, dtype: torch.dtype | None) -> ForceField:
    """Load one of our own files; others are told how another package's file is named."""
    try:
        return ForceField.load(path, device=device, dtype=dtype)
    except FileFormatError as error:
        if path.suffix == SUFFIX or not path.is_file():
            raise
        first, *rest = ADAPTERS
        raise FileFormatError(
            f"{path} is not a readable safetensors file; if another package wrote it, write {first}:{path} (or "
            f"{', '.join(f'{vendor}:' for vendor in rest)} before the name)"
        ) from error


def local_file(source: str | Path) -> Path:
    """Path of one of our own files that exists.

    Raises
    ------
    FileFormatError
        For names that are neither bundled nor that of a file, with the nearest one that is.
    """
    path = bundled_path(source)
    if not os.path.exists(path):
        prefix, colon, rest = str(source).partition(":")
        if colon and prefix.isidentifier() and len(prefix) > 1:
            close = get_close_matches(prefix, ADAPTERS, n=1)
            hint = f"did you mean {close[0]}:{rest}?" if close else f"these are: {', '.join(ADAPTERS)}"
            raise FileFormatError(
                f"{source}: no package {prefix!r} is known whose force fields are read; {hint}"
            )
        close = get_close_matches(str(source), BUNDLED, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the bundled names are {', '.join(BUNDLED)}"
        raise FileFormatError(
            f"there is no specialist {str(source)!r}, neither bundled nor as a file; {hint}"
        )
    return path


def as_list(sources: Source | Iterable[Source]) -> list[Source]:
    """One source or several as a list.

    Raises
    ------
    ArgumentError
        For an empty list, or something that is no source.
    """
    single = isinstance(sources, str | Path | ForceField | Mapping) or not isinstance(sources, Iterable)
    items: list[object] = [sources] if single else list(sources)  # type: ignore[arg-type]
    if not items:
        raise ArgumentError(
            f"no specialists were given; name at least one of {', '.join(BUNDLED)}, or give the path of a "
            ".safetensors file"
        )
    return [_checked(item) for item in items]


def _checked(item: object) -> Source:
    if isinstance(item, str | Path | ForceField):
        return item
    if isinstance(item, Mapping) and "fingerprint" in item:
        raise ArgumentError(
            f"specialist {item.get('name')!r} was given to the calculator as an object in memory, which "
            "its parameters cannot bring back; save it with ForceField.save and give the path"
        )
    raise ArgumentError(
        f"{item!r} ({type(item).__name__}) is no specialist; give a bundled name, a path or a ForceField"
    )


def as_force_field(source: Source) -> ForceField:
    """Load a source with its weights as stored; force fields in memory are returned as they are."""
    return source if isinstance(source, ForceField) else load_force_field(source)


def structures(frames: Frames) -> tuple[Atoms, ...]:
    """Structures, or those in a file."""
    return tuple(read_frames(frames) if isinstance(frames, str | Path) else frames)


def file_of(source: str | Path) -> Path | None:
    """The file that a source names; ``None`` for bundled and published force fields."""
    return _located(source)[1]


def _located(source: str | Path) -> tuple[str, Path | None, str]:
    """What stands before the path in a source, the path, and what stands behind it."""
    if parts := vendor_source(source):
        vendor, rest = parts
        file, kind, chosen = split_choice(rest)
        name, at, path = ("", "", file) if Path(file).exists() else file.rpartition("@")
        behind = f"#{kind}={chosen}" if kind else ""
        return f"{vendor}:{name}{at}", Path(path) if Path(path).exists() else None, behind
    return "", None if bundled_path(source) != Path(source) else Path(source), ""


def describe(source: Source) -> str | dict[str, str]:
    """Describe a source as JSON: its bundled name, its absolute path, or what the object in memory is."""
    if isinstance(source, ForceField):
        return {"name": source.name, "fingerprint": source.fingerprint}
    before, path, behind = _located(source)
    return str(source) if path is None else f"{before}{path.absolute()}{behind}"
