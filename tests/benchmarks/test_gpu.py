"""The benchmark of a GPU, in miniature on the processor."""

import json

import pytest


@pytest.mark.slow
@pytest.mark.nightly
def test_every_section_is_measured(script, capsys) -> None:
    module = script("gpu")
    options = (
        "--device cpu --sizes 9 18 --frames 3 --recipes mean --repeats 1 --largest 40 --no-compile --json"
    )
    module.main(options.split())
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "cpu"
    merged = found["merge"]["mean"]
    assert merged["largest_force_difference"] == 0.0
    assert "mean" in merged["cpu"]["phases"]
    for rows in found["steps"].values():
        assert [list(row) for row in rows.values()] == 2 * [["eager"]]
        assert all(row["eager"] > 0 for row in rows.values())
    for row in found["memory"].values():
        assert 1e3 < row["bytes_per_edge"] < 1e6
        assert (row["largest"]["atoms"], row["largest"]["ended"]) == (36, "no larger one was tried")
    assert set(found["batches"]) == {"1", "10", "100"}
    assert all(row["evaluate"] > 0 for row in found["batches"].values())
    assert {row["note"] for row in found["peers"]["torchmd-net"]}


def test_what_there_is_no_time_for_is_said(script, capsys) -> None:
    module = script("gpu")
    options = "--device cpu --minutes 0 --sizes 9 --only merge peers batches --recipes fast"
    module.main(options.split())
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("not measured: no time left") for line in lines) == 1 + 2 + 3


def test_the_largest_box_is_looked_for_half_way_back(script, monkeypatch) -> None:
    module = script("gpu")
    from ase_gffmerge.errors import DeviceMemoryError

    tried = []

    class Small:
        extras = {"n_edges": 1}  # noqa: RUF012

    def crowd(unit, n):
        class Box:
            def __len__(self):
                return n

            def get_forces(self):
                tried.append(n)
                if n > 300:
                    raise DeviceMemoryError("too large")

        return Box()

    monkeypatch.setattr(module, "crowd", crowd)
    session = module.Session(module.parsed(["--device", "cpu", "--sizes", "100"]))
    found = module.largest_box(session, Small(), None)
    assert tried == [100, 200, 400, 300]
    assert (found["atoms"], found["ended"]) == (300, "400 atoms did not fit")
