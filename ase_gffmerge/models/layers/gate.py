r"""Gated nonlinearity of equivariant features, without parameters.

.. math:: s \to c\,\mathrm{silu}(s),\qquad t^{(l)}_u \to c\,\mathrm{silu}(g^{(l)}_u)\,t^{(l)}_u

(Weiler et al., arXiv 1807.02547), with c such that a normally distributed input keeps its second moment.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from ase_gffmerge.models.layers.tensor_product import natural

SILU_SCALE = 1.6765324703310918
"""c = <silu(z)^2>^(-1/2) for normally distributed z."""


class Gate:
    """Layout and nonlinearity of pre-gate features: scalars, one gate per tensor, tensors.

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
