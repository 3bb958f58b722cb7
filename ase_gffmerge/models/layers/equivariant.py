r"""Equivariant layers as they are served: for weights that stay as they are, and derivatives that are taken once.

With features x of the sending atoms, harmonics Y of the edges (one channel per order) and weights w per edge, path
:math:`p = (l_1, l_2, l_3)` and channel u,

.. math::

   m^{(p)}_{i,u m_3} = \sum_{j} w^{(p)}_{ij,u} \sum_{m_1} B^{(p)}_{ij, m_3 m_1}\, x_{j,u m_1},\qquad
   B^{(p)}_{m_3 m_1} = c_p \sum_{m_2} C^{l_1 l_2 l_3}_{m_1 m_2 m_3} Y_{l_2 m_2},

which is e3nn's ``TensorProduct`` in mode ``uvu`` between a gather and a scatter. Here channels are the last axis, so that
every product runs along contiguous memory, and messages exist for a block of edges at a time, which fits the processor's
cache; the derivatives make them again.

Symmetric products of the features A of an atom (MACE, arXiv 2206.07697, eqs. 10 and 11) are polynomials in them, whose
coefficients depend on element and channel. With :math:`z = (A_1, \dots, A_n, 1)`

.. math::

   B_{i,cm} = \sum_{a \le b} z_{ica} z_{icb} \sum_d P^{(z_i)}_{cm,abd}\,z_{icd} .

The coefficients P are made once for every element that occurs, and atoms of one element are treated together.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from e3nn.o3 import Irreps, TensorProduct, wigner_3j
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ase_gffmerge.models.layers.readout import ExactBuffers

BLOCK = 400_000
"""Numbers in the messages of a block of edges."""


class SummedPath(NamedTuple):
    """A path: columns of its weights, components of its result, and where in the output the result stands."""

    weights: slice
    components: int
    output: slice


class Order(NamedTuple):
    """Features of one irrep of the input, and all paths that take them.

    Attributes
    ----------
    features
        Columns of the input.
    channels, components
        What they consist of.
    paths
        In order.
    rows
        Components of all results.
    """

    features: slice
    channels: int
    components: int
    paths: tuple[SummedPath, ...]
    rows: int


class EdgeSums(ExactBuffers):
    """Sums over the edges of a tensor product, see the module; it has no parameters.

    Parameters
    ----------
    product
        For which :meth:`can_replace` holds.
    """

    coefficients: Tensor

    def __init__(self, product: TensorProduct):
        super().__init__()
        first, second, result = product.irreps_in1, product.irreps_in2, product.irreps_out
        columns, outputs, start, starts = first.slices(), result.slices(), 0, []
        for path in product.instructions:
            starts.append(start)
            start += first[path.i_in1].mul
        self.orders: list[Order] = []
        tables = []
        for i, (mul, ir) in enumerate(first):
            own = [(begin, path) for begin, path in zip(starts, product.instructions) if path.i_in1 == i]
            if not own:
                continue
            paths = tuple(
                SummedPath(slice(begin, begin + mul), result[path.i_out].ir.dim, outputs[path.i_out])
                for begin, path in own
            )
            symbols = [
                path.path_weight * _symbols(second, path.i_in2, ir, result[path.i_out].ir) for _, path in own
            ]
            tables.append(torch.cat(symbols, dim=1).flatten(1))
            self.orders.append(Order(columns[i], mul, ir.dim, paths, sum(path.components for path in paths)))
        self.n_out, self.n_in = result.dim, first.dim
        self.sizes = [table.shape[1] for table in tables]
        self.register_buffer("coefficients", torch.cat(tables, dim=1), persistent=False)

    @staticmethod
    def can_replace(product: nn.Module) -> bool:
        """Whether a module is a tensor product of the kind, every result of which comes from one path."""
        if not isinstance(product, TensorProduct) or product.shared_weights or not product.instructions:
            return False
        paths, results = product.instructions, [path.i_out for path in product.instructions]
        return (
            all(path.connection_mode == "uvu" and path.has_weight for path in paths)
            and all(mul == 1 for mul, _ in product.irreps_in2)
            and all(mul > 0 for mul, _ in product.irreps_in1)
            and sorted(results) == list(range(len(product.irreps_out)))
        )

    def forward(self, features: Tensor, harmonics: Tensor, weights: Tensor, edge_index: Tensor) -> Tensor:
        """Messages (n_atoms, irreps_out.dim).

        Parameters
        ----------
        features
            Of the atoms (n_atoms, irreps_in1.dim).
        harmonics, weights
            Of the edges (n_edges, irreps_in2.dim) and (n_edges, n_weights).
        edge_index
            Senders and receivers (2, n_edges).
        """
        coupled = (harmonics @ self.coefficients.to(harmonics.dtype)).split(self.sizes, dim=1)
        by_order = [
            features[:, order.features].unflatten(1, (order.channels, order.components)).mT.contiguous()
            for order in self.orders
        ]
        sums: Tensor = _Sums.apply(self, edge_index, weights, *by_order, *coupled)
        return self._as_irreps(sums)

    def _as_irreps(self, sums: Tensor) -> Tensor:
        """Put the sums of all paths (n_atoms, irreps_out.dim), channels last, in the order of the result."""
        found: list[tuple[int, Tensor]] = []
        start = 0
        for order in self.orders:
            for path in order.paths:
                size = path.components * order.channels
                part = sums[:, start : start + size].unflatten(1, (path.components, order.channels))
                found.append((path.output.start, part.mT.flatten(1)))
                start += size
        return torch.cat([part for _, part in sorted(found, key=lambda entry: entry[0])], dim=1)


@lru_cache(maxsize=256)
def _symbols(harmonics: Irreps, i: int, ir_in: Any, ir_out: Any) -> Tensor:
    """Wigner's symbols (n_harmonics, 2 l3 + 1, 2 l1 + 1), zero for other harmonics than those of index ``i``."""
    table = torch.zeros(harmonics.dim, ir_out.dim, ir_in.dim, dtype=torch.float64)
    symbols = wigner_3j(ir_in.l, harmonics[i].ir.l, ir_out.l, dtype=torch.float64, device="cpu")
    table[harmonics.slices()[i]] = symbols.permute(1, 2, 0)
    return table


class _Sums(Function):
    """Sums (n_atoms, irreps_out.dim), path after path and channels last."""

    @staticmethod
    def forward(ctx: Any, sums: EdgeSums, edge_index: Tensor, weights: Tensor, *of_orders: Tensor) -> Tensor:
        """Sum the messages of one block of edges after the other.

        Parameters
        ----------
        ctx
            Keeps what the derivatives need.
        sums
            Which paths there are.
        edge_index, weights
            See :meth:`EdgeSums.forward`.
        of_orders
            Features (n_atoms, 2 l1 + 1, channels) of every order, then matrices B (n_edges, flat) of every order.
        """
        ctx.sums = sums
        ctx.save_for_backward(edge_index, weights, *of_orders)
        n = len(sums.orders)
        features, coupled = of_orders[:n], of_orders[n:]
        found = features[0].new_zeros(len(features[0]), sums.n_out)
        for block, sender, receiver in _blocks(edge_index, sums.n_out):
            messages = found.new_empty(len(sender), sums.n_out)
            start = 0
            for order, x, b in zip(sums.orders, features, coupled, strict=True):
                size = order.rows * order.channels
                result = messages[:, start : start + size].unflatten(1, (order.rows, order.channels))
                products = _products(b[block], x.index_select(0, sender))
                row = 0
                for path in order.paths:
                    rows = slice(row, row + path.components)
                    torch.mul(products[:, rows], weights[block, path.weights][:, None], out=result[:, rows])
                    row += path.components
                start += size
            found.index_add_(0, receiver, messages)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Derivatives with respect to weights, features and matrices."""
        sums: EdgeSums = ctx.sums
        edge_index, weights, *of_orders = ctx.saved_tensors
        n = len(sums.orders)
        features, coupled = of_orders[:n], of_orders[n:]
        of_features = [
            torch.zeros_like(x) if ctx.needs_input_grad[3 + i] else None for i, x in enumerate(features)
        ]
        of_coupled, of_weights = [torch.empty_like(b) for b in coupled], torch.empty_like(weights)
        for block, sender, receiver in _blocks(edge_index, sums.n_out):
            messages = gradient.index_select(0, receiver)
            start = 0
            for i, (order, x, b) in enumerate(zip(sums.orders, features, coupled, strict=True)):
                size = order.rows * order.channels
                own = messages[:, start : start + size].unflatten(1, (order.rows, order.channels))
                sent = x.index_select(0, sender)
                products = _products(b[block], sent).mul_(own)
                row = 0
                for path in order.paths:
                    rows = slice(row, row + path.components)
                    torch.sum(products[:, rows], dim=1, out=of_weights[block, path.weights])
                    own[:, rows].mul_(weights[block, path.weights][:, None])
                    row += path.components
                torch.bmm(own, sent.mT, out=of_coupled[i][block].unflatten(1, (order.rows, order.components)))
                if (total := of_features[i]) is not None:
                    total.index_add_(0, sender, _matrices(b[block], order.components).mT @ own)
                start += size
        return None, None, of_weights, *of_features, *of_coupled


def _blocks(edge_index: Tensor, width: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Edges, senders and receivers of one block after the other."""
    sender, receiver = edge_index
    size = max(BLOCK // width, 1)
    for start in range(0, len(sender), size):
        block = slice(start, start + size)
        yield block, sender[block], receiver[block]


def _matrices(flat: Tensor, components: int) -> Tensor:
    return flat.unflatten(1, (-1, components))


def _products(flat: Tensor, sent: Tensor) -> Tensor:
    """Matrices B times features (n, components, channels)."""
    matrices = _matrices(flat, sent.shape[1])
    return matrices * sent if sent.shape[1] == 1 else matrices @ sent


class SymmetricPowers(nn.Module):
    """Products of the features of an atom with themselves, up to the third power, see the module.

    Parameters
    ----------
    symbols
        For every irrep of the result the tensors of powers 1, 2, ... (2 l + 1, n, ..., n, n_weights).
    weights
        Likewise (n_elements, n_weights, channels), which are shared.
    """

    def __init__(self, symbols: Sequence[Sequence[Tensor]], weights: Sequence[Sequence[Tensor]]):
        super().__init__()
        self._symbols = [[_completed(tensor) for tensor in powers] for powers in symbols]
        self._weights, self._made = weights, dict[tuple[int, torch.dtype], Tensor]()
        self.components = [len(powers[0]) for powers in symbols]
        self.first, self.second = torch.triu_indices(*2 * [symbols[0][0].shape[1] + 1]).unbind()

    def forward(self, features: Tensor, elements: Tensor) -> Tensor:
        """Map features (n_atoms, channels, n) and one-hot elements (n_atoms, n_elements) to (n_atoms, irreps.dim)."""
        rows = elements.argmax(dim=1)
        z = torch.cat([features, torch.ones_like(features[:, :, :1])], dim=2).transpose(0, 1)
        groups = [(rows == row).nonzero()[:, 0] for row in rows.unique().tolist()]
        found = [self._evaluate(z.index_select(1, own), int(rows[own[0]])) for own in groups]
        order = torch.cat(groups).argsort()
        together = torch.cat(found, dim=1).index_select(1, order).transpose(0, 1)
        parts = together.split(self.components, dim=2)
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def _evaluate(self, z: Tensor, row: int) -> Tensor:
        """Polynomials (channels, n_atoms, components) of atoms of one element."""
        coefficients = self._coefficients(row, z.dtype)
        pairs = z.index_select(2, self.first) * z.index_select(2, self.second)
        inner = (z @ coefficients).unflatten(2, (-1, pairs.shape[2]))
        return (inner @ pairs[:, :, :, None]).squeeze(3)

    def _coefficients(self, row: int, dtype: torch.dtype) -> Tensor:
        """P of an element (channels, n + 1, components · pairs)."""
        if (known := self._made.get((row, dtype))) is not None:
            return known
        if len(self._made) >= MOST_ELEMENTS:
            self._made.clear()
        found = []
        for powers, weights in zip(self._symbols, self._weights, strict=True):
            total = torch.stack(
                [
                    torch.einsum("mabdk,kc->cdmab", tensor, weight[row].detach().to(tensor))
                    for tensor, weight in zip(powers, weights, strict=True)
                ]
            ).sum(dim=0)
            both = total + total.mT.triu(1)
            found.append(both[..., self.first, self.second])
        table = torch.cat(found, dim=2).flatten(2).to(dtype).contiguous()
        self._made[row, dtype] = table
        return table


MOST_ELEMENTS = 16
"""Whose coefficients are kept."""


def _completed(tensor: Tensor) -> Tensor:
    """The tensor of a power (components, n, ..., n_weights) as one of the third power of z."""
    power, n = tensor.ndim - 2, tensor.shape[1]
    full = torch.zeros(len(tensor), *3 * [n + 1], tensor.shape[-1], dtype=torch.float64, device=tensor.device)
    place: list[slice | int] = [slice(n)] * power + [n] * (3 - power)
    full[(slice(None), *place)] = tensor.double()
    return full


def replaced(root: nn.Module, swap: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Give a module some parts of which are others; it shares the rest, and is itself where nothing changes.

    Parameters
    ----------
    root
        Not changed.
    swap
        What stands in the place of a part; ``None`` where it stays.
    """
    if (found := swap(root)) is not None:
        return found
    parts = {name: replaced(part, swap) for name, part in root.named_children()}
    if all(part is root._modules[name] for name, part in parts.items()):
        return root
    twin = copy(root)
    twin._modules = {**root._modules, **parts}
    return twin
