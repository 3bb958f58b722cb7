"""Rows of the benchmark against other packages, where they are installed: models of the same size with random weights."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.data import chemical_symbols

from ase_gffmerge.evaluation.benchmark import Bench, Row, md_step, medians
from ase_gffmerge.models import build_potential
from ase_gffmerge.specialist import Specialist

CUTOFF = 5.0
PAINN = {"cutoff": CUTOFF, "channels": 128, "n_blocks": 3, "n_radial": 20}
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


def schnetpack_rows(bench: Bench) -> Iterator[Row]:
    """Compare with PaiNN of SchNetPack through its own calculator."""
    yield from _peer_rows(bench, "schnetpack", "painn", PAINN, schnetpack_painn, target=3.0)


def nequip_rows(bench: Bench) -> Iterator[Row]:
    """Compare with NequIP's own implementation, eager, through its own calculator."""
    yield from _peer_rows(bench, "nequip", "nequip", NEQUIP, nequip_model, target=1.0)


def _peer_rows(
    bench: Bench,
    package: str,
    architecture: str,
    hyper: dict[str, Any],
    make_peer: Callable[[tuple[int, ...], torch.device], Calculator],
    *,
    target: float,
) -> Iterator[Row]:
    what = f"MD step, {package}'s {architecture}"
    if find_spec(package) is None:
        yield Row(what=what, against="ours", ratio=None, note=f"{package} is not installed")
        return
    device, species = bench.force_field.potential.device, bench.force_field.species
    with torch.random.fork_rng(devices=[]):
        potential = build_potential(architecture, hyper, species).eval().requires_grad_(False)
        try:
            peer = make_peer(species, device)
        except Exception as error:  # another package, of any version
            yield Row(what=what, against="ours", ratio=None, note=f"{package} does not work here: {error}")
            return
    own = Specialist(name=architecture, potential=potential)
    for n_atoms in bench.sizes:
        atoms = bench.structure(n_atoms)
        steps = {package: md_step(peer, atoms), "ours": md_step(bench.calculator(own, False), atoms)}
        if bench.compile:
            steps["ours, compiled"] = md_step(bench.calculator(own, True), atoms)
        times = medians(steps, repeats=bench.repeats)
        yield _peer_row(what, times, package, target=target, atoms=atoms)


def _peer_row(what: str, times: dict[str, float], package: str, *, target: float, atoms: Atoms) -> Row:
    return Row(
        what=what,
        against="ours",
        ratio=times[package] / times["ours"],
        target=target,
        sense="at least",
        milliseconds=times,
        note=f"{len(atoms)} atoms",
    )


def schnetpack_painn(species: tuple[int, ...], device: torch.device) -> Calculator:
    """PaiNN of the same size in SchNetPack, with the fastest of its neighbour lists."""
    from schnetpack.atomistic import Atomwise, Forces, PairwiseDistances
    from schnetpack.interfaces import SpkCalculator
    from schnetpack.model import NeuralNetworkPotential
    from schnetpack.nn import CosineCutoff, GaussianRBF
    from schnetpack.representation import PaiNN
    from schnetpack.transform import MatScipyNeighborList

    class InMemory(SpkCalculator):  # its own way to load files does not pass torch's check of pickles
        def _load_model(self, model_file: Any) -> Any:
            return model_file.eval()

    channels, cutoff = PAINN["channels"], CosineCutoff(CUTOFF)
    basis = GaussianRBF(n_rbf=PAINN["n_radial"], cutoff=CUTOFF)
    model = NeuralNetworkPotential(
        representation=PaiNN(channels, PAINN["n_blocks"], radial_basis=basis, cutoff_fn=cutoff),
        input_modules=[PairwiseDistances()],
        output_modules=[Atomwise(n_in=channels, output_key="energy"), Forces()],
    )
    return InMemory(
        model, MatScipyNeighborList(cutoff=CUTOFF), energy_unit="eV", position_unit="Ang", device=device
    )


def nequip_model(species: tuple[int, ...], device: torch.device) -> Calculator:
    """Model of the same irreps, layers and cutoff in nequip, not compiled.

    It cannot be made without changing torch's default type, on which nothing of this package depends.
    """
    from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper, NeighborListTransform
    from nequip.integrations.ase import NequIPCalculator
    from nequip.model import NequIPGNNModel
    from nequip.utils.global_state import set_global_state

    set_global_state()
    names = [chemical_symbols[z] for z in species]
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
    return NequIPCalculator(model.eval(), device=device, transforms=transforms)
