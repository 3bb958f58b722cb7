"""``gffmerge merge --closed-loop``."""

import pytest

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.workflows import active_learning as closed_loop


@pytest.fixture
def brief(monkeypatch):
    """Dynamics of 20 fs, whatever was asked for; the temperatures that were asked for."""
    original, asked = closed_loop.run_rollouts, []

    def shortened(merged, specialists, options, **keywords):
        asked.append(options.temperature)
        return original(
            merged, specialists, options.model_copy(update={"time": 0.02, "replicas": 1}), **keywords
        )

    monkeypatch.setattr(closed_loop, "run_rollouts", shortened)
    return asked


def test_rounds_are_reported(gffmerge, files, brief):
    command = (
        "merge",
        "methanol.safetensors",
        "water.safetensors",
        "--recipe",
        "fast.yaml",
        "--closed-loop",
        1,
    )
    document = gffmerge(*command, "--loop-temperature", 20, "--out", "m.safetensors", "--json").json()
    loop = document["closed_loop"]
    assert brief == [20.0, 20.0]
    assert loop["rounds"][0]["n_frames"] == [6, 6]
    assert len(loop["rounds"]) == 2
    assert loop["rounds"][0]["trajectories"][1]["specialist"] == "water"
    merged = ForceField.load(files / "m.safetensors").merged
    assert merged is not None
    assert merged.recipe["closed_loop"]["rounds"] == 1
    assert loop["chosen"] in (0, 1)
    text = gffmerge(*command, "--out", "again.safetensors").out
    assert "on its own trajectories" in text
    assert "round 1" in text


def test_impossible_options_are_refused(gffmerge, files):
    command = (
        "merge",
        "methanol.safetensors",
        "water.safetensors",
        "--out",
        "m.safetensors",
        "--closed-loop",
    )
    assert "rounds" in gffmerge(*command, -1).error()
    assert "temperature" in gffmerge(*command, 1, "--loop-temperature", 0).error()
    assert not (files / "m.safetensors").exists()
