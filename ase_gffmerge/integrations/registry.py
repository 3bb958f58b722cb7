"""Which vendors there are; an adapter is imported when it is needed."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ase_gffmerge.errors import FileFormatError

if TYPE_CHECKING:
    from ase_gffmerge.integrations.base import Adapter

_MODULES = {
    vendor: f"ase_gffmerge.integrations.{module}"
    for vendor, module in (
        ("chgnet", "chgnet"),
        ("nequip", "nequip"),
        ("sevenn", "sevennet"),
        ("orb", "orb"),
        ("mace", "mace"),
    )
}


def vendors() -> tuple[str, ...]:
    """Names of the vendors whose files can be read."""
    return tuple(_MODULES)


def adapter(vendor: str) -> "Adapter":
    """Adapter of a vendor."""
    found: Adapter = import_module(_MODULES[vendor]).ADAPTER
    return found


def adapter_for(architecture: str) -> "Adapter":
    """Adapter that writes potentials of an architecture.

    Raises
    ------
    FileFormatError
        When there is none.
    """
    for vendor in _MODULES:
        if (found := adapter(vendor)).architecture == architecture:
            return found
    raise FileFormatError(
        f"a {architecture} potential is not another package's and has no format but .safetensors; save it instead"
    )


def vendor_source(source: str | Path) -> tuple[str, str] | None:
    """Vendor and the rest of ``vendor:rest``; ``None`` for anything else, files with a colon in their names among it."""
    vendor, colon, rest = str(source).partition(":")
    return (vendor, rest) if colon and vendor in _MODULES and not Path(source).exists() else None
