"""``gffmerge data``: which public data sets there are, what they hold, and how to get them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ase_gffmerge.data.download import fetch
from ase_gffmerge.data.manifest import Manifest, list_manifests, load_manifest

app = typer.Typer(help="List, show and fetch public data sets.", no_args_is_help=True)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
NameArgument = Annotated[str, typer.Argument(help="Name of a data set, or path of a manifest (.yaml).")]


@app.command("list")
def list_command(as_json: JsonOption = False) -> None:
    """List the data sets with a manifest."""
    manifests = [load_manifest(name) for name in list_manifests()]
    if as_json:
        _print_json([_summary(manifest) for manifest in manifests])
        return
    table = Table("name", "title", "licence", "level of theory", "elements", "files")
    for m in manifests:
        table.add_row(m.name, m.title, m.licence, m.level_of_theory, " ".join(m.elements), str(len(m.files)))
    Console().print(table)


@app.command("show")
def show_command(name: NameArgument, as_json: JsonOption = False) -> None:
    """Show all that a manifest says: rights, units, keys, splits, files and hashes."""
    manifest = load_manifest(name)
    if as_json:
        _print_json(manifest.model_dump())
        return
    console = Console()
    facts = Table(show_header=False, box=None)
    for label, value in _facts(manifest):
        facts.add_row(label, value)
    console.print(facts)
    files = Table("file", "system", "split", "sha256")
    for file in manifest.files:
        files.add_row(file.path, file.system, file.split or "-", file.sha256 or f"none: {file.reason}")
    console.print(files)


@app.command("fetch")
def fetch_command(
    name: NameArgument,
    files: Annotated[
        list[str] | None,
        typer.Option("--file", help="Shell pattern of a file, system or system/split; repeatable."),
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Download folder [default: the cache].")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Download a data set, check its hashes, and convert it to extxyz in eV and Å."""
    manifest = load_manifest(name)
    show = sys.stderr.isatty() and not as_json
    paths = fetch(manifest, directory=directory, files=files or None, progress=show)
    if as_json:
        _print_json(
            {"name": manifest.name, "licence": manifest.licence, "files": [str(path) for path in paths]}
        )
        return
    for path in paths:
        typer.echo(path)
    typer.echo(
        f"licence: {manifest.licence}; cite: {'; '.join(c.doi or c.text for c in manifest.citations)}",
        err=True,
    )


def _summary(manifest: Manifest) -> dict[str, object]:
    keys = ("name", "title", "licence", "level_of_theory", "elements", "homepage")
    return manifest.model_dump(include=set(keys)) | {
        "systems": manifest.systems,
        "n_files": len(manifest.files),
    }


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    """Labels and texts of the upper table, without what the manifest leaves out."""
    units = manifest.units
    rows = [
        ("name", manifest.name),
        ("title", manifest.title),
        *[("cite", f"{c.text}{f' doi:{c.doi}' if c.doi else ''}") for c in manifest.citations],
        ("licence", manifest.licence + (f" ({manifest.licence_note})" if manifest.licence_note else "")),
        ("homepage", manifest.homepage),
        ("from", manifest.base_url),
        ("level of theory", manifest.level_of_theory),
        ("elements", " ".join(manifest.elements)),
        ("units", ", ".join(u for u in (units.length, units.energy, units.force) if u)),
        ("keys", "; ".join(f"{key}: {meaning}" for key, meaning in manifest.keys.items())),
        ("splits", manifest.splits),
        ("notes", manifest.notes or ""),
    ]
    return [row for row in rows if row[1]]


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))
