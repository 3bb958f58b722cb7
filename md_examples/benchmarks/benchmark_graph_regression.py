"""Two SchNets of PyTorch Geometric that predict energies of molecules become one: regression of whole graphs.

    python md_examples/benchmarks/benchmark_graph_regression.py [--json] [--seeds N] [--copies N] [--epochs N]

Labels are made here: GFN2-xTB energies (tblite) of the molecules of H, C, N and O in ASE's G2 set, each in several rattled
copies; reference energies of the elements are fitted and subtracted. One network is trained on everything for a third of the
epochs; from it one specialist is trained on molecules without nitrogen and one on those with nitrogen, and a joint one on
both. ``merge_modules`` sees modules and structures, no labels and no force field. Errors are those of the energy per
molecule on copies that nobody was trained on.
"""

import argparse
import json
import time
from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from ase.collections import g2
from torch import Tensor, nn
from torch.nn.functional import l1_loss
from torch_geometric.data import Batch, Data
from torch_geometric.nn.models import SchNet
from xtb_frames import xtb

from ase_gffmerge import merge_modules

ELEMENTS = (1, 6, 7, 8)
SIZES = range(4, 13)
"""Atoms of a molecule."""
RATTLE, CUTOFF, BATCH, LEARNING_RATE = 0.05, 5.0, 32, 2e-3


def pairs(positions: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Edges (2, n_edges) between all atoms of a molecule that are nearer than the cutoff, and their lengths."""
    distances = torch.cdist(positions, positions)
    near = (batch[:, None] == batch) & (distances < CUTOFF)
    edges = near.fill_diagonal_(False).nonzero().T
    return edges, (positions[edges[0]] - positions[edges[1]]).norm(dim=1)


class Network(nn.Module):
    """SchNet whose energies begin at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.body = SchNet(
            hidden_channels=64, num_filters=64, num_interactions=3, num_gaussians=25, cutoff=CUTOFF,
            interaction_graph=pairs,
        )  # fmt: skip
        nn.init.zeros_(self.body.lin2.weight)

    def forward(self, data: Data) -> Tensor:
        """Energies (n_molecules, 1) in eV without those of the elements."""
        return self.body(data.z, data.pos, data.batch)


def labelled(copies: int) -> list[list[Atoms]]:
    """Rattled copies of every molecule with their energies, molecule by molecule."""
    names = [name for name in g2.names if len(g2[name]) in SIZES and set(g2[name].numbers) <= set(ELEMENTS)]
    found, calculator = [], xtb()
    for k, name in enumerate(names):
        own = []
        for copy in range(copies):
            atoms = molecule(name)
            atoms.rattle(RATTLE, seed=1000 * k + copy)
            atoms.info["energy"] = calculator.get_potential_energy(atoms)
            own.append(atoms)
        found.append(own)
    return found


def graphs(molecules: Sequence[Sequence[Atoms]]) -> list[list[Data]]:
    """Graphs with energies ``y`` from which those of the elements are fitted and subtracted."""
    frames = [atoms for own in molecules for atoms in own]
    counts = np.array([[(atoms.numbers == z).sum() for z in ELEMENTS] for atoms in frames])
    energies = np.array([atoms.info["energy"] for atoms in frames])
    references = np.linalg.lstsq(counts, energies, rcond=None)[0]
    rest = iter((energies - counts @ references).tolist())
    return [
        [
            Data(
                z=torch.tensor(atoms.numbers),
                pos=torch.tensor(atoms.positions, dtype=torch.float32),
                y=torch.tensor([[next(rest)]]),
            )
            for atoms in own
        ]
        for own in molecules
    ]


def train(model: nn.Module, data: Sequence[Data], *, epochs: int, seed: int) -> nn.Module:
    """Adam on absolute errors with a falling rate; the weights are those of the end."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    steps = epochs * -(-len(data) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(data), generator=generator).split(BATCH):
            batch = Batch.from_data_list([data[i] for i in chosen.tolist()])
            optimizer.zero_grad()
            l1_loss(model(batch), batch.y).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def error(model: nn.Module, data: Sequence[Data]) -> float:
    """Mean absolute error in meV per molecule."""
    batch = Batch.from_data_list(list(data))
    return 1000 * float((model(batch) - batch.y).abs().mean())


def measure(seed: int, *, copies: int, epochs: int) -> dict[str, dict[str, object]]:
    """Errors on both halves and processor seconds, by model."""
    torch.manual_seed(seed)
    molecules = graphs(labelled(copies))
    n_test = max(1, copies // 5)
    halves = [
        [own for own in molecules if bool((own[0].z == 7).any()) is nitrogen] for nitrogen in (False, True)
    ]
    training = [[data for own in half for data in own[n_test:]] for half in halves]
    tests = [[data for own in half for data in own[:n_test]] for half in halves]
    everything = [*training[0], *training[1]]
    base = train(Network(), everything, epochs=epochs // 3, seed=seed)
    start = time.process_time()
    specialists = [train(deepcopy(base), half, epochs=epochs, seed=seed + 1) for half in training]
    spent = time.process_time() - start
    start = time.process_time()
    joint = train(deepcopy(base), everything, epochs=epochs, seed=seed + 1)
    found: dict[str, tuple[list[nn.Module], float]] = {
        "base": ([base, base], 0.0),
        "specialists": (specialists, spent),
        "the other specialist": (specialists[::-1], spent),
        "joint training": ([joint, joint], time.process_time() - start),
    }
    start = time.process_time()
    examples = [
        [Batch.from_data_list(half[i : i + BATCH]) for i in range(0, len(half), BATCH)] for half in training
    ]
    result = merge_modules(specialists, examples, heads=[])
    seconds = time.process_time() - start
    found["mean"] = ([averaged(specialists)] * 2, 0.0)
    found["merged"] = ([result.for_model(k) for k in (0, 1)], seconds)
    start = time.process_time()
    refitted = merge_modules(specialists, examples, heads=["body.lin2"])
    found["merged, own last layers"] = (
        [refitted.for_model(k) for k in (0, 1)],
        time.process_time() - start,
    )
    return {
        name: {"errors": [error(m, test) for m, test in zip(models, tests, strict=True)], "seconds": seconds}
        for name, (models, seconds) in found.items()
    }


def averaged(models: Sequence[nn.Module]) -> nn.Module:
    """The mean of the weights."""
    model = deepcopy(models[0])
    with torch.no_grad():
        for parameter, *own in zip(model.parameters(), *(m.parameters() for m in models), strict=True):
            parameter.copy_(torch.stack(list(own)).mean(0))
    return model


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--copies", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [measure(seed, copies=options.copies, epochs=options.epochs) for seed in range(options.seeds)]
    summary = {
        name: {
            "without nitrogen": [f(run[name]["errors"][0] for run in runs) for f in (mean, deviation)],
            "with nitrogen": [f(run[name]["errors"][1] for run in runs) for f in (mean, deviation)],
            "seconds": mean(run[name]["seconds"] for run in runs),
        }
        for name in runs[0]
    }
    if options.json:
        print(json.dumps(summary, indent=1))
        return
    for name, row in summary.items():
        first, second = (
            "{:.0f} ± {:.0f}".format(*row[half]) for half in ("without nitrogen", "with nitrogen")
        )
        print(f"{name:26} {first:>12} {second:>12} meV   {row['seconds']:.1f} s")


def mean(values) -> float:
    """Mean of some numbers."""
    return float(np.mean(list(values)))


def deviation(values) -> float:
    """Standard deviation of some numbers."""
    return float(np.std(list(values)))


if __name__ == "__main__":
    main()
