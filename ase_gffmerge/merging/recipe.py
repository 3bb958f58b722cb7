"""Recipes: what a merge does, validated, named, and stored verbatim in the merged file."""

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from ase_gffmerge.errors import RecipeError
from ase_gffmerge.merging.distill_options import DistillOptions
from ase_gffmerge.merging.loop_options import ClosedLoopOptions
from ase_gffmerge.storage.documents import STRICT, Seed, Whole, explain, read_options, shown, with_text_keys


class ReadoutOptions(BaseModel):
    """Step 5, the force-matched readout.

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
    copies, max_copied_edges
        Copies of every calibration frame (:mod:`.copies`), fewer where those of a specialist would have more edges than
        that.
    temperature, interval
        Of the specialist's short dynamics that visits the copies: K, and fs from one copy to the next.
    displacement
        At temperature 0 copies are displaced at random instead, with this standard deviation in Å.
    probes
        Directional derivatives per frame; frames with fewer coordinates use all of them.
    seed
        Seed of projection, copies and probes.
    """

    model_config = STRICT

    width: Whole = Field(default=2048, ge=1)
    groups: Whole = Field(default=16, ge=1)
    inputs: Whole = Field(default=64, ge=1)
    blocks: Whole = Field(default=3, ge=1)
    energy_weight: float = Field(default=10.0, ge=0)
    stress_weight: float = Field(default=0.3, ge=0)
    copies: Whole = Field(default=8, ge=0)
    max_copied_edges: Whole = Field(default=300_000, ge=0)
    temperature: float = Field(default=500.0, ge=0)
    interval: float = Field(default=20.0, gt=0)
    displacement: float = Field(default=0.02, gt=0)
    probes: Whole = Field(default=6, ge=1)
    seed: Seed = 0


class Recipe(BaseModel):
    """A merge method with its options.

    Attributes
    ----------
    method
        ``closed-form`` solves layer by layer; ``mean`` averages the weights.
    inputs
        Rows of every layer come from the ``merged`` model as built so far, or from each ``specialist``.
    normalise
        Give every specialist the same say: divide by its number of rows and mean squared target.
    ridge, ridge_scale, anchor
        Strength of the ridge, its unit (the mean eigenvalue of the Gram matrix, or 1), and where it pulls to.
    ones
        Add a column of ones to ``biased`` layers only, or to ``all`` (a fitted bias without a home is dropped).
    probes, slope_weight
        Random displacements along which layers must agree in slope too, and how much slopes weigh against values.
    messages
        Correct all maps of every stage together on the stage's output (message-level targets).
    readout
        The force-matched readout, or ``None`` to treat the readout like any other layer.
    closed_loop
        Merge again with frames that the merged potential visits by itself, labelled by the specialists, or ``None``.
    refine
        Label-free distillation of the merged potential, or ``None``.
    conditioning
        ``shared``: one embedding table; ``per-specialist``: one per specialist, chosen per atom.
    weights
        How much each specialist counts; default 1 each.
    allow_unrelated, allow_mixed_theory, allow_identical
        Merge specialists without a common base, of different levels of theory, or the same specialist twice.
    """

    model_config = STRICT

    method: Literal["closed-form", "mean"] = "closed-form"
    inputs: Literal["merged", "specialist"] = "merged"
    normalise: bool = True
    ridge: float = Field(default=1e-4, ge=0)
    ridge_scale: Literal["relative", "absolute"] = "relative"
    anchor: Literal["mean", "zero"] = "mean"
    ones: Literal["biased", "all"] = "biased"
    probes: Whole = Field(default=3, ge=0)
    slope_weight: float = Field(default=1.0, ge=0)
    messages: bool = True
    readout: ReadoutOptions | None = ReadoutOptions()
    closed_loop: ClosedLoopOptions | None = None
    refine: DistillOptions | None = None
    conditioning: Literal["shared", "per-specialist"] = "shared"
    weights: tuple[float, ...] | None = None
    allow_unrelated: bool = False
    allow_mixed_theory: bool = False
    allow_identical: bool = False


PRESETS: dict[str, Recipe] = {
    "gffmerge": Recipe(),
    "paper": Recipe(
        inputs="specialist",
        normalise=False,
        ridge=1e-6,
        ridge_scale="absolute",
        anchor="zero",
        ones="all",
        probes=0,
        messages=False,
        readout=None,
    ),
    "mean": Recipe(method="mean", messages=False, readout=None),
}


def load_recipe(source: "str | Path | Mapping[str, Any] | Recipe" = "gffmerge", **overrides: Any) -> Recipe:
    """Turn a preset's name, a YAML file, a mapping or a recipe into a recipe.

    Parameters
    ----------
    source
        ``gffmerge``, ``paper``, ``mean``, a path, a mapping (a key ``preset`` names the recipe it starts from), or a
        :class:`Recipe`.
    **overrides
        Fields to replace; ``None`` leaves a field alone.

    Raises
    ------
    RecipeError
        For an unknown name or key, with a suggestion, or an impossible value.
    """
    label = "recipe"
    if isinstance(source, Recipe):
        data: dict[str, Any] = source.model_dump()
    elif isinstance(source, Mapping):
        data = with_text_keys(source)
    elif not isinstance(source, str | Path):
        raise RecipeError(f"{shown(source)} is no recipe; give a name, a YAML file, a mapping or a Recipe")
    elif str(source) in PRESETS:
        data = PRESETS[str(source)].model_dump()
    else:
        label, data = str(source), _read_yaml(Path(source))
    preset = data.pop("preset", "gffmerge")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise RecipeError(f"{label}: unknown preset {shown(preset)}; use one of {', '.join(PRESETS)}")
    known = {key: value for key, value in overrides.items() if value is not None}
    try:
        return Recipe(**{**PRESETS[preset].model_dump(), **data, **known})
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe, source=label)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    if not os.path.isfile(path):
        close = get_close_matches(str(path), PRESETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RecipeError(
            f"{shown(str(path))} is neither a recipe file nor one of the recipes {', '.join(PRESETS)}{hint}"
        )
    return read_options(path, what="the recipe")
