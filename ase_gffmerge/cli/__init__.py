"""The command ``gffmerge``: one verb per module; nothing heavy is imported before a verb runs."""

import sys
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from ase_gffmerge.cli import (
    benchmark,
    cache,
    compare,
    convert,
    demo,
    distill,
    evaluate,
    info,
    md,
    merge,
    relax,
    sample,
    train,
)
from ase_gffmerge.cli.variadic import VariadicCommand


class Verbs(TyperGroup):
    """Turns every error that input can cause into one line on stderr and an exit code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import the sub-commands of ``data`` only when they are called."""
        if args and args[0] == "data":
            from ase_gffmerge.cli.data import app as data

            return "data", typer.main.get_command(data), args[1:]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; exit code 2 for bad input, 130 for Ctrl-C."""
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt as stop:
                _say("", str(stop) or "interrupted")
                raise typer.Exit(130) from None
            except typer.Exit:
                raise
            except Exception as error:
                from ase_gffmerge.errors import GFFMergeError

                if isinstance(error, GFFMergeError):
                    message = _line(error)
                elif _is_usage_error(error):
                    message = f"{_line(error)} Try `{_path(error, ctx)} --help`."
                else:
                    raise
        _say("error: ", message)
        raise typer.Exit(2)


app = typer.Typer(
    cls=Verbs,
    help="Merge specialist graph-neural-network force fields in closed form and run them in ASE.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("convert")(convert.convert)
app.command("train")(train.train)
app.command("merge")(merge.merge)
app.command("distill", cls=VariadicCommand)(distill.distill)
app.command("compare", cls=VariadicCommand)(compare.compare)
app.command("evaluate")(evaluate.evaluate)
app.command("info")(info.info)
app.command("benchmark", cls=VariadicCommand)(benchmark.benchmark)
app.command("md")(md.md)
app.command("relax")(relax.relax)
app.command("sample", cls=VariadicCommand)(sample.sample)
app.add_typer(cache.app, name="cache")


@app.command("data")
def _data() -> None:
    """List, show and fetch public data sets."""


@app.callback()
def _root() -> None:
    pass


def main() -> None:
    """Entry point of the command ``gffmerge``."""
    app(prog_name="gffmerge")


def _is_usage_error(error: Exception) -> bool:
    """Whether ``error`` is the parser's complaint (and not its request to show the help)."""
    return hasattr(error, "format_message") and type(error).__name__ != "NoArgsIsHelpError"


def _path(error: Exception, ctx: Any) -> str:
    return (getattr(error, "ctx", None) or ctx).command_path


def _line(error: Exception) -> str:
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    return " ".join(text.split()) or type(error).__name__


def _say(kind: str, message: str) -> None:
    typer.echo(f"gffmerge: {kind}{message}", file=sys.stderr)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    _say("warning: ", " ".join(str(message).split()))
