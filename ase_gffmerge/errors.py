"""Exceptions and warnings: every message says what happened, why, and what to do.

All errors derive from :class:`GFFMergeError`, which is ASE's ``CalculatorSetupError`` as well, so that code written for ASE
catches them, too; what fails during an evaluation is also ASE's ``CalculationFailed``. The command line turns every one of
them into one line and exit code 2.
"""

from ase.calculators.calculator import CalculationFailed, CalculatorSetupError


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class GFFMergeError(CalculatorSetupError):
    """Base class of every error that a user's input or machine can cause."""


class ArgumentError(GFFMergeError):
    """An argument has an impossible value, or one that would have no effect."""


class FileFormatError(GFFMergeError):
    """A force-field or frame file cannot be used: missing, truncated, altered, or of an unknown version."""


class FramesError(GFFMergeError):
    """Frames are missing, lack labels, or do not fit the model that should read them."""


class StructureError(GFFMergeError):
    """A structure cannot be evaluated: empty, without a needed cell vector, or with an unsupported element."""


class EvaluationFailed(StructureError, CalculationFailed):
    """Positions, energies or forces are not finite; the calculator works again for the next structure."""


class IncompatibleSpecialistsError(GFFMergeError):
    """Specialists that must not be merged: different architecture, units, theory, or no common base."""


class DynamicsError(GFFMergeError):
    """A run of molecular dynamics cannot start, or its energy is no longer finite."""


class RecipeError(GFFMergeError):
    """A recipe or configuration has an unknown key or an impossible value."""


class DeviceError(GFFMergeError):
    """The requested device does not exist on this machine."""


class DeviceMemoryError(GFFMergeError, CalculationFailed):
    """A single structure, or a merge, does not fit into the memory of the device."""


class CacheError(GFFMergeError):
    """The cache folder cannot be written or locked."""


class BenchmarkError(GFFMergeError):
    """A benchmark was asked for rows that do not exist, or for a force field without structures to measure."""


class DataError(GFFMergeError):
    """A data manifest is invalid, or a download failed or has the wrong hash."""


class TrainingError(GFFMergeError):
    """A training cannot go on: its loss or gradient is not finite."""


class MissingExtrapolationGradeError(GFFMergeError):
    """A force field was saved without an extrapolation grade, so that nothing can say where it extrapolates."""


class MissingUncertaintyError(GFFMergeError):
    """A force field was saved without calibrated standard deviations of energies and forces."""


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


class ExportWarning(UserWarning):
    """A file of another package's format lacks something that the force field has."""


class ReadoutWarning(UserWarning):
    """The wide readout could not be solved, and the merge has the plain one of its layers."""


class LabelWarning(UserWarning):
    """Labels of frames were converted, or look like labels in other units."""


class ReferenceWarning(UserWarning):
    """Reference energies that do not fit the frames of a training."""


class CheckpointWarning(UserWarning):
    """A checkpoint belongs to another training, or is damaged, and the training begins anew."""


class CacheWarning(UserWarning):
    """A cached file was unusable and is being rebuilt."""


class CompileWarning(UserWarning):
    """A potential could not be compiled and is evaluated uncompiled."""


class CaptureWarning(UserWarning):
    """The kernels of a potential could not be recorded as a CUDA graph, and are launched one by one."""
