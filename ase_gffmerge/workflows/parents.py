"""The specialists that a merge came from, for whoever wants to ask them."""

from collections.abc import Sequence
from pathlib import Path

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.forcefield.force_field import ForceField


class Parents:
    """Specialists without their calibration frames.

    Parameters
    ----------
    loaded
        The specialists, or
    paths, fingerprints
        their files and what these held: they are loaded when they are asked for.
    """

    def __init__(
        self,
        loaded: Sequence[ForceField] | None = None,
        *,
        paths: Sequence[Path] = (),
        fingerprints: Sequence[str] = (),
    ):
        self._paths, self._fingerprints = [path.absolute() for path in paths], tuple(fingerprints)
        self._loaded = None if loaded is None else tuple(s.with_calibration(()) for s in loaded)

    def load(self) -> tuple[ForceField, ...]:
        """Give the specialists, in the order of their indices.

        Raises
        ------
        FileFormatError
            When a file has gone, was damaged, or holds another specialist by now.
        """
        if self._loaded is None:
            self._loaded = tuple(map(_unchanged, self._paths, self._fingerprints))
        return self._loaded


def _unchanged(path: Path, fingerprint: str) -> ForceField:
    specialist = ForceField.load(path).with_calibration(())
    if specialist.fingerprint != fingerprint:
        raise FileFormatError(
            f"{path} holds another specialist than the one that was merged; make a new calculator of the specialists as "
            "they are now, or put the old file back"
        )
    return specialist
