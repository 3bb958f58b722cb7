"""Labels of frames: energies (eV), forces (eV/Å) and stresses (eV/Å³), in one shape from whatever keys a file has.

Readers give every frame through :func:`normalize_labels`. What comes after takes labels from the functions
:func:`energy_label`, :func:`force_labels` and :func:`stress_label`: ``atoms.get_potential_energy()`` and
``atoms.get_stress()`` add the bias of constraints that a frame carries (Hookean, ExternalForce, FixSymmetry).
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_properties
from ase.calculators.singlepoint import SinglePointCalculator
from ase.geometry import minkowski_reduce
from ase.stress import voigt_6_to_full_3x3_stress

from ase_gffmerge.data.formats import stress_from_virial
from ase_gffmerge.data.plausibility import implausible_units
from ase_gffmerge.errors import FramesError, LabelWarning

LABELS = ("energy", "forces", "stress")
AUTO = "auto"
WEIGHT = "config_weight"

_PROGRAM = r"(?:(?:ref|dft|qm|target|true)_)?"
_KNOWN = {
    "energy": re.compile(_PROGRAM + r"(?:total_|free_)?energy", re.IGNORECASE),
    "forces": re.compile(_PROGRAM + r"forces?", re.IGNORECASE),
    "stress": re.compile(_PROGRAM + r"(?:stress|virials?)", re.IGNORECASE),
}
_OWN = {
    "energy": ("energy", "free_energy"),
    "forces": ("forces",),
    "stress": ("stress", "virial", "virials"),
}
_TOLERANCE = {"energy": 1e-4, "forces": 1e-3, "stress": 1e-4}
_FAR = 10.0  # Å between images of an atom that counts as isolated


def energy_label(atoms: Atoms) -> float:
    """Energy in eV of a labelled frame, or of its calculator, without the bias of constraints."""
    return float(atoms.calc.get_property("energy", atoms))


def force_labels(atoms: Atoms) -> np.ndarray:
    """Forces (n_atoms, 3) in eV/Å of a labelled frame, or of its calculator, without what constraints do to them."""
    return np.asarray(atoms.calc.get_property("forces", atoms), dtype=float)


def stress_label(atoms: Atoms) -> np.ndarray | None:
    """Stress (3, 3) in eV/Å³ of a labelled frame without the bias of constraints; ``None`` where there is none."""
    stress = atoms.calc.results.get("stress") if atoms.calc is not None and atoms.cell.rank == 3 else None
    return None if stress is None else voigt_6_to_full_3x3_stress(np.asarray(stress, dtype=float))


def frame_weight(atoms: Atoms) -> float:
    """How much a frame counts in a training: its ``config_weight``, 1 by default."""
    return float(atoms.info.get(WEIGHT, 1.0))


def normalize_labels(
    atoms: Atoms, where: str, *, keys: Mapping[str, str | None], note: Callable[[str], None]
) -> set[str]:
    """Put the labels of a frame into its calculator's results, in one shape, in place.

    Parameters
    ----------
    atoms
        The frame as it was read.
    where
        File and number of the frame, for messages.
    keys
        By label (``energy``, ``forces``, ``stress``) the key that holds it. ``None``: ASE's name, for stress also
        ``virial`` and ``virials``, for the energy ``free_energy`` where it is alone. ``auto``: whatever key of this or
        another program is there.
    note
        Called with a sentence for the user about a label that was converted.

    Returns
    -------
    set of str
        The labels that were found.

    Raises
    ------
    FramesError
        If a label is no number, not finite or of a wrong shape, or two keys of ``auto`` contradict.
    """
    results = dict(getattr(atoms.calc, "results", None) or {})
    labels: dict[str, float | np.ndarray] = {}
    for name in LABELS:
        wanted = keys.get(name)
        found = _candidates(atoms, results, name, wanted)
        if (key := _chosen(found, name, wanted)) is not None:
            value = _normal(atoms, f"{where}: {key}", name, key, found[key])
            if value is not None:
                labels[name] = value
                if "virial" in key.lower():
                    note(f"stresses are made of {key!r}: stress = -virial / volume")
            if wanted == AUTO:
                _refuse_contradictions(atoms, where, name, labels.get(name), found)
        if wanted is not None and key is not None:  # what was decided once is not asked again
            for other in found:
                atoms.info.pop(other, None)
                atoms.arrays.pop(other, None)
    _check_weight(atoms, where)
    if labels or results:
        others = {k: v for k, v in results.items() if k in all_properties and k not in LABELS}
        atoms.calc = atoms.calc or SinglePointCalculator(atoms)
        atoms.calc.results = others | labels
    return set(labels)


def _candidates(atoms: Atoms, results: dict[str, object], name: str, wanted: str | None) -> dict[str, object]:
    """Values by key that may be a label, ASE's own first."""
    there = {**results, **atoms.info, **atoms.arrays}
    own = {key: there[key] for key in _OWN[name] if there.get(key) is not None}
    known = {k: v for k, v in there.items() if v is not None and (k == wanted or _KNOWN[name].fullmatch(k))}
    return own | known


def _chosen(found: Mapping[str, object], name: str, wanted: str | None) -> str | None:
    if wanted is None:
        return next((key for key in _OWN[name] if key in found), None)
    return next(iter(found), None) if wanted == AUTO else wanted if wanted in found else None


def _normal(atoms: Atoms, what: str, name: str, key: str, value: object) -> float | np.ndarray | None:
    """A value in the shape of its label; ``None`` for the virial of a structure without a volume."""
    array = _numbers(what, value)
    if not np.isfinite(array).all():
        raise FramesError(f"{what} is not finite; remove this frame")
    if name == "energy":
        if array.size != 1:
            raise FramesError(
                f"{what} has shape {array.shape}, but an energy is one number; mend or remove it"
            )
        return float(array.reshape(()))
    if name == "forces":
        if array.shape != (len(atoms), 3):
            raise FramesError(
                f"{what} have shape {array.shape}, expected {(len(atoms), 3)}; mend or remove them"
            )
        return array
    virial = "virial" in key.lower()
    if array.size not in ((9,) if virial else (6, 9)) or array.shape not in ((6,), (9,), (3, 3)):
        shapes = "(9,) or (3, 3)" if virial else "(6,), (9,) or (3, 3)"
        raise FramesError(f"{what} has shape {array.shape}, expected {shapes}; mend or remove it")
    if not virial:
        return array if array.size == 6 else _voigt(array.reshape(3, 3))
    if atoms.cell.rank < 3:
        return None
    return stress_from_virial(array.reshape(3, 3), atoms.cell.array)


def _numbers(what: str, value: object) -> np.ndarray:
    """A label as floats; Fortran's exponents (``-1.0D+00``) are understood."""
    numbers = re.sub(r"(?<=[\d.])[dD](?=[+-]?\d)", "e", value).split() if isinstance(value, str) else value
    try:
        return np.asarray(numbers, dtype=float)
    except (TypeError, ValueError):
        shown = str(value) if len(str(value)) < 60 else f"{str(value)[:60]}..."
        raise FramesError(f"{what} is {shown!r}, which is no number; mend it or remove this frame") from None


def _voigt(stress: np.ndarray) -> np.ndarray:
    symmetric = 0.5 * (stress + stress.T)
    return symmetric[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]


def _check_weight(atoms: Atoms, where: str) -> None:
    if WEIGHT in atoms.info:
        weight = _numbers(f"{where}: {WEIGHT}", atoms.info[WEIGHT])
        if weight.size != 1 or not np.isfinite(weight).all() or weight.min() < 0:
            raise FramesError(
                f"{where}: {WEIGHT} is {atoms.info[WEIGHT]}; give a number that is not negative"
            )
        atoms.info[WEIGHT] = float(weight.reshape(()))


def _refuse_contradictions(
    atoms: Atoms, where: str, name: str, label: float | np.ndarray | None, found: Mapping[str, object]
) -> None:
    """Raise :class:`FramesError` when keys of a label have values other than the label.

    A free energy may differ from the energy, which is extrapolated to no smearing.
    """
    for key, value in found.items():
        if label is None or "free" in key.lower():
            continue
        other = _normal(atoms, f"{where}: {key}", name, key, value)
        if other is not None and not np.allclose(other, label, rtol=1e-4, atol=_TOLERANCE[name]):
            raise FramesError(
                f"{where}: the keys {', '.join(found)} contradict each other; say which holds the {name} with "
                f"--{name}-key ({name}_key=)"
            )


def require_labels(
    frames: Sequence[Atoms],
    source: str | Path,
    properties: Sequence[str] = ("energy", "forces"),
    *,
    numbers: Sequence[int] | None = None,
) -> None:
    """Check that every frame carries the labels that a step needs, and warn of units that look wrong.

    Parameters
    ----------
    frames
        Frames, for example from :func:`~ase_gffmerge.data.readers.read_frames`.
    source
        Where they are from, for the message.
    properties
        Names of ASE properties: ``energy``, ``forces``, ``stress``.
    numbers
        Those of the frames in the source, where it holds others, too.

    Raises
    ------
    FramesError
        If there are no frames, some lack a label (says which and what), or other keys contradict the labels.
    """
    if not frames:
        raise FramesError(f"{source}: there are no frames")
    count = numbers or range(len(frames))
    for name in properties:
        lacking = [i for i, atoms in enumerate(frames) if not _has_label(atoms, name)]
        if lacking:
            shown = ", ".join(str(count[i]) for i in lacking[:5]) + (", ..." if len(lacking) > 5 else "")
            raise FramesError(
                f"{source}: {len(lacking)} of {len(frames)} frames lack {name} (frames {shown}); "
                + _remedy(frames[lacking[0]], name)
            )
    for i, atoms in enumerate(frames):
        for name in (name for name in LABELS if _has_label(atoms, name)):
            others = {k: v for k, v in {**atoms.info, **atoms.arrays}.items() if _KNOWN[name].fullmatch(k)}
            if others:
                label = atoms.calc.results[name]
                found = {name: label} | {k: v for k, v in others.items() if v is not None}
                _refuse_contradictions(atoms, f"{source}, frame {count[i]}", name, label, found)
    for problem in implausible_units(frames):
        warnings.warn(f"{source}: {problem}", LabelWarning, stacklevel=2)


def have_labels(frames: Sequence[Atoms]) -> bool:
    """Whether :func:`require_labels` finds energies and forces."""
    try:
        require_labels(frames, "the frames")
    except FramesError:
        return False
    return True


def _has_label(atoms: Atoms, name: str) -> bool:
    return atoms.calc is not None and getattr(atoms.calc, "results", {}).get(name) is not None


def _remedy(atoms: Atoms, name: str) -> str:
    """What to do about a frame without a label."""
    keys = [key for key in (*atoms.info, *atoms.arrays) if key not in ("numbers", "positions")]
    if not keys:
        return f"compute the labels, or rename them to ASE's name {name!r}"
    return (
        f"the keys there are {', '.join(map(str, keys))}: name the right one with --{name}-key ({name}_key=), or give "
        f"{AUTO!r}; else compute the labels"
    )


def is_isolated_atom(atoms: Atoms) -> bool:
    """Whether a frame is one atom without neighbours, whose energy is the reference energy of its element.

    It is when its ``config_type`` says so (``IsolatedAtom``), or its periodic images are at least 10 Å away.
    """
    if len(atoms) != 1:
        return False
    if (
        str(atoms.info.get("config_type", "")).replace("_", "").lower() == "isolatedatom"
        or not atoms.pbc.any()
    ):
        return True
    reduced, _ = minkowski_reduce(atoms.cell, atoms.pbc)
    return bool(np.linalg.norm(reduced[atoms.pbc], axis=1).min() >= _FAR)


def isolated_atom_energies(frames: Sequence[Atoms]) -> dict[int, float]:
    """Reference energies (eV) by atomic number, from the frames of isolated atoms among `frames`.

    Raises
    ------
    FramesError
        If one lacks its energy, or two of an element have different ones.
    """
    energies: dict[int, float] = {}
    for atoms in frames:
        if not is_isolated_atom(atoms):
            continue
        z, symbol = int(atoms.numbers[0]), atoms.get_chemical_symbols()[0]
        if not _has_label(atoms, "energy"):
            raise FramesError(f"an isolated {symbol} atom lacks its energy; add it, or remove the frame")
        energy = energy_label(atoms)
        if abs(energies.setdefault(z, energy) - energy) > 1e-3:
            raise FramesError(
                f"isolated {symbol} atoms have energies {energies[z]:.6f} and {energy:.6f} eV; keep the right one"
            )
    return energies
