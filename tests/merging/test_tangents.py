import pytest
import torch

from ase_gffmerge.merging.calibration import advance, build_calibration
from ase_gffmerge.merging.tangents import Dual, pushforward


def test_push_gives_value_and_directional_derivatives() -> None:
    x, v = torch.randn(5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    out = pushforward(lambda t: (t.sin(), t.square().sum()), Dual((x,), (v,)))
    torch.testing.assert_close(out.value, (x.sin(), x.square().sum()))
    torch.testing.assert_close(out.tangent, (x.cos() * v, 2 * v @ x))


def test_without_probes_there_are_values_alone() -> None:
    x = torch.randn(4)
    out = pushforward(torch.exp, Dual((x,), ()))
    torch.testing.assert_close(out.value, (x.exp(),))
    assert out.tangent == ()


@pytest.mark.parametrize("directions", [0, 2])
def test_slopes_of_stage_states_are_derivatives_along_the_probes(family, architecture, directions) -> None:
    """Central differences of the state after all stages, displacing the atoms along each probe."""
    (specialist,) = family(architecture, 1, frames=2)
    potential = specialist.potential

    def final_state(shift: torch.Tensor | None = None) -> tuple[Dual, torch.Tensor]:
        frames = [atoms.copy() for atoms in specialist.calibration]
        if shift is not None:
            n = len(frames[0])
            for i, atoms in zip(order, frames):
                atoms.positions += shift[n * i : n * (i + 1)].numpy()
        moved = specialist.with_calibration(frames)
        (calibration_set,) = build_calibration([moved], potential, [1.0], directions=directions)
        (scene,) = calibration_set.batches
        state = scene.target
        for _, stage in potential.named_stages():
            state = advance(stage, state, scene)
        return state, scene.graph.positions

    state, positions = final_state()
    first = torch.as_tensor(specialist.calibration[0].positions)
    order = [0, 1] if torch.equal(positions[: len(first)], first) else [1, 0]
    if not directions:
        assert state.tangent == ()
        return
    generator = torch.Generator().manual_seed(0)
    displacements = torch.randn(directions, *positions.shape, generator=generator, dtype=torch.float64)
    step = 1e-5
    for p, displacement in enumerate(displacements):
        ahead, back = (final_state(sign * step * displacement)[0] for sign in (1, -1))
        for a, b, slope in zip(ahead.value, back.value, state.tangent):
            torch.testing.assert_close((a - b) / (2 * step), slope[p], rtol=1e-5, atol=1e-6)
