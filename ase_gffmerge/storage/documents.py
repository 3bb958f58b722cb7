"""Documents that users write: reading them, and pydantic's findings as one line that teaches."""

import reprlib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ase_gffmerge.errors import RecipeError

Model = TypeVar("Model", bound=BaseModel)

STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
"""Of options that users write: unknown keys are errors, and so are numbers that are none."""

Whole = Annotated[int, Field(lt=2**31)]
"""A number that torch and numpy can count to."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A number that seeds every generator of torch and numpy."""


def parse_yaml(text: str) -> Any:
    """Read a YAML document.

    Raises
    ------
    ValueError
        In one line, for all that PyYAML makes of a broken document: beside its own errors those of Python's constructors
        (2024-13-45 is a date) and of too deep nesting.
    """
    try:
        return yaml.safe_load(text)
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def read_options(path: Path, *, what: str) -> dict[str, Any]:
    """Read a YAML mapping of options.

    Raises
    ------
    RecipeError
        When the file cannot be read or is something else; ``what`` (the recipe, ...) is named in the message.
    """
    try:
        data = parse_yaml(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise RecipeError(f"cannot read {what} {path}: {error.strerror}; give another file") from None
    except ValueError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}; correct it there") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path} must be a YAML mapping of options, got {type(data).__name__}")
    return with_text_keys(data)


def with_text_keys(data: Mapping[Any, Any]) -> dict[str, Any]:
    """Copy of a mapping whose keys are strings, so that unknown ones can be named."""
    return {key if isinstance(key, str) else shown(key): value for key, value in data.items()}


def validated(model: type[Model], data: Mapping[str, Any], *, source: str) -> Model:
    """Make options of ``data``.

    Parameters
    ----------
    model
        Class of the options.
    data
        Keys and values of a document.
    source
        Where it comes from, for messages.

    Raises
    ------
    RecipeError
        For an unknown key, with a suggestion, or an impossible value; ``source`` begins the message.
    """
    try:
        return model(**data)
    except ValidationError as error:
        raise RecipeError(explain(error, model, source=source)) from None


def explain(error: ValidationError, model: type[BaseModel], *, source: str) -> str:
    """Describe the first finding of ``error``: where, what, and for an unknown key the nearest known one.

    Parameters
    ----------
    error
        What the validation raised.
    model
        Class of the options that were validated.
    source
        Where the document comes from: the beginning of the message.
    """
    finding = error.errors()[0]
    where = ".".join(str(part) for part in finding["loc"])
    said = finding["msg"].removeprefix("Value error, ")
    if not where and finding["type"] == "value_error":  # of several keys together, which it names itself
        return f"{source}: {said}"
    if finding["type"] != "extra_forbidden":
        return f"{source}: {where or 'the document'}: {said} (got {shown(finding.get('input'))})"
    known = _fields_at(model, finding["loc"][:-1])
    close = get_close_matches(str(finding["loc"][-1]), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
    return f"{source}: unknown key {shown(where)}; {hint}"


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        options = [
            a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)
        ]
        if not options:
            break
        model = options[0]
    return list(model.model_fields)


def shown(value: Any) -> str:
    """Describe a value of any size, depth or digits in less than a line."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 80
    brief.maxlevel = 2
    try:
        return brief.repr(value)
    except ValueError:  # more digits than Python prints
        return f"a {type(value).__name__} too long to print"
