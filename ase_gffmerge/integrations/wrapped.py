"""Networks of other packages that are chains of modules, each a function from a dictionary of tensors to another one.

A few entries of the dictionary are handed from module to module: they are the *state* of the potential. Others depend on
the edge vectors alone: they are the parts of the *geometry*. Everything else is indices. A :class:`ModuleStage` is a module
of the package together with the names of the entries that it reads and writes.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.graphs.graph import Topology
from ase_gffmerge.integrations.base import VendorObject
from ase_gffmerge.models.base import HyperParameters, Potential, Stage, State
from ase_gffmerge.models.layers import keep_plain
from ase_gffmerge.models.layers.equivariant import replaced
from ase_gffmerge.models.layers.linear import ElementLinear

Entries = dict[str, Tensor]


def on_cpu(network: nn.Module) -> nn.Module:
    """A network in memory, or its copy on the CPU if it is elsewhere: what is read of it is compared with it there."""
    there = any(x.device.type != "cpu" for x in (*network.parameters(), *network.buffers()))
    return deepcopy(network).cpu() if there else network


@dataclass(frozen=True, kw_only=True)
class PackageHyper(HyperParameters):
    """Hyper-parameters of a network that another package builds.

    Attributes
    ----------
    config
        Arguments of the package's builder as a JSON document, without those that are weights here: elements, energy scales
        and shifts.
    """

    config: str = "{}"

    @property
    def arguments(self) -> dict[str, VendorObject]:
        """The arguments as a dictionary."""
        return dict(json.loads(self.config))


@dataclass(frozen=True)
class ChainGeometry:
    """What the modules read beside the state.

    Attributes
    ----------
    indices
        Entries that do not depend on the edge vectors.
    names, parts
        Entries that do, and their names.
    """

    indices: Mapping[str, Tensor]
    names: tuple[str, ...]
    parts: State

    def with_parts(self, parts: State) -> Self:
        """Replace the entries that depend on the edge vectors."""
        return replace(self, parts=parts)

    def entries(self) -> Entries:
        """All of them in a new dictionary, which modules may change."""
        return {**self.indices, **dict(zip(self.names, self.parts, strict=True))}


class ModuleStage(Stage):
    """A module of another package as a stage.

    Parameters
    ----------
    module
        Maps a dictionary to a dictionary.
    reads, writes
        Entries that form the state before and after it.
    emits_scalars, gathers
        See :class:`.Stage`.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        reads: tuple[str, ...],
        writes: tuple[str, ...],
        emits_scalars: bool = True,
        gathers: bool = True,
    ):
        super().__init__()
        self.module, self.reads, self.writes = module, reads, writes
        self.emits_scalars, self.gathers = emits_scalars, gathers

    def forward(self, state: State, geometry: ChainGeometry) -> State:
        """Evaluate the module on the state and the geometry."""
        found = self.module({**geometry.entries(), **dict(zip(self.reads, state, strict=True))})
        return tuple(found[name] for name in self.writes)


class ChainPotential(Potential):
    """A potential whose stages are modules of another package, in float64 when it is new.

    What the modules hold as constants (Clebsch-Gordan coefficients and the like) follows every cast from its values in
    float64, so that a cast there and back changes weights alone, and is not stored in files.

    Attributes
    ----------
    edge_entries
        Names of what :meth:`edge_functions` returns.
    """

    compilable: ClassVar[bool] = False
    edge_entries: tuple[str, ...]

    def __init__(self, hyper: HyperParameters, species: tuple[int, ...], *, embedding_width: int):
        super().__init__(hyper, species)
        shape = (hyper.n_embeddings, len(self.species), embedding_width)
        self.embedding = nn.Parameter(torch.randn(shape))
        self._constants: dict[str, Tensor] = {}
        self._stored: tuple[str, ...] = ()

    def _seal(self) -> None:
        """Cast to float64 and remember the constants; the last step of a constructor."""
        self.double()
        keep_plain(self)
        for root, prefix in self._foreign():
            for name, buffer in root.named_buffers(prefix):
                self._constants[name] = buffer.detach().clone()
        self._stored = tuple(name for name in self.state_dict() if name in self._constants)
        self.register_state_dict_post_hook(_leave_out_constants)

    def _foreign(self) -> Iterator[tuple[nn.Module, str]]:
        """Modules of the other package, and their names."""
        for name, module in self.named_children():
            if name not in ("basis", "readout"):
                yield module, name
        for name, module in self.readout.named_modules(prefix="readout"):
            if isinstance(module, PackageReadout):
                yield module.module, f"{name}.module"

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *arguments: VendorObject
    ) -> None:
        """Let the constants be what they are; a hook would belong to one module, and not to its shallow copies."""
        for name in self._stored:
            state_dict[prefix + name] = self.get_buffer(name)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for name, exact in self._constants.items():
            owner, _, key = name.rpartition(".")
            dtype = self.dtype if exact.is_floating_point() else exact.dtype
            setattr(self.get_submodule(owner), key, exact.to(device=self.device, dtype=dtype))
        return self

    def for_inference(self) -> Self:
        """Give a copy that shares the weights; on a CPU its messages are summed block by block (:class:`.EdgeSums`)."""
        stages = replaced(self.stages, self.served) if self.device.type == "cpu" else self.stages
        if stages is self.stages:
            return self
        twin = copy(self)
        twin._modules = {**self._modules, "stages": stages}
        kept = {name for name, _ in twin.named_buffers()}
        twin._constants = {name: value for name, value in self._constants.items() if name in kept}
        twin._stored = tuple(name for name in self._stored if name in kept)
        return twin

    @staticmethod
    def served(part: nn.Module) -> nn.Module | None:
        """What stands for a part of a stage where first derivatives are taken alone; ``None`` where it stays."""
        return None

    def embed(self, graph: Topology) -> State:
        """Rows of the embedding."""
        return (self.embedded(graph),)

    def element_parameters(self) -> tuple[str, ...]:
        """Self-connections and energy scales."""
        maps = [
            f"{name}.weight" for name, module in self.named_modules() if isinstance(module, ElementLinear)
        ]
        scales = [
            f"{name}.scale" for name, module in self.named_modules() if isinstance(module, ScaledReadout)
        ]
        return (*maps, *scales)

    def indices(self, vectors: Tensor, graph: Topology) -> Entries:
        """Entries that are not differentiated; which edges there are may depend on the values of the edge vectors."""
        raise NotImplementedError

    def geometry(self, vectors: Tensor, graph: Topology) -> ChainGeometry:
        """Entries by name."""
        return ChainGeometry(self.indices(vectors, graph), self.edge_entries, self.edge_functions(vectors))

    def energies(self, scalars: Sequence[Tensor], vectors: Tensor, graph: Topology) -> Tensor:
        """Energies (n_atoms,) in eV of the readout, and the repulsion, if there is one.

        Parameters
        ----------
        scalars
            After every block.
        vectors : (n_edges, 3)
            Edge vectors in Å.
        graph
            Edges and elements.
        """
        energies, repulsion = (
            super().energies(scalars, vectors, graph),
            self.repulsion_energies(vectors, graph),
        )
        return energies if repulsion is None else energies + repulsion.double()

    @property
    def repulsive(self) -> bool:
        """Whether the package's model has a repulsion."""
        return getattr(self, "repulsion", None) is not None

    def repulsion_energies(self, vectors: Tensor, graph: Topology) -> Tensor | None:
        """Short-range repulsion (n_atoms,) in eV that is a function of elements and distances and is not merged."""
        return None

    def scalars(self, state: State) -> Tensor:
        """Even scalars, the first ``channels`` of the first entry of the state."""
        return state[0][:, : self.hyper.channels]


def _leave_out_constants(potential: ChainPotential, state: dict[str, Tensor], prefix: str, _: object) -> None:
    """Keep the constants out of a state dictionary."""
    for name in potential._stored:
        state.pop(prefix + name)


class PackageReadout(nn.Module):
    """Energies by a module of another package.

    Parameters
    ----------
    module
        What the subclass applies to the scalars.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, scalars: Sequence[Tensor], species: Tensor) -> Tensor:
        """Map L tensors (n_atoms, channels) and element rows (n_atoms,) to energies (n_atoms,) in eV."""
        raise NotImplementedError


class ScaledReadout(PackageReadout):
    """Energies of the last scalars, times a factor per element.

    Parameters
    ----------
    module
        Maps scalars (n_atoms, channels) to (n_atoms, 1).
    n_species
        Number of elements.
    """

    def __init__(self, module: nn.Module, n_species: int):
        super().__init__(module)
        self.scale = nn.Parameter(torch.ones(n_species))

    def forward(self, scalars: Sequence[Tensor], species: Tensor) -> Tensor:
        """Map L tensors (n_atoms, channels) and element rows (n_atoms,) to energies (n_atoms,) in eV."""
        return self.module(scalars[-1]).squeeze(-1) * self.scale[species]


class SummedReadout(PackageReadout):
    """Sum of energies of the scalars of the last blocks, as many as there are modules.

    Parameters
    ----------
    modules
        Each maps scalars (n_atoms, channels) to (n_atoms, 1).
    """

    module: nn.ModuleList

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__(nn.ModuleList(modules))

    def forward(self, scalars: Sequence[Tensor], species: Tensor) -> Tensor:
        """Map L tensors (n_atoms, channels) and element rows (n_atoms,) to energies (n_atoms,) in eV."""
        last = scalars[-len(self.module) :]
        energies = [part(x).squeeze(-1) for part, x in zip(self.module, last, strict=True)]
        return torch.stack(energies).sum(dim=0)


def one_number_of_scalars(numbers: Collection[int], *, of: str) -> int:
    """The number of scalars after every block.

    Raises
    ------
    FileFormatError
        When blocks differ.
    """
    different = sorted(set(numbers))
    if len(different) > 1:
        raise FileFormatError(
            f"the model's {of} have different numbers of scalars {different}, which is not read"
        )
    return different[0]
