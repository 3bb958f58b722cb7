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
x ⊗ Y, per path                                   ``geometry.angular``, see :class:`.Convolution`
n̄, mean number of neighbours                      ``avg_num_neighbors``
================================================  ======================================

Order l has parity (-1)^l throughout. The self-connection W_skip is shared by all elements; the last block
makes scalars only. Two choices keep features and initial forces of order one. Sums of messages, which are not
independent, are divided by n̄, as in MACE (arXiv 2206.07697), and not by its square root. The radial networks
are scaled by the mean square 1/cutoff^2 of their input, the Bessel basis at distances between 1 Å and the cutoff.

Convolution of equivariant features with spherical harmonics.

A path :math:`p = (l_1, l_2, l_3)` takes features of order :math:`l_1` and harmonics of order :math:`l_2` to
order :math:`l_3` with the Wigner 3j symbols C of e3nn. Harmonics have one channel, so their part does not
depend on features and is evaluated once per edge, whatever the number of blocks and channels:

.. math::

   B^{(p)}_{m_1 m_3}(\hat{\mathbf r}) =
       \sqrt{2l_3+1}\,\sum_{m_2} C^{l_1 l_2 l_3}_{m_1 m_2 m_3} Y_{l_2 m_2}(\hat{\mathbf r}),
   \qquad (x \otimes Y)^{(p)}_{u m_3} = \sum_{m_1} x_{u m_1} B^{(p)}_{m_1 m_3}.

This is e3nn's ``TensorProduct`` in mode ``uvu`` with ``path_normalization="none"``, in another order of
summation; its constants stay in float64, whatever happens to the weights.
"""

from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import ClassVar, NamedTuple, Self

import torch
from e3nn import o3
from e3nn.nn import FullyConnectedNet
from torch import Tensor, nn
from torch.nn.functional import silu

from ase_gffmerge.graphs.graph import Topology
from ase_gffmerge.models.base import EdgeGeometry, HyperParameters, Potential, Stage, State
from ase_gffmerge.models.layers import eager_e3nn, keep_plain
from ase_gffmerge.models.layers.equivariant import EdgeSums
from ase_gffmerge.models.layers.linear import take_rows
from ase_gffmerge.models.layers.readout import ExactBuffers


class Path(NamedTuple):
    """Orders of features, harmonics and result."""

    l1: int
    l2: int
    l3: int


def natural(channels: tuple[int, ...]) -> o3.Irreps:
    """Irreps with ``channels[l]`` features of order l and parity (-1)^l."""
    return o3.Irreps([(mul, (order, (-1) ** order)) for order, mul in enumerate(channels)])


def coupling_paths(l_in: int, l_harmonics: int, l_out: int) -> tuple[Path, ...]:
    """Paths between orders of natural parity by l1, then l3: a smaller ``l_out`` cuts the end of each l1.

    Parameters
    ----------
    l_in, l_harmonics, l_out
        Largest orders of features, harmonics and results.
    """
    orders = product(range(l_in + 1), range(l_out + 1), range(l_harmonics + 1))
    return tuple(
        Path(l1, l2, l3) for l1, l3, l2 in orders if abs(l1 - l3) <= l2 <= l1 + l3 and (l1 + l2 + l3) % 2 == 0
    )


def total_order(paths: tuple[Path, ...], l1: int) -> int:
    """Components of all results of features of order ``l1``."""
    return sum(2 * path.l3 + 1 for path in paths if path.l1 == l1)


class CoupledHarmonics(ExactBuffers):
    """Matrices B of all paths for a batch of directions.

    Parameters
    ----------
    l_max
        Largest order of features and harmonics.
    """

    coefficients: Tensor

    def __init__(self, l_max: int):
        super().__init__()
        orders = list(range(l_max + 1))
        self.harmonics = o3.SphericalHarmonics(orders, normalize=False, normalization="component")
        paths, groups = coupling_paths(l_max, l_max, l_max), []
        for l1 in orders:
            group = [self.symbols(path, l_max) for path in paths if path.l1 == l1]
            groups.append(torch.cat(group, dim=2).flatten(1))
        self.register_buffer("coefficients", torch.cat(groups, dim=1), persistent=False)

    @staticmethod
    def symbols(path: Path, l_max: int) -> Tensor:
        """Symbols (n_harmonics, 2 l1 + 1, 2 l3 + 1) of one path, zero for harmonics of other orders."""
        table = torch.zeros((l_max + 1) ** 2, 2 * path.l1 + 1, 2 * path.l3 + 1, dtype=torch.float64)
        symbols = o3.wigner_3j(*path, dtype=torch.float64, device="cpu").transpose(0, 1)
        table[path.l2**2 : (path.l2 + 1) ** 2] = (2 * path.l3 + 1) ** 0.5 * symbols
        return table

    def forward(self, directions: Tensor) -> Tensor:
        """Map unit vectors (n_edges, 3) to the matrices B of all paths, flat (n_edges, n_coefficients)."""
        return self.harmonics(directions) @ self.coefficients.to(directions.dtype)


class Convolution:
    """Messages ``w_p ⊙ (x ⊗ Y)_p`` for every path p.

    Parameters
    ----------
    channels
        Features of every order l = 0, 1, ...
    l_max
        Largest order of the harmonics.
    l_out
        Largest order of the messages.

    Attributes
    ----------
    weight_channels
        Number of weights per path.
    irreps_out
        Layout of the messages.
    """

    def __init__(self, channels: tuple[int, ...], *, l_max: int, l_out: int):
        self.channels, self.l_max, self.l_out = channels, l_max, l_out
        self.paths = coupling_paths(len(channels) - 1, l_max, l_out)
        self.weight_channels = [channels[path.l1] for path in self.paths]
        self.order = sorted(range(len(self.paths)), key=lambda i: self.paths[i].l3)
        sums = [0] * (l_out + 1)
        for path, mul in zip(self.paths, self.weight_channels, strict=True):
            sums[path.l3] += mul
        self.irreps_out = natural(tuple(sums))

    def __call__(self, features: Tensor, coupled: Tensor, weights: Tensor) -> Tensor:
        """Map features, coupled harmonics and weights on edges to messages (n_edges, irreps_out.dim)."""
        products = self.products(features, coupled)
        per_path = weights.split(self.weight_channels, dim=1)
        return torch.cat([(products[i] * per_path[i][:, :, None]).flatten(1) for i in self.order], dim=1)

    def as_product(self) -> o3.TensorProduct:
        """E3nn's module for the same products of features with harmonics."""
        results = [(self.channels[path.l1], (path.l3, (-1) ** path.l3)) for path in self.paths]
        paths = [(path.l1, path.l2, self.order.index(i), "uvu", True) for i, path in enumerate(self.paths)]
        with eager_e3nn():
            return o3.TensorProduct(
                natural(self.channels),
                natural((1,) * (self.l_max + 1)),
                o3.Irreps([results[i] for i in self.order]),
                paths,
                shared_weights=False,
                path_normalization="none",
            )

    def products(self, features: Tensor, coupled: Tensor) -> list[Tensor]:
        """(x ⊗ Y)_p (n_edges, channels, 2 l3 + 1) for every path."""
        all_paths = coupling_paths(self.l_max, self.l_max, self.l_max)
        products: list[Tensor] = []
        feature, column = 0, 0
        for l1, mul in enumerate(self.channels):
            rows, n_columns = 2 * l1 + 1, total_order(all_paths, l1)
            x = features[:, feature : feature + mul * rows].unflatten(1, (mul, rows))
            b = coupled[:, column : column + rows * n_columns].unflatten(1, (rows, n_columns))
            b = b[:, :, : total_order(self.paths, l1)]
            y = x @ b if l1 else x * b
            products += y.split([2 * path.l3 + 1 for path in self.paths if path.l1 == l1], dim=2)
            feature, column = feature + mul * rows, column + rows * n_columns
        return products


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
        summed = self.normalisation * self.summed(self.linear_up(features), geometry)
        return (self.linear_down(summed) + self.skip(features),)

    def summed(self, features: Tensor, geometry: EdgeGeometry) -> Tensor:
        """Sums of messages (n_atoms, irreps.dim)."""
        messages = self.messages(features, geometry)
        zeros = messages.new_zeros(len(features), messages.shape[1])
        return zeros.index_add(0, geometry.receiver, messages)

    def messages(self, features: Tensor, geometry: EdgeGeometry) -> Tensor:
        """Messages on edges (n_edges, irreps.dim)."""
        weights = self.radial(geometry.radial) * geometry.envelope
        return self.convolution(take_rows(features, geometry.sender), geometry.angular, weights)


@lru_cache(maxsize=32)
def _edge_sums(channels: tuple[int, ...], l_max: int, l_out: int) -> EdgeSums:
    """Sums of the messages of a :class:`Convolution`, which hold no weights and take e3nn a while to make."""
    return EdgeSums(Convolution(channels, l_max=l_max, l_out=l_out).as_product())


class InferenceInteraction(Interaction):
    """The same on a CPU for weights that stay as they are, with harmonics for angular functions: see :class:`.EdgeSums`.

    Parameters
    ----------
    interaction
        Whose weights are shared.
    """

    def __init__(self, interaction: Interaction):
        nn.Module.__init__(self)
        vars(self).update({**vars(interaction), "_modules": {**interaction._modules}})
        convolution = interaction.convolution
        self.sums = _edge_sums(convolution.channels, convolution.l_max, convolution.l_out)

    def summed(self, features: Tensor, geometry: EdgeGeometry) -> Tensor:
        """Sums of messages (n_atoms, irreps.dim)."""
        weights = self.radial(geometry.radial) * geometry.envelope
        found: Tensor = self.sums(
            features, geometry.angular, weights, torch.stack([geometry.sender, geometry.receiver])
        )
        return found


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
    hyper: NequIPHyper

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

    def for_inference(self) -> Self:
        """Give a copy that sums messages block by block on a CPU, which shares the weights."""
        if self.device.type != "cpu":
            return self
        twin = copy(self)
        stages = [InferenceInteraction(stage) for stage in self.stages if isinstance(stage, Interaction)]
        twin._modules = {**self._modules, "coupled_harmonics": self.coupled_harmonics.harmonics}
        twin.stages = nn.ModuleList(stages).train(self.training)
        return twin

    def embed(self, graph: Topology) -> State:
        """Element embeddings."""
        return (self.embedded(graph),)

    def angular(self, directions: Tensor) -> Tensor:
        """Coupled spherical harmonics."""
        return self.coupled_harmonics(directions)

    def scalars(self, state: State) -> Tensor:
        """Scalars after the gate (n_atoms, channels)."""
        return SILU_SCALE * silu(state[0][:, : self.hyper.channels])

    def vectors(self, state: State) -> Tensor | None:
        """Features of order 1 before the gate (n_atoms, 3, tensor_channels); the last block has none."""
        features, hyper = state[0], self.hyper
        first = hyper.channels + hyper.l_max * hyper.tensor_channels
        if hyper.l_max == 0 or features.shape[1] <= first:
            return None
        return features[:, first : first + 3 * hyper.tensor_channels].unflatten(1, (-1, 3)).transpose(1, 2)
