"""Content-addressed store of merged potentials: no merge is computed twice, nor by two processes at once."""

import errno
import hashlib
import json
import os
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Protocol

import platformdirs
from filelock import BaseFileLock, FileLock

from ase_gffmerge.errors import CacheError, CacheWarning, FileFormatError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.merging import recipe as recipe_module
from ase_gffmerge.merging.recipe import Recipe
from ase_gffmerge.runtime.distributed import agreed, by_first, is_mine
from ase_gffmerge.storage.tensor_file import read_metadata, remove_leftovers

try:
    import fcntl
except ImportError:  # Windows, which always has locks
    fcntl = None  # type: ignore[assignment]

ENVIRONMENT_VARIABLE = "GFFMERGE_CACHE"
SUFFIX = ".safetensors"
_KEY = "[0-9a-f]" * 64
"""Pattern of :func:`cache_key`: a file of any other name in the folder is somebody else's."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF, errno.EIO, errno.ENOSYS)
"""What file systems without locks answer when they are asked for one."""


class Mergeable(Protocol):
    """A specialist, or what will be one when its frames are known."""

    @property
    def content_digest(self) -> str:
        """SHA-256 of all that a merge takes from it."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its weights."""


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
        Of everything that the files of the specialists, and of a base that was given, hold, in this order:
        :attr:`.ForceField.content_digest`, which is what :func:`.read_digest` finds in a file's header.
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
        chosen = directory or os.environ.get(ENVIRONMENT_VARIABLE)
        try:
            folder = Path(chosen) if chosen else platformdirs.user_cache_path("ase-gffmerge") / "merged"
            self.directory = folder.expanduser().absolute()
        except (OSError, RuntimeError, KeyError) as error:  # neither HOME nor an entry in the list of users
            raise _unusable(chosen or "in the user's home", error) from None

    def path(self, key: str) -> Path:
        """File of the entry ``key``, whether it exists or not."""
        return self.directory / f"{key}{SUFFIX}"

    def get_or_build(
        self,
        specialists: Sequence[Mergeable],
        recipe: Recipe,
        build: Callable[[], ForceField],
        *,
        base: Mergeable | None = None,
    ) -> tuple[ForceField, bool]:
        """Load the merge of ``specialists`` by ``recipe``, or build and store it while other processes wait.

        A full disk, or a file system without locks, costs the entry (with a :class:`CacheWarning`), not the merge. In a
        folder that others may write to, everybody can read the entries and take the locks, whatever the umask. Processes
        that share the work build together, and the first reads and writes.

        Parameters
        ----------
        specialists
            What is merged.
        recipe
            How.
        build
            Makes the merged force field; called at most once, and only after the folder proved writable.
        base
            The common base, where it was given.

        Returns
        -------
        merged : ForceField
            Read from the stored file in either case, so that a hit equals a miss to the last bit.
        hit : bool
            Whether it had been there.

        Raises
        ------
        CacheError
            When the folder cannot be written, or the lock in it not opened.
        """
        key = cache_key([one.content_digest for one in (*specialists, *([base] if base else []))], recipe)
        path, fingerprints = self.path(key), [specialist.fingerprint for specialist in specialists]
        if found := by_first(partial(_load, path, fingerprints, warn=False)):
            return found, True
        with self._locked(key) if is_mine(0) else nullcontext(True) as locked:
            if not agreed(locked):
                return build(), False
            if found := by_first(partial(_load, path, fingerprints, warn=True)):
                return found, True
            by_first(partial(remove_leftovers, path))  # whoever wrote them held the lock, and was killed
            merged = build()
            return by_first(partial(_store, merged, path)), False

    def find(self, key: str) -> ForceField | None:
        """Load an entry and verify that it is the merge of this key; ``None`` where there is none."""
        return by_first(partial(_load, self.path(key), None, warn=False))

    @contextmanager
    def _locked(self, key: str) -> Iterator[bool]:
        """Hold the lock of ``key`` in a folder that was just written to; false where the file system has no locks.

        A full disk is true: it has room for neither the lock nor the entry, but that is said when the entry is written.
        """
        lock, usable = None, True
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory) as probe:
                lock = _acquire(self.directory / f".{key}.lock", probe.fileno())
                usable = lock is not None
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) not in _FULL:
                raise _unusable(self.directory, error) from None
        try:
            yield usable
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


def _acquire(path: Path, probe: int) -> BaseFileLock | None:
    """Wait for the lock, which all users of the folder can take; ``None``, with a warning, where there are no locks.

    The file descriptor ``probe``, of a file in the same folder, is locked first: without locks, filelock would mark a
    folder in a way that outlives a killed process.
    """
    lock = FileLock(path, mode=0o666) if _shared(path.parent) else FileLock(path)
    try:
        if fcntl is not None:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _patiently(lock)
    except (OSError, NotImplementedError) as error:
        code = getattr(error, "errno", None)
        if code in _FULL:
            raise
        reason = getattr(error, "strerror", None) or error
        if code not in _NO_LOCKS and not isinstance(error, NotImplementedError):
            raise CacheError(
                f"cannot open the lock {path} ({reason}); have its owner delete it, or choose another cache folder with "
                f"cache_dir=... or the environment variable {ENVIRONMENT_VARIABLE}"
            ) from None
        warnings.warn(
            f"the file system of the cache folder {path.parent} has no locks ({reason}), so this merge is not cached; "
            f"choose a folder on another one with cache_dir=... or the environment variable {ENVIRONMENT_VARIABLE}",
            CacheWarning,
            stacklevel=5,
        )
        return None
    return lock


def _patiently(lock: BaseFileLock, *, attempts: int = 5) -> None:
    """Acquire a lock which another user may just be making, and not have opened to all yet."""
    for attempt in range(attempts):
        try:
            lock.acquire()
            return
        except PermissionError:
            if attempt == attempts - 1:
                raise
            time.sleep(0.05)


def _shared(folder: Path) -> bool:
    """Whether others than its owner may write to a folder."""
    return bool(folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH))


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
            warnings.warn(f"cache entry is unusable and is built again: {error}", CacheWarning, stacklevel=5)
        return None
    return merged


def _store(merged: ForceField, path: Path) -> ForceField:
    """Write an entry and read it back; a full disk costs the entry, not the merge."""
    record = replace(merged.merged, cache_key=path.stem) if merged.merged else None
    try:
        replace(merged, merged=record).save(path)
        with suppress(OSError):
            if _shared(path.parent):
                path.chmod(path.stat().st_mode | stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH)
        return _read_entry(path)
    except FileFormatError as error:
        warnings.warn(f"the merge is done but could not be cached: {error}", CacheWarning, stacklevel=5)
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
