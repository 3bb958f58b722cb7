"""A table of the adapters: package, version, speed against the vendor's calculator, seconds of a merge, what is averaged.

    python md_examples/benchmarks/adapter_table.py FOLDER             # measure the packages of this environment
    python md_examples/benchmarks/adapter_table.py FOLDER --show      # all rows of all environments, as Markdown
    python md_examples/benchmarks/adapter_table.py FOLDER --json      # the same as JSON

One JSON file per model stands in FOLDER, and a killed run continues; run it once in every environment that
``vendor_environments.py`` makes. Models are the published weights that a package ships, else random ones of a usual size. A
step is energy, forces and stress of 64 atoms of rattled rock salt in single precision on one core, the best of several,
atoms moved in between. A merge is of two relatives, whose weights were changed by a hundredth, by the preset ``fast`` on
five frames of eight atoms each; ``--no-merge`` leaves it out. Times are processor seconds, so that other work on the machine
matters little.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import BaseCalculator

from ase_gffmerge import GFFMergeCalculator, merge
from ase_gffmerge.integrations import ADAPTERS
from ase_gffmerge.integrations.load import from_vendor

ELEMENTS = ("Na", "Cl")
STEPS, FRAMES, SIZE = 12, 5, 0.01
Model = Any
"""A network of another package."""


def sevennet() -> tuple[Model, Callable[[Model], BaseCalculator]]:
    """The published 7net-0."""
    from sevenn.calculator import SevenNetCalculator

    model = SevenNetCalculator("7net-0", device="cpu").model
    return model, lambda network: SevenNetCalculator(network, file_type="model_instance", device="cpu")


def chgnet() -> tuple[Model, Callable[[Model], BaseCalculator]]:
    """The published version 0.3.0."""
    from chgnet.model import CHGNet, CHGNetCalculator

    return CHGNet.load(verbose=False), lambda network: CHGNetCalculator(network, use_device="cpu")


def orb() -> tuple[Model, Callable[[Model], BaseCalculator]]:
    """A conservative Orb v3 with 20 neighbours."""
    from orb_models.forcefield.atomic_system import SystemConfig
    from orb_models.forcefield.calculator import ORBCalculator
    from orb_models.forcefield.pretrained import orb_v3_conservative_architecture

    model = orb_v3_conservative_architecture(device="cpu", system_config=SystemConfig(6.0, 20)).eval()
    return model, lambda network: ORBCalculator(network, device="cpu")


def nequip() -> tuple[Model, Callable[[Model], BaseCalculator]]:
    """Three layers of 32 features up to l = 2, 5 Å."""
    from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper, NeighborListTransform
    from nequip.integrations.ase import NequIPCalculator
    from nequip.model import NequIPGNNModel
    from nequip.utils.global_state import set_global_state

    set_global_state()
    torch.set_default_dtype(torch.float32)
    model = NequIPGNNModel(
        seed=1,
        model_dtype="float32",
        r_max=5.0,
        type_names=list(ELEMENTS),
        num_layers=3,
        l_max=2,
        num_features=32,
        avg_num_neighbors=20.0,
    ).eval()

    def calculator(network: Model) -> BaseCalculator:
        torch.set_default_dtype(torch.float64)
        transforms = [
            ChemicalSpeciesToAtomTypeMapper(list(ELEMENTS)),
            NeighborListTransform(r_max=5.0),
        ]
        return NequIPCalculator(network, "cpu", transforms=transforms)

    return model, calculator


def mace() -> tuple[Model, Callable[[Model], BaseCalculator]]:
    """Two layers of 64 scalars and vectors, correlation 3, 5 Å."""
    import numpy as np
    from e3nn.o3 import Irreps
    from mace import modules
    from mace.calculators import MACECalculator

    blocks = modules.interaction_classes
    model = modules.ScaleShiftMACE(
        r_max=5.0,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls_first=blocks["RealAgnosticInteractionBlock"],
        interaction_cls=blocks["RealAgnosticResidualInteractionBlock"],
        num_interactions=2,
        num_elements=2,
        hidden_irreps=Irreps("64x0e+64x1o"),
        MLP_irreps=Irreps("16x0e"),
        gate=torch.nn.functional.silu,
        atomic_energies=np.zeros(2),
        avg_num_neighbors=20.0,
        atomic_numbers=[11, 17],
        correlation=3,
        radial_MLP=[64, 64, 64],
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    ).float()
    return model, lambda network: MACECalculator(models=network, device="cpu", default_dtype="float32")


def matgl(kind: str) -> tuple[Model, Callable[[Model], BaseCalculator]]:
    """A network of the default size, with MatGL's default radial functions."""
    import matgl.models
    from matgl.apps.pes import Potential
    from matgl.ext.ase import PESCalculator

    network = getattr(matgl.models, kind)(element_types=ELEMENTS, is_intensive=False)
    return Potential(network).eval(), lambda model: PESCalculator(model, stress_unit="eV/A3", use_voigt=True)


def fairchem() -> tuple[Model, Callable[[Model], BaseCalculator]]:
    """A small conservative eSEN of 32 channels, l up to 2 and two layers, 5 Å."""
    import tempfile

    from fairchem.core import FAIRChemCalculator
    from fairchem.core.units.mlip_unit import load_predict_unit
    from fairchem.core.units.mlip_unit.api.inference import InferenceSettings

    from ase_gffmerge.integrations.fairchem import ARGUMENTS
    from ase_gffmerge.integrations.fairchem.model import ESENPackage, build_backbone
    from ase_gffmerge.integrations.wrapped import PackageHyper

    sizes = {"sphere_channels": 32, "hidden_channels": 32, "edge_channels": 32, "num_distance_basis": 64}
    backbone = build_backbone(
        {**sizes, "ff_type": "spectral", "use_dataset_embedding": False, "max_num_elements": 20}
    )
    config = {"backbone": {name: getattr(backbone, name) for name in ARGUMENTS}, "spin": 1, "dataset": "omol"}
    hyper = PackageHyper(channels=32, n_blocks=1, config=json.dumps(config))
    potential = ESENPackage(hyper, tuple(range(1, 20))).eval().requires_grad_(False)
    path = ADAPTERS["fairchem"].write(potential, Path(tempfile.mkdtemp()) / "esen.pt")
    unit = load_predict_unit(
        str(path), device="cpu", inference_settings=InferenceSettings(activation_checkpointing=False)
    )
    return unit.model.module, lambda network: FAIRChemCalculator(unit, task_name="omol")


def mattersim() -> tuple[Model, Callable[[Model], BaseCalculator]]:
    """A network of the default size."""
    from mattersim.forcefield.m3gnet.m3gnet import M3Gnet
    from mattersim.forcefield.potential import MatterSimCalculator, Potential

    model = M3Gnet(device="cpu").eval()
    return model, lambda network: MatterSimCalculator(Potential(network, device="cpu").eval(), device="cpu")


def metatrain() -> tuple[Model, Callable[[Model], BaseCalculator]]:
    """A PET of the default size."""
    from ase_gffmerge.integrations.metatrain import quiet_package

    with quiet_package():
        from metatomic_ase import MetatomicCalculator
        from metatrain.pet import __model__ as kind
    from metatrain.utils.architectures import get_default_hypers
    from metatrain.utils.data import DatasetInfo
    from metatrain.utils.data.target_info import get_energy_target_info

    energy = get_energy_target_info("energy", {"quantity": "energy", "unit": "eV"})
    info = DatasetInfo(length_unit="angstrom", atomic_types=[11, 17], targets={"energy": energy})
    model = kind(get_default_hypers("pet")["model"], info).eval()
    return model, lambda network: MetatomicCalculator(network.export(), device="cpu")


MODELS: dict[str, tuple[str, str, str, Callable[[], tuple[Model, Callable[[Model], BaseCalculator]]]]] = {
    "CHGNet 0.3.0": ("chgnet", "chgnet", "chgnet", chgnet),
    "eSEN, 32 channels": ("fairchem", "fairchem.core", "fairchem-core", fairchem),
    "MACE, 64 channels": ("mace", "mace", "mace-torch", mace),
    "M3GNet": ("matgl", "matgl", "matgl", lambda: matgl("M3GNet")),
    "TensorNet": ("matgl", "matgl", "matgl", lambda: matgl("TensorNet")),
    "MatterSim, 128 channels": ("mattersim", "mattersim", "mattersim", mattersim),
    "PET, 128 and 256 features": ("metatrain", "metatrain", "metatrain", metatrain),
    "NequIP, 32 features": ("nequip", "nequip", "nequip", nequip),
    "Orb v3, 20 neighbours": ("orb", "orb_models", "orb-models", orb),
    "SevenNet 7net-0": ("sevenn", "sevenn", "sevenn", sevennet),
}
"""Vendor, package in Python and for pip, and what makes the model and its calculator, by the name of the row."""


def crystal(seed: int = 0, *, repeat: int = 2) -> Atoms:
    """Rattled rock salt, eight atoms to a cell."""
    atoms = bulk("NaCl", "rocksalt", 5.6, cubic=True).repeat(repeat)
    atoms.rattle(0.1, seed=seed)
    return atoms


def moved(model: Model, seed: int) -> Model:
    """A copy whose weights were changed by a small random part of their mean size."""
    copy, generator = deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in copy.parameters():
            noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            value.add_(SIZE * value.abs().mean() * noise)
    return copy


def step_seconds(calculators: Sequence[BaseCalculator]) -> list[float]:
    """Processor seconds of energy, forces and stress by each of them in turn, the best of several."""
    structures, found = [crystal() for _ in calculators], [list[float]() for _ in calculators]
    for seed in range(STEPS):
        for atoms, calculator, seconds in zip(structures, calculators, found, strict=True):
            atoms.calc = calculator
            atoms.rattle(0.002, seed=seed)
            started = time.process_time()
            atoms.get_forces(), atoms.get_stress()
            seconds.append(time.process_time() - started)
    return [min(seconds[1:]) for seconds in found]


def served(name: str) -> dict[str, Any]:
    """Package and speed of a row."""
    vendor, _, distribution, make = MODELS[name]
    model, calculator = make()
    own = GFFMergeCalculator(from_vendor(vendor, model), device="cpu", dtype="float32")
    ours, theirs = step_seconds([own, calculator(model)])
    return {
        "vendor": vendor,
        "package": distribution,
        "version": version(distribution),
        "ms": [1000 * ours, 1000 * theirs],
        "speed": theirs / ours,
        "weights": sum(value.numel() for value in own.force_field.potential.parameters()),
    }


def merged(name: str) -> dict[str, Any]:
    """Seconds of a merge, and what it averaged."""
    vendor, _, _, make = MODELS[name]
    model, _ = make()
    pair = [
        from_vendor(
            vendor,
            moved(model, seed),
            calibration=[crystal(10 * seed + i, repeat=1) for i in range(FRAMES)],
            name=f"relative {seed}",
        )
        for seed in (1, 2)
    ]
    torch.set_default_dtype(torch.float32)
    started = time.process_time()
    _, report = merge(pair, "fast", device="cpu")
    return {"merge seconds": time.process_time() - started, "averaged": list(report.averaged)}


def row_file(folder: Path, name: str) -> Path:
    """File of a row."""
    return folder / f"{name.replace(' ', '-').replace(',', '')}.json"


def rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows that were measured, in any environment."""
    for name in MODELS:
        if (path := row_file(folder, name)).exists():
            yield name, json.loads(path.read_text())


def measure(folder: Path, chosen: list[str], *, merges: bool = True) -> None:
    """Measure what is missing in the rows of the models whose packages are installed here."""
    torch.set_num_threads(1)
    found = dict(rows(folder))
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, package, *_) in MODELS.items():
        row = found.get(name, {})
        if (chosen and name not in chosen) or find_spec(package.split(".")[0]) is None:
            continue
        for part, needed in ((served, "speed"), (merged, "merge seconds")):
            if needed in row or (part is merged and not merges):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row |= part(name)
            row_file(folder, name).write_text(json.dumps(row, indent=1))
            print(f"{name}: {needed} {row[needed]:.2f}", flush=True)


def shown(found: dict[str, dict[str, Any]]) -> str:
    """The table in Markdown."""
    lines = [
        "| model | package | weights | step, ms | vendor's, ms | speed | merge, s | averaged |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, row in found.items():
        ours, theirs = row["ms"]
        names = list(dict.fromkeys(part.split(".")[-1] for part in row.get("averaged", ())))
        of_merge = (
            f"{row['merge seconds']:.0f} | {', '.join(names) or '–'}" if "merge seconds" in row else " | "
        )
        lines.append(
            f"| {name} | `{row['package']}` {row['version']} | {row['weights']} | {ours:.0f} | {theirs:.0f} | "
            f"{row['speed']:.2f} | {of_merge} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, or show what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of one JSON file per model")
    parser.add_argument("--models", nargs="+", default=[], choices=MODELS, metavar="NAME")
    parser.add_argument("--no-merge", action="store_true", help="measure speeds alone")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    assert {vendor for vendor, *_ in MODELS.values()} == set(ADAPTERS)
    if not (arguments.show or arguments.json):
        measure(arguments.folder, arguments.models, merges=not arguments.no_merge)
        return
    found = dict(rows(arguments.folder))
    print(json.dumps(found, indent=1) if arguments.json else shown(found))


if __name__ == "__main__":
    main()
