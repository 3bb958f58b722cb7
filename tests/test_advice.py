"""What messages advise can be done: every option, verb and argument that one names exists."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer

from ase_gffmerge.cli import app
from ase_gffmerge.merging.recipe import DistillOptions, Recipe

PACKAGE = Path(__file__).parents[1] / "ase_gffmerge"
OPTION, VERB = re.compile(r"(?<![\w-])--[a-z][a-z-]*"), re.compile(r"(?<!-)gffmerge ([a-z]+)\b(?! cannot)")
ARGUMENT, FIELD = (
    re.compile(r"(?<![{\w])([a-z_]{3,})="),
    re.compile(r"\b([a-z_]+): (?:null|true|\{\}|shared)"),
)
OF_OTHERS = {"axis", "head", "modal", "pbc"}
"""Arguments of ASE, numpy and the vendors' packages."""


def words(node: ast.AST) -> str:
    """The text of a string, formatted or not; what is filled in becomes a brace."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(part.value if isinstance(part, ast.Constant) else "{" for part in parts)


def raised(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Texts of errors and warnings, also of those that are put together, and constants that are put into them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.JoinedStr):
            text = words(node.value) if isinstance(getattr(node.value, "value", ""), str) else ""
            yield node.lineno, text
        call = node.exc if isinstance(node, ast.Raise) else node
        named = isinstance(call, ast.Call) and ast.unparse(call.func)
        if named and (isinstance(node, ast.Raise) or named in {"warnings.warn", "note"}):
            texts = [n for n in ast.walk(call) if isinstance(n, ast.JoinedStr)]
            inside = {id(part) for text in texts for part in text.values}
            texts += [
                n
                for n in ast.walk(call)
                if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in inside
            ]
            yield node.lineno, " ".join(words(text) for text in texts)


def advice() -> Iterator[object]:
    """Messages that name an option, a verb, an argument or a field of a recipe."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for line, text in raised(ast.parse(path.read_text())):
            if any(kind.search(text) for kind in (OPTION, VERB, ARGUMENT, FIELD)):
                yield pytest.param(text, id=f"{path.relative_to(PACKAGE)}:{line}")


@cache
def options() -> dict[str, set[str]]:
    """Options of every verb."""

    def of(command: object) -> set[str]:
        return {text for option in command.params for text in option.opts}

    group = typer.main.get_command(app)
    return {"": of(group)} | {verb: of(command) for verb, command in group.commands.items()}


@cache
def arguments() -> set[str]:
    """Names of the arguments of all functions and classes of the package."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.arguments):
                found |= {a.arg for a in (*node.posonlyargs, *node.args, *node.kwonlyargs)}
    return found


@pytest.mark.parametrize("text", list(advice()))
def test_what_is_advised_exists(text: str) -> None:
    verbs = VERB.findall(text)
    assert set(verbs) <= {*options(), "data"}
    known = {"--help"}.union(*options().values())
    if len(verbs) == 1 and verbs[0] in options():  # its options, or those of the verb that says so
        known = options()[verbs[0]] | ({"--energy-key"} if "data" in verbs else set())
    assert set(OPTION.findall(text)) <= known
    assert set(ARGUMENT.findall(text)) <= arguments() | OF_OTHERS
    assert set(FIELD.findall(text)) <= {*Recipe.model_fields, *DistillOptions.model_fields, "preset"}


def test_what_does_not_exist_would_be_noticed() -> None:
    for text in (
        "pass --trusted",
        "gffmerge merge --trust",
        "give trusted=True",
        "write readuot: null",
        "gffmerge mix",
    ):
        with pytest.raises(AssertionError):
            test_what_is_advised_exists(text)
