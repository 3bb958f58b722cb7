"""The benchmark of LAMMPS: its structure and its ratios."""

import pytest

from ase_gffmerge.graphs import build_graph


def test_boxes_and_ratios(script):
    module = script("benchmark_lammps")
    box = module.ethanol(250)
    assert len(box) == 243
    neighbors = build_graph(box, 5.0).n_edges / len(box)
    assert 12 < neighbors < 15
    one = {
        "atoms": 1000,
        "ase": 0.1,
        "lammps-1": {"network": 0.09, "total": 0.104, "pairs": 13_000},
        "peak_gb": 0.4,
        "lammps-2": {"network": 0.05},
    }
    many = {
        "atoms": 8000,
        "lammps-1": {"network": 0.8, "total": 0.832, "pairs": 104_000},
        "peak_gb": 0.61,
        "lammps-2": {"network": 0.4},
    }
    found = module.summary([one, many], [1, 2])
    assert found["one process over ASE, 1000 atoms"] == pytest.approx(1.04)
    assert found["network of a process of 2 over one, 8000 atoms"] == pytest.approx(0.5)
    assert found["exponent of the cost"] == pytest.approx(1.0)
    assert found["bytes of memory per atom"] == pytest.approx(0.21e9 / 7000)
    assert found["bytes of memory per pair"] == pytest.approx(0.21e9 / 91_000)
