"""Architectures by name."""

from importlib import import_module
from importlib.util import find_spec
from numbers import Integral
from typing import Any

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.models.base import Potential
from ase_gffmerge.models.chgnet import CHGNet
from ase_gffmerge.models.nequip import NequIP
from ase_gffmerge.models.painn import PaiNN

_ARCHITECTURES: dict[str, type[Potential]] = {cls.architecture: cls for cls in (PaiNN, NequIP, CHGNet)}


_PACKAGES = {
    "nequip-package": ("nequip", "ase_gffmerge.integrations.nequip.model", "NequIPPackage"),
    "sevennet-package": ("sevenn", "ase_gffmerge.integrations.sevennet.model", "SevenNetPackage"),
    "orb-package": ("orb_models", "ase_gffmerge.integrations.orb.model", "OrbPackage"),
    "mace-package": ("mace", "ase_gffmerge.integrations.mace.model", "MACEPackage"),
}
"""Architectures whose modules another package brings: that package, our module and our class."""

_DISTRIBUTIONS = {"mace": "mace-torch"}
"""Packages that have another name for pip."""


def architectures() -> tuple[str, ...]:
    """Names of the architectures that need no other package."""
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
    """Class of an architecture; the package that it may need is imported."""
    if name in _ARCHITECTURES:
        return _ARCHITECTURES[name]
    if name not in _PACKAGES:
        raise FileFormatError(
            f"unknown architecture {name!r}; this version knows {', '.join((*_ARCHITECTURES, *_PACKAGES))}. "
            "A newer file may need a newer ase-gffmerge."
        )
    package, module, cls = _PACKAGES[name]
    if find_spec(package) is None:
        distribution = _DISTRIBUTIONS.get(package, package)
        raise FileFormatError(
            f"the architecture {name!r} is built by the package {distribution}, which is not installed; pip install "
            f"{distribution}"
        )
    found: type[Potential] = getattr(import_module(module), cls)
    return found
