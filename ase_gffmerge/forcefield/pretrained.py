"""The specialists that come with the package, and labelled frames that they were not trained on."""

from importlib.resources import files
from pathlib import Path

from ase import Atoms

from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.errors import FramesError

BUNDLED = ("rmd17-base", "rmd17-ethanol", "rmd17-malonaldehyde")
_FOLDER = Path(str(files("ase_gffmerge") / "bundled"))


def bundled_path(source: str | Path) -> Path:
    """Path of a bundled specialist, or the path itself."""
    if str(source) in BUNDLED and not Path(source).exists():
        return _FOLDER / f"{source}.safetensors"
    return Path(source)


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
    return read_frames(_FOLDER / f"{name}-test.extxyz")
