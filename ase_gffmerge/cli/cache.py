"""``gffmerge cache``: merged potentials on disk."""

from typing import TYPE_CHECKING, Any

import typer

from ase_gffmerge.cli.options import CacheDirOption, JsonOption
from ase_gffmerge.cli.output import print_json

if TYPE_CHECKING:
    from ase_gffmerge.workflows.cache import CacheEntry

app = typer.Typer(help="List, verify and clear the cache of merged potentials.", no_args_is_help=True)


@app.command("list", epilog="Example: gffmerge cache list --json")
def list_entries(cache_dir: CacheDirOption = None, as_json: JsonOption = False) -> None:
    """List merged potentials, oldest first."""
    from ase_gffmerge.workflows.cache import MergeCache

    cache = MergeCache(cache_dir)
    entries = [describe(entry) for entry in cache.entries()]
    if as_json:
        print_json({"directory": str(cache.directory), "entries": entries})
        return
    for entry in entries:
        specialists = " + ".join(entry["specialists"]) or "?"
        typer.echo(
            f"{entry['key'][:12]}  {entry['size'] / 1e6:7.2f} MB  {entry['modified'][:19]}  {specialists}"
        )
    typer.echo(f"{len(entries)} merged potential(s) in {cache.directory}", err=True)


@app.command("verify", epilog="Example: gffmerge cache verify")
def verify(cache_dir: CacheDirOption = None, as_json: JsonOption = False) -> None:
    """Read every entry and compare its digest; exit code 1 when one is corrupt."""
    from ase_gffmerge.workflows.cache import MergeCache

    cache = MergeCache(cache_dir)
    checks = [{**describe(check.entry), "ok": check.ok, "problem": check.problem} for check in cache.verify()]
    if as_json:
        print_json({"directory": str(cache.directory), "entries": checks})
    else:
        for check in checks:
            typer.echo(f"{check['key'][:12]}  {'ok' if check['ok'] else check['problem']}")
        intact = sum(check["ok"] for check in checks)
        typer.echo(f"{intact} of {len(checks)} intact in {cache.directory}", err=True)
    if not all(check["ok"] for check in checks):
        raise typer.Exit(1)


@app.command("clear", epilog="Example: gffmerge cache clear --cache-dir scratch")
def clear(cache_dir: CacheDirOption = None, as_json: JsonOption = False) -> None:
    """Delete all entries."""
    from ase_gffmerge.workflows.cache import MergeCache

    cache = MergeCache(cache_dir)
    deleted = [describe(entry) for entry in cache.clear()]
    if as_json:
        print_json({"directory": str(cache.directory), "deleted": deleted})
        return
    typer.echo(f"deleted {len(deleted)} merged potential(s) from {cache.directory}")


def describe(entry: "CacheEntry") -> dict[str, Any]:
    """Describe an entry, JSON-able; ``modified`` is ISO 8601 in UTC, ``size`` in bytes."""
    return {
        "key": entry.key,
        "path": str(entry.path),
        "name": entry.name,
        "specialists": list(entry.specialists),
        "size": entry.size,
        "modified": entry.modified.isoformat(),
    }
