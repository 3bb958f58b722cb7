"""Which specialist an atom belongs to, for potentials merged with one embedding table per specialist."""

from collections.abc import Sequence

import numpy as np
from ase import Atoms

from ase_gffmerge.errors import StructureError

KEY = "specialist"


def with_indices(
    atoms: Atoms, n_embeddings: int, *, names: Sequence[str] | None = None, default: str | int | None = None
) -> Atoms:
    """What a graph is built from: with specialist indices if, and only if, there is more than one embedding table.

    Parameters
    ----------
    atoms
        Not changed, but perhaps returned.
    n_embeddings
        Number of embedding tables of the potential.
    names, default
        See :func:`specialist_indices`; without names, structures must number their specialists.

    Raises
    ------
    StructureError
        When there is more than one table and nothing is said, or a name or number is unknown.
    """
    if n_embeddings == 1:
        return without_choice(atoms) if KEY in atoms.arrays else atoms
    bare = Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    bare.arrays[KEY] = specialist_indices(atoms, names or [None] * n_embeddings, default=default)
    return bare


def without_choice(atoms: Atoms) -> Atoms:
    """The structure, with what calculator it has, but without a word on specialists: itself where there is none."""
    if KEY not in atoms.arrays and KEY not in atoms.info:
        return atoms
    silent = atoms.copy()
    silent.calc = atoms.calc
    silent.arrays.pop(KEY, None)
    silent.info.pop(KEY, None)
    return silent


def with_choice_of(atoms: Atoms, other: Atoms) -> Atoms:
    """A copy that says about its specialists what ``other`` (the same atoms in the same order) says."""
    copy = without_choice(atoms).copy()
    if KEY in other.arrays:
        copy.arrays[KEY] = other.arrays[KEY].copy()
    if KEY in other.info:
        copy.info[KEY] = other.info[KEY]
    return copy


def specialist_indices(
    atoms: Atoms, names: Sequence[str | None], *, default: str | int | None = None
) -> np.ndarray:
    """Index of every atom's specialist.

    The most specific statement counts: the per-atom array ``atoms.arrays["specialist"]``, then
    ``atoms.info["specialist"]`` for the whole system, then ``default``.

    Parameters
    ----------
    atoms
        The structure. Specialists are named or numbered.
    names
        The specialists in the order of their indices; ``None`` for one whose name is not known.
    default
        For structures that say nothing.

    Returns
    -------
    (n_atoms,) int64

    Raises
    ------
    StructureError
        When nothing is said, or a name or number is unknown.
    """
    chosen = atoms.arrays.get(KEY, atoms.info.get(KEY, default))
    if chosen is None:
        raise StructureError(
            f"this potential has an embedding per specialist, and nothing says which one {atoms.get_chemical_formula()} "
            "belongs to; set atoms.info['specialist'], an array atoms.arrays['specialist'], or specialist=... "
            f"(--specialist in the command line): {_known(names)}"
        )
    values = np.asarray(chosen)
    if values.shape not in ((), (len(atoms),)):
        raise StructureError(
            f"'specialist' has shape {values.shape}; give one name for the system or one entry for each "
            f"of the {len(atoms)} atoms"
        )
    return np.broadcast_to(_numbered(values, names), len(atoms)).copy()


def same_choice(first: Atoms, second: Atoms) -> bool:
    """Whether two structures say the same about their specialists."""
    pairs = ((first.arrays.get(KEY), second.arrays.get(KEY)), (first.info.get(KEY), second.info.get(KEY)))
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def _known(names: Sequence[str | None]) -> str:
    """What may be said."""
    if None in names:
        return (
            f"it has numbers from 0 to {len(names) - 1}, whose names a bare potential does not keep; give numbers, or "
            "names=force_field.specialist_names"
        )
    return f"it was merged from {', '.join(f'{i} = {name!r}' for i, name in enumerate(names))}"


def _numbered(values: np.ndarray, names: Sequence[str | None]) -> np.ndarray:
    """Names or numbers of any shape as int64 indices; names read from a file may be an array of objects."""
    known = _known(names)
    if values.dtype.kind == "O" and all(isinstance(value, str) for value in values.flat):
        values = values.astype(str)
    if values.dtype.kind in "iu":
        wrong = values[(values < 0) | (values >= len(names))]
        if wrong.size:
            raise StructureError(f"this potential has no specialist number {wrong.flat[0]}; {known}")
        return values.astype(np.int64)
    if values.dtype.kind != "U":
        raise StructureError(
            f"'specialist' holds {values.dtype} values; give names or whole numbers: {known}"
        )
    distinct, inverse = np.unique(values, return_inverse=True)
    rows = np.array([_index(name, list(names)) for name in distinct.tolist()], dtype=np.int64)
    return rows[inverse].reshape(values.shape)


def _index(text: str, names: list[str | None]) -> int:
    """Index of the specialist of a name; what is no name may be a number, as command lines and files write it."""
    if names.count(text) == 1:
        return names.index(text)
    if text not in names and text.isdecimal() and int(text) < len(names):
        return int(text)
    what = "several specialists" if text in names else "no specialist"
    raise StructureError(f"this potential has {what} called {text!r}; {_known(names)}")
