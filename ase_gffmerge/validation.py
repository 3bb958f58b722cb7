"""Pydantic's findings as one line that teaches."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from ase_gffmerge.errors import RecipeError

Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], data: Mapping[str, Any], *, source: str) -> Model:
    """Make options of ``data``.

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
    """Describe the first finding of ``error``: where, what, and for an unknown key the nearest known one."""
    finding = error.errors()[0]
    where = ".".join(str(part) for part in finding["loc"]) or "the document"
    if finding["type"] != "extra_forbidden":
        return f"{source}: {where}: {finding['msg']} (got {finding.get('input')!r})"
    known = _fields_at(model, finding["loc"][:-1])
    close = get_close_matches(str(finding["loc"][-1]), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
    return f"{source}: unknown key {where!r}; {hint}"


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
