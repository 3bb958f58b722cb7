"""The command ``gffmerge``: one verb per module; nothing heavy is imported before a verb runs."""

import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ase_gffmerge.cli import (
    benchmark,
    cache,
    compare,
    compress,
    convert,
    demo,
    distill,
    evaluate,
    export,
    info,
    lammps,
    md,
    merge,
    relax,
    sample,
    train,
)
from ase_gffmerge.cli.options import VariadicCommand
from ase_gffmerge.runtime.progress import is_first, n_started


class Verbs(TyperGroup):
    """Turns every error that input can cause into one line on stderr and an exit code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import the sub-commands of ``data`` only when they are called; ``benchmark gnn`` is a verb of two words."""
        if args[:2] == ["benchmark", "gnn"]:
            args = ["benchmark gnn", *args[2:]]
        if args and n_started() > 1:
            _refuse_to_repeat(args)
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
                    message = f"{_line(error).rstrip('.')}. Try `{_path(error, ctx)} --help`."
                else:
                    raise
        _say("error: ", message)
        raise typer.Exit(2)


app = typer.Typer(
    cls=Verbs,
    help="Merge specialist graph-neural-network force fields in closed form and run them in ASE.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
EXAMPLES = {
    "demo": "gffmerge demo --out results",
    "convert": "gffmerge convert chgnet:fine-tuned.pth.tar copper.safetensors --calibration copper.extxyz",
    "export": "gffmerge export merged.safetensors --to lammps --out model.pt",
    "train": "gffmerge train ethanol.extxyz --out ethanol.safetensors --init rmd17-base --epochs 50",
    "merge": "gffmerge merge ethanol.safetensors malonaldehyde.safetensors --out merged.safetensors",
    "distill": "gffmerge distill rmd17-ethanol rmd17-malonaldehyde --out distilled.safetensors --epochs 10",
    "compress": "gffmerge compress rmd17-ethanol --channels 32 --out small.safetensors",
    "compare": "gffmerge compare rmd17-ethanol rmd17-malonaldehyde --methods mean gffmerge --plot errors.png",
    "evaluate": "gffmerge evaluate rmd17-ethanol merged.safetensors ethanol.extxyz --plot parity.png",
    "info": "gffmerge info rmd17-ethanol",
    "benchmark": "gffmerge benchmark rmd17-ethanol rmd17-malonaldehyde --only step scaling",
    "benchmark gnn": "gffmerge benchmark gnn graphs --out results --kinds GCN --seeds 5",
    "md": "gffmerge md rmd17-ethanol ethanol.xyz --ensemble nvt --temperature 300 --steps 1000 --out run.traj",
    "lammps": "gffmerge lammps in.ethanol --model rmd17-ethanol --dtype float32",
    "relax": "gffmerge relax rmd17-ethanol ethanol.xyz --out relaxed.xyz --fmax 0.01",
    "sample": "gffmerge sample rmd17-ethanol ethanol.xyz --out frames.extxyz --frames 100",
}
"""One line for every verb, shown at the end of its help."""
VERBS: dict[str, Callable[..., None]] = {
    "demo": demo.demo,
    "convert": convert.convert,
    "export": export.export,
    "train": train.train,
    "merge": merge.merge,
    "distill": distill.distill,
    "compress": compress.compress,
    "compare": compare.compare,
    "evaluate": evaluate.evaluate,
    "info": info.info,
    "benchmark": benchmark.benchmark,
    "benchmark gnn": benchmark.benchmark_gnn,
    "md": md.md,
    "lammps": lammps.lammps,
    "relax": relax.relax,
    "sample": sample.sample,
}
SHARED = ("merge", "train", "distill", "compare")
"""Verbs whose work the processes that torchrun starts share."""
for _name, _verb in VERBS.items():
    app.command(_name, cls=VariadicCommand, epilog=f"Example: {EXAMPLES[_name]}")(_verb)
app.add_typer(cache.app, name="cache", epilog="Example: gffmerge cache list")


@app.command("data", epilog="Example: gffmerge data list")
def _data() -> None:
    """List, show and fetch public data sets."""


def _show_version(asked: bool) -> None:
    if asked:
        from ase_gffmerge import __version__

        typer.echo(f"gffmerge {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and end."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the command ``gffmerge``."""
    app(prog_name="gffmerge")


def _refuse_to_repeat(args: list[str]) -> None:
    """Raise for what each of the processes that torchrun started would do once more."""
    from ase_gffmerge.errors import ArgumentError

    verb, n = args[0], n_started()
    if verb not in SHARED:
        shared = f"{', '.join(SHARED[:-1])} and {SHARED[-1]}"
        raise ArgumentError(
            f"gffmerge {verb} would run {n} times: only {shared} are shared by the processes that torchrun starts; start it "
            "without torchrun"
        )
    if {option.partition("=")[0] for option in args} & {"--workers", "--executor"}:
        raise ArgumentError(
            f"gffmerge {verb} is shared by the {n} processes that torchrun started; leave --workers and --executor out, or "
            "start it without torchrun"
        )


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
    if is_first():
        _say("warning: ", " ".join(str(message).split()))
