"""Numbers of the bundled pair's merges that no redesign may change; recorded with float32 weights, evaluated in float64."""

import numpy as np
import pytest
import torch

from ase_gffmerge import ForceField, merge
from ase_gffmerge.forcefield.force_field import bundled_test_frames
from ase_gffmerge.inference.predict import predict_frames

NAMES = ("rmd17-ethanol", "rmd17-malonaldehyde")
NUMBERS = {
    "mean": {
        "energies": (-4206.775108751, -7255.938997548),
        "forces": ((1.2188242, 0.5695416, -1.1379625), (4.7139915, -1.7791611, 2.6928620)),
        "disagreement": 0.1984434935,
    },
    "paper": {
        "energies": (-4208.631484819, -7255.810260409),
        "forces": ((1.0201746, 1.6487973, -0.8040191), (3.9885297, -2.5382091, 2.9887997)),
        "disagreement": 0.4486988130,
    },
    "closed-form": {
        "energies": (-4209.887798031, -7255.040971464),
        "forces": ((1.0431331, 1.2538623, -1.1004027), (4.7273785, -1.7936033, 2.8022505)),
        "disagreement": 0.0230948490,
    },
}
"""Per preset: energies (eV) of the first bundled test frame of each specialist, forces (eV/Å) on its first atom, and the
relative disagreement of the report. The closed form begins with the mean and is fitted to all frames."""


@pytest.mark.parametrize("preset", ["mean", "paper", pytest.param("closed-form", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.MergeWarning")
def test_merges_of_the_bundled_pair(preset: str) -> None:
    merged, report = merge(
        [ForceField.load(name) for name in NAMES], {"preset": preset, "select": False}, device="cpu"
    )
    merged.to(dtype=torch.float64)
    found = predict_frames(merged.potential, [bundled_test_frames(name)[0] for name in NAMES])
    expected = NUMBERS[preset]
    np.testing.assert_allclose(found.energies, expected["energies"], rtol=0, atol=1e-3)
    np.testing.assert_allclose([forces[0] for forces in found.forces], expected["forces"], rtol=0, atol=1e-3)
    assert report.relative_disagreement == pytest.approx(expected["disagreement"], rel=1e-3)
