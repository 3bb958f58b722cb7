"""What another package's force field needs to become a specialist, and the packages by name.

An adapter reads the vendor's file into a :class:`~ase_gffmerge.models.Potential` (a chain of stages, from edge vectors to
energies per atom in eV), and writes such a potential back. Everything else, the graphs, the merge, the calculator, works on
the potential and does not know where it comes from. What all adapters do alike is here, too.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np
import torch
from ase import Atoms
from numpy._core import multiarray
from torch import Tensor, nn

from ase_gffmerge.errors import FileFormatError, first_line
from ase_gffmerge.graphs import batch_graphs, build_graph
from ase_gffmerge.graphs.graph import AtomGraph, edge_vectors
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.registry import Registry
from ase_gffmerge.storage.tensor_file import atomic_write

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
    architectures
        Of the potentials that it reads and writes: ``module:class`` by name; the modules may need the package.
    shipped
        Names of weights that come with the package.
    choice
        What one of several force fields in a file is chosen by, in ``FILE#choice=NAME``; empty where a file holds one.
    files
        Names of the files in the folder that :meth:`write` makes; empty where it makes a single file.
    """

    vendor: ClassVar[str]
    models: ClassVar[str]
    package: ClassVar[str]
    distribution: ClassVar[str] = ""
    shipped: ClassVar[tuple[str, ...]] = ()
    choice: ClassVar[str] = ""
    files: ClassVar[tuple[str, ...]] = ()
    architectures: ClassVar[Mapping[str, str]]

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
            When the package is not installed, there is no such file, it holds code and is not trusted, a model with parts
            that are not known here, or several force fields of which none is chosen.
        """
        return self._read(source, None, trust=trust)

    def read_chosen(self, source: VendorObject, name: str, *, trust: bool = False) -> ConvertedModel:
        """Convert one of the force fields that a file holds, by its name; see :attr:`choice` and :meth:`read`.

        Parameters
        ----------
        source, trust
            As for :meth:`read`.
        name
            Of the chosen one, after ``#choice=``.
        """
        if not self.choice:
            raise FileFormatError(f"{self.models} files hold one force field each; give {source} without #")
        return self._read(source, name, trust=trust)

    def _read(self, source: VendorObject, name: str | None, *, trust: bool) -> ConvertedModel:
        """Convert a model or the chosen one of several; for adapters that do not have a :meth:`read` of their own."""
        raise NotImplementedError

    @abstractmethod
    def vendor_content(self, potential: Potential) -> VendorObject:
        """What ``torch.save`` writes into a file that the vendor's package loads."""

    def write(self, potential: Potential, path: Path) -> Path:
        """Write a file that the vendor's package loads, once it was read back.

        Raises
        ------
        FileFormatError
            When the potential has more than the vendor's format: a widened readout, several embeddings; or when what was
            written does not have its energies.
        """
        self.require_exportable(potential)
        content = self.vendor_content(potential)
        atomic_write(
            path,
            lambda temporary: torch.save(content, temporary),
            read_back=lambda temporary: require_energies(self.read_back(temporary, potential), potential),
        )
        return path

    def require_exportable(self, potential: Potential) -> None:
        """Raise the error of :meth:`write` for a potential with more than the format holds, without writing anything."""
        hyper = potential.hyper
        self._require_options(wide_readout=hyper.readout_width > 0, embeddings=hyper.n_embeddings > 1)

    def require_merge_exportable(
        self, specialists: Sequence[Potential], *, wide_readout: bool, embeddings: bool
    ) -> None:
        """Raise the error of :meth:`write` for a merge whose result the format could not hold, before it begins.

        Parameters
        ----------
        specialists
            Potentials of one of :attr:`architectures`.
        wide_readout, embeddings
            Whether the merge has a readout of random features, and an embedding per specialist.
        """
        self._require_options(wide_readout=wide_readout, embeddings=embeddings)

    def _require_options(self, *, wide_readout: bool, embeddings: bool) -> None:
        causes = {
            "a widened readout (in the recipe write readout: null)": wide_readout,
            "an embedding per specialist (write conditioning: shared)": embeddings,
        }
        if faults := [cause for cause, there in causes.items() if there]:
            raise FileFormatError(
                f"{self.models}'s format cannot hold {' and '.join(faults)}; merge with these options, or by gffmerge merge "
                "--exportable, or write .safetensors"
            )

    def read_back(self, path: Path, potential: Potential) -> Potential:
        """Read a file that was just written; ``potential`` is what was, which may tell what the file does not."""
        return self.read(path).potential

    def potential_class(self, architecture: str) -> type[Potential]:
        """Class of one of :attr:`architectures`.

        Raises
        ------
        FileFormatError
            When the package is not installed.
        """
        self.require_package()
        module, _, name = self.architectures[architecture].partition(":")
        found: type[Potential] = getattr(import_module(module), name)
        return found

    def require_package(self) -> None:
        """Raise :class:`FileFormatError` when the vendor's package is not installed."""
        if self.package and find_spec(self.package) is None:
            name = self.distribution or self.package
            raise FileFormatError(
                f"{self.models} models ({', '.join(self.architectures)}) need the package {name}, which is not installed; "
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


TRUST = "load_force_field(..., trust=True), or gffmerge convert {source} FILE.safetensors --trust"
"""How a file is loaded that executes code."""


def load_checkpoint(
    path: Path, *, trust: bool, source: str, tensors: str = "", names: Collection[str] = ()
) -> VendorObject:
    """Read a ``torch.save`` file: a dictionary of tensors, arrays and plain containers, or a model if it is trusted.

    Parameters
    ----------
    path
        The file.
    trust
        Execute code that it may contain.
    source, tensors, names
        For messages: ``vendor:path``; how weights are saved without anything else, where the package has a way; and names
        that may stand for a path.

    Raises
    ------
    FileFormatError
        When there is no such file, it holds code and is not trusted, or it is neither.
    """
    if path.is_dir():
        raise FileFormatError(f"{path} is a folder; give the checkpoint in it")
    try:
        with torch.serialization.safe_globals(_ARRAYS):
            content = torch.load(path, map_location="cpu", weights_only=not trust)
    except FileNotFoundError:
        or_name = f", or give one of {', '.join(names)}" if names else ""
        raise FileFormatError(f"there is no file {path}; check the path{or_name}") from None
    except Exception as error:  # a damaged pickle can raise anything
        yours = f"for a file of your own there is {TRUST.format(source=source)}{f', or {tensors}' if tensors else ''}"
        if found := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
            message = f"{path} holds Python objects ({found[1]}), whose loading executes code; {yours}"
            raise FileFormatError(message) from None
        advice = "write it again" if trust else f"it is damaged, or holds Python objects: {yours}"
        raise FileFormatError(f"{path} cannot be read as tensors: {first_line(error)}; {advice}") from None
    model = isinstance(content, nn.Module) or is_dataclass(content)
    if not (isinstance(content, dict) or (trust and model)):
        raise FileFormatError(
            f"{path} holds a {type(content).__name__}, not a dictionary of weights; give the checkpoint of its training"
        )
    return content


ADAPTERS: Registry[Adapter] = Registry(
    "integration",
    group="ase_gffmerge.integrations",
    own={
        "chgnet": "ase_gffmerge.integrations.chgnet:ADAPTER",
        "nequip": "ase_gffmerge.integrations.nequip.convert:ADAPTER",
        "sevenn": "ase_gffmerge.integrations.sevennet:ADAPTER",
        "orb": "ase_gffmerge.integrations.orb:ADAPTER",
        "mace": "ase_gffmerge.integrations.mace:ADAPTER",
        "matgl": "ase_gffmerge.integrations.matgl:ADAPTER",
        "mattersim": "ase_gffmerge.integrations.mattersim:ADAPTER",
        "fairchem": "ase_gffmerge.integrations.fairchem:ADAPTER",
        "metatrain": "ase_gffmerge.integrations.metatrain:ADAPTER",
    },
    name_of=lambda found: found.vendor if isinstance(found, Adapter) else None,
    error=FileFormatError,
)
"""A new vendor is one folder and one line here; other packages add theirs as entry points ``ase_gffmerge.integrations``."""


def adapters_by_architecture() -> dict[str, Adapter]:
    """Adapters by the architecture of their potentials; those of other packages that cannot be imported are left out."""
    found: dict[str, Adapter] = {}
    for vendor in ADAPTERS:
        try:
            adapter = ADAPTERS[vendor]
        except FileFormatError:  # said when that vendor is asked for
            continue
        for architecture in adapter.architectures:
            found.setdefault(architecture, adapter)
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
        f"a {architecture} potential is no other package's and has no format but .safetensors; give a name with that ending"
    )


def vendor_source(source: str | Path) -> tuple[str, str] | None:
    """Vendor and the rest of ``vendor:rest``; ``None`` for anything else, files with a colon in their names among it."""
    vendor, colon, rest = str(source).partition(":")
    return (vendor, rest) if colon and vendor in ADAPTERS and not Path(source).exists() else None


P = TypeVar("P", bound=Potential)

SAME = 1e-3
"""Of energies per atom, relative to their spread and size: far above round-off, far below a missing part."""


def converted(
    build: Callable[[], P],
    copy_weights: Callable[[P], None],
    *,
    dtype: torch.dtype,
    vendor_energies: Callable[[AtomGraph], Tensor],
    vendor: str,
) -> P:
    """A potential with a network's weights, frozen, that was seen to compute the same.

    Parameters
    ----------
    build
        Makes it with any weights.
    copy_weights
        Writes the network's weights into it.
    dtype
        Of the network's weights.
    vendor_energies
        Energies (n_atoms,) in eV by the network itself.
    vendor
        For the message.

    Raises
    ------
    FileFormatError
        When the energies differ.
    """
    with torch.random.fork_rng(devices=[]):
        potential = build()
    with torch.no_grad():
        copy_weights(potential)
    potential.to(dtype).eval().requires_grad_(False)
    if difference := _energy_difference(potential, vendor_energies):
        raise FileFormatError(
            f"this {vendor} model has a part that is not known here: converted, its energies differ by {difference:.2g} eV "
            "per atom from its own; leave it out of the merge"
        )
    return potential


def rows_of_elements(species: Sequence[int]) -> Tensor:
    """Rows (n_species,) of a table with one row per entry of ``species`` in the order of atomic numbers."""
    return torch.tensor(sorted(range(len(species)), key=species.__getitem__))


def per_element(values: Tensor, species: Sequence[int]) -> Tensor:
    """One number for all elements or one for each, in the order of atomic numbers, float64."""
    ones = torch.ones(len(species), dtype=torch.float64)
    return (ones * values.flatten().double())[rows_of_elements(species)]


def require_energies(again: Potential, potential: Potential) -> None:
    """Raise :class:`FileFormatError` when a potential that was read does not have the energies of the one written."""
    again.to(device=potential.device, dtype=potential.dtype)
    if difference := _energy_difference(potential, lambda graph: again(edge_vectors(graph), graph)[0]):
        raise FileFormatError(f"its energies differ by {difference:.2g} eV per atom from those written")


def _energy_difference(potential: Potential, energies: Callable[[AtomGraph], Tensor]) -> float:
    """Largest difference (eV) of the energies of a few atoms of five elements at random places; 0 if it is round-off."""
    generator = torch.Generator().manual_seed(0)
    numbers = 2 * list(potential.species[:5]) + [potential.species[0]]
    places = torch.rand(len(numbers), 3, generator=generator, dtype=torch.float64) * potential.hyper.cutoff
    atoms = Atoms(numbers, positions=1.2 * places.numpy())
    graph = batch_graphs([build_graph(atoms, potential.hyper.cutoff, dtype=potential.dtype)])
    graph = graph.to(potential.device)
    with torch.no_grad():
        theirs, ours = energies(graph).double(), potential(edge_vectors(graph), graph)[0].double()
    rows = potential.species_row[graph.atomic_numbers]
    size = (theirs - potential.references[rows]).abs().mean()
    difference = float((ours - theirs).abs().max())
    return 0.0 if difference <= SAME * size + 1e-5 else difference
