"""From names, files or objects to the one force field that is served; several are merged."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ase_gffmerge.errors import ArgumentError, FileFormatError, MergeWarning
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.integrations.base import vendor_source
from ase_gffmerge.integrations.load import Source, as_force_field, as_list, describe, local_file
from ase_gffmerge.merging.recipe import Recipe, load_recipe
from ase_gffmerge.runtime.progress import Progress, part_of, progress_bar
from ase_gffmerge.storage.tensor_file import read_digest
from ase_gffmerge.workflows.cache import MergeCache, cache_key

if TYPE_CHECKING:
    from ase_gffmerge.sampling.on_request import Calibration, SampledLater


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """How several specialists become one; see :class:`~ase_gffmerge.engines.ase.calculator.GFFMergeCalculator`.

    The bound of the memory changes nothing in the result, so that neither recipe nor cache know of it.
    """

    recipe: str | Path | Mapping[str, Any] | Recipe = "gffmerge"
    conditioning: str | None = None
    weights: tuple[float, ...] | None = None
    allow_unrelated: bool = False
    core_repulsion: str | None = None
    keep_base: bool | int | Source | None = None
    cache_dir: str | Path | None = None
    max_memory: str | float | None = None

    def load_recipe(self) -> Recipe:
        """Load the recipe and work the other options in."""
        return load_recipe(
            self.recipe,
            conditioning=self.conditioning,
            weights=self.weights,
            allow_unrelated=self.allow_unrelated or None,
            core_repulsion=self.core_repulsion,
            keep_base=self.keep_base if isinstance(self.keep_base, int | None) else True,
        )

    @property
    def base(self) -> Source | None:
        """The base to keep, where it was given."""
        return None if isinstance(self.keep_base, int | None) else self.keep_base


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """The force field to serve, with JSON-able constructor arguments that lead to it again.

    ``borrowed`` says that somebody else holds it, too, and must find it unchanged. ``specialists`` are what it was merged
    from, and ``cache_hit`` says whether the merge was found in the cache; both are ``None`` when nothing was to be merged.
    """

    force_field: ForceField
    arguments: Mapping[str, Any]
    borrowed: bool = False
    specialists: "Specialists | None" = None
    cache_hit: bool | None = None


def resolve(
    sources: Source | Iterable[Source],
    options: MergeOptions,
    *,
    device: torch.device,
    calibration: "str | Sequence[Calibration] | None" = None,
    progress: Progress | None = None,
) -> Resolved:
    """Load the sources and, if there are several, merge them through the cache.

    Parameters
    ----------
    sources
        One or several of: bundled name, path of a ``.safetensors`` file, ``vendor:what``, :class:`ForceField`.
    options
        Used for several sources; for a single one they are only checked against what it is.
    device
        Where the merge is computed.
    calibration
        See :func:`.with_frames`; default: what the specialists hold. A single force field needs none.
    progress
        Handed to :func:`~ase_gffmerge.workflows.merge.merge`; default: a bar, on terminals and in notebooks.
    """
    items = as_list(sources)
    if len(items) > 1:
        given = items if calibration is None else _with_frames(items, calibration)
        return _merged(given, options, device=device, progress=progress)
    force_field = as_force_field(items[0])
    check_single(force_field, options)
    if options.core_repulsion is not None:
        with_it = options.core_repulsion == "auto"
        force_field = force_field.with_core_repulsion() if with_it else force_field.without_core_repulsion()
    return Resolved(
        force_field=force_field,
        arguments={
            "specialists": [describe(items[0])],
            "recipe": "gffmerge",
            "weights": None,
            "keep_base": None,
        },
        borrowed=isinstance(items[0], ForceField),
    )


def _with_frames(
    items: list[Source], calibration: "str | Sequence[Calibration]"
) -> "list[Source | SampledLater]":
    from ase_gffmerge.sampling.on_request import with_frames  # dynamics, which a cache hit does not need

    return with_frames(items, calibration)


def check_single(force_field: ForceField, options: MergeOptions) -> None:
    """Raise :class:`ArgumentError` for options that a single force field does not follow."""
    if options.weights is not None:
        raise ArgumentError(
            "weights say how much each of several specialists counts, but only one force field was given; "
            "leave them out"
        )
    if options.keep_base:
        raise ArgumentError(
            "keep_base keeps what the base of several specialists knew, but only one force field was given; leave it out"
        )
    if options.core_repulsion not in (None, "auto", "none"):
        raise ArgumentError(f"core_repulsion={options.core_repulsion!r} is not known; use 'auto' or 'none'")
    served = "per-specialist" if force_field.potential.hyper.n_embeddings > 1 else "shared"
    if options.conditioning not in (None, served):
        made = f"was merged with conditioning={served!r}" if force_field.merged else "is a single specialist"
        raise ArgumentError(
            f"conditioning={options.conditioning!r} was asked for, but {force_field.name!r} {made}; merge "
            "the specialists again with the conditioning you want, or leave the argument out"
        )


def _warn_again(force_field: ForceField, recipe: Recipe) -> None:
    """Say about a cached merge what was said when it was made."""
    from ase_gffmerge.merging.report import GOOD, MergeReport

    record = force_field.merged
    if record is None or recipe.method == "mean" or record.report.get("relative_disagreement", GOOD) < GOOD:
        return
    report = MergeReport.from_dict(record.report)
    if report.verdict != "good":
        warnings.warn(
            f"the merged potential (from the cache) is {report.verdict}: {report.missed}; "
            "see calc.report, and do not rely on it untested",
            MergeWarning,
            stacklevel=4,
        )


def _merged(
    items: "Sequence[Source | SampledLater]",
    options: MergeOptions,
    *,
    device: torch.device,
    progress: Progress | None,
) -> Resolved:
    """Find the merge by what the specialists' files hold, or load them and merge them while other processes wait."""
    recipe = options.load_recipe()
    cache = MergeCache(options.cache_dir)
    inputs = [_input(item) for item in items]
    digests = [_digest(item) for item in inputs]
    base = as_force_field(options.base) if options.base is not None else None
    kept = [base.content_digest] if base else []
    key = cache_key([*digests, *kept], recipe)
    force_field, hit = cache.find(key), True
    specialists = Specialists(inputs, digests)
    if force_field is None:
        loaded = [as_force_field(item) if isinstance(item, Path) else item for item in inputs]
        key = cache_key([*(one.content_digest for one in loaded), *kept], recipe)
        specialists = Specialists(loaded)
        force_field, hit = cache.get_or_build(
            loaded,
            recipe,
            lambda: _merge(
                loaded, recipe, base=base, device=device, max_memory=options.max_memory, progress=progress
            ),
            base=base,
        )
    if hit:
        _warn_again(force_field, recipe)
    paths = [item for item in items if isinstance(item, str | Path)]
    if len(paths) < len(items) or isinstance(
        options.base, ForceField
    ):  # an object has no path, but its merge has one
        paths, options = [cache.path(key)], MergeOptions()
    return Resolved(
        force_field=force_field,
        arguments=_arguments(paths, recipe, options),
        specialists=specialists,
        cache_hit=hit,
    )


def _merge(
    specialists: "Sequence[ForceField | SampledLater]",
    recipe: Recipe,
    *,
    base: ForceField | None,
    device: torch.device,
    max_memory: str | float | None,
    progress: Progress | None,
) -> ForceField:
    """Sample what is to be sampled, and merge, under a bar that says so if the caller does not watch."""
    from ase_gffmerge.sampling.on_request import sampled
    from ase_gffmerge.workflows.merge import merge

    def merged(told: Progress) -> ForceField:
        given = sampled(specialists, device, told)
        return merge(given, recipe, base=base, device=device, max_memory=max_memory, progress=told)[0]

    if progress is not None:
        return merged(progress)
    names = " + ".join(item.name for item in specialists)
    title = f"merging {names} (once; the result is cached)"
    with progress_bar(title) as bar:
        return merged(part_of(bar, 0, 1, prefix=f"{title}: "))


def _input(source: "Source | SampledLater") -> "ForceField | SampledLater | Path":
    """What is in memory, or the path of one of our own files; another package's model is loaded."""
    if not isinstance(source, str | Path):
        return source
    return as_force_field(source) if vendor_source(source) else local_file(source)


def _digest(item: "ForceField | SampledLater | Path") -> str:
    return read_digest(item) if isinstance(item, Path) else item.content_digest


class Specialists:
    """The specialists of a merge without their calibration frames; those in files are loaded when they are asked for.

    Parameters
    ----------
    inputs
        Force fields, or paths of files.
    digests
        What the files held, in the order of ``inputs``; not needed for force fields.
    """

    def __init__(self, inputs: "Sequence[ForceField | SampledLater | Path]", digests: Sequence[str] = ()):
        self._inputs = [
            item.absolute() if isinstance(item, Path) else item.with_calibration(()) for item in inputs
        ]
        self._digests = digests or [""] * len(inputs)

    def load(self) -> tuple[ForceField, ...]:
        """Give the specialists, in the order of their indices.

        Raises
        ------
        FileFormatError
            When a file has gone, was damaged, or holds another specialist by now.
        """
        loaded = tuple(map(_unchanged, self._inputs, self._digests))
        self._inputs = list(loaded)
        return loaded


def _unchanged(item: ForceField | Path, digest: str) -> ForceField:
    if isinstance(item, ForceField):
        return item
    specialist = ForceField.load(item)
    if specialist.content_digest != digest:
        raise FileFormatError(
            f"{item} holds another specialist than the one that was merged; make a new calculator of the specialists as "
            "they are now, or put the old file back"
        )
    return specialist.with_calibration(())


def _arguments(items: Sequence[Source], recipe: Recipe, options: MergeOptions) -> dict[str, Any]:
    """Constructor arguments for the same force field."""
    named = options.recipe if isinstance(options.recipe, str) and not Path(options.recipe).suffix else None
    return {
        "specialists": [describe(item) for item in items],
        "recipe": named or recipe.model_dump(mode="json"),
        "weights": list(options.weights) if options.weights is not None else None,
        "keep_base": describe(options.base) if options.base is not None else options.keep_base,
    }
