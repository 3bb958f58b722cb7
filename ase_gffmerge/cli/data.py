"""``gffmerge data``: which public data sets there are, what they hold, and how to get them."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ase_gffmerge.cli.options import JsonOption
from ase_gffmerge.cli.output import print_json, print_table
from ase_gffmerge.data.download import fetch
from ase_gffmerge.data.manifest import Manifest, list_manifests, load_manifest
from ase_gffmerge.evaluation.table import Column, Table

app = typer.Typer(help="List, show and fetch public data sets.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="Name of a data set, or path of a manifest (.yaml).")]


@app.command("list", epilog="Example: gffmerge data list --json")
def list_command(as_json: JsonOption = False) -> None:
    """List the data sets with a manifest."""
    manifests = [load_manifest(name) for name in list_manifests()]
    if as_json:
        print_json([_summary(manifest) for manifest in manifests])
        return
    titles = ("name", "title", "licence", "level of theory", "elements")
    columns = (*(Column(title, words=True) for title in titles), Column("files"))
    rows = [
        (m.name, m.title, m.licence, m.level_of_theory, " ".join(m.elements), len(m.files)) for m in manifests
    ]
    print_table(Table(columns=columns, rows=tuple(rows)))


@app.command("show", epilog="Example: gffmerge data show rmd17")
def show_command(name: NameArgument, as_json: JsonOption = False) -> None:
    """Show all that a manifest says: rights, units, keys, splits, files and hashes."""
    manifest = load_manifest(name)
    if as_json:
        print_json(manifest.model_dump())
        return
    print_table(Table.of_values(_facts(manifest)))
    columns = tuple(Column(title, words=True) for title in ("file", "system", "split", "sha256"))
    files = [(f.path, f.system, f.split or "-", f.sha256 or f"none: {f.reason}") for f in manifest.files]
    print_table(Table(columns=columns, rows=tuple(files)))


@app.command("fetch", epilog="Example: gffmerge data fetch rmd17 --file ethanol --dir data")
def fetch_command(
    name: NameArgument,
    files: Annotated[
        list[str] | None,
        typer.Option("--file", help="Shell pattern of a file, system or system/split; repeatable."),
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Download folder.", show_default="the cache")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Download a data set, check its hashes, and convert it to extxyz in eV and Å."""
    manifest = load_manifest(name)
    show = sys.stderr.isatty() and not as_json
    paths = fetch(manifest, directory=directory, files=files or None, progress=show)
    if as_json:
        print_json(
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
