"""Labelled test frames that come with the bundled specialists."""

from importlib.resources import files
from pathlib import Path

from ase import Atoms

from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.errors import FramesError
from ase_gffmerge.forcefield.force_field import BUNDLED


def bundled_test_frames(name: str) -> list[Atoms]:
    """Frames that the bundled specialist ``name`` was not trained on.

    Parameters
    ----------
    name
        ``rmd17-base``, ``rmd17-ethanol`` or ``rmd17-malonaldehyde``.

    Returns
    -------
    list of ase.Atoms
        With energy (eV) and forces (eV/Å).

    Raises
    ------
    FramesError
        When there is no bundled specialist of that name.
    """
    if name not in BUNDLED:
        raise FramesError(f"no test frames are bundled for {name!r}; choose one of {', '.join(BUNDLED)}")
    return read_frames(Path(str(files("ase_gffmerge") / "bundled" / f"{name}-test.extxyz")))
