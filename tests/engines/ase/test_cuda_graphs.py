"""Networks recorded as CUDA graphs: padding changes nothing, sizes are recorded again, failures leave a working network.

A recording is checked on the CPU as well, by one that evaluates the recorded function again on the recorded addresses.
"""

import itertools
import threading
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.errors import CaptureWarning, CompileWarning
from ase_gffmerge.graphs import build_graph, predict
from ase_gffmerge.graphs.derivatives import assemble
from ase_gffmerge.graphs.graph import edge_vectors
from ase_gffmerge.inference.compiled import EAGER_STEPS, CompiledPotential, differentiated, traced_arguments
from ase_gffmerge.inference.cuda_graphs import (
    BACKOFF,
    FAILURES,
    MAX_EDGES,
    PADDING_ATOMS,
    RECORDINGS,
    VISITS,
    CapturedFunction,
    CudaGraphs,
    capacity,
)
from helpers.rerun import Rerun
from helpers.structures import STRUCTURES, crystal, everything
from helpers.toys import random_force_field


def arguments(potential, atoms):
    graph = build_graph(atoms, potential.hyper.cutoff)
    return traced_arguments(potential, edge_vectors(graph), graph)


def captured(potential, record) -> CapturedFunction:
    padding_atom = potential.species[-1], potential.hyper.cutoff
    return CapturedFunction(differentiated(potential), padding_atom=padding_atom, record=record)


def assert_equal_results(found, expected) -> None:
    (gradient, energies, scalars), (true_gradient, true_energies, true_scalars) = found, expected
    for one, other in zip(
        (gradient, energies, *scalars), (true_gradient, true_energies, *true_scalars), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@given(st.integers(0, 10**7))
def test_a_capacity_is_at_most_a_quarter_too_large(count) -> None:
    assert count <= capacity(count) <= max(16, 1.25 * count)
    assert capacity(capacity(count)) == capacity(count)


@pytest.mark.parametrize("architecture", ["painn", "nequip", "escaip"])
def test_replays_are_what_the_network_gives_without_padding(architecture) -> None:
    potential = random_force_field(architecture).potential
    function = captured(potential, record := Rerun())
    rng = torch.Generator().manual_seed(0)
    for step in range(VISITS + 3):
        atoms = crystal() * (2, 2, 1)
        atoms.positions += 0.05 * torch.randn(atoms.positions.shape, generator=rng).numpy()
        given = arguments(potential, atoms)
        assert_equal_results(function(*given), differentiated(potential)(*given))
        assert len(record.sizes) == (step + 1 >= VISITS), "recorded once, when a size comes back"
    (size,) = record.sizes
    assert size.n_atoms >= len(atoms) + PADDING_ATOMS
    assert size.n_edges >= len(given[0])


class Operations(TorchDispatchMode):
    """Collects the names of the operations that are carried out."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        if function is torch.ops.aten.index.Tensor:
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), "masks are counted"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ["painn", "nequip", "escaip"])
def test_nothing_in_a_network_waits_for_the_device(architecture) -> None:
    """Numbers that come from the device or go there cannot be recorded; new tensors must be made where the others are."""
    potential = random_force_field(architecture).potential
    given = arguments(potential, crystal())
    expected = differentiated(potential)(*given)
    with torch.device("meta"), Operations() as operations:
        found = differentiated(potential)(*given)
    assert_equal_results(found, expected)
    assert "mm" in operations.names or "addmm" in operations.names
    assert not operations.names & {
        "_local_scalar_dense",
        "nonzero",
        "lift_fresh",
        "lift_fresh_copy",
        "masked_select",
    }


def test_a_list_that_outgrows_its_size_is_recorded_again_and_the_old_one_kept() -> None:
    potential = random_force_field("painn").potential
    function = captured(potential, record := Rerun())
    small, large = crystal() * (2, 1, 1), crystal() * (3, 2, 1)
    for atoms in [small, large] * (VISITS + 1):
        given = arguments(potential, atoms)
        assert_equal_results(function(*given), differentiated(potential)(*given))
    assert len(record.sizes) == 2


def test_results_do_not_change_when_the_next_structure_is_replayed() -> None:
    potential = random_force_field("painn").potential
    function = captured(potential, Rerun())
    given, moved = (arguments(potential, atoms) for atoms in (crystal(), STRUCTURES["cluster"]()))
    for _ in range(VISITS):
        first = function(*given)
        function(*moved)
    before = [x.clone() for x in (*first[:2], *first[2])]
    shaken = (given[0] * 1.01, *given[1:])
    function(*shaken)
    assert all(torch.equal(x, y) for x, y in zip(before, (*first[:2], *first[2]), strict=True))


def test_only_the_latest_sizes_are_kept() -> None:
    potential = random_force_field("painn").potential
    function = captured(potential, record := Rerun())
    lengths = range(2, 4 * RECORDINGS, 4)
    inputs = {n: arguments(potential, crystal() * (n, 1, 1)) for n in lengths}
    inputs |= {100: arguments(potential, crystal() * (100, 1, 1))}
    assert len(inputs) == RECORDINGS + 1
    for each, _ in itertools.product(inputs.values(), range(VISITS)):
        function(*each)
    assert len(set(record.sizes)) == len(record.sizes) == RECORDINGS + 1
    assert len(function._recordings) == RECORDINGS
    for _ in range(BACKOFF * VISITS - 1):
        function(*inputs[2])
    assert len(record.sizes) == RECORDINGS + 1, "the oldest one is gone, and has to wait longer"
    assert_equal_results(function(*inputs[2]), differentiated(potential)(*inputs[2]))
    assert len(record.sizes) == RECORDINGS + 2


def test_more_sizes_than_recordings_soon_stop_recording() -> None:
    potential = random_force_field("painn").potential
    function = captured(potential, record := Rerun())
    inputs = [arguments(potential, crystal() * (n, 1, 1)) for n in (*range(2, 4 * RECORDINGS, 4), 100)]
    for each in inputs * 40:
        function(*each)
    assert len(record.sizes) < 4 * len(inputs)


def test_large_graphs_are_not_recorded() -> None:
    potential = random_force_field("painn").potential
    function = captured(potential, record := Rerun())
    vectors, edge_index, *rest = arguments(potential, crystal())
    repeats = MAX_EDGES // len(vectors) + 1
    many = (vectors.repeat(repeats, 1), edge_index.repeat(1, repeats), *rest)
    for _ in range(VISITS + 1):
        function(*many)
    assert not record.sizes


def test_what_cannot_be_recorded_is_launched_after_one_warning() -> None:
    attempts = []

    def impossible(function, inputs):
        attempts.append(inputs)
        raise RuntimeError("operation not permitted when stream is capturing\nsecond line")

    potential = random_force_field("painn").potential
    function, given = captured(potential, impossible), arguments(potential, crystal())
    expected = differentiated(potential)(*given)
    before_the_last = sum(VISITS * BACKOFF**k for k in range(FAILURES)) - 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(before_the_last):
            function(*given)
    with pytest.warns(CaptureWarning, match=r"capturing\); a newer torch") as caught:
        assert_equal_results(function(*given), expected)
    assert len(caught) == 1
    for _ in range(before_the_last):
        assert_equal_results(function(*given), expected)
    assert len(attempts) == FAILURES


def test_short_memory_makes_one_size_wait_and_gives_the_others_back() -> None:
    record = Rerun()

    def greedy(function, inputs):
        if len(inputs[2]) > 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return record(function, inputs)

    potential = random_force_field("painn").potential
    function = captured(potential, greedy)
    small, large = (arguments(potential, crystal() * (n, 1, 1)) for n in (2, 30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(VISITS):
            function(*small)
        assert function._recordings
        for _ in range(10 * FAILURES * VISITS):
            assert_equal_results(function(*large), differentiated(potential)(*large))
        assert not function._recordings
        for _ in range(BACKOFF * VISITS):
            assert_equal_results(function(*small), differentiated(potential)(*small))
    assert len(function._recordings) == 1


def test_recordings_make_room_for_a_launch() -> None:
    potential = random_force_field("painn").potential
    plain, given = differentiated(potential), arguments(potential, crystal())

    def needs_room(vectors, *rest):
        if function._recordings and len(vectors) > 1000:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(vectors, *rest)

    function = captured(potential, Rerun())
    function.function = needs_room
    for _ in range(VISITS):
        function(*given)
    large = arguments(potential, crystal() * (30, 1, 1))
    assert len(large[0]) > 1000
    assert_equal_results(function(*large), plain(*large))
    assert not function._recordings


def test_threads_share_recordings() -> None:
    potential = random_force_field("painn").potential
    function = captured(potential, record := Rerun())
    inputs = [arguments(potential, crystal() * (n, 1, 1)) for n in (2, 3, 4, 6)]
    expected = [differentiated(potential)(*given) for given in inputs]
    found: list[tuple[int, object]] = []

    def work(k: int) -> None:
        for step in range(12):
            i = (k + step) % len(inputs)
            found.append((i, function(*inputs[i])))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 48
    for i, result in found:
        assert_equal_results(result, expected[i])
    assert len(record.sizes) == len(set(record.sizes))


class FakeCuda:
    """What a recorder uses of ``torch.cuda``: streams and pools are numbers, kernels run at once."""

    def __init__(self, patch, *, fails: str = ""):
        self.streams, self.pools, self.current, self.fails = itertools.count(1), itertools.count(), 0, fails
        self.undone: list[str] = []
        self.captures: list[tuple[object, object]] = []
        for name in ("CUDAGraph", "current_stream", "set_stream", "stream", "graph", "graph_pool_handle"):
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "Stream", lambda: FakeStream(next(self.streams)))
        patch.setattr(torch.cuda, "device", lambda _: nullcontext())
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            patch.setattr(torch._C, name, lambda *_, name=name: self.undone.append(name), raising=False)

    class CUDAGraph:
        def replay(self) -> None: ...

    def graph_pool_handle(self) -> int:
        return next(self.pools)

    def current_stream(self, device=None):
        return FakeStream(self.current)

    def set_stream(self, stream) -> None:
        self.current = stream.number

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.number
        yield
        self.current = before

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.captures.append((pool, stream.number))
        before, self.current = self.current, stream.number
        try:
            yield
        finally:
            if self.fails == "end":
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            self.current = before


@dataclass(frozen=True)
class FakeStream:
    number: int

    def wait_stream(self, other) -> None: ...


def test_graphs_share_a_pool_and_a_stream_while_one_lives(monkeypatch) -> None:
    cuda, potential = FakeCuda(monkeypatch), random_force_field("painn").potential
    record, given = CudaGraphs(), arguments(potential, crystal())
    first, second = (record(differentiated(potential), given) for _ in range(2))
    assert_equal_results(first[0], differentiated(potential)(*given))
    assert cuda.captures[0] == cuda.captures[1]
    assert cuda.current == 0
    del first, second
    record(differentiated(potential), given)
    assert cuda.captures[2][0] != cuda.captures[0][0], "the pool of graphs that are gone is not used again"
    assert cuda.captures[2][1] == cuda.captures[0][1]


@pytest.mark.parametrize("fails", ["", "end"])
def test_a_failed_capture_tells_its_cause_and_leaves_torch_as_it_was(monkeypatch, fails) -> None:
    cuda, potential = FakeCuda(monkeypatch, fails=fails), random_force_field("painn").potential
    given, calls = arguments(potential, crystal()), []

    def waits_for_the_device(*inputs):
        calls.append(inputs)
        if len(calls) > CudaGraphs.WARM_UP:
            raise RuntimeError("operation not permitted when stream is capturing")
        return differentiated(potential)(*inputs)

    with pytest.raises(RuntimeError, match="not permitted"):
        CudaGraphs()(waits_for_the_device, given)
    assert cuda.current == 0
    assert cuda.undone == (["_cuda_endAllocateToPool", "_cuda_releasePool"] if fails else [])


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Potentials on the CPU are served as on a GPU; gives the sizes that were recorded."""
    record = Rerun()
    monkeypatch.setattr(CompiledPotential, "_on_gpu", True)
    monkeypatch.setattr(CudaGraphs, "__call__", lambda self, function, inputs: record(function, inputs))
    return record.sizes


def test_a_gpu_records_at_once_and_compiles_later(like_a_gpu, monkeypatch) -> None:
    compilations = []

    def traced(function, **_):
        compilations.append(function)
        return function

    monkeypatch.setattr(torch, "compile", traced)
    potential = random_force_field("painn").potential
    served = CompiledPotential(potential, compile="auto")
    graph = build_graph(crystal(), potential.hyper.cutoff)
    expected, vectors = predict(potential, graph), edge_vectors(graph)
    for step in range(EAGER_STEPS + VISITS):
        prediction = assemble(graph, vectors, served(vectors, graph))
        torch.testing.assert_close(prediction.forces, expected.forces, rtol=0, atol=1e-12)
        assert len(compilations) == (step >= EAGER_STEPS)
    assert len(like_a_gpu) == 2, "the network step by step, then the compiled one"
    assert list(served._functions) == ["compiled"], "what is not used any more gives its memory back"


def test_without_a_compiler_a_gpu_still_records(like_a_gpu, monkeypatch) -> None:
    def no_compiler(*_, **__):
        raise RuntimeError("Cannot find a working triton installation")

    monkeypatch.setattr(torch, "compile", lambda function, **_: no_compiler)
    potential = random_force_field("painn").potential
    served = CompiledPotential(potential, compile=True)
    graph = build_graph(crystal(), potential.hyper.cutoff)
    with pytest.warns(CompileWarning, match="triton"):
        served(edge_vectors(graph), graph)
    for _ in range(VISITS):
        served(edge_vectors(graph), graph)
    assert len(like_a_gpu) == 1


def test_compile_false_records_nothing(like_a_gpu) -> None:
    calc = GFFMergeCalculator(random_force_field("painn"), device="cpu", compile=False)
    for _ in range(VISITS + 1):
        everything(crystal(), calc)
        calc.reset()
    assert not like_a_gpu


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from(sorted(STRUCTURES)), min_size=1, max_size=8))
def test_any_sequence_of_structures_is_served_like_without_recording(names) -> None:
    with pytest.MonkeyPatch.context() as patch:
        record = Rerun()
        patch.setattr(CompiledPotential, "_on_gpu", True)
        patch.setattr(CudaGraphs, "__call__", lambda self, function, inputs: record(function, inputs))
        force_field = random_force_field("painn")
        recorded = GFFMergeCalculator(force_field, dtype="float64", device="cpu")
        plain = GFFMergeCalculator(force_field, dtype="float64", device="cpu", compile=False)
        connected = False
        for name in names * VISITS:
            atoms = STRUCTURES[name]()
            recorded.reset()
            for key, value in everything(atoms.copy(), recorded).items():
                torch.testing.assert_close(
                    torch.as_tensor(value),
                    torch.as_tensor(everything(atoms.copy(), plain)[key]),
                    rtol=0,
                    atol=1e-11,
                )
            connected |= recorded.extras["n_edges"] > 1
        assert bool(record.sizes) == connected


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("compile", ["auto", True])
def test_on_a_gpu_recordings_give_what_the_cpu_gives(architecture, compile, dtype) -> None:
    force_field = random_force_field(architecture)
    gpu = GFFMergeCalculator(force_field, dtype=dtype, device="cuda", compile=compile)
    cpu = GFFMergeCalculator(force_field, dtype=dtype, device="cpu", compile=False)
    assert not torch.backends.cuda.matmul.allow_tf32
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        warnings.simplefilter("error", CompileWarning)
        for step in range(2 * EAGER_STEPS):
            atoms = crystal() * ((1, 1, 1), (3, 2, 1))[step % 2]
            atoms.rattle(0.05, seed=step)
            found, expected = everything(atoms.copy(), gpu), everything(atoms.copy(), cpu)
            for key, value in expected.items():
                close = {"rtol": 0, "atol": 1e-9 if dtype == "float64" else 1e-4}
                torch.testing.assert_close(torch.as_tensor(found[key]), torch.as_tensor(value), **close)
    (function,) = gpu._predictor._compiled._functions.values()
    assert len(function._recordings) == 2


@needs_cuda
def test_on_a_gpu_a_failed_capture_is_survived() -> None:
    potential = random_force_field("painn").potential.cuda()
    given = tuple(x.cuda() for x in arguments(random_force_field("painn").potential, crystal()))
    expected, record = differentiated(potential)(*given), CudaGraphs()

    def waits(*inputs):
        inputs[0].sum().item()
        return differentiated(potential)(*inputs)

    with pytest.raises(RuntimeError, match="captur"):
        record(waits, given)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()
    outputs, replay = record(differentiated(potential), given)
    replay()
    torch.testing.assert_close(outputs[0], expected[0])


@needs_cuda
def test_on_a_gpu_sizes_share_memory() -> None:
    potential = random_force_field("painn").potential.cuda()
    function = captured(potential, CudaGraphs())
    reserved = []
    for n in (60, *range(2, 60, 4)):
        for _ in range(VISITS):
            function(
                *(x.cuda() for x in arguments(random_force_field("painn").potential, crystal() * (n, 1, 1)))
            )
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] <= 1.5 * reserved[0]
