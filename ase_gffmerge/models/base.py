r"""The interface that every architecture implements, and the architectures by name.

A potential is a chain of *stages*, which map the node features of all atoms to new ones:

.. math:: X^{(0)} = \mathrm{embed}(z),\qquad X^{(t)} = \mathrm{stage}_t(X^{(t-1)}),\qquad
          e_i = \mathrm{readout}(x_{1,i},\dots,x_{L,i}) + e^{\rm ref}_{z_i}

where :math:`x_l` are the invariant scalars after interaction block l. The merge needs nothing else from a model.
"""

import math
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from importlib import import_module
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.graphs.graph import Topology
from ase_gffmerge.models.core_repulsion import CoreRepulsion
from ase_gffmerge.models.layers.readout import (
    BesselBasis,
    ExactBuffers,
    MLPReadout,
    RandomFeatureReadout,
    polynomial_cutoff,
)
from ase_gffmerge.runtime.registry import Registry

State = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class HyperParameters:
    """Hyper-parameters that every architecture has.

    Attributes
    ----------
    cutoff
        Neighbour radius in Å.
    channels
        Scalar features per atom.
    n_blocks
        Interaction blocks.
    n_radial
        Radial basis functions.
    readout_width, readout_blocks
        Size of the widened readout; width 0 means the plain two-layer readout.
    readout_groups, readout_inputs
        Groups of its features and inputs that each group reads; 0 groups means that all features read all inputs.
    n_embeddings
        Embedding tables: 1, or one per merged specialist.
    """

    cutoff: float = 5.0
    channels: int = 64
    n_blocks: int = 3
    n_radial: int = 20
    readout_width: int = 0
    readout_blocks: int = 1
    readout_groups: int = 0
    readout_inputs: int = 0
    n_embeddings: int = 1

    def __post_init__(self) -> None:
        """Raise ``TypeError`` or ``ValueError`` for values that make no network."""
        for entry in fields(self):
            value, least = getattr(self, entry.name), _LEAST.get(entry.name, 1)
            if entry.type is int and (not isinstance(value, Integral) or isinstance(value, bool)):
                raise TypeError(f"{entry.name} must be a whole number, not {value!r}")
            if entry.type is int and value < least:
                raise ValueError(f"{entry.name} must be at least {least}, not {value}")
            number = isinstance(value, Real) and not isinstance(value, bool)
            if entry.type is float and not (number and 0 < float(value) < math.inf):
                raise ValueError(f"{entry.name} must be a positive number, not {value!r}")
        if self.readout_width and self.readout_blocks > self.n_blocks:
            raise ValueError(f"readout_blocks is {self.readout_blocks}, but there are {self.n_blocks} blocks")
        if self.readout_groups and (
            self.readout_width % self.readout_groups
            or not 0 < self.readout_inputs <= self.readout_blocks * self.channels
        ):
            raise ValueError(
                f"{self.readout_width} readout features cannot be split into {self.readout_groups} groups of "
                f"{self.readout_inputs} inputs"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for a file header."""
        return asdict(self)


_LEAST = {"readout_width": 0, "readout_groups": 0, "readout_inputs": 0, "l_max": 0, "radial_layers": 0}
"""Least values of whole-numbered hyper-parameters that need not be positive."""


class Geometry(Protocol):
    """What a stage may know about where the atoms are.

    Attributes
    ----------
    parts
        The tensors in it that depend on the edge vectors and are differentiated; the rest are indices.
    """

    @property
    def parts(self) -> State:
        """See the attributes."""

    def with_parts(self, parts: State) -> Self:
        """Give the same edges with other values of :attr:`parts`."""


@dataclass(frozen=True)
class EdgeGeometry:
    """Edges with their radial and angular functions.

    Attributes
    ----------
    sender, receiver : (n_edges,)
    radial : (n_edges, n_radial)
        Radial basis, without envelope.
    envelope : (n_edges, 1)
        Factor that takes every message to zero at the cutoff.
    angular : (n_edges, ...)
        Unit vectors or spherical harmonics.
    """

    sender: Tensor
    receiver: Tensor
    radial: Tensor
    envelope: Tensor
    angular: Tensor

    @cached_property
    def enveloped(self) -> Tensor:
        """Radial functions and a one, times the envelope (n_edges, n_radial + 1); made once for all blocks."""
        return torch.cat([self.radial * self.envelope, self.envelope], dim=1)

    @property
    def parts(self) -> State:
        """Radial functions, envelope and angular functions."""
        return self.radial, self.envelope, self.angular

    def with_parts(self, parts: State) -> Self:
        """Replace radial functions, envelope and angular functions."""
        radial, envelope, angular = parts
        return replace(self, radial=radial, envelope=envelope, angular=angular)


class Stage(nn.Module):
    """One link of the chain: ``forward(state, geometry) -> state``.

    Attributes
    ----------
    emits_scalars
        Whether the readout sees the scalars after this stage.
    gathers
        Whether an atom's features depend on those of its neighbours.
    """

    emits_scalars: bool = True
    gathers: bool = True


class Potential(ExactBuffers):
    """Base class: per-atom energies (n_atoms,) in eV, float64, from a graph with edge vectors.

    Casts and moves apply to everything but the reference energies, which stay float64.

    Parameters
    ----------
    hyper
        The architecture's hyper-parameters.
    species
        Atomic numbers the model knows, ascending.
    """

    architecture: ClassVar[str]
    Hyper: ClassVar[type[HyperParameters]]
    compilable: ClassVar[bool] = True
    """Whether it can be traced with the numbers of atoms and edges as symbols, which lists of angles cannot."""
    pads_neighborhoods: ClassVar[bool] = False
    """Whether it is then told the largest number of neighbours, too (:class:`.TracedTopology`)."""
    decomposition: ClassVar[Literal["stages", "halo", "none"]] = "stages"
    """How to cut a structure: exchange features between ``stages``, a ``halo`` of cutoff times blocks, or not at all."""
    node_entries: ClassVar[int] = 1
    """Leading entries of a state that have a row per atom; others have one per edge."""
    species_row: Tensor
    references: Tensor

    def __init__(self, hyper: HyperParameters, species: tuple[int, ...]):
        super().__init__()
        self.hyper = hyper
        self.species = tuple(sorted(species))
        rows = torch.full((119,), -1)
        rows[list(self.species)] = torch.arange(len(self.species))
        self.register_buffer("species_row", rows, persistent=False)
        self.register_buffer("references", torch.zeros(len(self.species), dtype=torch.float64))
        self.embedding = nn.Parameter(torch.randn(hyper.n_embeddings, len(self.species), hyper.channels))
        self.basis = BesselBasis(hyper.cutoff, hyper.n_radial)
        self.stages = nn.ModuleList()
        self.core_repulsion: CoreRepulsion | None = None  # of the force field, not of the architecture
        self.readout: nn.Module = self.own_readout()
        if hyper.readout_width:
            self.readout = RandomFeatureReadout(
                self.readout,
                hyper.channels,
                len(self.species),
                width=hyper.readout_width,
                blocks=hyper.readout_blocks,
                groups=hyper.readout_groups,
                inputs=hyper.readout_inputs,
            )

    def own_readout(self) -> nn.Module:
        """Give the architecture's readout, ``(scalars of all blocks, species rows) -> energies (n_atoms,)`` in eV."""
        return MLPReadout(self.hyper.channels)

    @property
    def repulsive(self) -> bool:
        """Whether the architecture itself keeps atoms from coming too close."""
        return False

    def with_core_repulsion(self, repulsion: CoreRepulsion | None) -> Self:
        """Same potential, which shares the weights, with another core repulsion or none."""
        twin = copy(self)
        twin._modules = dict(self._modules)
        twin.core_repulsion = repulsion
        return twin

    def element_parameters(self) -> tuple[str, ...]:
        """Names of the parameters (n_species, ...) that have a row per element, beside the embedding."""
        return ()

    def for_inference(self) -> Self:
        """Give what computes the same energies and their first derivatives faster, from weights that must not change.

        It shares the weights. Architectures without a faster way give themselves.
        """
        return self

    def embed(self, graph: Topology) -> State:
        """Make initial node features from elements (and specialist indices)."""
        raise NotImplementedError

    def angular(self, directions: Tensor) -> Tensor:
        """Functions of the unit vectors (n_edges, 3) from receiver to sender."""
        raise NotImplementedError

    def geometry(self, vectors: Tensor, graph: Topology) -> Geometry:
        """What the stages know about the edge vectors (n_edges, 3) in Å."""
        sender, receiver = graph.edge_index
        return EdgeGeometry(sender, receiver, *self.edge_functions(vectors))

    def edge_functions(self, vectors: Tensor) -> State:
        """Parts of the geometry for edge vectors (n_edges, 3); without indices, so that it can be differentiated in bulk."""
        lengths = vectors.square().sum(dim=-1).sqrt()
        envelope = polynomial_cutoff(lengths, self.hyper.cutoff)[:, None]
        return self.basis(lengths), envelope, self.angular(vectors / lengths[:, None])

    def scalars(self, state: State) -> Tensor:
        """Invariant features (n_atoms, channels) of a state."""
        raise NotImplementedError

    def vectors(self, state: State) -> Tensor | None:
        """Features (n_atoms, 3, d) of a state that turn like vectors, if it has any; distillation may match them."""
        return None

    def embedded(self, graph: Topology) -> Tensor:
        """Rows of the embedding table (n_atoms, channels)."""
        table = graph.specialist if self.hyper.n_embeddings > 1 else torch.zeros_like(graph.specialist)
        return self.embedding[table, self.species_row[graph.atomic_numbers]]

    def features(self, vectors: Tensor, graph: Topology) -> list[Tensor]:
        """Scalars (n_atoms, channels) after every interaction block, the inputs of the readout."""
        state, geometry, scalars = self.embed(graph), self.geometry(vectors.to(self.dtype), graph), []
        for stage in self.stages:
            state = stage(state, geometry)
            if stage.emits_scalars:
                scalars.append(self.scalars(state))
        return scalars

    def forward(self, vectors: Tensor, graph: Topology) -> tuple[Tensor, list[Tensor]]:
        """Evaluate the potential, an :class:`~ase_gffmerge.graphs.derivatives.EdgeFunction`, in whatever type vectors have.

        Returns
        -------
        energies : (n_atoms,) float64
            In eV, reference energies included.
        scalars : (n_atoms, channels) each
            See :meth:`features`.
        """
        vectors = vectors.to(self.dtype)
        if self.core_repulsion is not None:
            return self.core_repulsion.guarded(self, vectors, graph)
        scalars = self.features(vectors, graph)
        return self.energies(scalars, vectors, graph), scalars

    def energies(self, scalars: Sequence[Tensor], vectors: Tensor, graph: Topology) -> Tensor:
        """Per-atom energies (n_atoms,) in eV, float64, from the readout's inputs.

        Parameters
        ----------
        scalars, vectors, graph
            What :meth:`features` gives, and what it takes; most readouts do not look at the edge vectors.
        """
        species = self.species_row[graph.atomic_numbers]
        return self.readout(scalars, species).double() + self.references[species]

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.embedding.device

    def named_stages(self) -> Iterator[tuple[str, Stage]]:
        """Stages with their qualified names, in execution order."""
        for name, stage in self.stages.named_children():
            yield f"stages.{name}", stage  # type: ignore[misc]


def _name_of(found: object) -> str | None:
    return found.architecture if isinstance(found, type) and issubclass(found, Potential) else None


ARCHITECTURES: Registry[type[Potential]] = Registry(
    "architecture",
    group="ase_gffmerge.models",
    own={
        "painn": "ase_gffmerge.models.painn:PaiNN",
        "nequip": "ase_gffmerge.models.nequip:NequIP",
        "chgnet": "ase_gffmerge.models.chgnet:CHGNet",
        "escaip": "ase_gffmerge.models.escaip:EScAIP",
        "m3gnet": "ase_gffmerge.models.m3gnet:M3GNet",
        "tensornet": "ase_gffmerge.models.tensornet:TensorNet",
        "mattersim": "ase_gffmerge.models.m3gnet:MatterSim",
    },
    name_of=_name_of,
    error=FileFormatError,
)
"""A new architecture is one file and one line here; other packages add theirs as entry points ``ase_gffmerge.models``."""


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
    adapters = import_module("ase_gffmerge.integrations.base").adapters_by_architecture()
    if name not in adapters:
        raise FileFormatError(
            f"unknown architecture {name!r}; this version knows {', '.join(dict.fromkeys((*ARCHITECTURES, *adapters)))}. "
            "Choose one of them; a file that names another one needs a newer ase-gffmerge, or the package that adds it."
        )
    return adapters[name].potential_class(name)
