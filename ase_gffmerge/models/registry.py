"""Architectures by name."""

from importlib import import_module
from numbers import Integral
from typing import Any

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.models.base import Potential
from ase_gffmerge.runtime.registry import Registry


def _name_of(found: object) -> str | None:
    return found.architecture if isinstance(found, type) and issubclass(found, Potential) else None


ARCHITECTURES: Registry[type[Potential]] = Registry(
    "architecture",
    group="ase_gffmerge.models",
    own={
        "painn": "ase_gffmerge.models.painn:PaiNN",
        "nequip": "ase_gffmerge.models.nequip:NequIP",
        "chgnet": "ase_gffmerge.models.chgnet:CHGNet",
    },
    name_of=_name_of,
    error=FileFormatError,
)
"""A new architecture is one file and one line here; other packages add theirs as entry points ``ase_gffmerge.models``."""

INTEGRATIONS = "ase_gffmerge.integrations.registry"
"""What knows the architectures of wrapped networks; a name and no import, as it stands above this room."""


def architectures() -> tuple[str, ...]:
    """Names of the architectures that wrap no other package's network."""
    return tuple(ARCHITECTURES)


def build_potential(architecture: str, hyper: dict[str, Any], species: tuple[int, ...]) -> Potential:
    """Build a potential with fresh random weights.

    Parameters
    ----------
    architecture
        One of :func:`architectures`, or of a network of another package (such as ``mace-package``).
    hyper
        Hyper-parameters by name; missing ones take their defaults.
    species
        Atomic numbers.

    Raises
    ------
    FileFormatError
        For an unknown architecture or hyper-parameter, and one that needs a package that is not installed.
    """
    cls = _architecture(architecture)
    try:
        checked = cls.Hyper(**hyper)
    except (TypeError, ValueError, OverflowError) as error:
        raise FileFormatError(f"hyper-parameters do not fit architecture {architecture!r}: {error}") from None
    numbers = [z for z in species if isinstance(z, Integral) and not isinstance(z, bool) and 0 < z < 119]
    if not numbers or len(set(numbers)) < len(species):
        raise FileFormatError(
            f"species {list(species)} are not distinct atomic numbers between 1 and 118; write the file again"
        )
    return cls(checked, species)


def _architecture(name: str) -> type[Potential]:
    """Class of an architecture: one of the table, or of the integrations."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    adapters = import_module(INTEGRATIONS).adapters_by_architecture()
    if name not in adapters:
        raise FileFormatError(
            f"unknown architecture {name!r}; this version knows {', '.join(dict.fromkeys((*ARCHITECTURES, *adapters)))}. "
            "A newer file may need a newer ase-gffmerge, or the package that adds the architecture to it."
        )
    found: type[Potential] = adapters[name].potential_class()
    return found
