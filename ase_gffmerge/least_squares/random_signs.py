r"""Random signs: unbiased estimates of traces and diagonals from products alone.

For a vector u of independent signs, :math:`\mathbb E\,u u^\top = 1`, so that :math:`\mathbb E\,u^\top A u =
\mathrm{tr}\,A` and :math:`\mathbb E\,(J^\top u)^2 = \mathrm{diag}(J^\top J)` element by element (Hutchinson,
doi:10.1080/03610918908812806).
"""

import torch
from torch import Tensor


def random_signs(shape: tuple[int, ...], *, like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent ±1.

    Parameters
    ----------
    shape
        Of the result.
    like
        Tensor whose type and device it gets.
    generator
        On the CPU, so that the signs are the same on every device.
    """
    return 2.0 * torch.randint(0, 2, shape, generator=generator).to(like) - 1
