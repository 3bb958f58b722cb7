r"""Linear layers of special kinds (sparse, on gathered features, one per element), and the edges that they gather along.

The last kind are the equivariant self-connections of NequIP,

.. math:: y_i^{(l)} = \sum_{p\,:\,l_p = l} W_p^{(z_i)}\, x_i^{(l_p)}

which packages write as a fully connected tensor product of the features with element attributes :math:`a_z` (one-hot
vectors, or rows of an embedding). Those enter only as :math:`W_p^{(z)} = c_p \sum_v a_{zv} W_{pv}`, which is what is kept
in :class:`ElementLinear`: for each element the layer is linear in its parameters, and a merge can treat one element at a
time.

Rows of a tensor, collected along edges or angles.

Bonds of edges, and angles of bonds, found on whatever device the edges are on.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from e3nn.o3 import FullyConnectedTensorProduct, Irreps
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import one_hot


def undirected(edge_index: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
    """Join the edges j -> i and i -> j of a neighbour list into one bond.

    Parameters
    ----------
    edge_index : (2, n_edges)
        Sender and receiver.
    shifts : (n_edges, 3)
        Cell shifts of the senders, whole numbers.

    Returns
    -------
    bond : (n_edges,)
        Bond of every edge.
    edge : (n_bonds,)
        One edge of every bond.
    """
    sender, receiver = edge_index
    shifts = shifts.long()
    span = 2 * int(shifts.abs().max()) + 1 if len(shifts) else 1
    code = (shifts[:, 0] * span + shifts[:, 1]) * span + shifts[:, 2]
    backward = (sender > receiver) | ((sender == receiver) & (code < 0))
    low, high = torch.minimum(sender, receiver), torch.maximum(sender, receiver)
    code = torch.where(backward, -code, code) + span**3
    key = (low * (int(high.max()) + 1 if len(high) else 1) + high) * (2 * span**3) + code
    _, bond = torch.unique(key, return_inverse=True)
    n_bonds = int(bond.max()) + 1 if len(bond) else 0
    edge = bond.new_zeros(n_bonds).scatter_(0, bond, torch.arange(len(bond), device=bond.device))
    return bond, edge


def reversed_edges(edge_index: Tensor, shifts: Tensor) -> Tensor:
    """Edge i -> j of every edge j -> i (n_edges,); an edge without one is given itself.

    Parameters
    ----------
    edge_index : (2, n_edges)
        Sender and receiver.
    shifts : (n_edges, 3)
        Cell shifts of the senders, whole numbers.
    """
    sender, receiver = edge_index
    if not len(sender):
        return sender
    shifts, n = shifts.long(), int(edge_index.max()) + 1
    span = 2 * int(shifts.abs().max()) + 1
    code = (shifts[:, 0] * span + shifts[:, 1]) * span + shifts[:, 2]
    own, other = (
        (sender * n + receiver) * (2 * span**3) + code,
        (receiver * n + sender) * (2 * span**3) - code,
    )
    ordered, order = own.sort()
    found = order[torch.searchsorted(ordered, other).clamp(max=len(own) - 1)]
    return torch.where(own[found] == other, found, torch.arange(len(own), device=own.device))


def angles_between(receiver: Tensor, edges: Tensor) -> Tensor:
    """Ordered pairs (2, n_angles) of different edges that have the same receiver.

    Parameters
    ----------
    receiver : (n_edges,)
        Of all edges.
    edges : (n_chosen,)
        Indices of those that may form angles.
    """
    edges = edges[torch.argsort(receiver[edges], stable=True)]
    _, atom, counts = torch.unique_consecutive(receiver[edges], return_inverse=True, return_counts=True)
    start = (counts.cumsum(0) - counts)[atom]
    partners = counts[atom]
    first = torch.arange(len(edges), device=edges.device).repeat_interleave(partners)
    within = torch.arange(len(first), device=edges.device) - (partners.cumsum(0) - partners)[first]
    second = start[first] + within
    different = first != second
    return torch.stack([edges[first[different]], edges[second[different]]])


Part = tuple[Tensor, Tensor | None]
"""Features (m, d) and the row that each of n rows takes; ``None`` when the features are those rows already."""


_many_directions: ContextVar[bool] = ContextVar("many_directions", default=False)


@contextmanager
def many_directions() -> Iterator[None]:
    """Let :func:`take_rows` be fast along many directions at once; a single evaluation is slower by a few hundredths."""
    token = _many_directions.set(True)
    try:
        yield
    finally:
        _many_directions.reset(token)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Collect ``x[rows]`` (n, ...) from x (m, ...).

    It is ``index_select``, whose derivatives along many directions at once (``vmap`` of ``jvp``) PyTorch takes one element
    at a time; within :func:`many_directions` they are rows of rows.
    """
    if torch.compiler.is_compiling() or not _many_directions.get():
        return x.index_select(0, rows)
    collected: Tensor = _Rows.apply(x, rows)
    return collected


class _Rows(Function):
    shape: torch.Size

    @staticmethod
    def forward(x: Tensor, rows: Tensor) -> Tensor:
        return x.index_select(0, rows)

    @staticmethod
    def setup_context(ctx: "_Rows", inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, rows = inputs
        ctx.save_for_backward(rows)
        ctx.save_for_forward(rows)
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: "_Rows", gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.shape).index_add(0, rows, gradient), None

    @staticmethod
    def jvp(ctx: "_Rows", tangent: Tensor, _: None) -> Tensor:
        (rows,) = ctx.saved_tensors
        return take_rows(tangent, rows)

    @staticmethod
    def vmap(
        info: object, in_dims: tuple[int | None, int | None], x: Tensor, rows: Tensor
    ) -> tuple[Tensor, int]:
        if in_dims[1] is not None:
            raise NotImplementedError("rows that differ from probe to probe")
        return x.movedim(in_dims[0] or 0, 0).index_select(1, rows), 0


class SparseLinear(nn.Module):
    r"""Affine map :math:`y_{gw} = \sum_s W_{gws}\, x_{I_{gs}} + b_{gw}`: each of G groups of outputs reads S inputs.

    A dense map of the same width costs d/S times as much.

    Parameters
    ----------
    in_features, out_features
        Sizes d and G·W; the number of outputs must be divisible by that of groups.
    groups
        G.
    inputs
        S; which ones each group reads is drawn at random, the same whenever the sizes are.
    """

    inputs: Tensor

    def __init__(self, in_features: int, out_features: int, *, groups: int, inputs: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        generator = torch.Generator().manual_seed(0)
        chosen = [torch.randperm(in_features, generator=generator)[:inputs] for _ in range(groups)]
        self.register_buffer("inputs", torch.stack(chosen), persistent=False)
        self.weight = nn.Parameter(torch.zeros(groups, out_features // groups, inputs))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def linear(self, x: Tensor) -> Tensor:
        """Map (n, d) to (n, G·W) without the offset b."""
        read = x.T.index_select(0, self.inputs.flatten()).unflatten(0, self.inputs.shape)
        return torch.bmm(self.weight, read).flatten(0, 1).T

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, d) to (n, G·W)."""
        return self.linear(x) + self.bias


class JoinedLinear(nn.Linear):
    r"""Linear layer on joined features, :math:`y_n = W\,[x^1_{i_1(n)};\dots;x^K_{i_K(n)}] + b`.

    As the layer is linear, :math:`y_n = \sum_k (W_k x^k)_{i_k(n)} + b`: the products are taken before the rows are
    collected, of which there are many times more.
    """

    def forward(self, parts: Sequence[Part]) -> Tensor:  # type: ignore[override]
        """Map parts whose widths add up to ``in_features`` to (n, out_features)."""
        weights = self.weight.split([features.shape[-1] for features, _ in parts], dim=1)
        total: Tensor = self.bias
        for (features, rows), weight in zip(parts, weights, strict=True):
            if rows is None:
                total = torch.addmm(total, features, weight.T)
            elif total is self.bias:
                total = take_rows(features @ weight.T + total, rows)
            else:
                total = take_rows(features @ weight.T, rows) + total
        return total

    def entering(self, parts: Sequence[Part]) -> Tensor:
        """Give the input (n, in_features) of the plain linear layer."""
        return torch.cat([x if rows is None else take_rows(x, rows) for x, rows in parts], dim=1)


@dataclass(frozen=True)
class Block:
    """One path from an input irrep to an output irrep.

    Attributes
    ----------
    source
        Columns of the input.
    i_out
        Position of the output irrep.
    shape
        Channels of input and output.
    coefficients
        Columns of the weights.
    """

    source: slice
    i_out: int
    shape: tuple[int, int]
    coefficients: slice


class ElementLinear(nn.Module):
    """Bias-free linear layer between irreps, one per element.

    Parameters
    ----------
    irreps_in, irreps_out
        Layouts of the features.
    species
        Atomic numbers, ascending; one row of ``weight`` each.
    """

    species_row: Tensor

    def __init__(self, irreps_in: Irreps, irreps_out: Irreps, species: Sequence[int]):
        super().__init__()
        self.irreps_in, self.irreps_out = Irreps(irreps_in), Irreps(irreps_out)
        self.species = tuple(species)
        self.blocks: list[Block] = []
        size = 0
        for source, (mul_in, ir_in) in zip(self.irreps_in.slices(), self.irreps_in, strict=True):
            for i_out, (mul_out, ir_out) in enumerate(self.irreps_out):
                if ir_in == ir_out:
                    end = size + mul_in * mul_out
                    self.blocks.append(Block(source, i_out, (mul_in, mul_out), slice(size, end)))
                    size = end
        rows = torch.full((119,), -1)
        rows[list(self.species)] = torch.arange(len(self.species))
        self.register_buffer("species_row", rows, persistent=False)
        self.weight = nn.Parameter(torch.randn(len(self.species), size))

    def forward(self, x: Tensor, atomic_numbers: Tensor) -> Tensor:
        """Map features (n_atoms, irreps_in.dim) and atomic numbers (n_atoms,) to (n_atoms, irreps_out.dim)."""
        weight = self.weight[self.species_row[atomic_numbers]]
        parts = [x.new_zeros(len(x), mul, ir.dim) for mul, ir in self.irreps_out]
        for block in self.blocks:
            w = weight[:, block.coefficients].unflatten(1, block.shape)
            features = x[:, block.source].unflatten(1, (block.shape[0], -1))
            parts[block.i_out] = parts[block.i_out] + w.mT @ features
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def per_element(self, x: Tensor, atomic_numbers: Tensor) -> Tensor:
        """Give (n_atoms, n_species, irreps_in.dim): the features in the row of the atom's element, zeros in the others."""
        mask = one_hot(self.species_row[atomic_numbers], len(self.species)).to(x.dtype)
        return x[:, None, :] * mask[:, :, None]


@torch.no_grad()
def element_weights(product: FullyConnectedTensorProduct, attributes: Tensor) -> Tensor:
    """Weights (n_species, size) of the :class:`ElementLinear` that a tensor product with element attributes is.

    Parameters
    ----------
    product
        Of features with invariant attributes; all of its paths have weights.
    attributes : (n_species, n_attributes)
        One row per element.
    """
    return torch.cat(
        [
            scale * torch.einsum("zv,uvw->zuw", attributes.to(view), view).flatten(1)
            for scale, view in _paths(product)
        ],
        dim=1,
    )


@torch.no_grad()
def write_product(product: FullyConnectedTensorProduct, weights: Tensor) -> None:
    """Set the weights of a tensor product, one row per attribute; with one-hot elements, undoes :func:`element_weights`.

    Parameters
    ----------
    product
        Written in place.
    weights : (n_attributes, size)
        What an :class:`ElementLinear` has for elements, for each of which one attribute is 1 and the others are 0.
    """
    start = 0
    for scale, view in _paths(product):
        n_in, n_attributes, n_out = view.shape
        block = weights[:, start : start + n_in * n_out].view(n_attributes, n_in, n_out)
        view.copy_(block.transpose(0, 1) / scale)
        start += n_in * n_out


def _paths(product: FullyConnectedTensorProduct) -> Iterator[tuple[float, Tensor]]:
    """Factor and weights (n_in, n_attributes, n_out) of every path, in the order of :class:`ElementLinear`."""
    paths = sorted(enumerate(product.instructions), key=lambda entry: (entry[1].i_in1, entry[1].i_out))
    for i, instruction in paths:
        scale = instruction.path_weight / product.irreps_out[instruction.i_out].ir.dim ** 0.5
        yield scale, product.weight_view_for_instruction(i)
