"""A GPU against the processor beside it: merges by phase, MD steps, batches, memory; in at most eight minutes.

    python md_examples/benchmarks/gpu.py --json > gpu.json
    python md_examples/benchmarks/gpu.py --device cpu --sizes 30 --frames 4 --recipes fast   # a trial without a GPU

Protocol. One process, nothing else on the GPU; PyTorch's defaults (no TF32); network in float32, geometry in float64. Every
time is a wall time between two synchronisations of the device; times that are compared are measured in turn, and medians
of ``--repeats`` are told after a warm-up: five steps, so that what is recorded is recorded and what is compiled is compiled.

merge
    The bundled pair by the recipes, on the GPU and on one thread of the processor: seconds of every phase as the report has
    them, and how far the two results are apart, as the largest difference of a force component (eV/Å) on test frames. The
    GPU merges a small mixture first, which is not counted: it loads its libraries. A refined merge sums in another order in
    thousands of steps, so that it is the errors against the specialists which should agree.
steps
    Milliseconds per step of molecular dynamics as ASE's integrators ask for it (moved atoms in, forces out, neighbour list
    included), of boxes of ethanol with the density of a liquid: our PaiNN of 128 channels (three blocks, 20 radial
    functions, 5 Å, half a million parameters), the bundled one of 64, and our EScAIP of 128; evaluated step by step,
    recorded as CUDA graph where it is small enough for that, and compiled.
peers
    The rows of peer_nequip.py and peer_torchmdnet.py, where these packages are installed: models of the same size through
    their own calculators, eager and compiled.
batches
    Milliseconds per structure for many structures at once: by the calculator's ``evaluate``, and by TorchSim with our model
    where that is installed.
memory
    Bytes per edge: the peak of allocated memory in an evaluation, less what was allocated before, over the edges; and the
    largest box that fits, doubled in atoms until memory or time runs out, then half-way back.

What the time does not suffice for (``--minutes``) is told as not measured.
"""

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms

from ase_gffmerge import ForceField, GFFMergeCalculator, merge
from ase_gffmerge.errors import DeviceMemoryError, first_line
from ase_gffmerge.evaluation.benchmark.harness import ROWS, Bench, crowd, load_rows, md_step, medians
from ase_gffmerge.forcefield.force_field import bundled_test_frames
from ase_gffmerge.inference.predict import predict_frames
from ase_gffmerge.models import build_potential
from ase_gffmerge.runtime.devices import resolve_device
from ase_gffmerge.runtime.memory import PeakMemory

NAMES = ("rmd17-ethanol", "rmd17-malonaldehyde")
FOLDER = Path(__file__).parent
WARM_UP = 5
HYPER: dict[str, tuple[str, dict[str, Any]]] = {
    "PaiNN 128": ("painn", {"cutoff": 5.0, "channels": 128, "n_blocks": 3, "n_radial": 20}),
    "EScAIP 128": ("escaip", {"cutoff": 5.0, "channels": 128, "n_blocks": 3}),
}
BATCHES = (1, 10, 100)
LARGEST = 2_000_000
"""Atoms beyond which no larger box is tried."""


class Session:
    """What is measured on, and until when.

    Parameters
    ----------
    options
        Of the command line.
    """

    def __init__(self, options: argparse.Namespace):
        self.device = resolve_device(options.device)
        self.options = options
        self.end = time.monotonic() + 60 * options.minutes

    def left(self, seconds: float = 0.0) -> bool:
        """Whether there is time for something that takes about so long."""
        return time.monotonic() + seconds < self.end

    def wait(self) -> None:
        """Let the device finish."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def say(self, text: str) -> None:
        """Report on stderr; stdout is for the result."""
        print(f"{time.monotonic() - self.end + 60 * self.options.minutes:6.0f} s  {text}", file=sys.stderr)


def specialists(session: Session) -> list[ForceField]:
    """The bundled pair, with so many calibration frames."""
    n = session.options.frames
    return [s.with_calibration(s.calibration[:n]) for s in map(ForceField.load, NAMES)]


def network(name: str) -> ForceField:
    """A network with random weights; it costs what a trained one does."""
    architecture, hyper = HYPER[name]
    torch.manual_seed(0)
    potential = build_potential(architecture, hyper, (1, 6, 8)).eval().requires_grad_(False)
    return ForceField(name=name, potential=potential)


# -- merge --


def merges(session: Session) -> dict[str, Any]:
    """Every recipe on the device and on the processor."""
    given, result = specialists(session), dict[str, Any]()
    few = [s.with_calibration(s.calibration[:3]) for s in given]
    if session.device.type == "cuda":
        merge(few, "fast", device=session.device)
    for recipe in session.options.recipes:
        if not session.left(30):
            result[recipe] = "not measured: no time left"
            continue
        session.say(f"merge, {recipe}")
        places = dict.fromkeys((str(session.device), "cpu"))
        found = {place: one_merge(given, recipe, torch.device(place), session) for place in places}
        forces = [row.pop("forces") for row in found.values()]
        result[recipe] = {**found, "largest_force_difference": float(np.abs(forces[0] - forces[-1]).max())}
    return result


def one_merge(
    given: Sequence[ForceField], recipe: str, place: torch.device, session: Session
) -> dict[str, Any]:
    """Seconds, phases, errors against the specialists, and forces on test frames."""
    session.wait()
    start = time.perf_counter()
    merged, report = merge(given, recipe, device=place)
    session.wait()
    seconds = time.perf_counter() - start
    frames = [bundled_test_frames(name)[:10] for name in NAMES]
    served = merged.to(device=torch.device("cpu"), dtype=torch.float32)
    forces = [np.concatenate(predict_frames(served.potential, own).forces) for own in frames]
    own = [row.force_mae for row in report.disagreements if row.model == "merged"]
    return {
        "seconds": seconds,
        "phases": dict(report.seconds),
        "force_mae_against_specialists": own,
        "forces": np.concatenate(forces),
    }


# -- steps --


def ways(session: Session, force_field: ForceField) -> Iterator[tuple[str, Callable[[], GFFMergeCalculator]]]:
    """How a network can be evaluated here."""

    def calculator(compile: Any) -> Callable[[], GFFMergeCalculator]:
        return lambda: GFFMergeCalculator(force_field, device=session.device, compile=compile)

    yield "eager", calculator(False)
    if session.device.type == "cuda":
        yield "recorded", calculator("auto")
    if session.options.compile and force_field.potential.compilable:
        yield "compiled", calculator(True)


def steps(session: Session) -> dict[str, Any]:
    """Milliseconds per MD step of every network, size and way."""
    unit = ForceField.load(NAMES[0]).calibration[0]
    networks = {name: network(name) for name in HYPER} | {"bundled PaiNN 64": ForceField.load(NAMES[0])}
    result: dict[str, Any] = {name: {} for name in networks}
    for n_atoms in session.options.sizes:
        atoms = crowd(unit, n_atoms)
        for name, force_field in networks.items():
            rows: dict[str, Any] = {}
            for way, make in ways(session, force_field):
                rows[way] = (
                    one_step(session, make, atoms) if session.left(20) else "not measured: no time left"
                )
            result[name][str(len(atoms))] = rows
            session.say(f"steps, {name}, {len(atoms)} atoms: {rows}")
    return result


def one_step(session: Session, make: Callable[[], GFFMergeCalculator], atoms: Atoms) -> float | str:
    """Median of milliseconds, or why there is none."""
    try:
        step = md_step(make(), atoms)
        for _ in range(WARM_UP):
            step()
        return medians({"step": step}, repeats=session.options.repeats)["step"]
    except Exception as error:  # of a compiler, or of memory
        return f"failed: {first_line(error)}"


# -- other packages --


def peers(session: Session) -> dict[str, Any]:
    """Rows of the packages that are installed."""
    given, result = specialists(session), dict[str, Any]()
    bench = Bench(
        specialists=tuple(given),
        force_field=given[0],
        calculator=lambda force_field, compiled: GFFMergeCalculator(
            force_field, device=session.device, compile=compiled
        ),
        from_files=lambda n: GFFMergeCalculator(NAMES[:n], device=session.device),
        sizes=[n for n in session.options.sizes if n <= 1000],
        repeats=session.options.repeats,
        compile=session.options.compile,
    )
    for name, file in (("nequip", "peer_nequip.py"), ("torchmd-net", "peer_torchmdnet.py")):
        if not session.left(60):
            result[name] = "not measured: no time left"
            continue
        session.say(f"peers, {name}")
        if name not in ROWS:
            load_rows(FOLDER / file)
        result[name] = [row.to_dict() for row in ROWS[name](bench)]
    return result


def batches(session: Session) -> dict[str, Any]:
    """Milliseconds per structure of batches of molecules."""
    specialist = ForceField.load(NAMES[0])
    calculator = GFFMergeCalculator(specialist, device=session.device)
    frames = [atoms.copy() for atoms in specialist.calibration]
    result: dict[str, Any] = {}
    for n in BATCHES:
        if not session.left(10):
            result[str(n)] = "not measured: no time left"
            continue
        group = [frames[k % len(frames)] for k in range(n)]
        found = medians({"evaluate": partial(calculator.evaluate, group)}, repeats=session.options.repeats)
        other = torch_sim_milliseconds(session, calculator.force_field, group)
        result[str(n)] = {
            "evaluate": found["evaluate"] / n,
            "TorchSim": other / n if isinstance(other, float) else other,
        }
    return result


def torch_sim_milliseconds(session: Session, force_field: ForceField, frames: list[Atoms]) -> float | str:
    """Milliseconds of one evaluation of a state of TorchSim by our model, moved a little every time."""
    try:
        import torch_sim

        from ase_gffmerge.engines.torchsim import TorchSimModel
    except ImportError:
        return "not measured: torch-sim-atomistic is not installed"
    model = TorchSimModel(force_field)
    state = torch_sim.io.atoms_to_state(frames, session.device, torch.float64)

    def evaluate() -> None:
        state.positions = state.positions + 1e-3 * torch.randn_like(state.positions)
        model(state)

    return medians({"step": evaluate}, repeats=session.options.repeats)["step"]


# -- memory --


def memory(session: Session) -> dict[str, Any]:
    """Bytes per edge of every network, and the largest box that fits."""
    unit = ForceField.load(NAMES[0]).calibration[0]
    result: dict[str, Any] = {}
    for name in HYPER:
        force_field = network(name)
        calculator = GFFMergeCalculator(force_field, device=session.device, compile=False)
        found = [bytes_and_edges(session, calculator, crowd(unit, n)) for n in session.options.sizes]
        result[name] = {
            "bytes_per_edge": statistics.median(peak / edges for peak, edges in found),
            "largest": largest_box(session, calculator, unit),
        }
        session.say(f"memory, {name}: {result[name]}")
    return result


def bytes_and_edges(session: Session, calculator: GFFMergeCalculator, atoms: Atoms) -> tuple[float, int]:
    """Peak of one evaluation over what was held before, in bytes, and edges."""
    atoms.calc = calculator
    if session.device.type == "cuda":
        session.wait()
        torch.cuda.reset_peak_memory_stats(session.device)
        before = torch.cuda.memory_allocated(session.device)
        atoms.get_forces()
        peak = torch.cuda.max_memory_allocated(session.device) - before
    else:
        with PeakMemory() as counted:
            atoms.get_forces()
        peak = counted.peak
    return float(peak), int(calculator.extras["n_edges"])


def largest_box(session: Session, calculator: GFFMergeCalculator, unit: Atoms) -> dict[str, Any]:
    """Atoms and edges of the largest box that was evaluated, seconds of it, and why it was the last."""
    best: dict[str, Any] = {"atoms": 0}
    n, failed = max(session.options.sizes), 0
    while True:
        if not session.left(4 * best.get("seconds", 5.0)):
            return {**best, "ended": "no time left"}
        start = time.perf_counter()
        try:
            atoms = crowd(unit, n)
            atoms.calc = calculator
            atoms.get_forces()
        except DeviceMemoryError as error:
            if failed:
                return {**best, "ended": first_line(error)}
            failed, n = n, (n + int(best["atoms"])) // 2
            continue
        seconds = time.perf_counter() - start
        best = {"atoms": len(atoms), "edges": int(calculator.extras["n_edges"]), "seconds": seconds}
        if failed:
            return {**best, "ended": f"{failed} atoms did not fit"}
        if 2 * n > session.options.largest:
            return {**best, "ended": "no larger one was tried"}
        n *= 2


SECTIONS: dict[str, Callable[[Session], dict[str, Any]]] = {
    "merge": merges,
    "steps": steps,
    "batches": batches,
    "memory": memory,
    "peers": peers,
}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 10_000], help="atoms")
    parser.add_argument("--frames", type=int, default=100, help="calibration frames of each specialist")
    parser.add_argument("--recipes", nargs="+", default=["fast", "gffmerge"])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--largest", type=int, default=LARGEST, help="atoms beyond which no box is tried")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all sections and print them."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    session = Session(parsed(arguments))
    gpu = torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else None
    result: dict[str, Any] = {
        "device": str(session.device),
        "gpu": gpu,
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    for name in session.options.only:
        try:
            result[name] = SECTIONS[name](session)
        except Exception as error:  # the other sections are worth having
            result[name] = f"failed: {first_line(error)}"
            session.say(f"{name} {result[name]}")
    print(json.dumps(result, indent=1) if session.options.json else table(result))


def table(result: dict[str, Any]) -> str:
    """Every number on a line of its own, with the path that leads to it."""

    def lines(value: Any, path: str) -> Iterator[str]:
        pairs = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        if not isinstance(value, dict | list):
            yield f"{path:70s} {value:.4g}" if isinstance(value, float) else f"{path:70s} {value}"
        for key, entry in pairs:
            yield from lines(entry, f"{path}/{key}".lstrip("/"))

    return "\n".join(lines(result, ""))


if __name__ == "__main__":
    main()
