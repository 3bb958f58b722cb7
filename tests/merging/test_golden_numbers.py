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
        "energies": (-4209.885072488, -7255.034080093),
        "forces": ((1.1890076, 1.1559107, -1.2524408), (4.7794834, -1.7443760, 2.7586797)),
        "disagreement": 0.0645831309,
    },
}
"""Per preset: energies (eV) of the first bundled test frame of each specialist, forces (eV/Å) on its first atom, and the
relative disagreement of the report. The closed form is a quick one, of every fourth frame."""


RECIPES = {"closed-form": {"select": False, "readout": {"width": 256, "copies": 2}}}


@pytest.mark.parametrize("preset", ["mean", "paper", pytest.param("closed-form", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::ase_gffmerge.errors.MergeWarning")
def test_merges_of_the_bundled_pair(preset: str) -> None:
    specialists = [ForceField.load(name) for name in NAMES]
    if preset in RECIPES:
        specialists = [s.with_calibration(s.calibration[::4]) for s in specialists]
    merged, report = merge(specialists, {"preset": preset, **RECIPES.get(preset, {})}, device="cpu")
    merged.to(dtype=torch.float64)
    found = predict_frames(merged.potential, [bundled_test_frames(name)[0] for name in NAMES])
    expected = NUMBERS[preset]
    np.testing.assert_allclose(found.energies, expected["energies"], rtol=0, atol=1e-3)
    np.testing.assert_allclose([forces[0] for forces in found.forces], expected["forces"], rtol=0, atol=1e-3)
    assert report.relative_disagreement == pytest.approx(expected["disagreement"], rel=1e-3)
