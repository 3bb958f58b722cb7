"""What enters the layers of a block: activations of a specialist or of the merged model on calibration frames."""

from collections.abc import Callable

from torch import Tensor, nn

from ase_gffmerge.merging.calibration import CalibrationBatch
from ase_gffmerge.merging.tangents import Dual, Tensors, pushforward
from ase_gffmerge.models.affine_maps import is_affine, rows_entering
from ase_gffmerge.models.base import Stage

Run = Callable[[nn.Module, CalibrationBatch, Tensors], Tensor | Tensors]
"""``run(block, batch, tensors)`` evaluates a block, a stage or the readout, on the tensors of :data:`Inputs`."""

Inputs = Callable[[CalibrationBatch, bool], Dual]
"""``inputs(batch, of_merged)`` is what enters the block: in the merged model (``True``) or in the specialist."""


def run_stage(stage: nn.Module, batch: CalibrationBatch, tensors: Tensors) -> Tensors:
    """Evaluate a stage.

    Parameters
    ----------
    stage
        Of the merged model or of a specialist.
    batch
        Frames.
    tensors
        Values of :func:`stage_inputs`.
    """
    return tuple(stage(*batch.split(tensors)))


def stage_inputs(batch: CalibrationBatch, of_merged: bool) -> Dual:
    """State before the stage, and geometry."""
    return (batch.merged if of_merged else batch.target) + batch.geometry


def advance(stage: Stage, state: Dual, batch: CalibrationBatch) -> Dual:
    """State after a stage.

    Parameters
    ----------
    stage
        Of the merged model or of a specialist.
    state
        Before it.
    batch
        Frames.
    """
    return pushforward(lambda *x: run_stage(stage, batch, x), state + batch.geometry)


def entering(block: nn.Module, name: str, batch: CalibrationBatch, inputs: Dual, *, run: Run) -> Dual:
    """What enters a layer of a block, with its directional derivatives.

    Parameters
    ----------
    block, name
        The block, and the layer's name in it.
    batch
        Frames.
    inputs
        What enters the block.
    run
        Evaluates the block.
    """
    layer = block.get_submodule(name)
    return pushforward(lambda *x: layer_input(layer, lambda: run(block, batch, x)), inputs)


class _Reached(Exception):
    """Raised by a hook to stop a forward pass at the layer of interest."""


def layer_input(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """Run a model up to ``module`` and return what enters it."""
    caught: list[Tensor] = []

    def stop(_: nn.Module, inputs: tuple[object, ...]) -> None:
        caught.append(rows_entering(module, inputs))
        raise _Reached

    handle = module.register_forward_pre_hook(stop)
    try:
        run()
    except _Reached:
        pass
    finally:
        handle.remove()
    return caught[0]


def layer_inputs(
    root: nn.Module, run: Callable[[], object], *, wanted: Callable[[nn.Module], bool] = is_affine
) -> dict[str, Tensor]:
    """What enters the layers of ``root`` while ``run`` evaluates it, in the order of their execution.

    Layers that are given one and the same object share one tensor.

    Parameters
    ----------
    root
        Module whose layers are watched.
    run
        Evaluates it.
    wanted
        Which of its modules are watched; default: affine layers.
    """
    caught: dict[str, Tensor] = {}
    alive: list[object] = []  # so that no other object takes an identity
    rows: dict[int, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[object, ...]) -> None:
            key = id(inputs[0])
            if key not in rows:
                alive.append(inputs[0])
                rows[key] = rows_entering(module, inputs)
            caught[name] = rows[key]

        return hook

    handles = [
        module.register_forward_pre_hook(note(name))
        for name, module in root.named_modules()
        if wanted(module)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return caught


def affine_layers(root: nn.Module, run: Callable[[], object]) -> list[str]:
    """Names of the affine layers of ``root`` in the order in which ``run`` executes them."""
    return list(layer_inputs(root, run))
