"""Rows of the benchmark against TorchMD-Net: its equivariant transformer and TensorNet.

The equivariant transformer (Thölke and De Fabritiis, ICLR 2022) passes scalars and vectors as PaiNN does, with attention; no
other model of the package is as close to ours. TensorNet (Simeon and De Fabritiis, NeurIPS 2023) is what the package's fused
kernels are for, so it shows the package at its fastest. Channels, blocks, radial functions and cutoff are those of our
PaiNN, everything else is the package's default.
"""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from peers import CUTOFF, PAINN, Peer, peer_rows

from ase_gffmerge.evaluation.benchmark.harness import Bench, Row, register

SETTINGS = {
    "precision": 32,
    "embedding_dimension": PAINN["channels"],
    "num_layers": PAINN["n_blocks"],
    "num_rbf": PAINN["n_radial"],
    "cutoff_lower": 0.0,
    "cutoff_upper": CUTOFF,
    "rbf_type": "expnorm",
    "trainable_rbf": False,
    "activation": "silu",
    "attn_activation": "silu",
    "num_heads": 8,
    "distance_influence": "both",
    "neighbor_embedding": True,
    "equivariance_invariance_group": "O(3)",
    "max_z": 100,
    "max_num_neighbors": 64,
    "static_shapes": False,
    "atom_filter": -1,
    "prior_model": None,
    "output_model": "Scalar",
    "reduce_op": "add",
    "derivative": False,
    "remove_ref_energy": False,
}


@register("torchmd-net")
def torchmdnet_rows(bench: Bench) -> list[Row]:
    """Compare with two models of TorchMD-Net through its own calculator."""
    return [row for peer in PEERS for row in peer_rows(bench, peer)]


def torchmdnet_calculator(model: str, bench: Bench, compiled: bool) -> Calculator:
    """Calculator of a model of this name; it reads checkpoints only, and wants to be told the charge."""
    from torchmdnet.calculators import TMDNETCalculator
    from torchmdnet.models.model import create_model

    class Neutral(TMDNETCalculator):
        def calculate(self, atoms: Atoms, *args: Any, **kwargs: Any) -> None:
            atoms.info.setdefault("charge", 0)
            super().calculate(atoms, *args, **kwargs)

    settings = SETTINGS | {"model": model}
    with TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.ckpt")
        weights = create_model(dict(settings)).state_dict()
        torch.save({"hyper_parameters": settings, "state_dict": weights}, path)
        return Neutral(path, device=str(bench.force_field.potential.device), compile=compiled)


def neighbours_missed(atoms: Atoms) -> str:
    """Say so where the minimum image of TorchMD-Net does not find all neighbours."""
    cell = atoms.cell.array
    seen = np.allclose(cell, np.tril(cell)) and cell.diagonal().min() >= 2 * CUTOFF
    if seen or not atoms.pbc.any():
        return ""
    return (
        f"torchmd-net misses neighbours: the cell is narrower than {2 * CUTOFF:g} Å or not lower triangular"
    )


PEERS = tuple(
    Peer(
        package="torchmd-net",
        module="torchmdnet",
        model=model,
        architecture="painn",
        hyper=PAINN,
        make=partial(torchmdnet_calculator, model),
        compiles=compiles,
        remark=neighbours_missed,
    )
    for model, compiles in (("equivariant-transformer", False), ("tensornet", True))
)
