"""What a merge tells while it runs, and that a readout which fails leaves the layers."""

import pytest
import torch

import ase_gffmerge.merging.merge as merging
from ase_gffmerge.errors import ReadoutWarning
from ase_gffmerge.merging.merge import closed_form_merge
from ase_gffmerge.merging.readout_fit import described
from ase_gffmerge.merging.recipe import ReadoutOptions, Recipe

READOUT = {"width": 16, "copies": 1, "interval": 4.0}
RECIPE = Recipe(select=False, directions=1, readout=READOUT)


@pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.MergeWarning")
def test_progress_is_told_within_stages_and_never_goes_back(family) -> None:
    told: list[tuple[float, str]] = []
    specialists = family("painn", 2, frames=5, hyper={"cutoff": 3.0, "channels": 8, "n_blocks": 1})
    closed_form_merge(
        specialists, RECIPE, device="cpu", progress=lambda fraction, text: told.append((fraction, text))
    )
    fractions, texts = zip(*told)
    assert list(fractions) == sorted(fractions)
    assert (fractions[-1], min(fractions) >= 0) == (1.0, True)
    for expected in (
        "stages.0.filters",
        "stages.1, correction 2 of 15",
        "readout of 16 features, s0: copies of frames",
        "readout of 16 features, s1: batch 1 of 1",
    ):
        assert expected in texts, expected


def test_a_width_that_is_cut_is_said() -> None:
    assert described(16, ReadoutOptions(width=16)) == "readout of 16 features"
    assert described(12, ReadoutOptions(width=16)) == "readout of 12 (not 16) features"


@pytest.mark.parametrize("error", [RuntimeError("no memory\nat all"), torch.linalg.LinAlgError("singular")])
@pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.MergeWarning")
def test_layers_are_kept_where_the_readout_fails(family, monkeypatch, error: Exception) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    specialists = family("painn", 2, frames=5, hyper={"cutoff": 3.0, "channels": 8, "n_blocks": 1})
    plain, expected = closed_form_merge(
        specialists, RECIPE.model_copy(update={"readout": None}), device="cpu"
    )
    monkeypatch.setattr(merging, "match_forces", fail)
    with pytest.warns(ReadoutWarning, match=r"could not be solved \((no memory|singular)\); the merge keeps"):
        merged, report = closed_form_merge(specialists, RECIPE, device="cpu")
    assert merged.potential.hyper.readout_width == 0
    assert [layer.name for layer in report.layers] == [layer.name for layer in expected.layers]
    for ours, theirs in zip(merged.potential.parameters(), plain.potential.parameters(), strict=True):
        assert torch.equal(ours, theirs)
