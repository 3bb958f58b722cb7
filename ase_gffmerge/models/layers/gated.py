r"""Gated networks, :math:`\mathrm{core}(x)\odot\sigma(\mathrm{gate}(x))`, of M3GNet and of its readout."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from ase_gffmerge.models.layers.linear import JoinedLinear, Part

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swish": silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": softplus,
    "softplus2": lambda x: softplus(x) - math.log(2.0),
}
"""By the names that ``matgl`` gives them."""


class GatedNetwork(nn.Module):
    r"""Two networks of the same shape, the core with SiLU after its layers, the gate with SiLU between and σ at the end.

    Parameters
    ----------
    widths
        Of input, hidden layers and output.
    bias
        Whether the layers have one.
    joined
        The input is a sequence of parts, see :class:`.JoinedLinear`.
    activate_last
        Whether SiLU follows the core's last layer, too.
    """

    def __init__(
        self, widths: Sequence[int], *, bias: bool = True, joined: bool = False, activate_last: bool = True
    ):
        super().__init__()
        self.activate_last = activate_last
        first = JoinedLinear if joined else nn.Linear
        pairs = list(pairwise(widths))
        self.core, self.gate = (
            nn.ModuleList((nn.Linear if i else first)(*pair, bias=bias) for i, pair in enumerate(pairs))
            for _ in range(2)
        )

    def forward(self, x: Tensor | Sequence[Part]) -> Tensor:
        """Map features (n, widths[0]), joined or not, to (n, widths[-1])."""
        core, gate = _through(self.core, x), _through(self.gate, x)
        return (silu(core) if self.activate_last else core) * torch.sigmoid(gate)


def _through(layers: nn.ModuleList, x: Tensor | Sequence[Part]) -> Tensor:
    """All layers with SiLU between them."""
    first, *rest = layers
    hidden: Tensor = first(x)
    for layer in rest:
        hidden = layer(silu(hidden))
    return hidden


class GatedReadout(nn.Module):
    """Energies of the last scalars by a gated network, times a factor per element where ``n_species`` is given.

    Parameters
    ----------
    widths
        Of scalars, hidden layers and the energy, which is 1.
    n_species
        Number of elements.
    """

    def __init__(self, widths: Sequence[int], n_species: int | None = None):
        super().__init__()
        self.network = GatedNetwork(widths, activate_last=False)
        self.scale = None if n_species is None else nn.Parameter(torch.ones(n_species))

    def forward(self, scalars: Sequence[Tensor], species: Tensor) -> Tensor:
        """Map L tensors (n_atoms, channels) and element rows (n_atoms,) to energies (n_atoms,) in eV."""
        energies: Tensor = self.network(scalars[-1]).squeeze(-1)
        return energies if self.scale is None else energies * self.scale[species]
