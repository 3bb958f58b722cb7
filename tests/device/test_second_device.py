"""Merging, serving, dynamics and training on a device that is not the CPU: nothing is made or left in the wrong place."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration

pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch knows no devices written in Python",
)

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
}
TOLERANCES = {
    "painn merged by paper": 1e-12,
    "painn merged by default": 1e-9,
    "nequip merged by default": 1e-9,
    "recorded": 1e-12,
    "dynamics": 1e-12,
    "training": 1e-6,
    "distilled": 5e-3,  # a first step of Adam is the sign of a gradient, also where that is round-off
}


@pytest.mark.slow
@pytest.mark.nightly
def test_every_task_gives_on_a_second_device_what_it_gives_on_the_cpu() -> None:
    """In a process of its own: a device cannot be taken back."""
    tasks = HERE / "tasks.py"
    done = subprocess.run(
        [sys.executable, tasks], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout)
    assert differences.keys() == TOLERANCES.keys()
    assert all(differences[name] <= tolerance for name, tolerance in TOLERANCES.items()), differences


MISTAKES = """
import torch
from helpers.second_device import second_device

with second_device() as device:
    there, here = torch.eye(2, device=device), torch.eye(2)
    for mistake in (
        lambda: there + here,
        lambda: torch.linalg.solve(there, here),
        lambda: here.clone().copy_(there) @ there,
        lambda: torch.stack([there, torch.zeros_like(here)]),
        lambda: there.numpy(),
    ):
        try:
            mistake()
        except (AssertionError, RuntimeError, TypeError) as error:
            print(error)
        else:
            raise SystemExit("accepted")
    print((there + here.to(device)).cpu().numpy().sum())
"""


def test_what_a_gpu_refuses_the_second_device_refuses_too() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MISTAKES],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("are on the CPU") == 4
    assert done.stdout.endswith("4.0\n")


IN_MEMORY = """
import torch
from ase_gffmerge.integrations.wrapped import on_cpu
from helpers.second_device import second_device

with second_device() as device:
    network = torch.nn.BatchNorm1d(2).eval()
    assert on_cpu(network) is network
    there = torch.nn.BatchNorm1d(2).eval().to(device)
    copy = on_cpu(there)
    assert there.weight.device.type == "second"
    assert torch.equal(copy(torch.ones(3, 2)), network(torch.ones(3, 2)))
"""


def test_networks_in_memory_are_compared_on_the_cpu() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_MEMORY], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
