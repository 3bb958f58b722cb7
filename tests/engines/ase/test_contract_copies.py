"""Points 11, 12 and 13 of the contract: copies, side effects, reproducibility."""

import copy
import gc
import json
import logging
import os
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch
from ase.calculators.calculator import CalculatorSetupError
from ase.mep import NEB
from ase.optimize import FIRE

from ase_gffmerge import GFFMergeCalculator
from helpers.structures import cluster, crystal, everything


def test_11_parameters_rebuild_the_calculator(force_field, tmp_path):
    path = force_field.save(tmp_path / "with space, ä.safetensors")
    first = GFFMergeCalculator(path, dtype="float64", device="cpu")
    second = GFFMergeCalculator(**json.loads(json.dumps(first.todict())))
    assert everything(crystal(), first)["energy"] == everything(crystal(), second)["energy"]


@pytest.mark.parametrize("as_objects", [True, False])
def test_11_parameters_rebuild_a_merged_calculator(relatives, as_objects, tmp_path):
    sources = relatives if as_objects else [s.save(tmp_path / f"{s.name}.safetensors") for s in relatives]
    first = GFFMergeCalculator(
        sources, recipe="mean", weights=[1, 3], dtype="float64", cache_dir=tmp_path / "c", device="cpu"
    )
    second = GFFMergeCalculator(**json.loads(json.dumps(first.todict())))
    assert second.specialist_names == ("ethanol", "methanol")
    assert everything(cluster(), first)["energy"] == everything(cluster(), second)["energy"]


def test_11_an_object_in_memory_cannot_be_rebuilt_and_says_so(painn_calc):
    with pytest.raises(CalculatorSetupError, match="object in memory"):
        GFFMergeCalculator(**painn_calc.todict())


def test_11_pickles(calc, atoms):
    reference = everything(atoms, calc)
    twin = pickle.loads(pickle.dumps(calc))
    assert twin.results.keys() == reference.keys()
    assert everything(atoms, twin)["energy"] == reference["energy"]
    assert twin.todict() == calc.todict()


def test_11_deepcopy_and_spawn_share_weights_but_not_results(calc):
    atoms = crystal()
    atoms.calc = calc
    energy = atoms.get_potential_energy()
    for twin in (copy.deepcopy(calc), copy.deepcopy(atoms).calc, calc.spawn()):
        assert twin is not calc
        assert twin.force_field.potential is calc.force_field.potential
        assert twin.results is not calc.results
        assert twin.parameters is not calc.parameters
        moved = crystal()
        moved.positions[0] += 0.1
        moved.calc = twin
        assert moved.get_potential_energy() != energy
        assert calc.results["energy"] == energy
    assert copy.deepcopy(calc).results["energy"] == energy
    assert calc.spawn().results == {}


@pytest.mark.parametrize("spawned", [True, False])
def test_11_threads(calc, spawned):
    images = [cluster() for _ in range(6)]
    for i, image in enumerate(images):
        image.rattle(0.05, seed=i)
    expected = [everything(image, calc)["forces"] for image in images]
    wrong = []

    def work(image, forces, own):
        for _ in range(5):
            image.calc = own
            if not np.array_equal(image.get_forces(), forces):
                wrong.append(image)

    threads = [
        threading.Thread(target=work, args=(image, forces, calc.spawn() if spawned else calc))
        for image, forces in zip(images, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_11_copies_have_neighbors_of_their_own(calc):
    """A list is neither shared, which threads could not stand, nor carried along in pickles."""
    everything(crystal() * (4, 4, 4), calc)
    size = len(pickle.dumps(calc.spawn()))
    calc.reset()
    assert len(pickle.dumps(calc)) < 1.1 * size
    for twin in (calc.spawn(), copy.deepcopy(calc), pickle.loads(pickle.dumps(calc))):
        assert twin._neighbors is not calc._neighbors
        assert twin._neighbors.skin == calc._neighbors.skin
        assert everything(cluster(), twin)["energy"] == everything(cluster(), calc)["energy"]


def test_11_a_band_in_threads_takes_the_same_path(calc):
    """``NEB(parallel=True)`` runs a thread per image."""
    bands = []
    for parallel in (False, True):
        images = [cluster() for _ in range(5)]
        images[-1].positions[1, 0] += 0.3
        for image in images:
            image.calc = calc.spawn()
        band = NEB(images, method="improvedtangent", parallel=parallel)
        band.interpolate()
        FIRE(band, logfile=None).run(fmax=0, steps=4)
        bands.append(np.array([image.positions for image in images]))
    assert np.array_equal(*bands)


def test_11_a_dropped_calculator_is_freed_at_once(calc):
    own = calc.spawn()
    everything(cluster(), own)
    watched = weakref.ref(own)
    gc.disable()
    try:
        del own
        assert watched() is None, "a reference cycle keeps the weights in memory"
    finally:
        gc.enable()


def global_state():
    return (
        torch.get_default_dtype(),
        torch.random.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002 - the global state is what must not change
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        dict(os.environ),
        logging.getLogger().level,
        list(logging.getLogger().handlers),
    )


def test_12_no_global_state_is_touched(force_field, relatives, tmp_path):
    path = force_field.save(tmp_path / "one.safetensors")
    before = global_state()
    for source in (force_field, path, relatives):
        everything(
            cluster(), GFFMergeCalculator(source, recipe="mean", cache_dir=tmp_path / "c", device="cpu")
        )
    assert global_state() == before


def test_12_dtype_is_explicit_and_results_are_float64(force_field):
    atoms = crystal()
    single, double = (
        GFFMergeCalculator(force_field, dtype=d, device="cpu") for d in ("float32", torch.float64)
    )
    assert (single.parameters["dtype"], double.parameters["dtype"]) == ("float32", "float64")
    low, high = everything(atoms, single), everything(atoms, double)
    assert low["forces"].dtype == np.float64
    assert 0 < np.abs(low["forces"] - high["forces"]).max() < 1e-5
    assert force_field.potential.dtype == torch.float64, "the caller's object stays as it was"


def test_12_an_object_stays_the_callers(force_field):
    force_field.potential.requires_grad_(True).train()
    calc = GFFMergeCalculator(force_field, dtype="float64", device="cpu")
    before = everything(cluster(), calc)["energy"]
    with torch.no_grad():
        force_field.potential.references += 1.0
    calc.reset()
    assert everything(cluster(), calc)["energy"] == before, "the weights are the calculator's own"
    assert force_field.potential.training
    assert all(parameter.requires_grad for parameter in force_field.potential.parameters())


def test_12_foreign_global_state_has_no_effect(calc):
    reference = everything(cluster(), calc)["forces"]
    with torch.inference_mode():
        calc.reset()
        assert np.array_equal(everything(cluster(), calc)["forces"], reference)
        other = GFFMergeCalculator(calc.force_field, dtype="float64", device="cpu")
        assert np.array_equal(everything(cluster(), other)["forces"], reference)
    with torch.no_grad():
        calc.reset()
        assert np.array_equal(everything(cluster(), calc)["forces"], reference)
    torch.set_default_dtype(torch.float64)
    try:
        calc.reset()
        assert np.array_equal(everything(cluster(), calc)["forces"], reference)
    finally:
        torch.set_default_dtype(torch.float32)


def test_13_bitwise_reproducible_and_no_graph_retained(calc, atoms):
    first = everything(atoms, calc)
    calc.reset()
    second = everything(atoms, calc)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not calc.force_field.potential.training
    assert all(p.grad is None and not p.requires_grad for p in calc.force_field.potential.parameters())


def test_13_memory_is_flat(calc):
    atoms = cluster()
    atoms.calc = calc
    counts = []
    for step in range(30):
        atoms.positions[0, 0] += 1e-3
        atoms.get_forces()
        if step in (9, 29):
            gc.collect()
            counts.append(len(gc.get_objects()))
    assert counts[1] - counts[0] < 20


def test_13_later_training_of_the_specialist_does_not_leak_in(force_field):
    calc = GFFMergeCalculator(force_field, dtype="float64", device="cpu")
    energy = everything(cluster(), calc)["energy"]
    force_field.potential.embedding.mul_(2)
    calc.reset()
    assert everything(cluster(), calc)["energy"] == energy
