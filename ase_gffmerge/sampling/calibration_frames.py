"""Calibration frames for someone who has nothing but a specialist and a few structures."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from pydantic import Field

from ase_gffmerge.data.frames import bare, displaced
from ase_gffmerge.dynamics.batched_md import run_replicas
from ase_gffmerge.dynamics.langevin import BatchedLangevin
from ase_gffmerge.dynamics.stopping import Stop, StoppingCriteria, StoppingTracker, standard_criteria
from ase_gffmerge.errors import FramesError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.models import Potential
from ase_gffmerge.runtime.devices import chunks
from ase_gffmerge.runtime.progress import Progress, no_progress
from ase_gffmerge.sampling.temperature_ladder import Ladder, LadderOptions, run_ladder

RELAXATION, DAMPING = 500.0, 0.05
"""Time to rest in fs, and the friction meanwhile in 1/fs."""


class SampleOptions(LadderOptions):
    """What is sampled: a temperature ladder, and displaced copies of its frames.

    Attributes
    ----------
    n
        Frames wanted.
    relax
        Cool every structure to rest first (Langevin dynamics at 0 K).
    rattled
        Share of the frames that are copies with displaced atoms and strained cells.
    rattle, strain
        Standard deviation of displacements in Å; largest strain component, of structures periodic in 3 directions.
    """

    n: int = Field(default=100, ge=1)
    relax: bool = True
    rattled: float = Field(default=0.2, ge=0, lt=1)
    rattle: float = Field(default=0.04, ge=0)
    strain: float = Field(default=0.02, ge=0, lt=0.5)


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """Frames and how they came about.

    Attributes
    ----------
    frames
        Bare structures; ``info["source"]`` says ``md`` or ``rattled``, and ``md`` frames have a ``temperature`` (K).
    sources
        Number of frames per source.
    rejected
        Number of replicas stopped and of frames refused, per reason.
    wanted
        Frames asked for.
    decorrelation_fs
        After this time forces are forgotten; frames of one replica are at least this far apart.
    simulated_ps
        Time of all replicas together.
    seconds
        Wall time.
    """

    frames: tuple[Atoms, ...]
    sources: Mapping[str, int]
    rejected: Mapping[str, int]
    wanted: int
    decorrelation_fs: float
    simulated_ps: float
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """Everything but the frames, as JSON types."""
        plain = {key: value for key, value in vars(self).items() if key != "frames"}
        return plain | {
            "n_frames": len(self.frames),
            "sources": dict(self.sources),
            "rejected": dict(self.rejected),
        }


def sample_frames(
    specialist: ForceField,
    structures: Sequence[Atoms],
    options: SampleOptions | None = None,
    *,
    criteria: StoppingCriteria | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> SampleResult:
    """Sample calibration frames by short molecular dynamics with the specialist itself.

    Every structure runs at every temperature; a broken replica stops and its last frame is dropped. Frames a
    decorrelation time apart are taken, and displaced copies of structures and frames are added.

    Parameters
    ----------
    specialist
        The potential; a merged one must have one surface for all.
    structures
        Starting points: molecules or crystals.
    options
        How many frames, how hot, how long.
    criteria
        What is refused; default: broken bonds, overlaps, runaway temperature and, when the specialist has an extrapolation
        grade, atoms beyond twice the edge of its calibration frames.
    executor
        Workers among which the dynamics are shared out (:func:`.run_replicas`); default: this process.
    progress
        Called with a fraction (0 to 1) and a description.

    Raises
    ------
    FramesError
        For no structures or unknown elements, or when not a single frame survives.
    """
    began = time.perf_counter()
    options, criteria = options or SampleOptions(), criteria or standard_criteria(specialist)
    _check(specialist)
    starts, rejected = _relaxed(specialist.potential, structures, options, criteria, executor)
    n_displaced = round(options.rattled * options.n)
    ladder = run_ladder(
        specialist.potential,
        starts,
        options,
        criteria=criteria,
        n=options.n - n_displaced,
        executor=executor,
        progress=progress or no_progress,
    )
    rejected += ladder.stopped
    if not ladder.frames:
        raise FramesError(
            f"{specialist.name!r} gave no frames ({_counts(rejected)}); check that it knows these structures, or use "
            "lower temperatures or a longer time"
        )
    extra, refused = _displaced(specialist.potential, ladder, n_displaced, options, criteria)
    frames = (*ladder.frames, *extra)
    return SampleResult(
        frames=frames,
        sources=Counter(atoms.info["source"] for atoms in frames),
        rejected=rejected + refused,
        wanted=options.n,
        decorrelation_fs=ladder.decorrelation_fs,
        simulated_ps=ladder.simulated_ps,
        seconds=time.perf_counter() - began,
    )


def _check(specialist: ForceField) -> None:
    if specialist.potential.hyper.n_embeddings > 1:
        raise FramesError(
            f"{specialist.name!r} has one embedding per specialist, so no surface of its own to sample; sample each "
            "specialist"
        )


def _counts(rejected: Mapping[str, int]) -> str:
    return ", ".join(f"{n} x {reason}" for reason, n in rejected.items()) or "the time was too short"


def _relaxed(
    potential: Potential,
    structures: Sequence[Atoms],
    options: SampleOptions,
    criteria: StoppingCriteria,
    executor: Executor | None,
) -> tuple[list[Atoms], Counter[str]]:
    """Structures cooled to rest, and why some were lost on the way."""
    if not options.relax:
        return list(structures), Counter()
    steps = max(1, round(RELAXATION / options.timestep))
    runs = run_replicas(
        potential,
        structures,
        ensemble="nvt",
        temperature=0.0,
        timestep=options.timestep,
        steps=steps,
        every=steps,
        friction=DAMPING,
        criteria=criteria,
        executor=executor,
    )
    whole = [run.frames[-1] for run in runs if run.stopped is None]
    return whole, Counter(run.stopped for run in runs if run.stopped is not None)


def _displaced(
    potential: Potential, ladder: Ladder, n: int, options: SampleOptions, criteria: StoppingCriteria
) -> tuple[list[Atoms], Counter[str]]:
    """``n`` displaced copies of sampled frames, drawn until enough are accepted or as many again were refused."""
    rng = np.random.default_rng((options.seed, n))
    accepted: list[Atoms] = []
    refused: Counter[str] = Counter()
    while len(accepted) < n and refused.total() <= n:
        chosen = rng.integers(len(ladder.frames), size=n - len(accepted))
        copies = [
            displaced(ladder.frames[k], rattle=options.rattle, strain=options.strain, rng=rng) for k in chosen
        ]
        stops = screen(potential, copies, [ladder.references[k] for k in chosen], criteria=criteria)
        refused.update(stop.reason for stop in stops if stop)
        accepted += [copy for copy, stop in zip(copies, stops, strict=True) if stop is None]
    for atoms in accepted:
        atoms.info["source"] = "rattled"
    return accepted, refused


def screen(
    potential: Potential,
    frames: Sequence[Atoms],
    references: Sequence[Atoms],
    *,
    criteria: StoppingCriteria,
    max_atoms: int = 2000,
) -> list[Stop | None]:
    """Find what is wrong with each frame, compared with the intact structure that it comes from.

    Parameters
    ----------
    potential
        Its energies must be finite, and its extrapolation grade acceptable.
    frames
        Structures to look at.
    references
        One per frame, the same atoms in the same order; their bonds must hold.
    criteria
        The criteria.
    max_atoms
        Size of a batch.
    """
    found: list[Stop | None] = []
    for group in chunks(frames, max_atoms):
        part = references[len(found) : len(found) + len(group)]
        stops = _screen(potential, [bare(atoms) for atoms in group], part, criteria)
        found += [stops.get(k) for k in range(len(group))]
    return found


def _screen(
    potential: Potential, frames: Sequence[Atoms], references: Sequence[Atoms], criteria: StoppingCriteria
) -> dict[int, Stop]:
    n = len(frames)
    generators = [np.random.default_rng(0)] * n
    replicas = BatchedLangevin(
        potential, frames, temperatures=[0.0] * n, generators=generators, specialist=[0] * n, skin=0.0
    )
    freedom = [3 * len(atoms) for atoms in frames]
    return StoppingTracker(criteria, replicas, references, freedom=freedom).stops(recording=True)
