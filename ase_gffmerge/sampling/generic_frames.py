"""Structures of what a foundation model knows, for merges that shall not forget it: crystals, molecules, surfaces.

Nobody has the training set of a foundation model at hand when its descendants are merged, but what it predicts for simple
compounds of its elements shows most of what it knows. Every structure is another compound, so that those which are held out
of a merge are new to it.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.collections import g2
from ase.data import chemical_symbols, covalent_radii, reference_states

from ase_gffmerge.data.frames import displaced

MAX_ATOMS = 10
"""Atoms per crystal: another compound tells more than another cell of the same."""

ANIONS = (7, 8, 9, 16, 17, 35)
"""What every other compound has for its second element."""

RATTLE, STRAIN = 0.05, 0.03
"""Standard deviation of displacements in Å, and the largest strain of a cell."""

DENSEST = 0.176
"""Atoms per Å³ that no crystal exceeds: those of diamond. Covalent radii alone would press hydrogen or helium far beyond,
where nothing is known and every atom has thousands of neighbors."""

Rng = np.random.Generator


def generic_frames(
    species: Sequence[int], n: int, *, periodic: bool | None = None, seed: int = 0
) -> list[Atoms]:
    """Rattled and strained structures of different compounds, the same for the same arguments.

    Of ten structures, three are elements, four binary or ternary crystals in the prototypes of rock salt, caesium chloride,
    zinc blende, fluorite and perovskite, one is a slab and two are molecules of ASE's collection g2, as far as there
    are some of the elements. Every element has its turn before one comes again; every other compound is one with a common
    anion. Bonds are as long as the sum of covalent radii (Cordero et al., doi:10.1039/b801115j), elements as in ASE's table
    of reference states, and no crystal is denser than diamond.

    Parameters
    ----------
    species
        Atomic numbers that may occur.
    n
        How many structures.
    periodic
        Only crystals and slabs, or only molecules; default: both.
    seed
        Of compounds and displacements.
    """
    rng = np.random.default_rng(seed)
    elements = [int(z) for z in species]
    turn = _in_turn(elements, rng)
    molecules = _molecules(elements, rng) if periodic is not True else iter(())
    makers: dict[str, Callable[[], Atoms | None]] = {
        "element": lambda: _element(next(turn)),
        "compound": lambda: _compound(next(turn), elements, rng),
        "slab": lambda: _slab(int(rng.choice(elements))),
        "molecule": lambda: next(molecules, None),
    }
    turns = [
        "element",
        "compound",
        "molecule",
        "compound",
        "element",
        "slab",
        "compound",
        "molecule",
        "compound",
        "element",
    ]
    if periodic is False:
        turns = ["molecule"]
    frames: list[Atoms] = []
    for attempt in range(20 * n):
        if len(frames) == n:
            break
        made = makers[turns[attempt % len(turns)]]()
        if made is not None:
            strain = STRAIN if made.pbc.all() else 0.0
            frames.append(displaced(_no_denser(made), rattle=RATTLE, strain=strain, rng=rng))
    return frames


def compound(atoms: Atoms) -> str:
    """Composition of a structure, whatever its size."""
    return str(atoms.get_chemical_formula("hill", empirical=True))


def _in_turn(elements: Sequence[int], rng: Rng) -> Iterator[int]:
    """All elements in random order, again from the first after the last."""
    order = [int(z) for z in rng.permutation(elements)]
    while True:
        yield from order


def _no_denser(atoms: Atoms) -> Atoms:
    """The structure itself, its crystal expanded to the density of diamond where it is denser."""
    if atoms.pbc.all():
        excess = len(atoms) / atoms.get_volume() / DENSEST
        atoms.set_cell(max(excess, 1.0) ** (1 / 3) * atoms.cell.array, scale_atoms=True)
    return atoms


def _repeated(atoms: Atoms) -> Atoms:
    """As many cells as fit, about the same number along each axis."""
    repeat = [1, 1, 1]
    while True:
        lengths = atoms.cell.lengths() * repeat
        axis = int(np.argmin(lengths))
        grown = [r + (k == axis) for k, r in enumerate(repeat)]
        if len(atoms) * np.prod(grown) > MAX_ATOMS:
            return atoms.repeat(repeat)
        repeat = grown


def _element(z: int) -> Atoms | None:
    """An element in its reference structure where ASE builds it, else face-centred cubic."""
    symbol = chemical_symbols[z]
    try:
        return _repeated(bulk(symbol))
    except (ValueError, KeyError, RuntimeError, NotImplementedError):
        return _repeated(bulk(symbol, "fcc", a=2.0 * 2**0.5 * float(covalent_radii[z])))


def _compound(first: int, elements: Sequence[int], rng: Rng) -> Atoms | None:
    """An element with one or two others in a prototype, one bond as long as the sum of its covalent radii."""
    if len(elements) < 2:
        return None
    others = [z for z in elements if z != first]
    anions = [z for z in others if z in ANIONS]
    second = int(rng.choice(anions if anions and rng.integers(2) else others))
    d = float(covalent_radii[first] + covalent_radii[second])
    name = chemical_symbols[first] + chemical_symbols[second]
    prototype = int(rng.integers(5 if len(elements) > 2 else 4))
    if prototype == 0:
        return _repeated(bulk(name, "rocksalt", a=2 * d))
    if prototype == 1:
        return _repeated(bulk(name, "cesiumchloride", a=2 * d / 3**0.5))
    if prototype == 2:
        return _repeated(bulk(name, "zincblende", a=4 * d / 3**0.5))
    if prototype == 3:
        return _repeated(bulk(name + chemical_symbols[second], "fluorite", a=4 * d / 3**0.5))
    third = int(rng.choice([z for z in elements if z not in (first, second)]))
    scaled = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    a = max(2 * d, 2**0.5 * float(covalent_radii[third] + covalent_radii[second]))
    numbers = [third, first, second, second, second]
    return _repeated(Atoms(numbers, scaled_positions=scaled, cell=[a, a, a], pbc=True))


def _slab(z: int) -> Atoms | None:
    """Four layers of a face-centred cubic metal with vacuum above; nothing for other elements."""
    state = reference_states[z]
    if state is None or state.get("symmetry") != "fcc":
        return None
    slab = fcc111(chemical_symbols[z], (2, 1, 4), vacuum=6.0)
    slab.pbc = True
    return slab


def _molecules(elements: Sequence[int], rng: Rng) -> Iterator[Atoms]:
    """Molecules of the collection g2 that consist of the elements, in random order, again from the first after the last."""
    known = set(elements)
    names = [name for name in g2.names if set(g2[name].numbers.tolist()) <= known and len(g2[name]) > 1]
    while names:
        for i in rng.permutation(len(names)):
            yield molecule(names[i])
