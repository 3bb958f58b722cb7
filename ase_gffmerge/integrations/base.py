"""What a foreign package's force field needs to become a specialist.

An adapter reads the vendor's file into a :class:`~ase_gffmerge.models.Potential` (a chain of stages, from edge vectors to
energies per atom in eV), and writes such a potential back. Everything else, the graphs, the merge, the calculator, works on
the potential and does not know where it comes from.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from numpy._core import multiarray

from ase_gffmerge.errors import FileFormatError, first_line
from ase_gffmerge.models import Potential
from ase_gffmerge.storage.atomic import atomic_write

VendorObject: TypeAlias = Any
"""An object of another package, whose classes are imported only where the package is installed."""


@dataclass(frozen=True, kw_only=True)
class ConvertedModel:
    """What an adapter reads.

    Attributes
    ----------
    potential
        In evaluation mode, frozen, energies in eV and lengths in Å.
    vendor, version
        Package, and version of the model, as far as its file says.
    level_of_theory
        Of its labels, as far as known.
    name
        What to call it; empty when the source is a path or a name that tells.
    notes
        What the file holds and the potential does not, in words.
    """

    potential: Potential
    vendor: str
    version: str = ""
    level_of_theory: str = "unknown"
    name: str = ""
    notes: tuple[str, ...] = field(default=())


class Adapter(ABC):
    """Reads and writes the force fields of one package, the vendor.

    Attributes
    ----------
    vendor
        Its name before the colon.
    models
        What its models are called.
    package, distribution
        Its name in Python (empty when nothing of it is needed), and for pip where that is another.
    architecture, model
        Of the potentials that it reads and writes: name, and ``module:class``, which may need the package.
    """

    vendor: ClassVar[str]
    models: ClassVar[str]
    package: ClassVar[str]
    distribution: ClassVar[str] = ""
    architecture: ClassVar[str]
    model: ClassVar[str]

    @abstractmethod
    def read(self, source: VendorObject, *, trust: bool = False) -> ConvertedModel:
        """Convert a vendor's model, its file, or a name of pretrained weights.

        Parameters
        ----------
        source
            Path, name or object of the vendor's class.
        trust
            Execute code that the file may contain; otherwise such a file is refused.

        Raises
        ------
        FileFormatError
            When the package is not installed, there is no such file, it holds code and is not trusted, or a model with parts
            that are not known here.
        """

    @abstractmethod
    def vendor_content(self, potential: Potential) -> VendorObject:
        """What ``torch.save`` writes into a file that the vendor's package loads."""

    def write(self, potential: Potential, path: Path) -> Path:
        """Write a file that the vendor's package loads.

        Raises
        ------
        FileFormatError
            When the potential has more than the vendor's format: a widened readout, several embeddings.
        """
        if potential.hyper.readout_width or potential.hyper.n_embeddings > 1:
            extra = "a widened readout" if potential.hyper.readout_width else "an embedding per specialist"
            raise FileFormatError(
                f"the potential has what {self.models}'s format cannot hold ({extra}); merge with the recipe option "
                "readout: null and shared conditioning to export"
            )
        content = self.vendor_content(potential)
        atomic_write(path, lambda temporary: torch.save(content, temporary))
        return path

    def potential_class(self) -> type[Potential]:
        """Class of :attr:`architecture`.

        Raises
        ------
        FileFormatError
            When the package is not installed.
        """
        self.require_package()
        module, _, name = self.model.partition(":")
        found: type[Potential] = getattr(import_module(module), name)
        return found

    def require_package(self) -> None:
        """Raise :class:`FileFormatError` when the vendor's package is not installed."""
        if self.package and find_spec(self.package) is None:
            name = self.distribution or self.package
            raise FileFormatError(
                f"{self.models} models ({self.architecture}) need the package {name}, which is not installed; "
                f"pip install {name}"
            )


_ARRAYS: list[Callable[..., VendorObject] | tuple[Callable[..., VendorObject], str]] = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float32", "float64")),
    *(
        (getattr(multiarray, maker), f"numpy.{core}.multiarray.{maker}")
        for core in ("core", "_core")
        for maker in ("_reconstruct", "scalar")
    ),
]
"""What pickled numpy arrays and numbers are made of; they hold data only."""


def load_checkpoint(path: Path, *, trust: bool) -> dict[str, VendorObject]:
    """Read a ``torch.save`` file, tensors, arrays and plain containers alone unless it is trusted.

    Raises
    ------
    FileFormatError
        When there is no such file, it holds code and is not trusted, or it is no dictionary.
    """
    if path.is_dir():
        raise FileFormatError(f"{path} is a folder; give the checkpoint in it")
    try:
        with torch.serialization.safe_globals(_ARRAYS):
            content = torch.load(path, map_location="cpu", weights_only=not trust)
    except FileNotFoundError:
        raise FileFormatError(f"there is no file {path}; check the path") from None
    except Exception as error:  # a damaged pickle can raise anything
        advice = (
            "write it again"
            if trust
            else "if it is whole, it holds Python objects, whose loading would execute code from the file: pass trust=True "
            "for files of your own, or save model.as_dict() or state_dict() alone"
        )
        raise FileFormatError(f"{path} cannot be read as tensors: {first_line(error)}; {advice}") from None
    if not isinstance(content, dict):
        raise FileFormatError(
            f"{path} holds a {type(content).__name__}, not a dictionary of weights; save the model again"
        )
    return content
