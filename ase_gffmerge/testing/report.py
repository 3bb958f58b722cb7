"""What a series of checks found."""

import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from ase_gffmerge.errors import GFFMergeError

Outcome = Literal["passed", "failed", "skipped"]
WIDTH = 110


class ContractError(GFFMergeError, AssertionError):
    """An object does not do what the contract says; also an ``AssertionError``, so that pytest reports it as a failure."""


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check.

    Attributes
    ----------
    point
        Number of the contract's point.
    name
        What is checked, in words joined by underscores.
    outcome
        ``passed``, ``failed`` or ``skipped``.
    detail
        What was measured, why it failed, or why it was skipped.
    """

    point: int
    name: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class CheckReport:
    """Outcomes of all checks of one object; printing it gives a table.

    Attributes
    ----------
    subject
        What was checked.
    results
        One per check.
    """

    subject: str
    results: tuple[CheckResult, ...]

    def of(self, outcome: Outcome) -> tuple[CheckResult, ...]:
        """Results with this outcome."""
        return tuple(result for result in self.results if result.outcome == outcome)

    @property
    def failed(self) -> tuple[CheckResult, ...]:
        """Checks that failed."""
        return self.of("failed")

    @property
    def passed(self) -> bool:
        """Whether at least one check passed, and none failed."""
        return not self.failed and bool(self.of("passed"))

    def raise_if_failed(self) -> None:
        """Raise :class:`ContractError` naming every check that failed, or saying that none could be done."""
        if not self.passed:
            lines = [f"  {result.point:2d} {result.name}: {result.detail}" for result in self.failed]
            raise ContractError("\n".join([self.summary, *lines]))

    @property
    def summary(self) -> str:
        """One line with the number of checks of each outcome."""
        counts = ", ".join(
            f"{len(self.of(outcome))} {outcome}" for outcome in ("passed", "failed", "skipped")
        )
        return f"{self.subject}: {counts}"

    def to_dict(self) -> dict[str, object]:
        """Plain dictionary for JSON."""
        return {
            "subject": self.subject,
            "passed": self.passed,
            "results": [asdict(result) for result in self.results],
        }

    def __str__(self) -> str:
        return "\n".join([self.summary, *_rows(self.results)])


def _rows(results: Iterable[CheckResult]) -> Iterable[str]:
    """Lines of the table: point, outcome, name, and the detail wrapped in its column."""
    results = list(results)
    longest = max((len(result.name) for result in results), default=0)
    for result in results:
        head = f"{result.point:3d}  {result.outcome:7s}  {result.name:{longest}s}  "
        yield (
            textwrap.fill(result.detail, WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
            or head.rstrip()
        )
