"""Recipes: what a merge does, validated, named, and stored verbatim in the merged file."""

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from ase_gffmerge.errors import RecipeError
from ase_gffmerge.storage.documents import STRICT, Seed, Whole, explain, read_options, shown, with_text_keys

MERGE_VERSION = 14
"""Raised whenever the numbers of a merge change, so that cached potentials are rebuilt."""


BASE_FRAMES = 200
"""Structures of different compounds that the base joins with where ``keep_base`` is ``true``."""


class AugmentationOptions(BaseModel):
    """Copies of calibration frames that the specialist visits and labels by itself (:mod:`.augmentation`).

    Attributes
    ----------
    copies, max_copied_edges
        Copies of every calibration frame, fewer where those of a specialist would have more edges than that.
    temperature, interval
        Of the specialist's short dynamics that visits the copies: K, and fs from one copy to the next.
    displacement
        Standard deviation in Å of random displacements.
    seed
        Of everything that is drawn.
    """

    model_config = STRICT

    copies: Whole = Field(default=8, ge=0)
    max_copied_edges: Whole = Field(default=300_000, ge=0)
    temperature: float = Field(default=500.0, ge=0)
    interval: float = Field(default=20.0, gt=0)
    displacement: float = Field(default=0.02, gt=0)
    seed: Seed = 0


class ReadoutOptions(AugmentationOptions):
    """Step 5, the force-matched readout; at temperature 0 its copies are displaced at random.

    Attributes
    ----------
    width
        Random features.
    groups, inputs
        Groups of features and how many of the scalars each group reads, chosen at random: the features cost less than if
        all of them read all scalars. Every group reads all of them where there are no more than ``inputs``.
    blocks
        How many of the last blocks' scalars feed the features.
    energy_weight
        Weight of one energy per atom (eV) against one force component (eV/Å).
    stress_weight
        Weight of the strain derivative (eV) of structures with a volume against one force component (eV/Å).
    directions
        Directional derivatives of the energy per frame; frames with fewer coordinates use all of them.
    """

    width: Whole = Field(default=2048, ge=1)
    groups: Whole = Field(default=16, ge=1)
    inputs: Whole = Field(default=64, ge=1)
    blocks: Whole = Field(default=3, ge=1)
    energy_weight: float = Field(default=10.0, ge=0)
    stress_weight: float = Field(default=0.3, ge=0)
    directions: Whole = Field(default=6, ge=1)


FeatureMatch = Literal["nodes", "vectors", "edges", "edges-to-nodes"]


class DistillOptions(AugmentationOptions):
    """How a merged potential is fine-tuned on its specialists' own energies, forces and stresses.

    Attributes
    ----------
    threshold
        A merge whose relative force error on held-out frames is below this for every specialist is left as it is. Default:
        a quarter of the specialist's own relative error on test frames, to which that adds 3 %, as errors add in squares;
        0.3 % where its file records no such error.
    budget
        Processor seconds that training may take; epochs, then frames, are cut to what fits by the time of a first batch, so
        the result depends on the machine. Default: all epochs, whatever they take; the same result on every CPU run.
    epochs, batch_size, learning_rate
        Longest duration (default: :meth:`suited_epochs`), frames per step, and the peak of the one-cycle schedule; default:
        2e-3, or less for a start that is already near (:meth:`~ase_gffmerge.training.teachers.Teachers.suited_rate`).
    energy_weight, force_weight, stress_weight
        Weights of the mean absolute differences: eV/atom, eV/Å (norm of a force), and eV/Å^3.
    feature_weight
        Weight of the difference between features of student and specialist, in units of the latter's size.
    feature_match
        Which features: ``nodes``, the scalars of all blocks; ``vectors`` of the atoms, of PaiNN and NequIP; ``edges``, of
        EScAIP and M3GNet; ``edges-to-nodes``, the specialist's edges summed over each atom, with the student's scalars.
    hessian_weight
        Weight of the difference between products of Hessians with random directions, one per frame, in units of their size.
    displacement, strain
        Every frame and copy has a twin with displaced atoms: the standard deviation in Å, and the largest strain of cells.
    sampled
        Frames that each specialist adds by molecular dynamics of its own, from its calibration frames.
    patience
        Stop after so many epochs without progress on held-out frames.
    ema_decay, gradient_clip
        Decay of the moving average of the weights; largest norm of the gradient.
    """

    threshold: float | None = Field(default=None, ge=0)
    budget: float | None = Field(default=None, gt=0)
    epochs: Whole | None = Field(default=None, ge=1)
    batch_size: Whole = Field(default=10, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    energy_weight: float = Field(default=1.0, ge=0)
    force_weight: float = Field(default=1.0, ge=0)
    stress_weight: float = Field(default=1.0, ge=0)
    feature_weight: float = Field(default=0.0, ge=0)
    feature_match: FeatureMatch = "nodes"
    hessian_weight: float = Field(default=0.0, ge=0)
    copies: Whole = Field(default=12, ge=0)
    interval: float = Field(default=10.0, gt=0)
    displacement: float = Field(default=0.03, gt=0)
    strain: float = Field(default=0.02, ge=0, lt=0.5)
    sampled: Whole = Field(default=0, ge=0)
    patience: Whole = Field(default=3, ge=1)
    ema_decay: float = Field(default=0.995, ge=0, lt=1)
    gradient_clip: float = Field(default=10.0, gt=0)

    def suited_epochs(self, n_specialists: int) -> int:
        """Epochs for so many specialists, if none are given: three for two, and one more for every two more."""
        return self.epochs or 2 + (n_specialists + 1) // 2


class TrajectoryOptions(BaseModel):
    """Short Langevin dynamics of a merged potential.

    Attributes
    ----------
    temperature
        K.
    replicas
        Per specialist, each from another of its calibration frames.
    time
        Of every replica, ps.
    timestep, friction
        fs and 1/fs.
    max_grade
        A replica stops when an atom's extrapolation grade passes this; ``None``: it may go anywhere.
    seed
        Of starts, velocities and thermostat.
    """

    model_config = STRICT

    temperature: float = Field(default=500.0, gt=0)
    replicas: Whole = Field(default=8, ge=1)
    time: float = Field(default=1.0, gt=0)
    timestep: float = Field(default=1.0, gt=0)
    friction: float = Field(default=0.02, ge=0)
    max_grade: float | None = Field(default=3.0, gt=0)
    seed: Seed = 0


class ClosedLoopOptions(TrajectoryOptions):
    """Rounds of dynamics and merging.

    Attributes
    ----------
    rounds
        How often to merge again at most.
    frames
        Visited frames that join each specialist's calibration frames per round.
    tolerance
        The loop ends when all replicas hold and the mean disagreement fell by less than this fraction.
    """

    rounds: Whole = Field(default=2, ge=1)
    frames: Whole = Field(default=150, ge=1)
    tolerance: float = Field(default=0.03, ge=0, lt=1)


class Recipe(BaseModel):
    """A merge method with its options.

    Attributes
    ----------
    method
        ``closed-form``: this package's solves, block by block (:mod:`.layerwise`, :mod:`.blockwise`, :mod:`.readout_fit`);
        ``paper``: the reference method (:mod:`.paper`); ``mean``: the mean of the weights (:mod:`.average`).
    ridge
        Strength λ of the pull to the start (under ``keep_base``, to the base), in units of the mean eigenvalue of the Gram
        matrix; of the pull to zero, as it is, in the method ``paper``.
    directions, derivative_weight
        Random displacements along which the layers' derivatives are matched too, and how much these weigh against values.
    messages
        Correct all maps of every block together on the block's output (message-level targets).
    readout
        The force-matched wide readout, or ``None`` to treat the readout like any other layer: as fast as a specialist.
    select
        Begin with the best of the mean, task arithmetic, the base and each specialist, and keep a step only where frames
        that are held out confirm it (:mod:`.selection`).
    frames
        Calibration frames per specialist, evenly spread, that the layers are solved on; default: all but held-out ones.
    closed_loop
        Merge again with frames that the merged potential visits by itself, labelled by the specialists, or ``None``.
    refine
        Label-free distillation of the merged potential where it is not yet close to every specialist, or ``None``.
    conditioning
        ``shared``: one embedding table; ``per-specialist``: one per specialist, chosen per atom.
    core_repulsion
        ``auto``: where the architecture has no repulsion of its own, one that begins below the shortest distances of the
        calibration frames (:mod:`~ase_gffmerge.models.core_repulsion`); ``none``: leave it out.
    keep_base
        Do not forget what the common base knew: it joins as one more specialist, with its own calibration frames and this
        many structures of different compounds of its elements (:mod:`ase_gffmerge.sampling.generic_frames`), and the ridge
        pulls to its weights. ``true`` stands for 200 structures, ``false`` for none: the base does not join.
    weights
        How much each specialist counts; default 1 each.
    allow_unrelated, allow_mixed_theory, allow_identical
        Merge specialists without a common base, of different levels of theory, or the same specialist twice.
    """

    model_config = STRICT

    method: Literal["closed-form", "paper", "mean"] = "closed-form"
    ridge: float = Field(default=1e-4, ge=0)
    directions: Whole = Field(default=3, ge=0)
    derivative_weight: float = Field(default=1.0, ge=0)
    messages: bool = True
    readout: ReadoutOptions | None = None
    select: bool = True
    frames: Whole | None = Field(default=None, ge=1)
    closed_loop: ClosedLoopOptions | None = None
    refine: DistillOptions | None = None
    conditioning: Literal["shared", "per-specialist"] = "shared"
    core_repulsion: Literal["auto", "none"] = "auto"
    keep_base: Whole = Field(default=0, ge=0)
    weights: tuple[float, ...] | None = None
    allow_unrelated: bool = False
    allow_mixed_theory: bool = False
    allow_identical: bool = False

    @field_validator("keep_base", mode="before")
    @classmethod
    def _number_of_structures(cls, value: object) -> object:
        return BASE_FRAMES * value if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _only_what_the_method_does(self) -> Self:
        if self.method != "closed-form" and (self.messages or self.readout is not None or self.select):
            raise ValueError(
                f"the method {self.method!r} has no messages, no readout of its own and no choice of steps; set messages "
                "and select to false and readout to null, or take the method 'closed-form'"
            )
        if self.keep_base and self.conditioning == "per-specialist":
            raise ValueError(
                "keep_base makes one surface of specialists and base; set conditioning to shared, or keep_base to 0"
            )
        return self

    @property
    def keeps_wide_readout(self) -> bool:
        """Whether the merged potential has the force-matched readout, for which other packages' formats have no place."""
        return self.readout is not None

    def exportable(self) -> Self:
        """The recipe with what other packages' formats can hold: a plain readout, and one embedding for all."""
        return self.model_copy(update={"readout": None, "conditioning": "shared"})


PRESETS: dict[str, Recipe] = {
    "gffmerge": Recipe(frames=25, refine=DistillOptions()),
    "closed-form": Recipe(readout=ReadoutOptions()),
    "fast": Recipe(frames=25),
    "paper": Recipe(
        method="paper", ridge=1e-6, directions=0, messages=False, select=False, core_repulsion="none"
    ),
    "mean": Recipe(method="mean", messages=False, select=False),
}
"""The default (solves on few frames, then distillation where it is needed); solves on all frames with a wide readout and
without training; solves on few frames alone; the published method; the mean of the weights."""


def load_recipe(
    source: "str | Path | Mapping[str, object] | Recipe" = "gffmerge", **overrides: object
) -> Recipe:
    """Turn a preset's name, a YAML file, a mapping or a recipe into a recipe.

    Parameters
    ----------
    source
        ``gffmerge``, ``closed-form``, ``fast``, ``paper``, ``mean``, a path, a mapping (a key ``preset`` names the recipe it
        starts from), or a :class:`Recipe`.
    **overrides
        Fields to replace; ``None`` leaves a field alone.

    Raises
    ------
    RecipeError
        For an unknown name or key, with a suggestion, or an impossible value.
    """
    label = "recipe"
    if isinstance(source, Recipe):
        data: dict[str, object] = source.model_dump()
    elif isinstance(source, Mapping):
        data = with_text_keys(source)
    elif not isinstance(source, str | Path):
        raise RecipeError(f"{shown(source)} is no recipe; give a name, a YAML file, a mapping or a Recipe")
    elif str(source) in PRESETS:
        data = PRESETS[str(source)].model_dump()
    else:
        label, data = str(source), _read_yaml(Path(source))
    method = data.get("method")
    preset = data.pop("preset", method if method in ("paper", "mean") else "gffmerge")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise RecipeError(f"{label}: unknown preset {shown(preset)}; use one of {', '.join(PRESETS)}")
    known = {key: value for key, value in overrides.items() if value is not None}
    try:
        return Recipe(**{**PRESETS[preset].model_dump(), **data, **known})
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe, source=label)) from None


def _read_yaml(path: Path) -> dict[str, object]:
    if not os.path.isfile(path):
        close = get_close_matches(str(path), PRESETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RecipeError(
            f"{shown(str(path))} is neither a recipe file nor one of the recipes {', '.join(PRESETS)}{hint}"
        )
    return read_options(path, what="the recipe")
