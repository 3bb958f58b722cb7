"""Rows of a tensor, collected along edges or angles."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd import Function

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
