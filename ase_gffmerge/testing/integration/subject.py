"""The adapter under test, and how results are compared."""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import BaseCalculator, PropertyNotImplementedError
from numpy.typing import ArrayLike

from ase_gffmerge.graphs import build_graph, predict
from ase_gffmerge.models import Potential
from ase_gffmerge.testing.calculator.harness import deviation, require


class Converted(Protocol):
    """What reading gives, as :class:`~ase_gffmerge.integrations.base.ConvertedModel` does."""

    @property
    def potential(self) -> Potential:
        """Evaluates the energies."""

    @property
    def vendor(self) -> str:
        """Name of the package."""


class ReadsAndWrites(Protocol):
    """An adapter, as :class:`~ase_gffmerge.integrations.base.Adapter` is."""

    vendor: ClassVar[str]
    architectures: ClassVar[Mapping[str, str]]

    def read(self, source: object, *, trust: bool = False) -> Converted:
        """Convert a file or a model in memory."""

    def write(self, potential: Potential, path: Path) -> Path:
        """Write the package's format."""

    def read_back(self, path: Path, potential: Potential) -> Potential:
        """Read a file that was just written, of a potential that may tell what the file does not."""

    def potential_class(self, architecture: str) -> type[Potential]:
        """Class of an architecture."""


@dataclass(frozen=True, kw_only=True)
class IntegrationSubject:
    """An adapter under test.

    Attributes
    ----------
    adapter
        The adapter.
    source
        A model in memory, or what :meth:`read` takes.
    structures
        Of elements that the model knows; the first has at least two atoms.
    calculator
        The package's own, with the same weights; ``None`` skips what compares with it.
    served_by
        The package's own calculator of a file that the adapter wrote; likewise.
    suffix
        Ending of such a file.
    tolerance
        Of energies (eV) and forces (eV/Å), relative to the largest force if that is above 1 eV/Å; ``None``: by the weights.
    """

    adapter: ReadsAndWrites
    source: object
    structures: tuple[Atoms, ...]
    calculator: BaseCalculator | None
    served_by: Callable[[Path], BaseCalculator] | None
    suffix: str
    tolerance: float | None

    @cached_property
    def potential(self) -> Potential:
        """What is read of the source."""
        return self.adapter.read(self.source).potential

    @property
    def limit(self) -> float:
        """The tolerance, by default 1e-9 in double precision, else 3e-6."""
        if self.tolerance is not None:
            return self.tolerance
        return 1e-9 if self.potential.dtype == torch.float64 else 3e-6

    def compare(self, ours: Potential, theirs: Potential | BaseCalculator, what: str, limit: float) -> str:
        """Largest difference of energies, forces and stresses on all structures, in words; fails beyond the limit.

        Parameters
        ----------
        ours, theirs
            What is compared.
        what
            Where the second one comes from, for the message.
        limit
            See :attr:`tolerance`.
        """
        worst = 0.0
        for atoms in self.structures:
            got = _results(ours, atoms)
            expected = (
                _results(theirs, atoms) if isinstance(theirs, Potential) else _vendor_results(theirs, atoms)
            )
            size = max(1.0, float(np.abs(expected["forces"]).max()))
            for name in sorted({*got} & {*expected}):
                gap = deviation(got[name], expected[name]) / size / (3 if name == "energy" else 1)
                require(
                    gap <= limit,
                    f"{name} of {atoms.get_chemical_formula()} differ by {gap * size:.3g} from {what} (tolerance "
                    f"{limit * size:.1g})",
                )
                worst = max(worst, gap)
        return f"to {worst:.1e}"

    def again(self, potential: Potential) -> Potential:
        """What is read of a file that was written."""
        with tempfile.TemporaryDirectory() as folder:
            return self.adapter.read_back(self.written(potential, folder), potential)

    def written(self, potential: Potential, folder: str) -> Path:
        """File of a potential in a temporary folder."""
        return self.adapter.write(potential, Path(folder) / f"written{self.suffix}")


def _results(potential: Potential, atoms: Atoms) -> dict[str, ArrayLike]:
    """Energy, forces and, of periodic structures, stress (3, 3) in eV/Å^3."""
    graph = build_graph(atoms, potential.hyper.cutoff, dtype=potential.dtype, device=potential.device)
    found = predict(potential, graph)
    results: dict[str, ArrayLike] = {
        "energy": float(found.energy.sum()),
        "forces": found.forces.double().cpu().numpy(),
    }
    if atoms.pbc.all():
        results["stress"] = found.strain_derivative[0].double().cpu().numpy() / atoms.get_volume()
    return results


def _vendor_results(calculator: BaseCalculator, atoms: Atoms) -> dict[str, ArrayLike]:
    own = atoms.copy()
    own.calc = calculator
    results: dict[str, ArrayLike] = {"energy": own.get_potential_energy(), "forces": own.get_forces()}
    if own.pbc.all():
        with suppress(PropertyNotImplementedError):
            results["stress"] = own.get_stress(voigt=False)
    return results
