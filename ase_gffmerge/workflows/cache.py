"""Content-addressed store of merged potentials: no merge is computed twice, nor by two processes at once."""

import errno
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import platformdirs
from filelock import BaseFileLock, FileLock

from ase_gffmerge.errors import CacheError, CacheWarning, FileFormatError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.merging import recipe as recipe_module
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.storage.tensor_file import read_metadata, remove_leftovers

ENVIRONMENT_VARIABLE = "GFFMERGE_CACHE"
SUFFIX = ".safetensors"
_KEY = "[0-9a-f]" * 64
"""Pattern of :func:`cache_key`: a file of any other name in the folder is somebody else's."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """One merged potential in the store.

    Attributes
    ----------
    path
        The file, a complete merged force field.
    key
        SHA-256 of everything the merge depends on.
    name, specialists
        Name of the merged potential and of its specialists; empty when the file cannot be read.
    size
        In bytes.
    modified
        When it was written (UTC).
    """

    path: Path
    key: str
    name: str
    specialists: tuple[str, ...]
    size: int
    modified: datetime


@dataclass(frozen=True, kw_only=True)
class CacheCheck:
    """Whether an entry is intact; ``problem`` says in one line what is wrong with it."""

    entry: CacheEntry
    problem: str | None = None

    @property
    def ok(self) -> bool:
        """True for an intact entry."""
        return self.problem is None


def cache_key(digests: Sequence[str], recipe: Recipe) -> str:
    """SHA-256 over all that decides a merge's result, including whether it is refused.

    Parameters
    ----------
    digests
        Of everything that the specialists' files hold, in the order given: :attr:`.ForceField.content_digest`, which is what
        :func:`.read_digest` finds in a file's header.
    recipe
        The complete recipe; the version of the merge's numbers is added, but neither devices nor folders.
    """
    document = {
        "version": recipe_module.MERGE_VERSION,
        "recipe": recipe.model_dump(mode="json"),
        "specialists": list(digests),
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


class MergeCache:
    """Merged potentials in one folder, a file per merge, named by :func:`cache_key`.

    Parameters
    ----------
    directory
        The folder; default: the environment variable ``GFFMERGE_CACHE``, else the user's cache folder.
    """

    def __init__(self, directory: str | Path | None = None):
        default = (
            os.environ.get(ENVIRONMENT_VARIABLE) or platformdirs.user_cache_path("ase-gffmerge") / "merged"
        )
        try:
            self.directory = Path(directory or default).expanduser().absolute()
        except (OSError, RuntimeError) as error:
            raise _unusable(directory or default, error) from None

    def path(self, key: str) -> Path:
        """File of the entry ``key``, whether it exists or not."""
        return self.directory / f"{key}{SUFFIX}"

    def get_or_build(
        self, specialists: Sequence[ForceField], recipe: Recipe, build: Callable[[], ForceField]
    ) -> tuple[ForceField, bool]:
        """Load the merge of ``specialists`` by ``recipe``, or build and store it while other processes wait.

        A full disk costs the entry (with a :class:`CacheWarning`), not the merge.

        Parameters
        ----------
        specialists
            The force fields to merge.
        recipe
            How.
        build
            Makes the merged force field; called at most once, and only after the folder proved writable.

        Returns
        -------
        merged : ForceField
            Read from the stored file in either case, so that a hit equals a miss to the last bit.
        hit : bool
            Whether it had been there.

        Raises
        ------
        CacheError
            When the folder cannot be written or locked.
        """
        key = cache_key([specialist.content_digest for specialist in specialists], recipe)
        path, fingerprints = self.path(key), [specialist.fingerprint for specialist in specialists]
        if found := _load(path, fingerprints, warn=False):
            return found, True
        with self._locked(key):
            if found := _load(path, fingerprints, warn=True):
                return found, True
            remove_leftovers(path)  # whoever wrote them held the lock, and was killed
            return _store(build(), path), False

    def find(self, key: str) -> ForceField | None:
        """Load an entry and verify that it is the merge of this key; ``None`` where there is none."""
        return _load(self.path(key), None, warn=False)

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Hold the lock of ``key`` in a folder that was just written to; go on without one on a full disk."""
        lock: BaseFileLock | None = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory):
                lock = FileLock(self.directory / f".{key}.lock")
                lock.acquire()
        except (OSError, ValueError, NotImplementedError) as error:
            if getattr(error, "errno", None) not in _FULL:
                raise _unusable(self.directory, error) from None
            lock = None
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    def entries(self) -> list[CacheEntry]:
        """All entries, oldest first; weights are neither read nor verified."""
        found = [entry for path in self._files(f"{_KEY}{SUFFIX}") if (entry := _describe(path))]
        return sorted(found, key=lambda entry: (entry.modified, entry.key))

    def _files(self, pattern: str) -> list[Path]:
        try:
            return list(self.directory.glob(pattern))
        except OSError as error:
            raise _unusable(self.directory, error) from None

    def verify(self) -> list[CacheCheck]:
        """Read every entry completely and compare its digest."""
        return [CacheCheck(entry=entry, problem=_problem(entry.path)) for entry in self.entries()]

    def clear(self) -> list[CacheEntry]:
        """Delete all entries and what killed processes left behind; returns the deleted entries.

        Raises
        ------
        CacheError
            When a file cannot be deleted.
        """
        entries = self.entries()
        beside = [f".{_KEY}.*.tmp", f".{_KEY}.lock"]
        others = [path for pattern in beside for path in self._files(pattern)]
        for path in [*(entry.path for entry in entries), *others]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise CacheError(
                    f"cannot delete {path} ({error.strerror}); check the folder's permissions"
                ) from None
        return entries


def _unusable(directory: str | Path, error: Exception) -> CacheError:
    reason = getattr(error, "strerror", None) or error
    return CacheError(
        f"cannot write to the cache folder {directory} ({reason}); choose another one with cache_dir=... or the "
        f"environment variable {ENVIRONMENT_VARIABLE}"
    )


def _read_entry(path: Path) -> ForceField:
    """Read and verify an entry, which says itself which merge it is: a file may have been renamed, or be a link."""
    merged = ForceField.load(path)
    if merged.merged is None or merged.merged.cache_key != path.stem:
        raise FileFormatError(f"{path} does not hold the merge that its name stands for; clear the cache")
    return merged


def _load(path: Path, fingerprints: Sequence[str] | None, *, warn: bool) -> ForceField | None:
    """Read and verify an entry.

    Parameters
    ----------
    path
        Where it should be.
    fingerprints
        Of the specialists, where they are known: the entry must name the same.
    warn
        Say why an entry that is there is not used.

    Returns
    -------
    ForceField or None
        ``None`` if there is none, or one that is corrupt or of another merge.
    """
    if not os.path.isfile(path):
        return None
    try:
        merged = _read_entry(path)
        if fingerprints is not None and (
            merged.merged is None or merged.merged.fingerprints != tuple(fingerprints)
        ):
            raise FileFormatError(f"{path} is a merge of other specialists than its name stands for")
    except FileFormatError as error:
        if warn:
            warnings.warn(f"cache entry is unusable and is built again: {error}", CacheWarning, stacklevel=4)
        return None
    return merged


def _store(merged: ForceField, path: Path) -> ForceField:
    """Write an entry and read it back; a full disk costs the entry, not the merge."""
    record = replace(merged.merged, cache_key=path.stem) if merged.merged else None
    try:
        replace(merged, merged=record).save(path)
        return _read_entry(path)
    except FileFormatError as error:
        warnings.warn(f"the merge is done but could not be cached: {error}", CacheWarning, stacklevel=4)
        return merged


def _describe(path: Path) -> CacheEntry | None:
    """Describe an entry; ``None`` if another process has just deleted it."""
    try:
        status = path.lstat()
    except OSError:
        return None
    try:
        metadata = read_metadata(path)
        name, specialists = str(metadata["name"]), tuple(map(str, metadata["merged"]["specialists"]))
    except (FileFormatError, KeyError, TypeError):
        name, specialists = "", ()
    modified = datetime.fromtimestamp(status.st_mtime, tz=UTC)
    return CacheEntry(
        path=path, key=path.stem, name=name, specialists=specialists, size=status.st_size, modified=modified
    )


def _problem(path: Path) -> str | None:
    try:
        _read_entry(path)
    except FileFormatError as error:
        return str(error)
    return None
