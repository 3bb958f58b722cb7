"""Pydantic's findings as one line that teaches."""

from difflib import get_close_matches
from typing import get_args

from pydantic import BaseModel, ValidationError


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
