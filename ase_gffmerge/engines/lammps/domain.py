r"""A potential on one domain of a structure that is spread over processes.

A domain holds its own atoms and, as *ghosts*, copies of other domains' atoms (and of periodic images of its own) within one
cutoff. Its edges end at its own atoms, so that a stage gives their features alone; the features of ghosts come from their
owners before the next stage that reads neighbours. With :math:`G` for that copy, from own atoms to own atoms and ghosts, a
stage is :math:`X^{(t)} = \mathrm{stage}_t(G\,X^{(t-1)})`, and the reverse pass sends the derivatives at ghosts back,
:math:`\partial E/\partial X^{(t-1)} = G^{\mathsf T}\,\partial E/\partial(G X^{(t-1)})`. Every domain thus obtains the
gradients of the energy of the whole structure with respect to its own edges.

The copy is LAMMPS's (ML-IAP interface) or that of :mod:`.halo`.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ase_gffmerge.errors import ArgumentError
from ase_gffmerge.graphs.graph import Topology
from ase_gffmerge.models import Potential
from ase_gffmerge.models.base import Geometry, Stage, State


class Exchange(Protocol):
    """What copies features between domains; all domains call it together. Members are named as LAMMPS names them.

    Attributes
    ----------
    nlocal, ntotal
        Own atoms, which come first; and these together with ghosts.
    """

    @property
    def nlocal(self) -> int:
        """See the attributes."""

    @property
    def ntotal(self) -> int:
        """See the attributes."""

    def forward_exchange(self, features: Tensor, out: Tensor, width: int) -> None:
        """Copy rows of own atoms, and fill rows of ghosts with those of their owners.

        Parameters
        ----------
        features, out
            Contiguous, (n_total, width).
        width
            Numbers per atom.
        """

    def reverse_exchange(self, features: Tensor, out: Tensor, width: int) -> None:
        """Copy rows of own atoms and add to them the rows that other domains hold of their ghosts.

        Parameters
        ----------
        features, out, width
            As for :meth:`forward_exchange`.
        """


class _Ghosts(Function):
    """Rows of own atoms and ghosts (n_total, width) from those of own atoms (n_local, width)."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        rows = own.new_zeros(exchange.ntotal, own.shape[1])
        rows[: exchange.nlocal] = own
        out = torch.zeros_like(rows)
        exchange.forward_exchange(rows, out, own.shape[1])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        out = torch.zeros_like(gradient)
        ctx.exchange.reverse_exchange(gradient, out, gradient.shape[1])
        return out[: ctx.exchange.nlocal], None


class _DomainStage(Stage):
    """A stage that first obtains the features of ghosts, or leaves them out where it does not read them."""

    def __init__(self, stage: Stage, exchange: Exchange, n_nodes: int):
        super().__init__()
        self.stage, self.exchange, self.n_nodes = stage, exchange, n_nodes
        self.emits_scalars, self.gathers = stage.emits_scalars, stage.gathers

    def forward(self, state: State, geometry: Geometry) -> State:
        """Change the state; rows of ghosts in the result mean nothing."""
        own = tuple(x[: self.exchange.nlocal] for x in state[: self.n_nodes])
        nodes = self._with_ghosts(own) if self.gathers else own
        changed: State = self.stage((*nodes, *state[self.n_nodes :]), geometry)
        return changed

    def _with_ghosts(self, own: State) -> State:
        """Exchange all node features in one message."""
        widths = [x[0].numel() if len(x) else x.new_empty(1, *x.shape[1:]).numel() for x in own]
        flat = torch.cat([x.reshape(len(x), width) for x, width in zip(own, widths, strict=True)], dim=1)
        rows = _Ghosts.apply(flat, self.exchange).split(widths, dim=1)
        return tuple(row.reshape(len(row), *x.shape[1:]) for row, x in zip(rows, own, strict=True))


class _DomainReadout(nn.Module):
    """Energies of own atoms, and zeros for ghosts."""

    def __init__(self, readout: nn.Module, exchange: Exchange):
        super().__init__()
        self.readout, self.exchange = readout, exchange

    def forward(self, scalars: list[Tensor], species: Tensor) -> Tensor:
        """Map L tensors (n_total, channels) to energies (n_total,) in eV."""
        n_own, n_total = self.exchange.nlocal, self.exchange.ntotal
        energies: Tensor = self.readout([x[:n_own] for x in scalars], species[:n_own])
        return torch.cat([energies, energies.new_zeros(n_total - n_own)])


def in_domain(potential: Potential, exchange: Exchange) -> Potential:
    """Give the potential of a domain, whose energies are right for own atoms; weights are shared.

    The first stage that reads neighbours needs no exchange, since embeddings are functions of the elements alone. Potentials
    that are cut by halos exchange nothing.
    """
    twin = potential.with_core_repulsion(potential.core_repulsion)
    if potential.decomposition == "stages":
        stages = [*potential.stages]
        first = 1 + next((k for k, stage in enumerate(stages) if stage.gathers), len(stages))
        later = [_DomainStage(stage, exchange, potential.node_entries) for stage in stages[first:]]
        twin.stages = nn.ModuleList([*stages[:first], *later])
    twin.readout = _DomainReadout(potential.readout, exchange)
    return twin


def require_decomposable(potential: Potential, name: str) -> None:
    """Raise :class:`ArgumentError` for a potential that cannot be evaluated domain by domain."""
    if potential.decomposition == "none":
        raise ArgumentError(
            f"{name!r} ({potential.architecture}) cannot be evaluated domain by domain: its energy is read from the "
            "mean over the whole structure and is not a sum over atoms; use ASE or TorchSim"
        )


def halo_width(potential: Potential) -> float:
    """Distance in Å up to which a domain needs atoms of others."""
    hyper = potential.hyper
    return hyper.cutoff * (hyper.n_blocks if potential.decomposition == "halo" else 1)


@dataclass(frozen=True)
class DomainPrediction:
    """What a potential says about the own atoms of a domain.

    Attributes
    ----------
    energies : (n_local,) float64
        eV.
    gradient : (n_edges, 3) float64
        Of the energy of the whole structure with respect to this domain's edge vectors, eV/Å.
    scalars : (n_local, channels) each
        Inputs of the readout.
    """

    energies: Tensor
    gradient: Tensor
    scalars: tuple[Tensor, ...]


def predict_domain(
    potential: Potential, vectors: Tensor, graph: Topology, exchange: Exchange
) -> DomainPrediction:
    """Evaluate one domain; all domains do it together, those without atoms or edges, too.

    Parameters
    ----------
    potential
        Frozen, perhaps prepared for inference.
    vectors, graph
        Edge vectors (n_edges, 3) in Å and topology; of the atoms, own ones first.
    exchange
        Between the domains.
    """
    local, n_own = in_domain(potential, exchange), exchange.nlocal
    vectors = vectors.detach().double().requires_grad_()
    with torch.enable_grad():
        energies, scalars = local(vectors, graph)
        (gradient,) = torch.autograd.grad(energies[:n_own].sum(), vectors)
    own = tuple(x[:n_own].detach() for x in scalars)
    return DomainPrediction(energies[:n_own].detach(), gradient, own)
