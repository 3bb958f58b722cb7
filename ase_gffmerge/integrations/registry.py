"""Which packages' force fields can be read; an adapter is imported when it is needed."""

from pathlib import Path

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.integrations.base import Adapter
from ase_gffmerge.runtime.registry import Registry

ADAPTERS: Registry[Adapter] = Registry(
    "integration",
    group="ase_gffmerge.integrations",
    own={
        "chgnet": "ase_gffmerge.integrations.chgnet:ADAPTER",
        "nequip": "ase_gffmerge.integrations.nequip.convert:ADAPTER",
        "sevenn": "ase_gffmerge.integrations.sevennet.convert:ADAPTER",
        "orb": "ase_gffmerge.integrations.orb.convert:ADAPTER",
        "mace": "ase_gffmerge.integrations.mace.convert:ADAPTER",
    },
    name_of=lambda found: found.vendor if isinstance(found, Adapter) else None,
    error=FileFormatError,
)
"""A new vendor is one folder and one line here; other packages add theirs as entry points ``ase_gffmerge.integrations``."""


def vendors() -> tuple[str, ...]:
    """Names of the vendors whose files can be read."""
    return tuple(ADAPTERS)


def adapters_by_architecture() -> dict[str, Adapter]:
    """Adapters by the architecture of their potentials; those of other packages that cannot be imported are left out."""
    found: dict[str, Adapter] = {}
    for vendor in ADAPTERS:
        try:
            adapter = ADAPTERS[vendor]
        except FileFormatError:  # said when that vendor is asked for
            continue
        found.setdefault(adapter.architecture, adapter)
    return found


def adapter_for(architecture: str) -> Adapter:
    """Adapter that writes potentials of an architecture.

    Raises
    ------
    FileFormatError
        When there is none.
    """
    if found := adapters_by_architecture().get(architecture):
        return found
    raise FileFormatError(
        f"a {architecture} potential is not another package's and has no format but .safetensors; save it instead"
    )


def vendor_source(source: str | Path) -> tuple[str, str] | None:
    """Vendor and the rest of ``vendor:rest``; ``None`` for anything else, files with a colon in their names among it."""
    vendor, colon, rest = str(source).partition(":")
    return (vendor, rest) if colon and vendor in ADAPTERS and not Path(source).exists() else None
