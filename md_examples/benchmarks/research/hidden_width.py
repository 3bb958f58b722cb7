r"""Family ``hidden width``: PaiNN's stages with more hidden features, random ones, on which ``out`` is solved.

Beside the hidden layer silu(W x + b) of a stage stands silu(A x + b') with random A; ``out`` is linear in both, so that
the layer-wise and message-level solves stay convex. The first message is left alone: its input is one vector per element.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from ase_gffmerge.merging.calibration import CalibrationSet
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.models.base import EdgeGeometry, Stage, State
from ase_gffmerge.models.painn import Message, Update
from research.bench import Trial
from research.stages import walked
from research.trunk import SolveStage, standard_stage

SPREAD = 0.5


class RandomFeatures(nn.Module):
    """silu(A x + b), fixed: A x + b has deviation ``SPREAD`` over the rows (n, d) it is made for."""

    def __init__(self, rows: Tensor, width: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        d = rows.shape[1]
        deviation = rows.std(0).clamp(min=1e-3 * float(rows.std()))
        a = torch.randn(width, d, generator=generator).to(rows) / math.sqrt(d) / deviation
        b = torch.randn(width, generator=generator).to(rows)
        self.weight = nn.Parameter(SPREAD * a, requires_grad=False)
        self.bias = nn.Parameter(SPREAD * (b - a @ rows.mean(0)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, width)."""
        return silu(linear(x, self.weight, self.bias))


def hidden_rows(stage: Message | Update, state: State) -> Tensor:
    """What enters the hidden layer of a stage."""
    scalars, vectors = state
    if isinstance(stage, Message):
        return scalars
    return torch.cat([scalars, (stage.V(vectors).square().sum(dim=1) + stage.norm_offset).sqrt()], dim=-1)


def widened_out(out: nn.Linear, width: int) -> nn.Linear:
    """The same map with ``width`` further inputs that do not count yet."""
    wide = nn.Linear(out.in_features + width, out.out_features).to(out.weight)
    wide.weight.zero_()
    wide.weight[:, : out.in_features] = out.weight
    wide.bias.copy_(out.bias)
    return wide.requires_grad_(False)


class WideMessage(Message):
    """A message whose ``out`` sees random features of the scalars too."""

    more: RandomFeatures

    def forward(self, state: State, geometry: EdgeGeometry) -> State:
        """Add Δs and Δv."""
        scalars, vectors = state
        sender, receiver = geometry.sender, geometry.receiver
        filters = self.filters(geometry.radial) * geometry.envelope
        phi = self.out(torch.cat([silu(self.hidden(scalars)), self.more(scalars)], dim=-1))
        s, vv, vs = (phi.index_select(0, sender) * filters).chunk(3, dim=-1)
        messages = vectors.index_select(0, sender) * vv[:, None] + vs[:, None] * geometry.angular[:, :, None]
        return scalars.index_add(0, receiver, s), vectors.index_add(0, receiver, messages)


class WideUpdate(Update):
    """An update whose ``out`` sees random features of scalars and norms too."""

    more: RandomFeatures

    def forward(self, state: State, geometry: EdgeGeometry) -> State:
        """Add Δs and Δv."""
        scalars, vectors = state
        u, v = self.U(vectors), self.V(vectors)
        x = torch.cat([scalars, (v.square().sum(dim=1) + self.norm_offset).sqrt()], dim=-1)
        ss, sv, vv = self.out(torch.cat([silu(self.hidden(x)), self.more(x)], dim=-1)).chunk(3, dim=-1)
        return scalars + ss + sv * (u * v).sum(dim=1), vectors + vv[:, None] * u


def widened_stage(stage: Message | Update, rows: Tensor, width: int) -> Message | Update:
    """The same stage with ``width`` random hidden features made for the rows that enter its hidden layer."""
    channels = stage.hidden.out_features
    wide = (
        WideMessage(channels, stage.filters.in_features)
        if isinstance(stage, Message)
        else WideUpdate(channels, stage.norm_offset)
    )
    wide.to(stage.out.weight).load_state_dict(stage.state_dict())
    wide.more = RandomFeatures(rows, width)
    wide.out = widened_out(stage.out, width)
    return wide.eval().requires_grad_(False)


def with_random_hidden(width: int) -> SolveStage:
    """Widen every stage but the first, then solve as usual."""

    def solve(
        name: str,
        stage: Stage,
        originals: Sequence[Stage],
        calibration_sets: Sequence[CalibrationSet],
        recipe: Recipe,
    ) -> Stage:
        assert isinstance(stage, Message | Update)
        states = [
            scene.merged.value for calibration_set in calibration_sets for scene in calibration_set.batches
        ]
        if any(vectors.any() for _, vectors in states):
            stage = widened_stage(stage, torch.cat([hidden_rows(stage, state) for state in states]), width)
        return standard_stage(name, stage, originals, calibration_sets, recipe)

    return solve


def trials() -> list[Trial]:
    """All trials of this module."""
    return [
        Trial(
            name=f"hidden {width}",
            family="hidden width",
            changes=f"{width} random hidden features in every stage but the first",
            run=walked(with_random_hidden(width)),
            order=28,
            costs=True,
        )
        for width in (128, 256)
    ]
