"""Contract, point 12: an import changes nothing in the process, neither ours nor, but for what is named here, our packages'.

Run as a program, this file imports in steps, from an unusual state that a return to defaults would show, and prints what
each step changed.
"""

import importlib
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from hashlib import sha256
from typing import Any

import numpy as np
import torch

PACKAGES = (
    "ase.calculators.calculator",
    "e3nn.nn",
    "matscipy.neighbours",
    "platformdirs",
    "safetensors.torch",
    "scipy.linalg",
    "scipy.sparse",
    "scipy.spatial.transform",
    "torch_geometric.nn",
    "yaml",
)
STEPS = {
    "ase_gffmerge": ("ase_gffmerge",),
    "packages": PACKAGES,
    "calculator": ("ase_gffmerge.engines.ase.calculator",),
}

VARIABLES = ["TORCHINDUCTOR_CACHE_DIR"]
"""torch writes its own default there when torch._dynamo is imported, as torch_geometric and e3nn do: the value that it would
take without the variable. A user's own value stays."""
CATCH_ALL = "None, <class 'Warning'>"
"""What no new warning filter may say. Those of requests, urllib3, scipy, sympy and torch_geometric name their own category
or a message, whoever imports these packages; without them, users would see warnings about which they can do nothing."""
SAFE_GLOBALS = ("torch_geometric.", "builtins.", "collections.", "torch.")
"""Modules of the classes that torch_geometric lets ``torch.load(weights_only=True)`` read: its own and plain containers."""


def fingerprint(value: object) -> str:
    return sha256(repr(value).encode()).hexdigest()


def state() -> dict[str, Any]:
    """What belongs to the whole process, as JSON; lists and mappings where single entries may be added."""
    root = logging.getLogger()
    return {
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "module search path": list(sys.path),
        "random": fingerprint(random.getstate()),
        "numpy's random": fingerprint(np.random.get_state()[1].tolist()),  # noqa: NPY002
        "numpy's errors": np.geterr(),
        "numpy's printing": repr(np.get_printoptions()),
        "root logger": [root.level, repr(root.handlers), repr(root.filters), logging.root.manager.disable],
        "warning filters": [repr(entry) for entry in warnings.filters],
        "signals": {number.name: repr(signal.getsignal(number)) for number in signal.valid_signals()
                    if isinstance(number, signal.Signals)},
        "hooks": [repr(hook) for hook in (sys.excepthook, threading.excepthook, warnings.showwarning)],
        "threads": [thread.name for thread in threading.enumerate()],
        "recursion limit": sys.getrecursionlimit(),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "torch's dtype": str(torch.get_default_dtype()),
        "torch's device": str(torch.get_default_device()),
        "torch's random": fingerprint(torch.random.get_rng_state().tolist()),
        "torch's threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "torch's gradients": [torch.is_grad_enabled(), torch.is_anomaly_enabled()],
        "torch's determinism": [
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        ],
        "torch's precision": [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32],
        "torch's printing": repr(torch._tensor_str.PRINT_OPTS),
        "torch's file sharing": torch.multiprocessing.get_sharing_strategy(),
        "torch's safe globals": sorted(f"{each.__module__}.{each.__qualname__}" for each in
                                       torch.serialization.get_safe_globals() if isinstance(each, type)),
        "CUDA is initialised": torch.cuda.is_initialized(),
    }  # fmt: skip


def make_unusual() -> None:
    """Nothing that an import could set to its default stays at its default."""
    random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002
    np.seterr(over="raise", invalid="ignore")
    np.set_printoptions(precision=5)
    logging.getLogger().addHandler(logging.NullHandler())
    warnings.filterwarnings("error", message="unheard of")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.setrecursionlimit(1234)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    torch.set_printoptions(precision=5)


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, list]:
    return {what: [before[what], after[what]] for what in before if before[what] != after[what]}


def main() -> None:
    make_unusual()
    last, report = json.loads(json.dumps(state())), {}
    for step, modules in STEPS.items():
        for module in modules:
            importlib.import_module(module)
        now = json.loads(json.dumps(state()))
        report[step], last = changes(last, now), now
    print(json.dumps(report))


def added(before: list[str], after: list[str]) -> list[str]:
    """What is new in a list that lost nothing."""
    rest = list(after)
    for entry in before:
        rest.remove(entry)
    return rest


def test_12_import_has_no_side_effects() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["ase_gffmerge"] == {}
    assert report["calculator"] == {}

    packages = report["packages"]
    assert packages.keys() <= {"environment", "warning filters", "torch's safe globals"}
    before, after = packages.get("environment", ({}, {}))
    assert {name for name in after if after[name] != before.get(name)} <= set(VARIABLES)
    assert before.keys() <= after.keys()
    filters = added(*packages.get("warning filters", ([], [])))
    assert [entry for entry in filters if CATCH_ALL in entry or entry.startswith("('error'")] == []
    safe = added(*packages.get("torch's safe globals", ([], [])))
    assert [name for name in safe if not name.startswith(SAFE_GLOBALS)] == []


if __name__ == "__main__":
    main()
