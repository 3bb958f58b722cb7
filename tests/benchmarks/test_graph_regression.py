"""The benchmark of energies of molecules in miniature: a merge is nearer to its models than their mean."""

import pytest
import torch

pytest.importorskip("tblite")


@pytest.mark.slow
def test_two_schnets_become_one(script, monkeypatch):
    module = script("benchmark_graph_regression")
    monkeypatch.setattr(module, "SIZES", range(4, 6))
    threads = torch.get_num_threads()
    found = module.measure(0, copies=3, epochs=6)
    torch.set_num_threads(threads)
    assert list(found)[:2] == ["base", "specialists"]
    own = found["specialists"]["errors"]

    def distance(name):
        return sum(abs(a - b) for a, b in zip(found[name]["errors"], own, strict=True))

    assert distance("merged") < distance("mean")
    assert distance("merged, own last layers") < distance("mean")
