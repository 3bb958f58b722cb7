"""ASE results of many structures at once: evaluated in batches, one dictionary each."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Integral
from typing import Any

import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from torch import Tensor

from ase_gffmerge.engines.ase.dispersion import Dispersion
from ase_gffmerge.engines.ase.results import (
    as_array,
    ase_results,
    require_finite,
    require_structure,
    require_volume,
)
from ase_gffmerge.errors import ArgumentError, GFFMergeError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import Prediction, build_graph
from ase_gffmerge.graphs.neighbor_list import check_geometry
from ase_gffmerge.inference.batches import predict_batches
from ase_gffmerge.inference.predict import Predictor

GRADE = "extrapolation"


def evaluate_structures(
    force_field: ForceField,
    structures: Iterable[Atoms],
    *,
    predictor: Predictor,
    served: Sequence[str],
    properties: Sequence[str] | None = None,
    specialist: str | int | None = None,
    max_edges: int | None = None,
    dispersion: Dispersion | None = None,
) -> list[dict[str, Any]]:
    """Results of every structure.

    Parameters
    ----------
    force_field
        What a structure is checked against.
    structures
        Of any sizes and boundary conditions.
    predictor
        What evaluates the same force field.
    served, properties
        What there is, and what of it is wanted; default: everything that a structure has. ``extrapolation`` is given on
        request, when the force field has a gauge.
    specialist
        For structures that do not say which specialist they belong to.
    max_edges
        Size of a batch; default: :data:`.MAX_EDGES` of the device.
    dispersion
        D3 correction to add.

    Raises
    ------
    GFFMergeError, PropertyNotImplementedError
        As the calculator does for a single structure, with the index of the structure.
    """
    originals = _listed(structures)
    wanted = _wanted(properties, (*served, GRADE) if force_field.extrapolation_grade is not None else served)
    prepared = []
    for k, atoms in enumerate(originals):
        with _named(k):
            if properties is not None and "stress" in wanted:
                require_volume(atoms)
            prepared.append(_checked(force_field, atoms, specialist))
    _check_size(max_edges)
    with torch.inference_mode(False):
        graphs = (build_graph(atoms, force_field.cutoff) for atoms in prepared)
        predictions = predict_batches(
            partial(predictor, graded=GRADE in wanted),
            graphs,
            device=force_field.potential.device,
            max_edges=max_edges,
        )
        return [
            _results(k, atoms, *prediction, wanted, dispersion)
            for k, (atoms, prediction) in enumerate(zip(originals, predictions, strict=True))
        ]


def _results(
    k: int,
    atoms: Atoms,
    prediction: Prediction,
    grades: Tensor | None,
    wanted: Sequence[str],
    dispersion: Dispersion | None,
) -> dict[str, Any]:
    found = ase_results(prediction, atoms)
    with _named(k):
        require_finite(found, atoms)
        if dispersion is not None:
            found = dispersion.added(found, atoms)
    if grades is not None:
        found[GRADE] = as_array(grades)
    return {name: found[name] for name in wanted if name in found}


def _checked(force_field: ForceField, atoms: Atoms, specialist: str | int | None) -> Atoms:
    """What a graph can be built from: everything is checked before anything is evaluated."""
    require_structure(atoms)
    prepared = force_field.prepared(atoms, specialist=specialist)
    check_geometry(prepared, force_field.cutoff)
    return prepared


def _listed(structures: Iterable[Atoms]) -> list[Atoms]:
    if isinstance(structures, Atoms):
        raise ArgumentError(
            "evaluate() takes a list of structures and was given a single Atoms object; put it into a list"
        )
    listed = list(structures)
    for k, atoms in enumerate(listed):
        if not isinstance(atoms, Atoms):
            raise ArgumentError(f"structure {k} is no Atoms object but {type(atoms).__name__}: {atoms!r:.60}")
    return listed


def _wanted(properties: Sequence[str] | None, served: Sequence[str]) -> tuple[str, ...]:
    """Names of what is wanted; by default without the grade, so that results hold what ASE knows."""
    if properties is None:
        return tuple(name for name in served if name != GRADE)
    names = (properties,) if isinstance(properties, str) else tuple(properties)
    for name in names:
        if name not in served:
            raise PropertyNotImplementedError(f"{name!r} is not served; there are {', '.join(served)}")
    return names


def _check_size(max_edges: int | None) -> None:
    if max_edges is not None and (not isinstance(max_edges, Integral) or max_edges < 1):
        raise ArgumentError(f"max_edges={max_edges!r} is no size of a batch; give a positive whole number")


@contextmanager
def _named(k: int) -> Iterator[None]:
    """Begin messages with the index of the structure."""
    try:
        yield
    except (GFFMergeError, PropertyNotImplementedError) as error:
        raise type(error)(f"structure {k}: {error}") from error
