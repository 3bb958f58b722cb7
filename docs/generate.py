"""Write the pages of the reference that follow from the code: commands, options, methods, public names, examples.

Run by ``conf.py`` before Sphinx reads the sources. Nothing here is kept by git.
"""

import ast
import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from inspect import cleandoc
from pathlib import Path
from typing import Any, get_args

import typer
from pydantic import BaseModel

import ase_gffmerge
from ase_gffmerge.cli import app
from ase_gffmerge.merging.recipe import PRESETS, Recipe
from ase_gffmerge.methods import METHODS
from ase_gffmerge.methods.modules import MODULE_METHODS
from ase_gffmerge.training.config import TrainConfig

EXAMPLES = Path(__file__).parents[1] / "md_examples"
MERGE_ROOMS = ("least_squares", "merging")
"""Rooms whose modules are all shown: the method itself."""


def write_pages(folder: Path) -> None:
    """Write every generated page into ``folder``, leaving pages alone that did not change."""
    pages = {
        "commands": commands(),
        "options": options(),
        "methods": methods(),
        "names": public_names(),
        "merging": merging_modules(),
        "gallery": gallery(),
    }
    folder.mkdir(exist_ok=True)
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; line breaks and bars in cells are made harmless."""
    lines = [header, ("---",) * len(header), *rows]
    cells = ([" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


# ---- the command line -------------------------------------------------------------------------------------------------


def commands() -> str:
    """A section for every command, from the program itself."""
    program = typer.main.get_command(app)
    text = (
        "# Command line\n\nEvery command has `--help`. Bad input gives one line on stderr and exit code 2.\n"
    )
    return text + "".join(_command(f"gffmerge {name}", command) for name, command in _verbs(program))


def _verbs(program: Any) -> Iterator[tuple[str, Any]]:
    for name in program.commands:
        command = program.resolve_command(None, [name])[1]
        if hasattr(command, "commands"):
            yield from ((f"{name} {verb}", below) for verb, below in command.commands.items())
        else:
            yield name, command


def _command(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    found = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = " ".join([name, *map(_argument, arguments), *(["[OPTIONS]"] if found else [])])
    text = f"\n## {name}\n\n{cleandoc(command.help or '')}\n\n```text\n{usage}\n```\n\n"
    if arguments:
        text += (
            table(("argument", "meaning"), [(f"`{p.name.upper()}`", p.help or "") for p in arguments]) + "\n"
        )
    if found:
        rows = [(f"`{' / '.join([*p.opts, *p.secondary_opts])}`", p.help or "", _default(p)) for p in found]
        text += table(("option", "meaning", "default"), rows)
    return text


def _argument(parameter: Any) -> str:
    name = parameter.name.upper() + ("..." if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if isinstance(getattr(parameter, "show_default", None), str):
        return str(parameter.show_default)
    value = getattr(parameter.default, "value", parameter.default)
    return "" if value is None or value == () or value is False else f"`{value}`"


# ---- options of recipes and trainings ---------------------------------------------------------------------------------


def options() -> str:
    """Keys of recipes and of training files with types and defaults, and what the presets change."""
    text = (
        "# Keys of recipes and training files\n\n"
        "Recipes and training options are YAML files, mappings in Python, or objects of the classes below. "
        "Unknown keys are errors that suggest the key that was meant.\n"
    )
    text += "\n## Recipe\n\n" + _model(Recipe)
    text += "\n### Presets\n\nWhat each preset changes against the defaults above:\n\n"
    default = Recipe().model_dump()
    rows = []
    for name, preset in PRESETS.items():
        values = preset.model_dump()
        changed = [f"`{key}: {_yaml(value)}`" for key, value in values.items() if value != default[key]]
        rows.append((f"`{name}`", ", ".join(changed) or "nothing: it is the default"))
    text += table(("preset", "changes"), rows)
    for name, model in _nested(Recipe):
        text += f"\n## {name}\n\n" + _model(model)
    return text + "\n## Training options\n\nFor `gffmerge train --config FILE`.\n\n" + _model(TrainConfig)


def _nested(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Options within options, by their key."""
    for key, field in model.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield key, kind
                yield from ((f"{key}: {inner}", below) for inner, below in _nested(kind))


def _model(model: type[BaseModel]) -> str:
    meanings = _meanings(model)
    summary = cleandoc(model.__doc__ or "").split("\n\n")[0]
    rows: list[tuple[str, str, str]] = []
    for key, field in model.model_fields.items():
        value = field.get_default(call_default_factory=True)
        shown = "see below" if isinstance(value, BaseModel) else f"`{_yaml(value)}`"
        row = (f"`{key}`", meanings.get(key, ""), "required" if field.is_required() else shown)
        if rows and row[1] and rows[-1][1] == row[1]:  # described together
            names, meaning, defaults = rows.pop()
            row = (f"{names}, {row[0]}", meaning, f"{defaults}, {row[2]}")
        rows.append(row)
    return f"{_markdown(summary)}\n\n" + table(("key", "meaning", "default"), rows)


def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """Descriptions in the docstring's Attributes or Parameters section by name, those of base classes included."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        lines = cleandoc(cls.__dict__.get("__doc__") or "").splitlines()
        names: list[str] = []
        for before, line, after in zip(["", *lines], lines, [*lines[1:], ""]):
            if line and not line.startswith(" ") and after.startswith(" "):
                names = [name.strip() for name in line.partition(":")[0].split(",")]
                found.update({name: "" for name in names})
            elif line.startswith(" ") and names:
                for name in names:
                    found[name] += f" {line.strip()}"
            elif line and not before:
                names = []
    return {name: _markdown(text.strip()) for name, text in found.items()}


def _markdown(text: str) -> str:
    """Roles and literals of reStructuredText as Markdown."""
    text = re.sub(r":\w+:`~?([^`]+)`", lambda match: f"`{match[1].rpartition('.')[2]}`", text)
    return text.replace("``", "`")


def _yaml(value: object) -> str:
    named = {None: "null", True: "true", False: "false"}
    if isinstance(value, bool) or value is None:
        return named[value]
    if isinstance(value, BaseModel):
        return str(value.model_dump())
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- methods, public names, modules -----------------------------------------------------------------------------------


def methods() -> str:
    """The table of methods that ``gffmerge compare`` knows."""
    rows = []
    for name in METHODS:
        method = METHODS[name]
        notes = ["trains"] * method.trains + ["one potential per specialist"] * method.per_specialist
        needs = ", ".join(sorted(need.value for need in method.needs)) or "weights alone"
        rows.append((f"`{name}`", method.citation, needs, ", ".join(notes)))
    return (
        "# Methods\n\nNames for `gffmerge compare --methods` and `ase_gffmerge.methods.METHODS`.\n\n"
        + table(("method", "source", "needs", "notes"), rows)
        + "\n## For graph networks that are no potentials\n\n"
        "Names in `ase_gffmerge.methods.modules.MODULE_METHODS`: see [how to merge any graph neural network]"
        "(../how_to/merge_any_gnn.md).\n\n" + table(("method", "source", "needs", "notes"), module_methods())
    )


def module_methods() -> list[tuple[str, str, str, str]]:
    """Rows of the methods for modules."""
    return [
        (
            f"`{name}`",
            method.citation,
            ", ".join(sorted(need.value for need in method.needs)) or "examples",
            "trains" * method.trains,
        )
        for name, method in MODULE_METHODS.items()
    ]


def public_names() -> str:
    """Everything that ``from ase_gffmerge import ...`` gives."""
    text = "# Python: public names\n\nAll of these are imported from `ase_gffmerge` itself.\n"
    for name in ase_gffmerge.__all__:
        if name.startswith("_"):
            continue
        found = getattr(ase_gffmerge, name)
        if not isinstance(found, type):
            body = f".. autofunction:: {found.__module__}.{found.__name__}"
        elif issubclass(found, BaseModel):
            body = f"Keys and defaults: see :doc:`options`. Made by ``{found.__module__}.load_recipe`` from names and files."
        else:
            body = f".. autoclass:: {found.__module__}.{name}\n   :members:"
        text += f"\n## {name}\n\n```{{eval-rst}}\n{body}\n```\n"
    return text


def merging_modules() -> str:
    """The modules of the method with their docstrings."""
    text = "# Python: the modules of the method\n"
    for room in MERGE_ROOMS:
        package = import_module(f"ase_gffmerge.{room}")
        text += f"\n## ase_gffmerge.{room}\n\n```{{eval-rst}}\n.. automodule:: ase_gffmerge.{room}\n   :no-index:\n```\n"
        for info in pkgutil.iter_modules(package.__path__):
            name = f"ase_gffmerge.{room}.{info.name}"
            options_of_pydantic = ":exclude-members: model_config"
            text += f"\n### {info.name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n   {options_of_pydantic}\n"
            text += "   :no-index:\n```\n"
    return text


# ---- examples ---------------------------------------------------------------------------------------------------------


def gallery() -> str:
    """The numbered examples with their first lines, pictures and code."""
    text = (
        "# Gallery\n\nScripts that run from a clean install without arguments, check their own results with `assert`, and "
        "compare with something known. `docs/make_pictures.py` made the pictures.\n"
    )
    for path in sorted(EXAMPLES.glob("[0-9]*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        title, _, rest = docstring.partition("\n\n")
        paragraphs = [part for part in rest.split("\n\n") if part and not part.startswith("    ")]
        title = " ".join(title.split()).rstrip(".")
        text += f"\n## {path.stem[:2]} {title.partition(':')[0]}\n\n{_markdown(title)}.\n\n" + "\n\n".join(
            paragraphs
        )
        picture = Path(__file__).parent / "pictures" / f"{path.stem}.png"
        if picture.exists():
            text += f"\n\n![{title}](../pictures/{picture.name})\n"
        text += "\n\n<details><summary>code</summary>\n\n"
        text += f"```{{literalinclude}} ../../md_examples/{path.name}\n:language: python\n```\n\n</details>\n"
    return text
