"""Recipes: what a merge does, validated, named, and stored verbatim in the merged file."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ase_gffmerge.errors import RecipeError
from ase_gffmerge.validation import explain

_STRICT = ConfigDict(extra="forbid", frozen=True)


class ReadoutOptions(BaseModel):
    """Step 5, the force-matched readout.

    Attributes
    ----------
    width
        Random features.
    blocks
        How many of the last blocks' scalars feed the features.
    energy_weight
        Weight of one energy per atom (eV) against one force component (eV/Å).
    stress_weight
        Weight of the strain derivative (eV) of structures with a volume against one force component (eV/Å).
    copies, displacement
        Copies of every calibration frame with randomly displaced atoms, and the standard deviation in Å.
    probes
        Directional derivatives per frame; frames with fewer coordinates use all of them.
    seed
        Seed of projection, displacements and probes.
    """

    model_config = _STRICT

    width: int = Field(default=1024, ge=1)
    blocks: int = Field(default=3, ge=1)
    energy_weight: float = Field(default=10.0, ge=0)
    stress_weight: float = Field(default=0.3, ge=0)
    copies: int = Field(default=8, ge=0)
    displacement: float = Field(default=0.02, gt=0)
    probes: int = Field(default=6, ge=1)
    seed: int = 0


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
        Solve every stage's closing map again on the stage's output.
    readout
        The force-matched readout, or ``None`` to treat the readout like any other layer.
    conditioning
        ``shared``: one embedding table; ``per-specialist``: one per specialist, chosen per atom.
    weights
        How much each specialist counts; default 1 each.
    allow_unrelated, allow_mixed_theory, allow_identical
        Merge specialists without a common base, of different levels of theory, or the same specialist twice.
    """

    model_config = _STRICT

    method: Literal["closed-form", "mean"] = "closed-form"
    inputs: Literal["merged", "specialist"] = "merged"
    normalise: bool = True
    ridge: float = Field(default=1e-4, ge=0)
    ridge_scale: Literal["relative", "absolute"] = "relative"
    anchor: Literal["mean", "zero"] = "mean"
    ones: Literal["biased", "all"] = "biased"
    probes: int = Field(default=3, ge=0)
    slope_weight: float = Field(default=1.0, ge=0)
    messages: bool = True
    readout: ReadoutOptions | None = ReadoutOptions()
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
        data = dict(source)
    elif str(source) in PRESETS:
        data = PRESETS[str(source)].model_dump()
    else:
        label, data = str(source), _read_yaml(Path(source))
    preset = data.pop("preset", "gffmerge")
    if preset not in PRESETS:
        raise RecipeError(f"{label}: unknown preset {preset!r}; use one of {', '.join(PRESETS)}")
    known = {key: value for key, value in overrides.items() if value is not None}
    try:
        return Recipe(**{**PRESETS[preset].model_dump(), **data, **known})
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe, source=label)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        close = get_close_matches(str(path), PRESETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RecipeError(
            f"{path} is neither a recipe file nor one of the recipes {', '.join(PRESETS)}{hint}"
        )
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path} must be a YAML mapping of recipe options, got {type(data).__name__}")
    return {str(key): value for key, value in data.items()}
