r"""NequIP, an E(3)-equivariant interatomic potential (Batzner et al., arXiv 2101.03164), on e3nn.

One stage maps the *pre-gate* features :math:`y` of a block to those of the next:

.. math::

   h_i = \mathrm{gate}(y_i),\qquad
   m_i = \frac{1}{\bar n} \sum_j f_c(r_{ij})\, R(r_{ij})
         \odot \big(W_{\rm up} h_j \otimes Y(\hat{\mathbf r}_{ij})\big),\qquad
   y'_i = W_{\rm down} m_i + W_{\rm skip} h_i .

================================================  ======================================
equation                                          variable
================================================  ======================================
y (n_atoms, irreps.dim)                           ``state[0]``, laid out by :class:`.Gate`
W_up, W_down, W_skip                              ``linear_up``, ``linear_down``, ``skip`` (``o3.Linear``)
R(r), one weight per path and channel             ``radial`` (``FullyConnectedNet`` without bias)
f_c(r)                                            ``geometry.envelope``
x ⊗ Y, per path                                   ``geometry.angular``, see :mod:`.tensor_product`
n̄, mean number of neighbours                      ``avg_num_neighbors``
================================================  ======================================

Order l has parity (-1)^l throughout. The self-connection W_skip is shared by all elements; the last block
makes scalars only. Two choices keep features and initial forces of order one. Sums of messages, which are not
independent, are divided by n̄, as in MACE (arXiv 2206.07697), and not by its square root. The radial networks
are scaled by the mean square 1/cutoff^2 of their input, the Bessel basis at distances between 1 Å and the cutoff.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from e3nn import o3
from e3nn.nn import FullyConnectedNet
from torch import Tensor
from torch.nn.functional import silu

from ase_gffmerge.graphs.graph import Topology
from ase_gffmerge.models.base import EdgeGeometry, HyperParameters, Potential, Stage, State
from ase_gffmerge.models.layers.e3nn_compat import eager_e3nn, keep_plain
from ase_gffmerge.models.layers.linear import take_rows
from ase_gffmerge.models.layers.tensor_product import Convolution, CoupledHarmonics, natural

SILU_SCALE = 1.6765324703310918
"""c = <silu(z)^2>^(-1/2) for normally distributed z."""


class Gate:
    r"""Gated nonlinearity of pre-gate features: scalars, one gate per tensor, tensors; it has no parameters.

    .. math:: s \to c\,\mathrm{silu}(s),\qquad t^{(l)}_u \to c\,\mathrm{silu}(g^{(l)}_u)\,t^{(l)}_u

    (Weiler et al., arXiv 1807.02547), with c such that a normally distributed input keeps its second moment.

    Parameters
    ----------
    channels
        Gated features of every order l = 0, 1, ...

    Attributes
    ----------
    irreps_in
        Pre-gate features.
    """

    def __init__(self, channels: tuple[int, ...]):
        self.channels = channels
        self.irreps_in = natural((sum(channels), *channels[1:]))

    def __call__(self, features: Tensor) -> Tensor:
        """Map (n_atoms, irreps_in.dim) to gated features (n_atoms, natural(channels).dim)."""
        n_scalars = sum(self.channels)
        scalars, *gates = (SILU_SCALE * silu(features[:, :n_scalars])).split(self.channels, dim=1)
        sizes = [mul * (2 * order + 1) for order, mul in enumerate(self.channels) if order]
        tensors = features[:, n_scalars:].split(sizes, dim=1)
        gated = [
            (gate[:, :, None] * tensor.unflatten(1, (gate.shape[1], -1))).flatten(1)
            for gate, tensor in zip(gates, tensors, strict=True)
        ]
        return torch.cat([scalars, *gated], dim=1)


@dataclass(frozen=True, kw_only=True)
class NequIPHyper(HyperParameters):
    """Hyper-parameters of :class:`NequIP`.

    Attributes
    ----------
    n_radial
        Radial basis functions.
    l_max
        Largest order of features and spherical harmonics.
    tensor_channels
        Features per atom of every order l > 0.
    radial_hidden, radial_layers
        Width and number of hidden layers of the radial networks.
    avg_num_neighbors
        Neighbours within the cutoff that normalise the sum of messages.
    """

    n_radial: int = 8
    l_max: int = 2
    tensor_channels: int = 32
    radial_hidden: int = 64
    radial_layers: int = 2
    avg_num_neighbors: float = 10.0


class Interaction(Stage):
    """One interaction block, from pre-gate to pre-gate features.

    Parameters
    ----------
    hyper
        Hyper-parameters.
    gate
        Gate of the features of the block before; ``None`` for the first block, which takes the embedding.
    channels_out
        Gated features of every order that the next block takes.
    """

    def __init__(self, hyper: NequIPHyper, *, gate: Gate | None, channels_out: tuple[int, ...]):
        super().__init__()
        self.gate = gate
        channels = gate.channels if gate else (hyper.channels,)
        irreps, irreps_out = natural(channels), Gate(channels_out).irreps_in
        self.convolution = Convolution(channels, l_max=hyper.l_max, l_out=len(channels_out) - 1)
        hidden, n_weights = hyper.radial_layers * [hyper.radial_hidden], sum(self.convolution.weight_channels)
        widths = [hyper.n_radial, *hidden, n_weights]
        self.radial = FullyConnectedNet(widths, silu, variance_in=hyper.cutoff**-2)
        self.linear_up = o3.Linear(irreps, irreps)
        self.linear_down = o3.Linear(self.convolution.irreps_out, irreps_out)
        self.skip = o3.Linear(irreps, irreps_out)
        self.normalisation = 1 / hyper.avg_num_neighbors

    def forward(self, state: State, geometry: EdgeGeometry) -> State:
        """Map pre-gate features (n_atoms, dim) of one block to those of the next."""
        features = self.gate(state[0]) if self.gate else state[0]
        messages = self.messages(self.linear_up(features), geometry)
        zeros = messages.new_zeros(len(features), messages.shape[1])
        summed = self.normalisation * zeros.index_add(0, geometry.receiver, messages)
        return (self.linear_down(summed) + self.skip(features),)

    def messages(self, features: Tensor, geometry: EdgeGeometry) -> Tensor:
        """Messages on edges (n_edges, irreps.dim)."""
        weights = self.radial(geometry.radial) * geometry.envelope
        return self.convolution(take_rows(features, geometry.sender), geometry.angular, weights)


class NequIP(Potential):
    """NequIP with a Bessel basis and a polynomial envelope.

    Parameters
    ----------
    hyper
        Hyper-parameters.
    species
        Atomic numbers.
    """

    architecture: ClassVar[str] = "nequip"
    Hyper: ClassVar[type[HyperParameters]] = NequIPHyper

    def __init__(self, hyper: NequIPHyper, species: tuple[int, ...]):
        super().__init__(hyper, species)
        hidden = (hyper.channels, *hyper.l_max * (hyper.tensor_channels,))
        gate = None
        with eager_e3nn():
            self.coupled_harmonics = CoupledHarmonics(hyper.l_max)
            for block in range(hyper.n_blocks):
                channels_out = hidden if block < hyper.n_blocks - 1 else hidden[:1]
                self.stages.append(Interaction(hyper, gate=gate, channels_out=channels_out))
                gate = Gate(channels_out)
        keep_plain(self)

    def embed(self, graph: Topology) -> State:
        """Element embeddings."""
        return (self.embedded(graph),)

    def angular(self, directions: Tensor) -> Tensor:
        """Coupled spherical harmonics."""
        return self.coupled_harmonics(directions)

    def scalars(self, state: State) -> Tensor:
        """Scalars after the gate (n_atoms, channels)."""
        return SILU_SCALE * silu(state[0][:, : self.hyper.channels])
