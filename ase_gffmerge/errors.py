"""Exceptions: every message says what happened, why, and what to do.

All user-facing errors derive from :class:`GFFMergeError`; the command line turns them into one line and exit
code 2. Errors that reach ASE through the calculator derive from ASE's own classes as well (see
:mod:`ase_gffmerge.engines.ase.calculator`).
"""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class GFFMergeError(Exception):
    """Base class of every error that a user's input or machine can cause."""


class FileFormatError(GFFMergeError):
    """A specialist, merged or frame file cannot be read: truncated, altered, or of an unknown version."""


class FramesError(GFFMergeError):
    """Frames are missing, lack labels, or do not fit the model that should read them."""


class StructureError(GFFMergeError):
    """A structure cannot be evaluated: empty, not finite, without a needed cell vector, unsupported element."""


class IncompatibleSpecialistsError(GFFMergeError):
    """Specialists that must not be merged: different architecture, units, theory, or no common base."""


class DynamicsError(GFFMergeError):
    """A run of molecular dynamics cannot start, or its energy is no longer finite."""


class RecipeError(GFFMergeError):
    """A recipe or configuration has an unknown key or an impossible value."""


class DeviceError(GFFMergeError):
    """The requested device does not exist on this machine."""


class DeviceMemoryError(GFFMergeError):
    """A single structure, or a merge, does not fit into the memory of the device."""


class CacheError(GFFMergeError):
    """The cache folder cannot be written or locked."""


class BenchmarkError(GFFMergeError):
    """A benchmark was asked for rows that do not exist, or for a force field without structures to measure."""


class DataError(GFFMergeError):
    """A data manifest is invalid, or a download failed or has the wrong hash."""


class MissingExtrapolationGradeError(GFFMergeError):
    """A force field has no extrapolation gauge, so nothing can tell where it extrapolates."""


class ExtrapolationError(GFFMergeError):
    """A structure is beyond what the force field was calibrated on.

    Attributes
    ----------
    atom
        Index of the atom that is furthest out.
    grade
        Its extrapolation grade.
    """

    def __init__(self, message: str, *, atom: int, grade: float):
        super().__init__(message)
        self.atom, self.grade = atom, grade


class ExtrapolationWarning(UserWarning):
    """A structure is beyond what the force field was calibrated on."""


class MergeWarning(UserWarning):
    """The merge finished, but its report's verdict is not `good`."""


class ReferenceWarning(UserWarning):
    """Reference energies that do not fit the frames of a training."""


class CacheWarning(UserWarning):
    """A cached file was unusable and is being rebuilt."""
