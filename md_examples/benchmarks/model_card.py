"""Model cards of the bundled specialists, in Markdown; see rebuild_bundled.py."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from ase_gffmerge.data.manifest import load_manifest
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.inference.errors import Errors


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one bundled model is trained."""

    molecules: tuple[str, ...]
    epochs: int
    learning_rate: float
    parent: str | None = None
    batch_size: int = 5
    validation: int = 50
    seed: int = 0


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def published_hash(file_name: str) -> str | None:
    """SHA-256 of a file of rMD17 according to the manifest."""
    return {file.path: file.sha256 for file in load_manifest("rmd17").files}.get(file_name)


def model_card(specialist: ForceField, plan: Plan, measured: Mapping[str, Errors], *, file_hash: str) -> str:
    """Write the card: what, whose data, how, how good, for what not, hashes, command."""
    sections = (
        f"# {specialist.name}",
        facts(specialist, plan),
        training(specialist, plan),
        error_table(measured),
        limits(plan),
        hashes(specialist, plan, file_hash),
    )
    return "\n\n".join(sections) + "\n"


def facts(specialist: ForceField, plan: Plan) -> str:
    """Say what the model is and whose data it knows."""
    manifest = load_manifest("rmd17")
    citation = manifest.citations[0]
    potential = specialist.potential
    size = sum(value.numel() for value in potential.parameters())
    numbers = potential.hyper.to_dict()
    sparse = ("readout_groups", "readout_inputs")
    hyper = ", ".join(f"{key} {value}" for key, value in numbers.items() if value or key not in sparse)
    what = (
        f"Specialist fine-tuned from `{plan.parent}`" if plan.parent else "Base for fine-tuning specialists"
    )
    lines = (
        f"{what}, for {', '.join(plan.molecules)}, at the level of theory {specialist.level_of_theory}. "
        f"Architecture {potential.architecture}: {hyper}; {size} parameters.",
        f"Data: {manifest.title}. {citation.text}, doi:{citation.doi}.",
        f"Licence of data and model: {manifest.licence} ({manifest.licence_note}).",
    )
    return "\n\n".join(fill(line, 110) for line in lines)


def training(specialist: ForceField, plan: Plan) -> str:
    """Say which frames were used and how."""
    origin = specialist.provenance
    start = f"from the weights of `{plan.parent}`" if plan.parent else "from random weights"
    text = (
        f"Split 01 of rMD17: of the 1000 frames of train_01 {origin.n_train // len(plan.molecules)} were trained "
        f"on and {plan.validation} held out for the loss curve, per molecule; the errors are measured on test_01. "
        f"{len(specialist.calibration)} training frames are stored, without labels, for merging. "
        f"{origin.epochs} epochs {start} on energies and forces, batches of {plan.batch_size}, one-cycle schedule with "
        f"the peak learning rate {plan.learning_rate:g}, exponential moving average of the weights, seed {origin.seed}."
    )
    return "## Split and training\n\n" + fill(text, 110)


def error_table(measured: Mapping[str, Errors]) -> str:
    """Markdown table of measured errors."""
    rows = [
        f"| {what} | {1000 * e.force_mae:.1f} | {1000 * e.force_rmse:.1f} | {1000 * e.energy_mae:.2f} |"
        for what, e in measured.items()
    ]
    head = "| frames | force MAE (meV/Å) | force RMSE (meV/Å) | energy MAE (meV/atom) |\n|---|---|---|---|\n"
    return "## Measured errors against the labels\n\n" + head + "\n".join(rows)


def limits(plan: Plan) -> str:
    """Say what the model must not be used for."""
    text = (
        f"For demonstrations and tests. It knows {', '.join(plan.molecules)} as isolated molecules near 500 K: no "
        "other molecules, no reactions, no condensed phase, no interaction between molecules, no long-range forces. Beyond "
        "that its forces are extrapolations, and nothing in the results shows it."
    )
    return "## Limits\n\n" + fill(text, 110)


def hashes(specialist: ForceField, plan: Plan, file_hash: str) -> str:
    """Fingerprints of weights, frames and files, and the command."""
    files = [f"rmd17_{molecule}_{part}_01.npz" for molecule in plan.molecules for part in ("train", "test")]
    rows = {
        f"{specialist.name}.safetensors": file_hash,
        "weights (fingerprint)": specialist.fingerprint,
        **{f"weights of the parent, {plan.parent}": key for key in specialist.provenance.lineage},
        "training frames (geometries)": specialist.provenance.data_hash,
        **{file: published_hash(file) for file in files},
    }
    table = "\n".join(f"| {what} | `{value}` |" for what, value in rows.items())
    fetch = 'gffmerge data fetch rmd17 --file "*_01.npz" --dir DATA'
    commands = f"{fetch}\npython md_examples/benchmarks/rebuild_bundled.py DATA"
    return f"## Hashes (SHA-256)\n\n| what | hash |\n|---|---|\n{table}\n\nMade by\n\n```\n{commands}\n```"
