"""Memory of merges: counted, estimated beforehand, and kept within a bound without changing the result."""

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk
from hypothesis import given
from hypothesis import strategies as st

from ase_gffmerge.errors import ArgumentError, DeviceMemoryError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.merging.merge import closed_form_merge
from ase_gffmerge.merging.recipe import DistillOptions, Recipe, load_recipe
from ase_gffmerge.runtime.memory import (
    VARIABLE,
    PeakMemory,
    Portions,
    _glibc,
    freed_memory_kept,
    memory_bound,
    n_bytes,
    written,
)
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.loop import _gradient
from ase_gffmerge.training.loss import loss_terms
from ase_gffmerge.training.teachers import _graphs_with_targets
from ase_gffmerge.workflows.memory import estimate_distillation, estimate_memory
from ase_gffmerge.workflows.merge import merge
from helpers.toys import family

TESTS = Path(__file__).parents[1]
SMALLEST = Portions(edges=1, keep_graphs=False, directions=1)
HYPER: dict[str, dict[str, object]] = {
    "painn": {"cutoff": 3.0, "channels": 8, "n_radial": 6},
    "chgnet": {"cutoff": 3.0, "channels": 8, "n_radial": 6, "n_angular": 5, "readout_layers": 1},
}
RECIPE = Recipe(select=False, directions=2, readout={"width": 32, "copies": 1, "interval": 4.0})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9),
        ("500 MiB", 500 * 2**20),
        ("1.5g", 1.5e9),
        (2e9, 2e9),
        ("123", 123),
        ("2e3 kB", 2e6),
    ],
)
def test_sizes(text, size: float) -> None:
    assert n_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "0", "-1GB", "4XB", "1e400", "nan", True])
def test_what_is_no_size(text) -> None:
    with pytest.raises(ArgumentError, match="is no size; give one such as '4GB'"):
        n_bytes(text)


@given(st.integers(10**7, 10**12))
def test_a_written_size_is_read_again(size: int) -> None:
    assert n_bytes(written(size)) == pytest.approx(size, rel=0.06)


def test_the_environment_bounds_what_is_given_no_bound(monkeypatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert memory_bound(None) is None
    monkeypatch.setenv(VARIABLE, "3GB")
    assert memory_bound(None) == 3 * 10**9
    assert memory_bound("2GB") == 2 * 10**9
    with pytest.raises(ArgumentError, match="max_memory=0 is no size"):
        memory_bound(0)
    monkeypatch.setenv(VARIABLE, "all")
    with pytest.raises(ArgumentError, match="GFFMERGE_MAX_MEMORY='all' is no size"):
        memory_bound(None)


def page_faults_of_a_step() -> int:
    """Pages that the system has to clear for a step that allocates, uses and frees 64 MB, as the last of a few."""
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(2**18) for _ in range(64)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(_glibc() is None, reason="another C library, or told what to do by the environment")
def test_freed_memory_is_there_for_the_next_step() -> None:
    with freed_memory_kept(), freed_memory_kept():
        faults = page_faults_of_a_step()
    assert faults < 64 * 2**20 / resource.getpagesize() / 10


def test_live_and_peak_bytes_are_counted() -> None:
    before = torch.ones(100, dtype=torch.float64)
    with PeakMemory() as memory:
        a = torch.zeros(1000, dtype=torch.float64)
        b = a[:10].mul_(2)  # a view, and in place
        c = torch.outer(before, before)
        assert memory.live == 8000 + 80_000
        del c
        d = before.view(10, 10)
        assert (memory.live, memory.peak) == (8000, 88_000)
        del a, b, d
        assert memory.live == 0


def test_gradients_are_counted_through_vmap_and_jvp() -> None:
    """As many bytes for twice the rows, within a tenth: what estimates rely on."""
    peaks = []
    for n in (1000, 2000):
        x, layer = torch.randn(n, 8), torch.nn.Linear(8, 8)
        with PeakMemory() as memory:
            _, slope = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
            slope.square().sum().backward()
        peaks.append(memory.peak)
    assert peaks[1] == pytest.approx(2 * peaks[0], rel=0.1)


@pytest.mark.parametrize(
    "architecture", ["painn", pytest.param("chgnet", marks=[pytest.mark.slow, pytest.mark.nightly])]
)
def test_portions_do_not_change_a_merge(architecture: str) -> None:
    pair = family(architecture, 2, frames=2, hyper={**HYPER[architecture], "n_blocks": 1})
    specialists = [replace(s, potential=s.potential.double()) for s in pair]
    whole, report = closed_form_merge(specialists, RECIPE, device="cpu")
    small, other = closed_form_merge(specialists, RECIPE, device="cpu", portions=SMALLEST)
    for s in specialists:
        one, two = (predict_frames(m.potential, s.calibration) for m in (whole, small))
        np.testing.assert_allclose(one.energies, two.energies, rtol=1e-10, atol=1e-9)
        np.testing.assert_allclose(np.concatenate(one.forces), np.concatenate(two.forces), rtol=0, atol=1e-8)
    assert report.relative_disagreement == pytest.approx(other.relative_disagreement, rel=1e-8)


def test_the_gradient_of_a_batch_is_the_sum_over_its_parts() -> None:
    """Also where structures have different sizes, and only some have a stress."""
    first = family("painn", 1, species=(1, 6, 8, 13))[0]
    teacher = replace(first, potential=first.potential.double())
    crystal = bulk("Al", cubic=True)
    crystal.rattle(0.1, seed=0)
    frames = [*teacher.calibration[:3], crystal]
    student = family("painn", 2, species=(1, 6, 8, 13))[1].potential.double().requires_grad_(True)
    graphs = _graphs_with_targets(teacher, student, frames, index=0, options=DistillOptions())
    config = TrainConfig(stress_weight=10.0)
    found = []
    for max_edges in (None, 1):
        student.zero_grad()
        value = _gradient(
            student, graphs, lambda m, part, whole: loss_terms(m, part, config, whole=whole), max_edges
        )
        found.append((value, [p.grad.clone() for p in student.parameters() if p.grad is not None]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    assert len(found[0][1]) > 10
    for one, two in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_what_does_not_fit_says_what_to_lower() -> None:
    specialists = family("painn", 2)
    with pytest.raises(DeviceMemoryError) as caught:
        merge(specialists, RECIPE, device="cpu", max_memory="10MB")
    (line,) = str(caught.value).splitlines()
    assert "more than max_memory=10 MB" in line
    assert line.endswith("or raise max_memory")


def test_a_bound_makes_portions_smaller_and_is_met_by_the_estimate() -> None:
    specialists = [ForceField.load(name) for name in ("rmd17-ethanol", "rmd17-malonaldehyde")]
    recipe = load_recipe("fast")
    free = estimate_memory(specialists, recipe, device="cpu")
    assert free.portions == Portions()
    assert max(free.phases, key=free.phases.get) == "the corrections of whole stages"
    bound = int(free.peak - 20e6)
    bounded = estimate_memory(specialists, recipe, device="cpu", bound=bound)
    assert bounded.peak <= bound
    assert not bounded.portions.keep_graphs
    assert "of memory, most of it for" in str(bounded)


def test_all_frames_count_that_are_in_memory() -> None:
    """A distillation takes all frames, whatever the solves take, and so does the base that is kept."""
    pair = family("painn", 2, frames=12)
    wide, narrow = (load_recipe({"preset": "gffmerge", "frames": n}) for n in (12, 2))
    one, two = (estimate_memory(pair, recipe, device="cpu").phases for recipe in (wide, narrow))
    assert two["the layers"] < one["the layers"]
    assert two["the distillation"] == pytest.approx(one["the distillation"], rel=0.02)
    joined = estimate_memory(pair, narrow, device="cpu", base_joined=True).phases
    assert two["the layers"] < joined["the layers"] < one["the layers"]


def test_a_distillation_is_estimated_with_its_own_student_and_teachers() -> None:
    pair = family("painn", 2, frames=6, hyper=HYPER["painn"])
    wide = family("painn", 1, frames=6, hyper=HYPER["painn"] | {"channels": 32})[0]
    few, many = DistillOptions(batch_size=2), DistillOptions(batch_size=6)
    small = estimate_distillation(pair[0], pair, few, device="cpu")
    assert set(small.phases) == {"labels", "the distillation"}
    assert "of memory, most of it for" in str(small)
    more = estimate_distillation(pair[0], pair, many, device="cpu")
    assert more.phases["the distillation"] > small.phases["the distillation"]
    large = estimate_distillation(wide, pair, few, device="cpu")
    assert large.phases["the distillation"] > small.phases["the distillation"]
    taught = estimate_distillation(pair[0], [wide], few, device="cpu")
    assert taught.phases["labels"] > small.phases["labels"]
    assert estimate_distillation(pair[0], [pair[1].with_calibration([])], few, device="cpu").peak > 0


@pytest.mark.parametrize("more", [{"feature_weight": 1.0}, {"hessian_weight": 1.0}])
def test_what_a_distillation_matches_beside_forces_is_in_its_estimate(more) -> None:
    pair = family("painn", 2, frames=6, hyper=HYPER["painn"])
    plain, matched = (
        estimate_distillation(pair[0], pair, DistillOptions(**o), device="cpu") for o in ({}, more)
    )
    assert matched.phases["the distillation"] > plain.phases["the distillation"]
    assert matched.phases["labels"] >= plain.phases["labels"]
    recipe = load_recipe("gffmerge")
    assert recipe.refine is not None
    with_it = recipe.model_copy(update={"refine": recipe.refine.model_copy(update=more)})
    merges = [
        estimate_memory(pair, one, device="cpu").phases["the distillation"] for one in (recipe, with_it)
    ]
    assert merges[1] > merges[0]


def test_a_bound_makes_the_parts_of_a_distillation_smaller() -> None:
    pair = family("painn", 2, frames=6, hyper=HYPER["painn"] | {"channels": 64})
    options = DistillOptions(batch_size=20, copies=0)
    free = estimate_distillation(pair[0], pair, options, device="cpu")
    assert free.portions.edges is None
    bounded = estimate_distillation(pair[0], pair, options, device="cpu", bound=int(free.peak - 1e6))
    assert bounded.peak < free.peak
    assert bounded.portions.edges
    with pytest.raises(DeviceMemoryError, match=r"this distillation needs about .* or raise max_memory"):
        estimate_distillation(pair[0], pair, options, device="cpu", bound=10**7)


CHILD = """
import json, re, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from ase_gffmerge.merging.recipe import load_recipe
from ase_gffmerge.workflows.memory import estimate_distillation, estimate_memory
from ase_gffmerge.workflows.merge import merge
from ase_gffmerge.merging.blockwise import align_block
from helpers.toys import family
align_block.__kwdefaults__["iterations"] = 2  # as much memory in less time
hyper = {"cutoff": 4.0, "channels": 128, "n_blocks": 1, "n_radial": 20}
pair = family("painn", 2, frames=24, hyper=hyper)
options = {"select": False, "frames": 24, "directions": 1, "allow_unrelated": True}
recipe = load_recipe({"preset": "fast", **options})
free = estimate_memory(pair, recipe, device="cpu")
bound = int(free.resident + 0.75 * (free.peak - free.resident))
found = {"bound": bound, "estimate": free.peak}
for kind, max_memory in (("bounded", bound), ("free", None)):
    merge(pair, recipe, device="cpu", max_memory=max_memory)
    status = Path("/proc/self/status").read_text()  # ru_maxrss begins with that of the parent
    found[kind] = int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_the_estimate_and_the_bound_hold() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, check=True, cwd=TESTS
    )
    found = json.loads(done.stdout)
    assert found["bounded"] <= found["bound"] < found["free"]
    assert found["estimate"] / 1.5 < found["free"] < 1.5 * found["estimate"]
