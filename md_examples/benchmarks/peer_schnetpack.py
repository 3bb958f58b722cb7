"""Row of the benchmark against SchNetPack."""

from typing import Any

from ase.calculators.calculator import Calculator
from peers import CUTOFF, PAINN, Peer, peer_rows

from ase_gffmerge.evaluation.benchmark.harness import Bench, Row, register


@register("schnetpack")
def schnetpack_rows(bench: Bench) -> list[Row]:
    """Compare with PaiNN of SchNetPack through its own calculator."""
    return peer_rows(bench, SCHNETPACK)


def schnetpack_painn(bench: Bench, compiled: bool) -> Calculator:
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
        model,
        MatScipyNeighborList(cutoff=CUTOFF),
        energy_unit="eV",
        position_unit="Ang",
        device=bench.force_field.potential.device,
    )


SCHNETPACK = Peer(
    package="schnetpack",
    module="schnetpack",
    model="painn",
    architecture="painn",
    hyper=PAINN,
    make=schnetpack_painn,
    target=3.0,
)
