"""The rooms of the package: who may import whom, and what every module and every public name must have."""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

PACKAGE = Path(__file__).parents[1] / "ase_gffmerge"
ROOMS = (
    *("errors", "least_squares", "runtime", "storage", "graphs", "data", "models", "forcefield", "testing"),
    *("integrations", "inference", "dynamics", "merging", "sampling", "training", "workflows"),
    *("methods", "engines", "__init__", "evaluation", "cli", "__main__"),
)
"""From the ground up: a room imports only rooms named before it."""
LONGEST_MODULE, MOST_FILES, MOST_ANY = 400, 225, 130


@dataclass(frozen=True)
class Module:
    """A file of the package and its syntax tree."""

    path: Path
    tree: ast.Module
    n_lines: int

    @property
    def name(self) -> str:
        parts = self.path.relative_to(PACKAGE.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def room(self) -> str:
        first = self.path.relative_to(PACKAGE).parts[0]
        return first.removesuffix(".py")

    def at(self, node: ast.AST) -> str:
        return f"{self.path.relative_to(PACKAGE.parent)}:{getattr(node, 'lineno', 1)}"


@cache
def modules() -> dict[str, Module]:
    """All modules of the package by dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        module = Module(path, ast.parse(text), text.count("\n"))
        found[module.name] = module
    return found


def imported(module: Module, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Modules of this package that a statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE.name)
        return
    base = node.module or ""
    if node.level:
        parents = module.name.split(".")
        keep = len(parents) - node.level + (module.path.name == "__init__.py")
        base = ".".join([*parents[:keep], *([base] if base else [])])
    if base.split(".")[0] == PACKAGE.name:
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            yield inner if inner in modules() else base


def imports(module: Module, *, anywhere: bool = True) -> Iterator[tuple[ast.AST, str]]:
    """Statements and the modules they import: all, or those that run when the module itself is imported."""
    waiting: list[ast.AST] = [module.tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node, name) for name in imported(module, node))
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typed = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if anywhere or not (lazy or typed):
            waiting += ast.iter_child_nodes(node)


def room_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def climbing_imports() -> list[str]:
    """Imports of a room that is named later than the importer's."""
    found = {
        f"{module.at(node)}: {module.room} imports {name}"
        for module in modules().values()
        for node, name in imports(module)
        if room_of(name) != module.room and ROOMS.index(room_of(name)) > ROOMS.index(module.room)
    }
    return sorted(found)


def loose_modules() -> list[str]:
    allowed = {"__init__", "__main__", "errors"}
    return [
        f"{m.at(m.tree)}: loose"
        for m in modules().values()
        if m.path.parent == PACKAGE and m.room not in allowed
    ]


def unknown_rooms() -> list[str]:
    return sorted({f"ase_gffmerge/{m.room}/" for m in modules().values() if m.room not in ROOMS})


def cycles() -> list[str]:
    """Groups of modules that import one another while they are imported (Tarjan's strongly connected components)."""
    edges = {
        name: sorted({target for _, target in imports(module, anywhere=False) if target != name})
        for name, module in modules().items()
    }
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in edges.get(name, ()):
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append("circle of " + ", ".join(sorted(group)))

    for name in edges:
        if name not in index:
            visit(name)
    return found


def long_modules() -> list[str]:
    return [f"{m.at(m.tree)}: {m.n_lines} lines" for m in modules().values() if m.n_lines > LONGEST_MODULE]


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(module: Module) -> Iterator[tuple[str, Definition]]:
    """Public functions, classes and methods with their dotted names; not what lies within functions."""

    def within(node: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Definition) and not child.name.startswith("_"):
                yield f"{prefix}{child.name}", child
                if isinstance(child, ast.ClassDef):
                    yield from within(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.If | ast.Try):
                yield from within(child, prefix)

    yield from within(module.tree, "")


def decorators(node: Definition) -> str:
    return " ".join(ast.unparse(decorator) for decorator in node.decorator_list)


def without_docstring() -> list[str]:
    """Modules and public objects; a setter has its getter's, an overload its implementation's."""
    found = [
        f"{m.at(m.tree)}: module without docstring"
        for m in modules().values()
        if not ast.get_docstring(m.tree)
    ]
    for module in modules().values():
        for name, node in public(module):
            if not ast.get_docstring(node) and not any(
                word in decorators(node) for word in ("setter", "overload")
            ):
                found.append(f"{module.at(node)}: {name} without docstring")
    return found


def arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    spec = node.args
    named = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
    return [a.arg for a in named if a.arg not in {"self", "cls"}]


INTERFACES = {"forward", "calculate", "get_property"}
"""Methods whose arguments torch and ASE document."""


def inherited() -> set[str]:
    """Names of methods whose arguments the class that introduces them documents."""
    documented = {
        child.name
        for module in modules().values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
        for child in node.body
        if isinstance(child, ast.FunctionDef) and "Parameters\n---" in (ast.get_docstring(child) or "")
    }
    return documented | INTERFACES


def without_parameters() -> list[str]:
    """Public functions of three or more arguments; commands are documented option by option, for ``--help``."""
    found = []
    known = inherited()
    for module in modules().values():
        for name, node in public(module):
            if isinstance(node, ast.ClassDef) or len(arguments(node)) < 3:
                continue
            if any(word in decorators(node) for word in ("command", "callback", "overload", "override")):
                continue
            if "typer." in ast.unparse(node.args):
                continue
            if "." in name and node.name in known:
                continue
            text = ast.get_docstring(node) or ""
            if "Parameters\n---" not in text:
                found.append(
                    f"{module.at(node)}: {name} of {len(arguments(node))} arguments without Parameters"
                )
    return found


def any_annotations() -> list[str]:
    return [
        module.at(node)
        for module in modules().values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Name) and node.id == "Any"
    ]


def files() -> list[str]:
    return [str(module.path.relative_to(PACKAGE.parent)) for module in modules().values()]


NONE = 0
CHECKS = [
    pytest.param(unknown_rooms, NONE, id="rooms"),
    pytest.param(loose_modules, NONE, id="loose"),
    pytest.param(climbing_imports, NONE, id="climbing"),
    pytest.param(cycles, NONE, id="circles"),
    pytest.param(long_modules, NONE, id="long"),
    pytest.param(files, MOST_FILES, id="files"),
    pytest.param(without_docstring, NONE, id="docstrings"),
    pytest.param(without_parameters, NONE, id="parameters"),
    pytest.param(any_annotations, MOST_ANY, id="any"),
]


@pytest.mark.parametrize(("offenders", "most"), CHECKS)
def test_house(offenders: Callable[[], list[str]], most: int) -> None:
    found = offenders()
    assert len(found) <= most, f"{len(found)} of at most {most}:\n" + "\n".join(found)


def test_relative_and_lazy_imports_are_seen() -> None:
    """The reader itself: every form in which a module can be named."""
    text = (
        "from . import painn\nfrom ..graphs import graph\nimport ase_gffmerge.cli\n"
        "def f():\n    from ase_gffmerge import merge\n"
        "if TYPE_CHECKING:\n    from ase_gffmerge.errors import GFFMergeError\n"
    )
    module = Module(PACKAGE / "models" / "new.py", ast.parse(text), 7)
    everything = {name for _, name in imports(module)}
    prefix = "ase_gffmerge."
    top = {f"{prefix}models.painn", f"{prefix}graphs.graph", f"{prefix}cli"}
    assert everything == top | {"ase_gffmerge", f"{prefix}errors"}
    assert {name for _, name in imports(module, anywhere=False)} == top


def test_no_example_is_random_or_fails_because_a_machine_is_busy() -> None:
    assert settings.default is not None
    assert settings.default.derandomize
    assert settings.default.deadline is None
