"""Architectures by name."""

from numbers import Integral
from typing import Any

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.models.chgnet import CHGNet
from ase_gffmerge.models.nequip import NequIP
from ase_gffmerge.models.painn import PaiNN
from ase_gffmerge.models.potential import Potential

_ARCHITECTURES: dict[str, type[Potential]] = {cls.architecture: cls for cls in (PaiNN, NequIP, CHGNet)}


def architectures() -> tuple[str, ...]:
    """Names of the known architectures."""
    return tuple(_ARCHITECTURES)


def build_potential(architecture: str, hyper: dict[str, Any], species: tuple[int, ...]) -> Potential:
    """Build a potential with fresh random weights.

    Parameters
    ----------
    architecture
        One of :func:`architectures`.
    hyper
        Hyper-parameters by name; missing ones take their defaults.
    species
        Atomic numbers.

    Raises
    ------
    FileFormatError
        For an unknown architecture or hyper-parameter.
    """
    if architecture not in _ARCHITECTURES:
        raise FileFormatError(
            f"unknown architecture {architecture!r}; this version knows {', '.join(_ARCHITECTURES)}. "
            "A newer file may need a newer ase-gffmerge."
        )
    cls = _ARCHITECTURES[architecture]
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
