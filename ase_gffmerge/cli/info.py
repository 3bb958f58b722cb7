"""``gffmerge info``: what is in a specialist or merged file."""

from typing import TYPE_CHECKING, Any

from ase_gffmerge.cli.options import JsonOption, ModelArgument
from ase_gffmerge.cli.output import print_json, print_values

if TYPE_CHECKING:
    from ase_gffmerge.forcefield.force_field import ForceField


def info(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Show architecture, elements, level of theory, training, errors, and how a merged file was made."""
    from ase_gffmerge.forcefield.force_field import bundled_path
    from ase_gffmerge.integrations.load import load_force_field

    document = {"path": str(bundled_path(model)), **describe(load_force_field(model))}
    if as_json:
        print_json(document)
    else:
        print_values(readable(document))


def describe(force_field: "ForceField") -> dict[str, Any]:
    """Everything but weights and frames, JSON-able."""
    from ase.data import chemical_symbols

    from ase_gffmerge.forcefield.serialization import UNITS

    potential = force_field.potential
    elements = [chemical_symbols[number] for number in potential.species]
    return {
        "name": force_field.name,
        "kind": _kind(force_field),
        "architecture": potential.architecture,
        "hyper": potential.hyper.to_dict(),
        "species": elements,
        "cutoff": force_field.cutoff,
        "n_parameters": sum(value.numel() for value in potential.parameters()),
        "dtype": str(potential.dtype).removeprefix("torch."),
        "units": UNITS,
        "level_of_theory": force_field.level_of_theory,
        "references": dict(zip(elements, potential.references.tolist(), strict=True)),
        "calibration_frames": len(force_field.calibration),
        "provenance": force_field.provenance.to_dict(),
        "fingerprint": force_field.fingerprint,
        "merged": merge_record(force_field),
    }


def _kind(force_field: "ForceField") -> str:
    from ase_gffmerge.merging.report import MergeReport

    if force_field.merged is None:
        return "specialist"
    return "student" if MergeReport.from_dict(force_field.merged.report).is_student else "merged"


def merge_record(force_field: "ForceField") -> dict[str, Any] | None:
    """How a merged file was made; ``None`` for a specialist."""
    merged = force_field.merged
    if merged is None:
        return None
    return {
        "specialists": list(merged.specialists),
        "fingerprints": list(merged.fingerprints),
        "recipe": merged.recipe,
        "verdict": merged.report.get("verdict"),
        "report": merged.report,
    }


def readable(document: dict[str, Any]) -> dict[str, Any]:
    """Turn the document into a table for people."""
    training, merged = document["provenance"], document["merged"]
    rows = {key: document[key] for key in ("name", "path", "kind", "architecture")}
    if training.get("origin"):
        rows["read from"] = training["origin"]
    rows["hyper-parameters"] = _pairs(document["hyper"])
    rows |= {"elements": _elements(document["species"]), "cutoff": f"{document['cutoff']:g} Å"}
    rows["parameters"] = f"{document['n_parameters']} ({document['dtype']})"
    rows["level of theory"] = document["level_of_theory"]
    if len(document["references"]) <= MANY:
        energies = {symbol: f"{value:.4f}" for symbol, value in document["references"].items()}
        rows["references"] = _pairs(energies) + " (eV)"
    rows["calibration frames"] = document["calibration_frames"]
    if merged:
        student = document["kind"] == "student"
        rows["taught by" if student else "merged from"] = ", ".join(merged["specialists"])
        if not student:
            rows["recipe"] = _recipe(merged["recipe"])
        rows["verdict"] = merged["verdict"]
    else:
        size = f"{training['n_train']} frames, {training['epochs']} epochs"
        rows["trained on"] = f"{training['data_set']} ({size})"
        rows["frames seen"] = training["seen_frames"] or "not recorded"
        rows["test errors"] = _errors(training["errors"]) or "not measured"
        rows["ancestors"] = ", ".join(key[:12] for key in training["lineage"]) or "none"
    rows["fingerprint"] = document["fingerprint"]
    return rows


MANY = 12
"""Elements of a foundation model are counted, and their reference energies are left to ``--json``."""


def _elements(symbols: list[str]) -> str:
    if len(symbols) <= MANY:
        return " ".join(symbols)
    return f"{len(symbols)} from {symbols[0]} to {symbols[-1]} (all of them: --json)"


def _recipe(recipe: dict[str, Any]) -> str:
    """The preset, and what was changed in it."""
    from ase_gffmerge.merging.recipe import PRESETS

    changed = {name: _differences(recipe, preset.model_dump(mode="json")) for name, preset in PRESETS.items()}

    def size(name: str) -> int:
        return sum(len(value) if isinstance(value, dict) else 1 for value in changed[name].values())

    nearest = min(changed, key=size)
    return f"{nearest}, but {_pairs(changed[nearest])}" if changed[nearest] else nearest


def _differences(options: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """Options that are not as usual, those within options as ``outer.inner``."""
    found: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, dict) and isinstance(usual.get(key), dict):
            found |= {f"{key}.{inner}": kept for inner, kept in _differences(value, usual[key]).items()}
        elif key not in usual or usual[key] != value:
            found[key] = value
    return found


def _errors(errors: dict[str, Any]) -> str:
    """Errors in the names and units of ``gffmerge evaluate``."""
    found = [
        f"{key.replace('_', ' ').replace('mae', 'MAE').replace('rmse', 'RMSE')} {scale * errors[key]:.4g} {unit}"
        for key, (scale, unit) in UNITS_OF_ERRORS.items()
        if errors.get(key) is not None
    ]
    others = {key: value for key, value in errors.items() if key not in UNITS_OF_ERRORS}
    return ", ".join([*found, *([_pairs(others)] if others else [])])


UNITS_OF_ERRORS = {
    "force_mae": (1000, "meV/Å"),
    "force_rmse": (1000, "meV/Å"),
    "energy_mae": (1000, "meV/atom"),
    "stress_mae": (1, "GPa"),
}


def _pairs(mapping: Any) -> str:
    return ", ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in mapping.items())
