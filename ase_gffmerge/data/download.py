"""Downloads of public data sets: verified, atomic, and converted to extxyz in eV and Å."""

from __future__ import annotations

import fnmatch
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ase.io
import platformdirs
import pooch
from filelock import FileLock

from ase_gffmerge.data.manifest import DataFile, Manifest, load_manifest
from ase_gffmerge.data.readers import iter_frames
from ase_gffmerge.errors import DataError

SEEN_HASHES = "seen-hashes.json"
_TIMEOUT = 60  # seconds without an answer
_CHUNK = 1000  # frames converted at a time


def data_directory(name: str) -> Path:
    """Default download folder of a data set, in the user's cache folder."""
    return platformdirs.user_cache_path("ase-gffmerge") / "data" / name


def fetch(
    name: str | Path | Manifest,
    *,
    directory: str | Path | None = None,
    files: str | Sequence[str] | None = None,
    base_url: str | None = None,
    progress: bool = True,
) -> list[Path]:
    """Download files of a data set, check them, and convert them to extxyz.

    A file whose hash is in the manifest is accepted with that hash only. For a file without one, the hash
    seen on the first download is kept in ``seen-hashes.json`` beside it, and a different one is refused
    later. Files that are there and right are neither downloaded nor converted again.

    Parameters
    ----------
    name
        Name of a data set, path of a manifest (``.yaml``), or a manifest.
    directory
        Download folder; by default in the user's cache folder.
    files
        Shell patterns such as ``"*ethanol*"``, matched with a file's path, its file name, its system and its
        ``system/split``. All files by default. A DeePMD folder comes whole or not at all.
    base_url
        Another server with the same files, instead of the manifest's.
    progress
        Whether to show a progress bar.

    Returns
    -------
    list of Path
        The converted extxyz files (eV, Å), in the order of the manifest.

    Raises
    ------
    DataError
        If the name or pattern is unknown, a download fails or is cut short, a hash is wrong, or the folder
        cannot be written.
    FileFormatError, FramesError
        If a downloaded file cannot be converted.
    """
    manifest = name if isinstance(name, Manifest) else load_manifest(name)
    folder = Path(directory) if directory is not None else data_directory(manifest.name)
    groups = _select(manifest, [files] if isinstance(files, str) else files)
    base = (base_url or manifest.base_url).rstrip("/")
    converted = []
    with _progress(progress, sum(map(len, groups.values()))) as advance:
        for source, members in groups.items():
            for file in members:
                _download(file, f"{base}/{file.path}", folder)
                advance(file.path)
            converted.append(_convert_if_newer(folder / source, [folder / file.path for file in members]))
    return converted


def convert_to_extxyz(path: str | Path, out: str | Path) -> Path:
    """Convert a frame file or folder to extxyz in eV and Å; `out` appears complete or not at all.

    Parameters
    ----------
    path
        Anything that :func:`ase_gffmerge.data.readers.read_frames` reads.
    out
        The file to write; replaced if it exists.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    FileFormatError, FramesError
        If `path` cannot be read.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(out) as temporary:
        chunk = []
        for atoms in iter_frames(path):
            chunk.append(atoms)
            if len(chunk) == _CHUNK:
                ase.io.write(temporary, chunk, format="extxyz", append=True)
                chunk = []
        if chunk:
            ase.io.write(temporary, chunk, format="extxyz", append=True)
    return out


def _select(manifest: Manifest, patterns: Sequence[str] | None) -> dict[str, list[DataFile]]:
    """Files to download, grouped by what becomes one extxyz: a file, or the folder of a DeePMD system."""
    groups: dict[str, list[DataFile]] = {}
    for file in manifest.files:
        groups.setdefault(_source(manifest, file), []).append(file)
    if patterns is None:
        return groups
    chosen = {
        s: members for s, members in groups.items() if any(_matches(f, p) for f in members for p in patterns)
    }
    if not chosen:
        raise DataError(
            f"no file of {manifest.name} matches {' or '.join(map(repr, patterns))}; "
            f"systems: {', '.join(manifest.systems)} (see 'gffmerge data show {manifest.name}')"
        )
    return chosen


def _source(manifest: Manifest, file: DataFile) -> str:
    path = Path(file.path)
    if manifest.reader != "deepmd":
        return file.path
    return (path.parent.parent if path.parent.name.startswith("set.") else path.parent).as_posix()


def _matches(file: DataFile, pattern: str) -> bool:
    names = (file.path, Path(file.path).name, file.system, f"{file.system}/{file.split}")
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


class _Downloader(pooch.HTTPDownloader):  # type: ignore[misc,unused-ignore]
    """pooch's downloader, which also remembers the hash of what came."""

    seen: str | None = None

    def __call__(self, url: str, output_file: str, *args: object, **kwargs: object) -> None:
        super().__call__(url, output_file, *args, **kwargs)
        self.seen = pooch.file_hash(output_file)


def _download(file: DataFile, url: str, folder: Path) -> None:
    """Bring one file into `folder`, or leave there what was there before and raise."""
    target = folder / file.path
    with _locked(folder):
        known = file.sha256 or _seen(folder).get(file.path)
        downloader = _Downloader(timeout=_TIMEOUT, chunk_size=1 << 16)
        known_hash = f"sha256:{known}" if known else None
        try:
            with _quiet_pooch():
                pooch.retrieve(url, known_hash, fname=target.name, path=target.parent, downloader=downloader)
        except (OSError, ValueError) as error:
            if known and downloader.seen and downloader.seen != known:
                raise DataError(_wrong_hash(file, url, known, downloader.seen, folder)) from error
            raise DataError(
                f"cannot download {file.path} from {url}: {error}; check the connection and try again, "
                f"or put the file at {target} by hand"
            ) from error
        if not known:
            _record(folder, file.path, pooch.file_hash(str(target)))


def _wrong_hash(file: DataFile, url: str, known: str, found: str, folder: Path) -> str:
    whose = "in the manifest" if file.sha256 else f"seen on first use ({folder / SEEN_HASHES})"
    remedy = (
        "try again; if it stays so, the file was altered: do not use it"
        if file.sha256
        else f"try again; if you trust the new file, delete its line from {folder / SEEN_HASHES}"
    )
    return f"wrong hash for {file.path} from {url}: expected sha256 {known} {whose}, found {found}; {remedy}"


def _seen(folder: Path) -> dict[str, str]:
    path = folder / SEEN_HASHES
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except ValueError as error:
        raise DataError(
            f"{path} is damaged ({error}); mend it, or delete it to trust the files there anew"
        ) from error


def _record(folder: Path, name: str, sha256: str) -> None:
    seen = _seen(folder) | {name: sha256}
    with _replacing(folder / SEEN_HASHES) as temporary:
        temporary.write_text(json.dumps(seen, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _convert_if_newer(source: Path, parts: list[Path]) -> Path:
    """Convert unless a conversion newer than all its parts is there."""
    out = source.with_name(source.name + ".extxyz") if source.is_dir() else source.with_suffix(".extxyz")
    if out.exists() and out.stat().st_mtime_ns >= max(part.stat().st_mtime_ns for part in parts):
        return out
    return convert_to_extxyz(source, out)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder and hold its lock, so that two processes do not write the same files."""
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise DataError(f"cannot write to the folder {folder}: {error}; choose another one") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """Give a temporary file beside `out` that becomes `out` if all goes well and vanishes if not."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        os.replace(temporary, out)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error}; is the disk full or the folder read-only?") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _quiet_pooch() -> Iterator[None]:
    """Silence pooch's advice to paste hashes into the call: here they are kept in a file."""
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _progress(show: bool, total: int) -> Iterator[Callable[[str], None]]:
    """Give a function that moves a bar of `total` files on by one (or does nothing)."""
    if not show:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("fetching", total=total)
        yield lambda path: bar.update(task, advance=1, description=Path(path).name)
