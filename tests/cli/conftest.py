"""Tiny models and frame files for the command line."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from typer.testing import CliRunner

from ase_gffmerge.cli import app
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.forcefield.provenance import Provenance
from ase_gffmerge.models import build_potential

HYPER = {"channels": 8, "n_blocks": 1, "n_radial": 4, "cutoff": 4.0}


@dataclass(frozen=True)
class Outcome:
    """What a command printed and returned."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)

    def error(self) -> str:
        """The one line of a refused command."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert self.out == ""
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("gffmerge: error: ")
        return lines[0]


@pytest.fixture
def gffmerge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GFFMERGE_CACHE", str(tmp_path / "cache"))

    def run(*arguments: object) -> Outcome:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="gffmerge")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


def emt_frames(name: str, n: int = 6, seed: int = 0) -> list[Atoms]:
    rng, frames = np.random.default_rng(seed), []
    for _ in range(n):
        atoms = molecule(name)
        atoms.rattle(0.05, rng=rng)
        atoms.calc = EMT()
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        atoms.calc = SinglePointCalculator(atoms, **results)
        frames.append(atoms)
    return frames


def specialists() -> list[ForceField]:
    """A base and two children with slightly other weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = ForceField(
            name="base", potential=build_potential("painn", HYPER, (1, 6, 8)).eval(), level_of_theory="EMT"
        )
        base.potential.requires_grad_(False)
        children = []
        for name, formula in (("methanol", "CH3OH"), ("water", "H2O")):
            potential = build_potential("painn", HYPER, (1, 6, 8)).eval().requires_grad_(False)
            for child, parent in zip(potential.parameters(), base.potential.parameters(), strict=True):
                child.copy_(
                    parent + 0.02 * parent.std() * torch.randn_like(parent) if parent.numel() > 1 else parent
                )
            children.append(
                ForceField(
                    name=name,
                    potential=potential,
                    calibration=tuple(Atoms(a.numbers, a.positions) for a in emt_frames(formula)),
                    level_of_theory="EMT",
                    provenance=Provenance(
                        lineage=(base.fingerprint,), data_set=formula, errors={"force_mae": 0.1}
                    ),
                )
            )
    return [base, *children]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with models (base, methanol, water), labelled frames and structures."""
    for specialist in specialists():
        specialist.save(tmp_path / f"{specialist.name}.safetensors")
    base = specialists()[0]
    replace(base, name="one").save(tmp_path / "one.safetensors")
    write(tmp_path / "methanol.xyz", emt_frames("CH3OH"), format="extxyz")
    write(tmp_path / "water.xyz", emt_frames("H2O"), format="extxyz")
    write(tmp_path / "ammonia.xyz", emt_frames("NH3"), format="extxyz")
    write(tmp_path / "diamond.cif", bulk("C", "diamond", a=3.6, cubic=True))
    (tmp_path / "tiny.yaml").write_text(
        "hyper: {channels: 8, n_blocks: 1, n_radial: 4}\nvalidation: 2\nepochs: 2\n"
    )
    (tmp_path / "fast.yaml").write_text(
        "preset: closed-form\nreadout: {width: 16, blocks: 1, directions: 8}\n"
    )
    return tmp_path
