"""A device whose memory does not suffice: batches are split, and what cannot be split says what would help."""

import sys

import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.calculators.calculator import CalculationFailed

import ase_gffmerge.forcefield.leverage as leverage
import ase_gffmerge.inference.predict as accuracy
import ase_gffmerge.inference.predict as evaluation
import ase_gffmerge.training.loop as loop
from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.errors import DeviceMemoryError
from ase_gffmerge.forcefield.leverage import fit_extrapolation_grade
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.runtime.devices import in_parts, is_out_of_memory
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.train import train
from ase_gffmerge.workflows.merge import merge
from helpers.faults import RECIPE, labelled_water

SYSTEMS = ("CH3OH", "H2O", "CH3CH2OH", "CO2", "CH4", "HCOOH", "H2O", "C2H6")
FAILURES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


class Small:
    """An evaluation on a device that fits so many atoms."""

    def __init__(self, evaluate, *, n_atoms: int, failure: Exception):
        self.evaluate, self.n_atoms, self.failure = evaluate, n_atoms, failure
        self.sizes: list[int] = []

    def __call__(self, *arguments, **options):
        graph = arguments[-1]
        if len(graph) > self.n_atoms:
            raise self.failure
        self.sizes.append(len(graph))
        return self.evaluate(*arguments, **options)


@pytest.fixture
def frames():
    return [molecule(system) for system in SYSTEMS]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("n_atoms", [9, 20])
def test_batches_are_split(specialists, frames, monkeypatch, failure, n_atoms):
    expected = predict_frames(specialists[0].potential, frames)
    small = Small(accuracy.predict, n_atoms=n_atoms, failure=failure)
    monkeypatch.setattr(accuracy, "predict", small)
    found = predict_frames(specialists[0].potential, frames)
    assert sum(small.sizes) == sum(map(len, frames)), "every frame is evaluated once"
    assert max(small.sizes) <= n_atoms
    np.testing.assert_allclose(found.energies, expected.energies, rtol=1e-6)
    for ours, theirs in zip(found.forces, expected.forces, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_batch_that_fits_is_evaluated_once(frames):
    calls = []
    assert in_parts(
        lambda batch: calls.append(len(batch)) or len(batch), frames, device=torch.device("cpu")
    ) == [8]
    assert calls == [8]


def test_a_frame_that_does_not_fit(specialists, frames, monkeypatch):
    monkeypatch.setattr(accuracy, "predict", Small(accuracy.predict, n_atoms=8, failure=FAILURES[0]))
    with pytest.raises(
        DeviceMemoryError, match=r"C2H6O \(9 atoms\) needs more memory than cpu has free; .*use"
    ):
        predict_frames(specialists[0].potential, frames)


def test_other_errors_are_not_taken_for_it(frames):
    def fail(batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        in_parts(fail, frames, device=torch.device("cpu"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_remedy_on_a_gpu(frames):
    def fail(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(
        DeviceMemoryError, match=r"CH4O \(6 atoms\) needs more memory than cuda:1 has.*device='cpu'"
    ):
        in_parts(fail, frames[:1], device=torch.device("cuda:1"))


def test_memory_of_a_failed_batch_is_free_when_its_halves_are_evaluated(frames):
    """The error's traceback must not keep the tensors of the batch that was too large."""
    alive: list[int] = []

    class Large:
        def __init__(self):
            alive.append(1)

        def __del__(self):
            alive.pop()

    def evaluate(batch):
        assert not alive
        tensors = Large()
        if len(batch) > 1:
            raise torch.OutOfMemoryError
        return tensors.__class__.__name__

    assert in_parts(evaluate, frames, device=torch.device("cpu")) == ["Large"] * len(frames)


@pytest.mark.parametrize("failure", FAILURES, ids=lambda error: type(error).__name__)
def test_the_calculator(specialists, monkeypatch, failure):
    calc = GFFMergeCalculator(specialists[0], device="cpu")
    small, large = molecule("H2O"), molecule("CH3OH")
    small.calc = large.calc = calc
    expected = small.get_potential_energy()
    monkeypatch.setattr(
        evaluation, "differentiate", Small(evaluation.differentiate, n_atoms=3, failure=failure)
    )
    with pytest.raises(CalculationFailed, match=r"CH4O \(6 atoms\) needs more memory than cpu") as caught:
        large.get_forces()
    assert isinstance(caught.value, DeviceMemoryError)
    assert small.get_potential_energy() == expected, "the calculator works again"


def test_a_merge(specialists, monkeypatch, tmp_path):
    monkeypatch.setattr(accuracy, "predict", Small(accuracy.predict, n_atoms=2, failure=FAILURES[0]))
    with pytest.raises(DeviceMemoryError, match=r"needs more memory than cpu"):
        merge(specialists, RECIPE, device="cpu")
    with pytest.raises(DeviceMemoryError, match=r"needs more memory than cpu"):
        GFFMergeCalculator(specialists, recipe=RECIPE, cache_dir=tmp_path, device="cpu")
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_extrapolation_grade_of_a_merge(specialists, monkeypatch):
    expected = fit_extrapolation_grade(specialists[0].potential, [s.calibration for s in specialists])
    whole, sizes = leverage._features, []

    def small(potential, frames, *, index):
        if len(frames) > 1:
            raise FAILURES[0]
        sizes.append(len(frames))
        return whole(potential, frames, index=index)

    monkeypatch.setattr(leverage, "_features", small)
    found = fit_extrapolation_grade(specialists[0].potential, [s.calibration for s in specialists])
    assert sizes == [1] * 4
    torch.testing.assert_close(found.whitening, expected.whitening)


def test_a_training(tmp_path, monkeypatch):
    options = {
        "hyper": {"channels": 4, "n_blocks": 1, "n_radial": 3},
        "epochs": 2,
        "batch_size": 3,
        "validation": 1,
    }
    frames, out = labelled_water(tmp_path / "water.xyz"), tmp_path / "model.safetensors"

    def fail(*args, **kwargs):
        raise FAILURES[0]

    monkeypatch.setattr(loop, "loss_terms", fail)
    with pytest.raises(
        DeviceMemoryError, match=r"a batch of 3 frames needs more memory than cpu.*smaller batch_size"
    ):
        train([frames], out, TrainConfig(**options), device="cpu")
    assert not out.exists()


def test_the_layers_of_a_merge(specialists, monkeypatch):
    def fail(*args, **kwargs):
        raise FAILURES[0]

    monkeypatch.setattr(sys.modules["ase_gffmerge.merging.merge"], "build_calibration", fail)
    with pytest.raises(
        DeviceMemoryError, match="merging 2 specialists needs more memory than cpu has free; give"
    ):
        merge(specialists, "gffmerge", device="cpu")
