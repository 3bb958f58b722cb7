"""Errors that are at once the package's and ASE's, so that either family's ``except`` catches them."""

from collections.abc import Iterator
from contextlib import contextmanager

from ase.calculators.calculator import CalculationFailed, CalculatorSetupError

from ase_gffmerge.errors import (
    CacheError,
    DeviceError,
    DeviceMemoryError,
    FileFormatError,
    FramesError,
    GFFMergeError,
    IncompatibleSpecialistsError,
    RecipeError,
    StructureError,
)


class SetupError(CalculatorSetupError, GFFMergeError):
    """The calculator cannot be made, or cannot be used for this structure."""


class FileSetupError(SetupError, FileFormatError):
    """A force-field file cannot be used."""


class FramesSetupError(SetupError, FramesError):
    """Calibration frames are missing or unsuitable."""


class StructureSetupError(SetupError, StructureError):
    """The structure holds something the force field does not know."""


class SpecialistsSetupError(SetupError, IncompatibleSpecialistsError):
    """These specialists must not be merged."""


class RecipeSetupError(SetupError, RecipeError):
    """The recipe has an unknown key or an impossible value."""


class DeviceSetupError(SetupError, DeviceError):
    """The device does not exist."""


class CacheSetupError(SetupError, CacheError):
    """The cache folder cannot be used."""


class EvaluationFailed(CalculationFailed, StructureError):
    """Positions, energies or forces are not finite; the calculator works again for the next structure."""


class MemoryFailed(CalculationFailed, DeviceMemoryError):
    """A structure does not fit into the device's memory; the calculator works again for a smaller one."""


class MemorySetupError(SetupError, DeviceMemoryError):
    """A merge does not fit into the device's memory."""


_TWINS: dict[type[GFFMergeError], type[SetupError]] = {
    FileFormatError: FileSetupError,
    FramesError: FramesSetupError,
    StructureError: StructureSetupError,
    IncompatibleSpecialistsError: SpecialistsSetupError,
    RecipeError: RecipeSetupError,
    DeviceError: DeviceSetupError,
    CacheError: CacheSetupError,
    DeviceMemoryError: MemorySetupError,
}


@contextmanager
def as_setup_errors() -> Iterator[None]:
    """Turn the package's errors into their twins below ``CalculatorSetupError``; the message stays."""
    try:
        yield
    except CalculatorSetupError:
        raise
    except GFFMergeError as error:
        twin = next((_TWINS[cls] for cls in type(error).__mro__ if cls in _TWINS), SetupError)
        raise twin(str(error)) from error
