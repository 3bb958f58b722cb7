"""Into the first cell, so that a search for neighbours costs the same however far atoms have drifted."""

import numpy as np


def wrapped(
    positions: np.ndarray, box: np.ndarray, *, origin: np.ndarray, pbc: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    r"""Find the cell of every atom, and where in that cell it is.

    With edges found between the wrapped atoms, ``shifts + cells[receiver] - cells[sender]`` are those of the atoms
    themselves: :math:`\mathbf r = \mathbf r' + \mathbf n H` gives
    :math:`\mathbf r'_j - \mathbf r'_i + S' H = \mathbf r_j - \mathbf r_i + (S' + \mathbf n_i - \mathbf n_j) H`.

    Parameters
    ----------
    positions
        (n_atoms, 3) in Å.
    box, origin
        Vectors (3, 3), as rows, and corner (3,) of the first cell in Å.
    pbc
        Which of the three directions are periodic.

    Returns
    -------
    inside : (n_atoms, 3) float64
        Fractional coordinates, from 0 to 1 along periodic directions.
    cells : (n_atoms, 3) int64
        Number of box vectors taken away; 0 along open directions.
    """
    fractional = (positions - origin) @ np.linalg.inv(box)
    cells = np.where(pbc, np.floor(fractional), 0.0)
    return fractional - cells, cells.astype(np.int64)
