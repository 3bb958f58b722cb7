"""Which specialist an atom belongs to, for potentials merged with one embedding table per specialist."""

from collections.abc import Sequence

import numpy as np
from ase import Atoms

from ase_gffmerge.errors import StructureError

KEY = "specialist"


def specialist_indices(atoms: Atoms, names: Sequence[str], *, default: str | int | None = None) -> np.ndarray:
    """Index of every atom's specialist.

    The most specific statement counts: the per-atom array ``atoms.arrays["specialist"]``, then
    ``atoms.info["specialist"]`` for the whole system, then ``default``.

    Parameters
    ----------
    atoms
        The structure. Specialists are named or numbered.
    names
        The specialists in the order of their indices.
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
            f"this potential has an embedding per specialist ({', '.join(names)}), and nothing says which "
            f"one {atoms.get_chemical_formula()} belongs to; set atoms.info['specialist'], an array "
            "atoms.arrays['specialist'], or the calculator's specialist=..."
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


def _numbered(values: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Names or numbers of any shape as int64 indices."""
    known = f"it was merged from {', '.join(f'{i} = {name!r}' for i, name in enumerate(names))}"
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
    for name in distinct.tolist():
        if list(names).count(name) != 1:
            what = "several specialists" if name in names else "no specialist"
            raise StructureError(f"this potential has {what} called {name!r}; {known}")
    rows = np.array([list(names).index(name) for name in distinct.tolist()], dtype=np.int64)
    return rows[inverse].reshape(values.shape)
