r"""What a merge did, layer by layer, how far it is from every specialist, and how far it can be trusted.

On the calibration frames of specialist k, with its own forces :math:`F^{(k)}`, the relative disagreement of a model is

.. math:: d_k = \sqrt{\langle |F - F^{(k)}|^2 \rangle \,/\, \langle |F^{(k)}|^2 \rangle} .

Where a specialist's frames have no forces by symmetry (equations of state, perfect crystals), energies per atom and stresses
speak in their place (:mod:`ase_gffmerge.inference.errors`). The verdict goes by the largest of these :math:`d_k`, of the
error on held-out frames, and of what was forgotten of the base (:class:`Forgetting`): ``good`` below 12 %, ``usable after
distillation`` below 30 %, else ``failed`` (:attr:`.MergeReport.verdict`). No labels are needed for it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import TypeAdapter, ValidationError

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.inference.errors import Scales
from ase_gffmerge.runtime.registry import own_version

if TYPE_CHECKING:
    from ase_gffmerge.least_squares.ridge import Solution

Verdict = Literal["good", "usable after distillation", "failed"]

GOOD, USABLE = 0.12, 0.30
"""Thresholds of the verdict on the relative disagreement (see :meth:`MergeReport.relative_disagreement`)."""

ADVICE: dict[Verdict, str] = {
    "good": "test it on frames of your own, then run it",
    "usable after distillation": "distill it on the specialists' own predictions before relying on it",
    "failed": "do not use it; do the specialists share a base, and do the calibration frames cover what they know?",
}
"""What to do after each verdict."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One least-squares problem.

    Attributes
    ----------
    name, kind
        Qualified name; ``layer``, ``message`` or ``readout``.
    rows, size
        Rows of the problem and columns of its design; numbers of outputs and of unknowns for messages.
    residual_before, residual_after
        Relative squared residual of the mean of the weights (of the layer-wise solution, for messages), and after.
    effective_rank
        Degrees of freedom that the rows determine; not known for messages, which are solved iteratively.
    ridge
        Absolute ridge used; the damping for messages.
    """

    name: str
    kind: str
    rows: int
    size: int
    residual_before: float
    residual_after: float
    effective_rank: float | None
    ridge: float

    @classmethod
    def of(cls, name: str, kind: str, solution: "Solution", *, before: float | None = None) -> Self:
        """Report of a ridge solution.

        Parameters
        ----------
        name, kind, solution
            See the attributes; the solution has its diagnosis.
        before
            In the place of the anchor's residual.
        """
        return cls(
            name=name,
            kind=kind,
            rows=solution.n_rows,
            size=len(solution.theta),
            residual_before=solution.residual_before if before is None else before,
            residual_after=solution.residual_after,
            effective_rank=solution.effective_rank,
            ridge=solution.ridge,
        )


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """How a potential differs from one specialist on that specialist's calibration frames.

    Attributes
    ----------
    specialist
        Whose frames and predictions.
    model
        ``mean``, ``merged``, or the name of another specialist.
    force_mae, force_rmse
        eV/Å.
    energy_mae
        eV/atom.
    force_rms
        Root mean square of the specialist's own forces, eV/Å.
    energy_rmse, energy_rms
        Root mean square error of energies, and of the specialist's own ones, less shifts of the elements, eV/atom.
    stress_rmse, stress_rms
        The same for stresses, GPa; ``None`` where no frame has one.
    n_frames
        How many frames; 0 in files that older versions wrote.
    """

    specialist: str
    model: str
    force_mae: float
    force_rmse: float
    energy_mae: float
    force_rms: float
    energy_rmse: float = 0.0
    energy_rms: float = 0.0
    stress_rmse: float | None = None
    stress_rms: float | None = None
    n_frames: int = 0

    @property
    def relative(self) -> tuple[float, str]:
        """The d of the module, and of what it is: ``forces``, or where these are silent the worst of all."""
        size = Scales(force=self.force_rms, energy=self.energy_rms, stress=self.stress_rms)
        error = Scales(force=self.force_rmse, energy=self.energy_rmse, stress=self.stress_rmse)
        return error.relative(size)


@dataclass(frozen=True, kw_only=True)
class Parity:
    """A sample of one specialist's predictions and of those of the mean and merged models, on its frames.

    Attributes
    ----------
    specialist
        Whose frames.
    reference, mean, merged
        Force components (eV/Å); where forces are silent, energies less shifts of the elements (eV/atom).
    quantity
        ``forces`` or ``energies``.
    """

    specialist: str
    reference: tuple[float, ...]
    mean: tuple[float, ...]
    merged: tuple[float, ...]
    quantity: Literal["forces", "energies"] = "forces"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A candidate that was compared with the specialists on held-out frames.

    Attributes
    ----------
    name
        What it is.
    disagreements
        Relative force error against each specialist, see :mod:`.disagreement`.
    kept
        Whether it took the place of what there was before.
    """

    name: str
    disagreements: tuple[float, ...]
    kept: bool

    @property
    def overall(self) -> float:
        """Root mean square over the specialists."""
        return float((sum(d * d for d in self.disagreements) / len(self.disagreements)) ** 0.5)


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """How a potential differs from the specialists' common base on compounds that were not in the merge.

    Attributes
    ----------
    model, base
        ``merged``, or the name of a specialist, which forgot by its fine-tuning; name of the base.
    n_compounds
        How many.
    mean, median, worst
        Of the mean absolute differences of force components on every compound, eV/Å.
    worst_compound
        Its composition.
    relative
        Root mean square difference of forces over the root mean square of the base's.
    """

    model: str
    base: str
    n_compounds: int
    mean: float
    median: float
    worst: float
    worst_compound: str
    relative: float


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """Diagnosis of a merge.

    Attributes
    ----------
    specialists
        Names, in the order of the specialist index.
    layers
        Least-squares problems in the order they were solved.
    disagreements
        For every specialist: mean, merged model, every other specialist.
    held_out
        Relative force error on held-out calibration frames, when a readout was fitted and so saw the others.
    energy_shifts
        Per specialist, the shift per element (eV) that put its energies on the common scale.
    seconds
        Wall time per phase.
    parity
        Sample for the parity plot.
    averaged
        Parameters that no least-squares problem covers and that are the mean of the specialists'.
    closed_loop
        ``chosen`` of the ``rounds`` of a closed loop, each with its ``trajectories``, as JSON types.
    elements
        Symbols of what the merged model knows; empty in files that older versions wrote.
    trials
        Where the merge could have begun, and its steps, as they fared on held-out frames.
    forgetting
        Of the merged potential and of the specialists, where their base is a foundation model at hand, or is kept.
    version, date
        Of this package, and when the merge was made (UTC, ISO 8601); empty in files that older versions wrote.
    """

    specialists: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    disagreements: tuple[Disagreement, ...]
    held_out: float | None
    energy_shifts: Mapping[str, Mapping[str, float]]
    seconds: Mapping[str, float]
    parity: tuple[Parity, ...] = ()
    averaged: tuple[str, ...] = ()
    closed_loop: Mapping[str, Any] | None = None
    elements: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()
    forgetting: tuple[Forgetting, ...] = ()
    version: str = field(default_factory=own_version)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def is_student(self) -> bool:
        """Whether it was taught by the specialists without a merge before."""
        return set(self.seconds) == {"distillation"}

    @property
    def relative_disagreement(self) -> float:
        """Largest error of the merged model against a specialist, relative to the specialist's own forces.

        Energies and stresses speak where forces are silent by symmetry. A readout fitted on the same frames is judged by its
        error on held-out frames, if that is larger, and what was forgotten of the base counts like another specialist.
        """
        return self._worst[0]

    @property
    def _worst(self) -> tuple[float, str, str]:
        """Largest relative error of the merged model, of what, and of whom."""
        rows = [d.relative for d in self.disagreements if d.model == "merged"]
        value, quantity = max(rows, default=(0.0, "forces"))
        own = (max(value, self.held_out or 0.0), quantity, "a specialist's")
        lost = [f.relative for f in self.forgetting if f.model == "merged"]
        return max([own, *((value, "forces", "on new compounds its base's") for value in lost)])

    @property
    def verdict(self) -> Verdict:
        """`good` below 12 % relative disagreement, `usable after distillation` below 30 %, else `failed`."""
        value = self.relative_disagreement
        return "good" if value < GOOD else "usable after distillation" if value < USABLE else "failed"

    @property
    def warning(self) -> str:
        """What to say of a merged potential that is not good."""
        return f"the merged potential is {self.verdict}: {self.missed}; {self.advice}"

    @property
    def missed(self) -> str:
        """By how much the worst specialist, or the base, is missed, in words."""
        _, quantity, whose = self._worst
        return f"it misses {whose} {quantity} by {100 * self.relative_disagreement:.0f} %"

    @property
    def advice(self) -> str:
        """What to do with a potential of this verdict."""
        if self.verdict == "good" or "base" not in self._worst[2]:
            return ADVICE[self.verdict]
        kept = any(f"{row.base} (base)" in self.specialists for row in self.forgetting)
        return f"{'keep_base with more structures' if kept else 'merge with keep_base'}, or keep to its own systems"

    def __repr__(self) -> str:
        """One line; :meth:`summary` is longer."""
        names, (value, quantity, _) = " + ".join(self.specialists), self._worst
        return (
            f"<MergeReport {names}: {self.verdict}, relative disagreement in {quantity} {100 * value:.1f} %>"
        )

    def _repr_html_(self) -> str:
        """Elements, specialists, verdict and plot, in a notebook."""
        from ase_gffmerge.merging.report_plot import report_card

        return report_card(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dictionary, verdict included."""
        return {**asdict(self), "verdict": self.verdict, "relative_disagreement": self.relative_disagreement}

    def to_json(self) -> str:
        """One JSON document."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`.

        Raises
        ------
        FileFormatError
            For a dictionary that is no report.
        """
        try:
            known = {k: v for k, v in data.items() if k not in ("verdict", "relative_disagreement")}
            return TypeAdapter(cls).validate_python({"version": "", "date": "", **known})
        except ValidationError as error:
            finding = error.errors()[0]
            raise FileFormatError(
                f"the merge report is garbled at {'.'.join(map(str, finding['loc']))!r} ({finding['msg']}); merge the "
                "specialists again"
            ) from None

    def summary(self) -> str:
        """A few lines for a terminal."""
        value, quantity, whose = self._worst
        of = " from its base on new compounds" if "base" in whose else ""
        kind, who = ("student", "student") if self.is_student else ("merge", "merged")
        lines = [f"{kind} of {', '.join(self.specialists)}: {self.verdict}"]
        lines.append(f"  relative disagreement in {quantity} {100 * value:.1f} %{of}")
        for row in self.disagreements:
            lines.append(
                f"  {row.specialist}: {who if row.model == 'merged' else row.model} differs by "
                f"{1000 * row.force_mae:.1f} meV/Å, {1000 * row.energy_mae:.2f} meV/atom"
            )
        if self.forgetting:
            first = self.forgetting[0]
            lines.append(f"  from {first.base}, on {first.n_compounds} compounds that were not in the merge")
            lines += [
                f"    {row.model} differs by {1000 * row.mean:.1f} meV/Å (median {1000 * row.median:.1f}, worst "
                f"{1000 * row.worst:.0f}: {row.worst_compound})"
                for row in self.forgetting
            ]
        if self.trials:
            lines += [
                "  on held-out frames (relative force error, root mean square over specialists)",
                *_trials(self.trials),
            ]
        if self.averaged:
            lines.append(f"  as in the starting point, as no solve covers them: {_listed(self.averaged)}")
        lines.append("  " + ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items()))
        lines += ["on its own trajectories", *_rounds(self.closed_loop)] if self.closed_loop else []
        return "\n".join(lines)


def _trials(trials: Sequence[Trial]) -> Iterator[str]:
    """A line for each candidate."""
    for trial in trials:
        yield f"    {trial.name}: {100 * trial.overall:.1f} %{' (kept)' if trial.kept else ''}"


def _rounds(loop: Mapping[str, Any]) -> Iterator[str]:
    """A line for each round of a closed loop."""
    for k, entry in enumerate(loop["rounds"]):
        went = entry["trajectories"]
        missed = [(t["specialist"], t["disagreement"]) for t in went]
        parts = [f"{who} {1000 * d['force_mae']:.1f} meV/Å" if d else f"{who} broke" for who, d in missed]
        total = sum(t["n_replicas"] for t in went)
        left = total - sum(sum(t["stopped"].values()) for t in went)
        held = f"{left} of {total} replicas held{' (chosen)' if k == loop['chosen'] else ''}"
        yield f"  round {k}: differs by {', '.join(parts)}; {held}"


def _listed(names: tuple[str, ...], *, shown: int = 3) -> str:
    """The first few names and how many there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
