r"""Family ``readout``: which features, how many, fitted how.

``learned`` directions: with :math:`g_i=\partial e_i/\partial z_i` of a first fit on random features, A is drawn with
covariance :math:`M^p`, where :math:`M=\langle g g^\top\rangle` is the averaged gradient outer product (AGOP;
Radhakrishnan et al., arXiv 2212.13881).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from ase_gffmerge.merging.random_features import draw_random_features, random_feature_readout
from ase_gffmerge.models import Potential
from ase_gffmerge.models.layers.readout import RandomFeatureReadout
from research.bench import Bench, MergeOutput, Trial
from research.features import ElementReadout, GatedReadout, with_norms, with_readout
from research.readout_fit import CHEAP, Setting, fitted, on_shared_trunk, whitened

FAMILY = "readout"
SPREAD = 0.5


def draw(lift: torch.nn.Linear, rows: Tensor, root: Tensor, *, seed: int = 0) -> None:
    r"""Draw A with covariance ``root``ᵀ ``root`` (d, d), scaled so that A z + b has deviation ``SPREAD`` over the rows."""
    generator = torch.Generator().manual_seed(seed)
    centred = rows.double() - rows.double().mean(0)
    a = torch.randn(*lift.weight.shape, generator=generator, dtype=torch.float64) @ root
    a = SPREAD * a / (centred @ a.T).std(0).mean()
    b = SPREAD * torch.randn(len(a), generator=generator, dtype=torch.float64)
    lift.weight.copy_(a)
    lift.bias.copy_(b - a @ rows.double().mean(0))


def unscaled(readout: RandomFeatureReadout, rows: Tensor, element: Tensor) -> None:
    """Isotropic directions: inputs keep their own scales."""
    draw(readout.lift, rows, torch.eye(rows.shape[1], dtype=torch.float64))


def per_element(readout: RandomFeatureReadout, rows: Tensor, element: Tensor) -> None:
    """The product's whitened directions, for each element from its own atoms."""
    assert isinstance(readout, ElementReadout)
    for row in element.unique().tolist():
        stand_in = RandomFeatureReadout(
            readout.mlp,
            readout.mlp.hidden.in_features,
            1,
            width=readout.lift.out_features,
            blocks=readout.blocks,
        )
        draw_random_features(stand_in, rows[element == row], seed=row)
        readout.lifts[row].load_state_dict(stand_in.lift.state_dict())


def gated(readout: RandomFeatureReadout, rows: Tensor, element: Tensor) -> None:
    """Whitened directions for projection and gate."""
    assert isinstance(readout, GatedReadout)
    whitened(readout, rows, element)
    lift = {name: value.clone() for name, value in readout.lift.state_dict().items()}
    draw_random_features(readout, rows, seed=1, spread=1.0)
    readout.gate.load_state_dict(readout.lift.state_dict())
    readout.lift.load_state_dict(lift)


def gradient_outer_product(potential: Potential, rows: Tensor, element: Tensor) -> Tensor:
    r"""M (d, d), float64: mean of :math:`g g^\top` over atoms, without the plain two-layer part."""
    readout = random_feature_readout(potential)

    def energy(z: Tensor, theta: Tensor) -> Tensor:
        return torch.nn.functional.silu(readout.lift(z)) @ theta

    gradients = vmap(grad(energy))(rows, readout.theta[element]).double()
    return gradients.T @ gradients / len(gradients)


def learned(power: float) -> Callable[[Bench], MergeOutput]:
    """Directions learned from a first fit."""

    def run(bench: Bench) -> MergeOutput:
        seen: dict[str, Tensor] = {}

        def remember(readout: RandomFeatureReadout, rows: Tensor, element: Tensor) -> None:
            seen.update(rows=rows, element=element)
            whitened(readout, rows, element)

        first = fitted(bench.trunk, Setting(lift=remember))
        values, vectors = torch.linalg.eigh(gradient_outer_product(first.potentials[0], **seen))
        root = vectors * (values.clamp(min=0) + 1e-6 * values.max()) ** (power / 2) @ vectors.T
        setting = Setting(lift=lambda readout, rows, element: draw(readout.lift, rows, root))
        return fitted(bench.trunk, setting, extra_seconds=first.seconds - bench.trunk.seconds)

    return run


def _option_trials() -> list[Trial]:
    """Trials that change one of the product's options."""
    rows: Sequence[tuple[str, dict[str, Any], int]] = (
        ("width 2048", {"width": 2048}, 16),
        ("width 512", {"width": 512}, 17),
        ("width 256", {"width": 256}, 36),
        ("blocks 1", {"blocks": 1}, 37),
        ("blocks 2", {"blocks": 2}, 42),
        ("energy weight 1", {"energy_weight": 1.0}, 43),
        ("energy weight 3", {"energy_weight": 3.0}, 38),
        ("energy weight 30", {"energy_weight": 30.0}, 43),
        ("directions 9", {"directions": 9}, 44),
        ("directions 27", {"directions": 27}, 39),
    )
    return [
        Trial(
            name=name,
            family=FAMILY,
            changes=", ".join(f"{key} = {value}" for key, value in options.items()),
            run=on_shared_trunk(Setting(options=CHEAP.model_copy(update=options))),
            order=order,
            costs="width" in options,
        )
        for name, options, order in rows
    ]


def trials() -> list[Trial]:
    """All trials of this family."""
    rows: tuple[tuple[str, str, Setting, int, bool], ...] = (
        (
            "norms",
            "norms of the vector features too",
            Setting(with_random_feature_readout=with_norms),
            18,
            True,
        ),
        (
            "gated",
            "gated features",
            Setting(with_random_feature_readout=partial(with_readout, GatedReadout), lift=gated),
            19,
            True,
        ),
        (
            "per-element A",
            "a random projection per element",
            Setting(with_random_feature_readout=partial(with_readout, ElementReadout), lift=per_element),
            19,
            True,
        ),
        ("unscaled A", "inputs of the projection keep their scales", Setting(lift=unscaled), 46, False),
        ("spread 0.25", "flatter features", Setting(lift=partial(whitened, spread=0.25)), 52, False),
        ("spread 1", "steeper features", Setting(lift=partial(whitened, spread=1.0)), 52, False),
        ("shared theta", "one θ for all elements", Setting(shared_theta=True), 47, False),
        ("ridge by GCV", "ridge by generalised cross-validation", Setting(ridge="gcv"), 48, False),
    )
    found = [
        Trial(
            name=name, family=FAMILY, changes=changes, run=on_shared_trunk(setting), order=order, costs=costs
        )
        for name, changes, setting, order, costs in rows
    ]
    for power in (0.5, 1.0):
        changes = f"directions learned from a first fit, covariance AGOP^{power:g}"
        found.append(
            Trial(name=f"learned A {power:g}", family=FAMILY, changes=changes, run=learned(power), order=49)
        )
    return found + _option_trials()
