"""What a foundation model knew and its descendant may have forgotten: compounds, close contacts, dynamics."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.data import covalent_radii
from ase.spacegroup import crystal

from ase_gffmerge.data.frames import displaced
from ase_gffmerge.dynamics.batched_md import run_replicas
from ase_gffmerge.inference.predict import FramePredictions, predict_frames
from ase_gffmerge.merging.recipe import DistillOptions
from ase_gffmerge.models import Potential
from ase_gffmerge.sampling.generic_frames import RATTLE, STRAIN, generic_frames

DIMERS = ("HH", "CO", "LiS", "PS", "NaCl", "SiO", "FeO", "CuCu", "AlN", "OO")
"""Pairs of elements that are pushed together."""
DISTANCES = np.linspace(1.0, 0.5, 11)
"""In units of the sum of the covalent radii."""
COMPRESSIONS = np.linspace(1.0, 0.8, 9)
"""Of every edge of a cell."""
TEMPERATURES = (300.0, 1000.0)
"""K."""


def new_compounds() -> dict[str, Atoms]:
    """Compounds in structures and with lattice constants from experiment (Å), and molecules."""
    rutile = {"spacegroup": 136, "cellpar": [4.594, 4.594, 2.959, 90, 90, 90]}
    corundum = {"spacegroup": 167, "cellpar": [4.759, 4.759, 12.991, 90, 90, 120], "primitive_cell": True}
    layered = {"spacegroup": 166, "cellpar": [2.816, 2.816, 14.05, 90, 90, 120], "primitive_cell": True}
    perovskite = {"spacegroup": 221, "cellpar": [3.905, 3.905, 3.905, 90, 90, 90]}
    quartz = {"spacegroup": 154, "cellpar": [4.913, 4.913, 5.405, 90, 90, 120]}
    corners = [(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0)]
    cuprite = {"spacegroup": 224, "cellpar": [4.27, 4.27, 4.27, 90, 90, 90]}
    auricupride = {"spacegroup": 221, "cellpar": [3.75, 3.75, 3.75, 90, 90, 90]}
    return {
        "Cu2O": crystal("CuO", [(0.25, 0.25, 0.25), (0, 0, 0)], **cuprite),
        "Cu3Au": crystal(["Au", "Cu"], [(0, 0, 0), (0, 0.5, 0.5)], **auricupride),
        "NiAl": bulk("NiAl", "cesiumchloride", a=2.88).repeat(2),
        "TiC": bulk("TiC", "rocksalt", a=4.33, cubic=True),
        "KCl": bulk("KCl", "rocksalt", a=6.29, cubic=True),
        "PbTe": bulk("PbTe", "rocksalt", a=6.46, cubic=True),
        "SiC": bulk("SiC", "zincblende", a=4.36, cubic=True),
        "InP": bulk("InP", "zincblende", a=5.87, cubic=True),
        "CdTe": bulk("CdTe", "zincblende", a=6.48, cubic=True),
        "GaN": bulk("GaN", "wurtzite", a=3.19, c=5.19).repeat((2, 2, 1)),
        "CaF2": bulk("CaF2", "fluorite", a=5.46, cubic=True),
        "CeO2": bulk("CeO2", "fluorite", a=5.41, cubic=True),
        "NaCl": bulk("NaCl", "rocksalt", a=5.64, cubic=True),
        "MgO": bulk("MgO", "rocksalt", a=4.21, cubic=True),
        "Si": bulk("Si", cubic=True),
        "diamond": bulk("C", cubic=True),
        "GaAs": bulk("GaAs", "zincblende", a=5.653, cubic=True),
        "ZnO": bulk("ZnO", "wurtzite", a=3.25, c=5.207).repeat((2, 2, 1)),
        "Fe": bulk("Fe", cubic=True).repeat(2),
        "Al": bulk("Al", cubic=True).repeat((2, 1, 1)),
        "TiO2": crystal("TiO", [(0, 0, 0), (0.3053, 0.3053, 0)], **rutile),
        "Al2O3": crystal("AlO", [(0, 0, 0.3522), (0.3064, 0, 0.25)], **corundum),
        "LiCoO2": crystal(["Li", "Co", "O"], [(0, 0, 0.5), (0, 0, 0), (0, 0, 0.2605)], **layered).repeat(
            (2, 2, 1)
        ),
        "SrTiO3": crystal(["Sr", "Ti", "O"], corners, **perovskite),
        "quartz": crystal("SiO", [(0.4697, 0, 2 / 3), (0.4133, 0.2672, 0.7855)], **quartz),
        "Pt(111)": in_box(fcc111("Pt", (2, 2, 3), vacuum=6.0)),
        "CO2": molecule("CO2"),
        "H2O": molecule("H2O"),
        "C6H6": molecule("C6H6"),
        "C7NH5": molecule("C7NH5"),
        "biphenyl": molecule("biphenyl"),
    }


def in_box(slab: Atoms) -> Atoms:
    """The slab, periodic along its normal, too."""
    slab.pbc = True
    return slab


def probe_frames(species: Sequence[int], n_seen: int) -> dict[str, list[Atoms]]:
    """Displaced structures: of compounds that every merge with the base is shown, displaced anew, and of others.

    The others are in no merge, in no refinement either.

    Parameters
    ----------
    species
        Elements of the foundation model.
    n_seen
        How many structures such a merge is shown; a refinement of it, so many more as it makes copies of other frames.
    """
    rng = np.random.default_rng(1)
    shown = generic_frames(species, n_seen)
    formulas = {formula(atoms) for atoms in generic_frames(species, n_seen * (1 + DistillOptions().copies))}
    known = set(species)
    others = [
        atoms
        for atoms in new_compounds().values()
        if formula(atoms) not in formulas and set(atoms.numbers.tolist()) <= known
    ]
    return {
        "seen": [displaced(atoms, rattle=RATTLE, strain=0.0, rng=rng) for atoms in shown],
        "new": [
            displaced(atoms, rattle=RATTLE, strain=STRAIN if atoms.pbc.all() else 0.0, rng=rng)
            for atoms in others
        ],
    }


def formula(atoms: Atoms) -> str:
    """Composition, whatever the size of the cell."""
    return str(atoms.get_chemical_formula("hill", empirical=True))


def forgetting(potential: Potential, frames: Sequence[Atoms], base: FramePredictions) -> dict[str, Any]:
    """Mean absolute difference of force components from the base, by compound, and over compounds (eV/Å).

    Parameters
    ----------
    potential
        What may have forgotten.
    frames
        One of each compound.
    base
        The base's predictions for them.
    """
    own = predict_frames(potential, frames)
    found = [
        float(np.abs(ours - theirs).mean()) for ours, theirs in zip(own.forces, base.forces, strict=True)
    ]
    energies = np.abs(own.energies - base.energies) / [len(atoms) for atoms in frames]
    return {
        "mean": float(np.mean(found)),
        "median": float(np.median(found)),
        "worst": float(np.max(found)),
        "energy_mean": float(energies.mean()),
        "by_compound": [[formula(atoms), value] for atoms, value in zip(frames, found, strict=True)],
    }


def contacts(potential: Potential) -> dict[str, Any]:
    """Energies (eV) of pairs of atoms and of crystals that are pressed together.

    Returns
    -------
    dict
        ``dimers``, ``cells``: per name the curve. ``dimers_rise``, ``cells_rise``: fraction whose energy is finite and
        rises with every step over the last half of the way.
    """
    dimers = {
        pair: [dimer(pair, fraction) for fraction in DISTANCES]
        for pair in DIMERS
        if set(dimer(pair, 1.0).numbers.tolist()) <= set(potential.species)
    }
    cells = {
        name: [pressed(atoms, factor) for factor in COMPRESSIONS]
        for name, atoms in new_compounds().items()
        if atoms.pbc.all() and name != "Pt(111)" and set(atoms.numbers.tolist()) <= set(potential.species)
    }
    curves = {
        kind: {
            name: [float(e) / len(frames[0]) for e in predict_frames(potential, frames).energies]
            for name, frames in groups.items()
        }
        for kind, groups in (("dimers", dimers), ("cells", cells))
    }
    return {
        **curves,
        **{f"{kind}_rise": float(np.mean([rises(c) for c in curves[kind].values()])) for kind in curves},
    }


def rises(curve: Sequence[float]) -> bool:
    """Whether an energy is finite and rises over the last half of a compression."""
    half = np.asarray(curve[len(curve) // 2 :])
    return bool(np.isfinite(curve).all() and (np.diff(half) > 0).all())


def dimer(pair: str, fraction: float) -> Atoms:
    """Two atoms, at a fraction of the sum of their covalent radii."""
    atoms = Atoms(pair)
    atoms.positions[1, 0] = fraction * covalent_radii[atoms.numbers].sum()
    return atoms


def pressed(atoms: Atoms, factor: float) -> Atoms:
    """A crystal with shorter edges."""
    copy = atoms.copy()
    copy.set_cell(factor * atoms.cell.array, scale_atoms=True)
    return copy


def dynamics(potential: Potential, crystal: Atoms, molecule: Atoms, steps: tuple[int, int]) -> dict[str, Any]:
    """Short NVT runs at home and of a compound that is new (NaCl): what stopped them, ``None`` where nothing did.

    Parameters
    ----------
    potential
        That moves the atoms.
    crystal, molecule
        Structures of the two specialists.
    steps
        Of the crystal's specialist (2 fs each); of molecule and new compound (1 fs).
    """
    salt = new_compounds()["NaCl"]
    runs = {"crystal": (crystal, 2.0, steps[0]), "molecule": (molecule, 1.0, steps[1])}
    found: dict[str, Any] = {}
    for name, (start, timestep, n) in {**runs, "NaCl": (salt, 1.0, steps[1])}.items():
        trajectories = run_replicas(
            potential,
            [start] * len(TEMPERATURES),
            ensemble="nvt",
            temperature=TEMPERATURES,
            timestep=timestep,
            steps=n,
            every=n,
        )
        for temperature, run in zip(TEMPERATURES, trajectories, strict=True):
            found[f"{name} {temperature:.0f} K"] = run.stopped
    return found
