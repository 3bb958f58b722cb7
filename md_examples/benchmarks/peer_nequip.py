"""Rows of the benchmark against nequip, eager and compiled."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.data import chemical_symbols
from peers import CUTOFF, Peer, peer_rows

from ase_gffmerge.evaluation.benchmark.harness import Bench, Row, register

NEQUIP = {
    "cutoff": CUTOFF,
    "channels": 32,
    "tensor_channels": 32,
    "n_blocks": 3,
    "l_max": 2,
    "n_radial": 8,
    "radial_hidden": 64,
    "radial_layers": 2,
    "avg_num_neighbors": 10.0,
}


@register("nequip")
def nequip_rows(bench: Bench) -> list[Row]:
    """Compare with NequIP's own implementation through its own calculator, eager and compiled."""
    return peer_rows(bench, PEER)


def nequip_model(bench: Bench, compiled: bool) -> Calculator:
    """Model of the same irreps, layers and cutoff in nequip.

    It cannot be made without changing torch's default type, on which nothing of this package depends.
    """
    from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper, NeighborListTransform
    from nequip.integrations.ase import NequIPCalculator
    from nequip.model import NequIPGNNModel
    from nequip.utils.global_state import set_global_state

    set_global_state()
    names = [chemical_symbols[z] for z in bench.force_field.species]
    model = NequIPGNNModel(
        seed=0,
        model_dtype="float32",
        r_max=CUTOFF,
        type_names=names,
        num_layers=NEQUIP["n_blocks"],
        l_max=NEQUIP["l_max"],
        parity=False,
        num_features=NEQUIP["channels"],
        radial_mlp_depth=NEQUIP["radial_layers"],
        radial_mlp_width=NEQUIP["radial_hidden"],
        num_bessels=NEQUIP["n_radial"],
        avg_num_neighbors=NEQUIP["avg_num_neighbors"],
    )
    transforms = [ChemicalSpeciesToAtomTypeMapper(names), NeighborListTransform(r_max=CUTOFF)]
    device = bench.force_field.potential.device
    eager = NequIPCalculator(model.eval(), device=device, transforms=transforms)
    if not compiled:
        return eager
    example = bench.structure(max(bench.sizes))
    if not example.pbc.any():
        example.center(vacuum=CUTOFF)  # the check of what was compiled needs a volume for the stress
    return _compiled(eager, example)


def _compiled(eager: Any, example: Atoms) -> Calculator:
    """Do to the model in memory what ``nequip-compile --mode aotinductor --target ase`` does to its file.

    That is how nequip recommends to run molecular dynamics; ``compile_mode="compile"`` evaluates single frames eagerly.
    """
    from nequip.integrations.ase import NequIPCalculator
    from nequip.scripts._compile_utils import AOTI_ASE_TARGET, COMPILE_TARGET_DICT
    from nequip.utils.aot import aot_export_model
    from nequip.utils.global_state import get_latest_global_state

    target, device = COMPILE_TARGET_DICT[AOTI_ASE_TARGET], eager.device.type
    sizes = {"graph": "num_frames", "node": "num_nodes", "edge": "num_edges"}
    dimensions = {kind: torch.export.Dim(name, min=2) for kind, name in sizes.items()}
    known = eager.model.metadata | get_latest_global_state(only_metadata_related=True)
    metadata = {key: str(int(value) if isinstance(value, bool) else value) for key, value in known.items()}
    with TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.nequip.pt2")
        aot_export_model(
            model=eager.model,
            device=device,
            input_fields=target["input"],
            output_fields=target["output"],
            data=target["data_settings"](eager.atoms_to_data(example)),
            batch_map=target["batch_map_settings"](dimensions),
            output_path=path,
            inductor_configs={"aot_inductor.metadata": metadata},
        )
        return NequIPCalculator.from_compiled_model(
            path, device=device, chemical_species_to_atom_type_map=True
        )


PEER = Peer(
    package="nequip",
    module="nequip",
    model="nequip",
    architecture="nequip",
    hyper=NEQUIP,
    make=nequip_model,
    compiles=True,
    target=1.0,
)
