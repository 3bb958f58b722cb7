"""Constants that no change of precision may spoil."""

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class ExactBuffers(nn.Module):
    """A module whose own buffers follow it to a device but keep their floating-point type.

    A model that goes ``.float()`` and back ``.double()`` then computes what it computed before, up to its
    weights. Use the buffers cast to the type of the features they meet.
    """

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self
