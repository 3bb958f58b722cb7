"""Tables of things by name whose modules are imported when they are asked for: this package's own, and other packages'.

Another package adds to a table by an entry point, for example a method in its ``pyproject.toml``::

    [project.entry-points."ase_gffmerge.methods"]
    median = "its_package.median:median"
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from difflib import get_close_matches
from functools import cached_property
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Generic, TypeVar

from ase_gffmerge.errors import GFFMergeError, first_line

T = TypeVar("T")


class Registry(MutableMapping[str, T], Generic[T]):
    """Objects of one kind by name; iteration gives the names, this package's own first, and imports nothing.

    Parameters
    ----------
    kind
        What the objects are, in one word, for messages.
    group
        Name of the group of entry points.
    own
        ``module:attribute`` of this package's objects by name.
    name_of
        The name that an object gives itself; ``None`` for what is not of the kind.
    error
        What is raised for names that do not exist, exist twice, or cannot be imported.
    """

    def __init__(
        self,
        kind: str,
        *,
        group: str,
        own: Mapping[str, str],
        name_of: Callable[[object], str | None],
        error: type[GFFMergeError],
    ):
        self.kind, self.group, self._own, self._name_of, self._error = kind, group, own, name_of, error

    @cached_property
    def _entries(self) -> dict[str, list[EntryPoint] | T]:
        """What every name stands for: the places that claim it or, once it was asked for, the object."""
        places: dict[str, list[EntryPoint]] = {
            name: [EntryPoint(name, value, self.group)] for name, value in self._own.items()
        }
        for point in sorted(entry_points(group=self.group), key=lambda point: point.name):
            claimed = places.setdefault(point.name, [])
            if all(point.value != other.value for other in claimed):
                claimed.append(point)
        return dict(places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> T:
        entry = self._entries.get(name)
        if entry is None:
            close = get_close_matches(name, self._entries, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise self._error(f"there is no {self.kind} {name!r}{hint} (known: {', '.join(self)})")
        if isinstance(entry, list):
            entry = self._entries[name] = self._load(name, entry)
        return entry

    def __setitem__(self, name: str, found: T) -> None:
        self._entries[name] = found

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def _load(self, name: str, places: list[EntryPoint]) -> T:
        """Import what a name stands for."""
        if len(places) > 1:
            owners = " and ".join(f"{_owner(place)} ({place.value})" for place in places)
            raise self._error(f"the {self.kind} {name!r} exists twice, in {owners}; uninstall one of them")
        (place,) = places
        try:
            found = place.load()
        except Exception as error:  # code of another package can raise anything
            if place.dist is None:
                raise
            raise self._error(
                f"the {self.kind} {name!r} of {_owner(place)} cannot be imported from {place.value}: "
                f"{type(error).__name__}: {first_line(error)}; mend or uninstall that package"
            ) from error
        if (own_name := self._name_of(found)) != name:
            what = f"calls itself {own_name!r}" if own_name else f"is no {self.kind}"
            raise self._error(
                f"the {self.kind} {name!r} of {_owner(place)}, {place.value}, {what}; mend or uninstall that package"
            )
        loaded: T = found
        return loaded


def _owner(place: EntryPoint) -> str:
    """The distribution of an entry point."""
    return "ase-gffmerge" if place.dist is None else f"{place.dist.name} {place.dist.version}"


def own_version() -> str:
    """Version of this package; ``unknown`` where it runs without its metadata, as a checkout or in a bundle."""
    try:
        return version("ase-gffmerge")
    except PackageNotFoundError:
        return "unknown"
