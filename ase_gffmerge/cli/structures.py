"""Reading the structure that a verb works on, with a calculator attached."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ase import Atoms


def read_structure(path: Path) -> "Atoms":
    """First frame of any file ASE reads, or of an npz archive, without its labels."""
    from ase_gffmerge.data.readers import read_frames
    from ase_gffmerge.errors import FramesError

    atoms = read_frames(path, index=0)[0].copy()
    if len(atoms) == 0:
        raise FramesError(f"{path} holds a structure without atoms; give one with at least one")
    return atoms


def require_other(out: Path, inputs: Sequence[str | Path]) -> None:
    """Refuse to write over what is read."""
    from ase_gffmerge.errors import FileFormatError

    if any(out.exists() and Path(path).exists() and out.samefile(path) for path in inputs):
        raise FileFormatError(
            f"cannot write {out}: it is the input, which would be lost; choose another name"
        )


def prepared(
    model: str, structure: Path, *, out: Path, device: str, dtype: str, specialist: str | None
) -> "Atoms":
    """Read the structure and attach the model as its calculator.

    Unknown elements are refused here, and so is an ``out`` that would overwrite the input.
    """
    from ase_gffmerge.engines.ase.calculator import GFFMergeCalculator

    require_other(out, [structure, Path(model)])
    atoms = read_structure(structure)
    atoms.calc = GFFMergeCalculator([model], device=device, dtype=dtype, specialist=specialist)  # type: ignore[arg-type]
    return atoms
