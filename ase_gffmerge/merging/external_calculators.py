"""Merge the networks inside any ASE calculators, which evaluate their frames themselves while hooks watch the layers.

For force fields without an integration: steps 1 to 3 (sequential inputs, anchored ridge, equivariant layers) on every layer
that :mod:`~ase_gffmerge.models.affine_maps` knows, in the order of execution; everything else is averaged. Derivatives are
differences between a frame and a displaced twin. Corrections of whole blocks and a readout of random features need a
potential that can be differentiated, and are not part of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from torch import Tensor, nn

from ase_gffmerge.data.frames import bare
from ase_gffmerge.errors import FramesError, IncompatibleSpecialistsError
from ase_gffmerge.inference.predict import FramePredictions
from ase_gffmerge.integrations.base import adapters_by_architecture
from ase_gffmerge.least_squares.gram import Gram, normalized_sum
from ase_gffmerge.least_squares.ridge import ridge_solve
from ase_gffmerge.merging.report import Disagreement, LayerReport, disagreement
from ase_gffmerge.models.affine_maps import AffineMap, is_affine, layer_maps, rows_entering
from ase_gffmerge.runtime.progress import Progress, no_progress

MAX_ROWS = 4096
"""Rows of a layer that are kept of one frame, chosen at random."""

STEP = 0.01
"""Displacement of the twins in Å (standard deviation): large against round-off of float32, small against curvature."""

Module = Callable[[Any], nn.Module]  # of whichever class the calculator is


class _Reached(Exception):
    """Ends an evaluation at the layer of interest."""


@dataclass(frozen=True, kw_only=True)
class HookedMerge:
    """Calculators merged into one.

    Attributes
    ----------
    calculator
        A copy of the first calculator with the merged weights.
    layers
        Least-squares problems in the order they were solved.
    averaged
        Parameters that no layer covers and that were averaged.
    disagreements
        How the mean and the merged calculator differ from each calculator on its frames.
    """

    calculator: Calculator
    layers: tuple[LayerReport, ...]
    averaged: tuple[str, ...]
    disagreements: tuple[Disagreement, ...]


def merge_calculators(
    calculators: Sequence[Calculator],
    calibration: Sequence[Sequence[Atoms]],
    *,
    module: Module,
    ridge: float = 1e-5,
    derivative_weight: float = 1.0,
    progress: Progress = no_progress,
) -> HookedMerge:
    """Merge fine-tuned networks that ASE calculators hold.

    Parameters
    ----------
    calculators
        At least two of one kind, which can be copied by :func:`copy.deepcopy`. They are not changed.
    calibration
        For each of them frames that it knows; labels are not used.
    module
        Finds the network in a calculator, for example ``lambda calc: calc.model``. Layers must be its submodules, called as
        modules, and take the same rows in the same order whenever a frame is evaluated.
    ridge
        Relative ridge, anchored at the mean of the weights.
    derivative_weight
        Weight of the derivatives against the values.
    progress
        Called with a fraction (0 to 1) and a description.

    Raises
    ------
    IncompatibleSpecialistsError
        For fewer than two calculators, or networks of different parameters.
    FramesError
        When a calculator has no frames.
    """
    adapters_by_architecture()  # whose modules register the layers of their packages
    networks = [module(calculator) for calculator in calculators]
    _check(networks, calibration)
    merged = deepcopy(calculators[0])
    target = module(merged)
    average_parameters(target, networks)
    mean = deepcopy(merged)
    names = executed_layers(target, lambda: [evaluate(merged, frames[0]) for frames in calibration])
    if not names:
        raise IncompatibleSpecialistsError(
            "evaluating a frame called no layer that a merge knows; is this the network that the calculator evaluates, "
            "and not a compiled or copied one?"
        )
    layers: list[LayerReport] = []
    for i, name in enumerate(names):
        progress(0.9 * i / len(names), name)
        layers += _solve_layer(
            name,
            merged,
            calculators,
            calibration,
            module=module,
            ridge=ridge,
            derivative_weight=derivative_weight,
        )
    progress(0.9, "report")
    disagreements = tuple(
        disagreement(f"{k}", kind, predictions(calculator, frames), reference)
        for k, (own, frames) in enumerate(zip(calculators, calibration, strict=True))
        for reference in [predictions(own, frames)]
        for kind, calculator in (("mean", mean), ("merged", merged))
    )
    progress(1.0, "done")
    covered = {f"{name}.{key}" for name in names for key, _ in target.get_submodule(name).named_parameters()}
    averaged = tuple(name for name, _ in target.named_parameters() if name not in covered)
    return HookedMerge(
        calculator=merged, layers=tuple(layers), averaged=averaged, disagreements=disagreements
    )


def _check(networks: Sequence[nn.Module], calibration: Sequence[Sequence[Atoms]]) -> None:
    if len(networks) < 2:
        raise IncompatibleSpecialistsError(
            f"a merge needs at least two calculators, got {len(networks)}; use a single one as it is"
        )
    if len(calibration) != len(networks) or not all(calibration):
        raise FramesError(
            f"each of the {len(networks)} calculators needs frames that it knows; give one list of structures for each"
        )
    for network in networks:
        if not isinstance(network, nn.Module):
            raise IncompatibleSpecialistsError(
                f"module gave a {type(network).__name__}, not the torch network in a calculator; give a function such as "
                "lambda calc: calc.model"
            )
    shapes = [{name: value.shape for name, value in network.named_parameters()} for network in networks]
    for k, other in enumerate(shapes[1:], start=1):
        different = sorted(
            name for name in shapes[0].keys() | other.keys() if shapes[0].get(name) != other.get(name)
        )
        if different:
            raise IncompatibleSpecialistsError(
                f"calculators 0 and {k} hold different networks (first difference: {different[0]}); fine-tune both from one "
                "base"
            )


@torch.no_grad()
def average_parameters(target: nn.Module, networks: Sequence[nn.Module]) -> None:
    """Set all parameters of ``target`` to their mean over the networks."""
    named = [dict(network.named_parameters()) for network in networks]
    for name, parameter in target.named_parameters():
        parameter.copy_(torch.stack([other[name].double() for other in named]).mean(0))


def evaluate(calculator: Calculator, atoms: Atoms) -> tuple[float, np.ndarray]:
    """Energy (eV) and forces (eV/Å), always computed anew."""
    copy = bare(atoms)
    calculator.reset()
    forces = calculator.get_property("forces", copy)
    return float(calculator.get_property("energy", copy)), np.array(forces)


def predictions(calculator: Calculator, frames: Sequence[Atoms]) -> FramePredictions:
    """Energies and forces of frames; stresses, which not every calculator has, are not asked for."""
    found = [evaluate(calculator, atoms) for atoms in frames]
    return FramePredictions(
        numbers=[atoms.numbers for atoms in frames],
        energies=np.array([energy for energy, _ in found]),
        forces=[forces for _, forces in found],
        stresses=[None] * len(found),
    )


def executed_layers(network: nn.Module, run: Callable[[], object]) -> list[str]:
    """Names of the affine layers in the order in which ``run`` executes them."""
    names: dict[str, None] = {}
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: names.update({name: None}))
        for name, module in network.named_modules()
        if is_affine(module)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return list(names)


@contextmanager
def _watched(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what enters a layer, and end the evaluation there."""
    caught: list[Tensor] = []

    def stop(module: nn.Module, inputs: tuple[object, ...]) -> None:
        caught.append(rows_entering(module, inputs).detach())
        raise _Reached

    handle = layer.register_forward_pre_hook(stop)
    try:
        yield caught
    finally:
        handle.remove()


def _entering(calculator: Calculator, layer: nn.Module, atoms: Atoms) -> Tensor | None:
    """What enters a layer in one frame; ``None`` where the frame does not reach it."""
    with _watched(layer) as caught:
        try:
            evaluate(calculator, atoms)
        except Exception:
            if not caught:  # an error of the calculator, not the hook's end of the evaluation
                raise
    return caught[0] if caught else None


def _solve_layer(
    name: str,
    merged: Calculator,
    calculators: Sequence[Calculator],
    calibration: Sequence[Sequence[Atoms]],
    *,
    module: Module,
    ridge: float,
    derivative_weight: float,
) -> list[LayerReport]:
    """Solve all maps of one layer on the merged network's inputs and each network's own outputs."""
    layer = module(merged).get_submodule(name)
    ours = layer_maps(name, layer)
    grams: list[list[Gram]] = []
    for calculator, frames in zip(calculators, calibration, strict=True):
        original = module(calculator).get_submodule(name)
        theirs = layer_maps(name, original)
        values = [Gram.zero(*affine_map.read().shape) for affine_map in ours]
        derivatives = list(values)
        for i, atoms in enumerate(frames):
            here, there = (
                (_entering(merged, layer, one), _entering(calculator, original, one))
                for one in (atoms, twin(atoms, seed=i))
            )
            (x, own), (x_there, own_there) = here, there
            if x is None or own is None:  # nothing in this frame needs the layer
                continue
            for k, (affine_map, their) in enumerate(zip(ours, theirs, strict=True)):
                rows, targets = _rows(affine_map, their, x, own)
                values[k] += Gram.of(rows, targets)
                if x_there is None or own_there is None:
                    continue
                if x_there.shape == x.shape and own_there.shape == own.shape:  # no neighbour came or went
                    rows_there, targets_there = _rows(affine_map, their, x_there, own_there)
                    derivatives[k] += Gram.of((rows_there - rows) / STEP, (targets_there - targets) / STEP)
        grams.append([a.balanced(b, derivative_weight) for a, b in zip(values, derivatives, strict=True)])
    reports = []
    for i, affine_map in enumerate(ours):
        gram = normalized_sum([totals[i] for totals in grams], [1.0] * len(grams))
        solution = ridge_solve(gram, affine_map.read().double().cpu(), ridge=ridge)
        affine_map.write(solution.theta.to(affine_map.read()))
        reports.append(LayerReport.of(affine_map.name, "layer", solution))
    return reports


def twin(atoms: Atoms, *, seed: int) -> Atoms:
    """Copy with all atoms displaced by about :data:`STEP`."""
    copy = bare(atoms)
    copy.rattle(STEP, seed=seed)
    return copy


def _rows(affine_map: AffineMap, their: AffineMap, x: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the merged network's input, and what the other network makes of its own; always the same choice of them."""
    rows, targets = affine_map.design(x), their.design(own) @ their.read()
    if len(rows) > MAX_ROWS:
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:MAX_ROWS].to(
            rows.device
        )
        rows, targets = rows[chosen], targets[chosen]
    return rows.double().cpu(), targets.double().cpu()
