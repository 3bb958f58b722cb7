r"""Orb v3 as the package ``orb_models`` builds it (Rhodes et al., arXiv 2504.06231), its blocks wrapped as stages.

Atoms and edges carry latents h and e, which every block of the network changes. The energy of n atoms is read from the mean
of the atoms' latents, and the short-range repulsion is a mean as well:

.. math::

   E = n\,\mathrm{MLP}\Bigl(\frac1n\sum_i h_i\Bigr) + \frac1n\sum_i V_i^{\rm ZBL} + \sum_i e^{\rm ref}_{z_i}

The last stage hands the mean to each atom, so that the readout gives every atom its n-th part of the energy. Mean and
standard deviation of the vendor's labels are in the readout's last layer here. A latent is no invariant: the vendor's
network learns what a rotation is and is not built to ignore it.

An atom attends to a limited number of neighbours, the nearest ones. Where more are within the cutoff, energies have small
steps, and for neighbours at equal distances the choice is arbitrary, here as in the vendor's package.

Weights of Orb in the vendor's state dictionaries and in our potentials.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from orb_models.forcefield.pretrained import orb_v3_conservative_architecture
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ase_gffmerge.graphs.graph import Topology
from ase_gffmerge.integrations.base import VendorObject
from ase_gffmerge.integrations.wrapped import ChainPotential, Entries, ModuleStage
from ase_gffmerge.models.base import HyperParameters, State
from ase_gffmerge.models.layers import package_mode

try:
    from orb_models.common.models.nn_util import build_mlp, get_cutoff
except ModuleNotFoundError:  # 0.5
    from orb_models.forcefield.nn_util import build_mlp, get_cutoff

STATE = ("nodes", "edges")


@dataclass(frozen=True, kw_only=True)
class OrbPackageHyper(HyperParameters):
    """Hyper-parameters of :class:`OrbPackage`; the defaults are those of the published models with 120 neighbours.

    Attributes
    ----------
    n_blocks
        The vendor's message-passing steps, and the mean after them.
    mlp_width, mlp_depth
        Hidden layers of encoder and blocks.
    head_width, head_depth
        Hidden layers of the readout.
    activation
        ``silu``, ``ssp`` or ``gelu``.
    max_neighbors
        How many neighbours an atom attends to.
    repulsion
        Whether the short-range repulsion is part of the energy.
    confidence
        Whether the vendor's confidence head is carried along.
    """

    cutoff: float = 6.0
    channels: int = 256
    n_blocks: int = 6
    n_radial: int = 8
    mlp_width: int = 1024
    mlp_depth: int = 2
    head_width: int = 256
    head_depth: int = 1
    activation: str = "silu"
    max_neighbors: int = 120
    repulsion: bool = True
    confidence: bool = True


def build_network(hyper: OrbPackageHyper) -> VendorObject:
    """The package's network with random weights, and the repulsion of the published ones, which new releases sum up."""
    network = orb_v3_conservative_architecture(
        latent_dim=hyper.channels,
        base_mlp_hidden_dim=hyper.mlp_width,
        base_mlp_depth=hyper.mlp_depth,
        head_mlp_hidden_dim=hyper.head_width,
        head_mlp_depth=hyper.head_depth,
        num_message_passing_steps=hyper.n_blocks - 1,
        activation=hyper.activation,
        device="cpu",
    )
    network.pair_repulsion_fn.node_aggregation = "mean"
    return network


class Encode(nn.Module):
    """First latents of atoms and of the edges that are kept."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, data: Entries) -> Entries:
        """Change the entry ``nodes`` and add ``edges``."""
        nodes, edges = self.encoder(data["nodes"], data["edge_features"].index_select(0, data["kept"]))
        return {**data, "nodes": nodes, "edges": edges}


class Block(nn.Module):
    """One of the package's interaction networks."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, data: Entries) -> Entries:
        """Change the entries ``nodes`` and ``edges``."""
        cutoff = data["cutoff"].index_select(0, data["kept"])
        nodes, edges = self.network(data["nodes"], data["edges"], data["senders"], data["receivers"], cutoff)
        return {**data, "nodes": nodes, "edges": edges}


class Pool(nn.Module):
    """The mean latent of a structure in the place of each of its atoms'."""

    def forward(self, data: Entries) -> Entries:
        """Change the entry ``nodes``."""
        nodes, counts = data["nodes"], data["counts"]
        sums = nodes.new_zeros(len(counts), nodes.shape[1]).index_add(0, data["structure"], nodes)
        return {**data, "nodes": (sums / counts[:, None]).index_select(0, data["structure"])}


class MeanReadout(nn.Module):
    """Energies of the last scalars by the package's head."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, scalars: Sequence[Tensor], species: Tensor) -> Tensor:
        """Map L tensors (n_atoms, channels) to energies (n_atoms,) in eV."""
        energies: Tensor = self.module(scalars[-1]).squeeze(-1)
        return energies


class OrbPackage(ChainPotential):
    """A conservative Orb v3 of the package ``orb_models``.

    ``unused`` holds what the vendor's files have and energies do not depend on: the decoder and the confidence head.

    Parameters
    ----------
    hyper
        Hyper-parameters.
    species
        Atomic numbers.
    """

    architecture: ClassVar[str] = "orb-package"
    decomposition = "none"  # the mean over a structure is read
    Hyper: ClassVar[type[HyperParameters]] = OrbPackageHyper
    hyper: OrbPackageHyper
    edge_entries = ("edge_features", "cutoff")

    def __init__(self, hyper: OrbPackageHyper, species: tuple[int, ...]):
        super().__init__(hyper, species, embedding_width=hyper.channels)
        with package_mode():
            network = build_network(hyper)
        model, heads = network.model, network.heads
        self.bessel, self.harmonics = model.rbf_transform, model.angular_transform
        self.repulsion = network.pair_repulsion_fn if hyper.repulsion else None
        encode = Encode(model._encoder)
        self.stages.append(ModuleStage(encode, reads=("nodes",), writes=STATE, emits_scalars=False))
        for block in model.gnn_stacks:
            self.stages.append(ModuleStage(Block(block), reads=STATE, writes=STATE))
        self.stages.append(ModuleStage(Pool(), reads=STATE, writes=("nodes",)))
        self.unused = nn.ModuleDict({"decoder": model._decoder})
        if hyper.confidence:
            self.unused["confidence"] = heads["confidence"]
        self._seal()

    def own_readout(self) -> nn.Module:
        """The package's head, which gives energies in eV per atom."""
        hyper = self.hyper
        hidden = [hyper.head_width] * hyper.head_depth
        with package_mode():
            return MeanReadout(build_mlp(hyper.channels, hidden, 1, activation=hyper.activation))

    def indices(self, vectors: Tensor, graph: Topology) -> Entries:
        """Edges of the nearest neighbours, which run from the receiving atom in the package, and structures of the atoms."""
        kept, structure = self._nearest(vectors, graph), graph.structure_index
        receivers, senders = graph.edge_index[:, kept]
        counts = torch.bincount(structure)
        return {
            "kept": kept,
            "senders": senders,
            "receivers": receivers,
            "structure": structure,
            "counts": counts,
        }

    def _nearest(self, vectors: Tensor, graph: Topology) -> Tensor:
        """Edges (n_kept,) to the nearest neighbours of every atom; among equals the first ones."""
        centre, limit = graph.edge_index[1], self.hyper.max_neighbors
        n_edges = torch.bincount(centre, minlength=len(graph))
        if not len(centre) or int(n_edges.max()) <= limit:
            return torch.arange(len(centre), device=centre.device)
        order = vectors.detach().square().sum(dim=1).argsort(stable=True)
        order = order[centre[order].argsort(stable=True)]
        rank = torch.arange(len(centre), device=centre.device) - (n_edges.cumsum(0) - n_edges)[centre[order]]
        return order[rank < limit].sort().values

    def edge_functions(self, vectors: Tensor) -> State:
        """Products of radial and angular functions with the cutoff function (n_edges, n_features), and that function."""
        lengths = vectors.norm(dim=1)
        cutoff = get_cutoff(lengths)
        products = self.bessel(lengths)[:, :, None] * self.harmonics(vectors)[:, None, :]
        return cutoff * products.flatten(1), cutoff

    def repulsion_energies(self, vectors: Tensor, graph: Topology) -> Tensor | None:
        """Each atom's part of the mean repulsion of Ziegler, Biersack and Littmark."""
        if self.repulsion is None:
            return None
        found = self.indices(vectors, graph)
        batch = SimpleNamespace(
            senders=found["senders"],
            receivers=found["receivers"],
            n_node=found["counts"],
            node_features={"atomic_numbers_embedding": one_hot(graph.atomic_numbers, num_classes=118)},
            edge_features={"vectors": vectors[found["kept"]]},
        )
        energy: Tensor = self.repulsion(batch)["energy"]
        return (energy / found["counts"])[found["structure"]]


EMBEDDING, REFERENCES = "model.atom_emb.embeddings.weight", "heads.energy.reference.linear.weight"


def hyper_of(state: Mapping[str, Tensor], **settings: VendorObject) -> OrbPackageHyper:
    """Hyper-parameters from the shapes of the weights.

    Parameters
    ----------
    state
        Of a conservative Orb v3.
    **settings
        Those that the shapes do not tell.

    Raises
    ------
    KeyError, TypeError, ValueError
        For other dictionaries and impossible settings.
    """
    encoder, head = "model._encoder._node_fn.mlp.NN-", "heads.energy.mlp.NN-"

    def hidden(prefix: str) -> int:
        return sum(key.startswith(prefix) and key.endswith(".weight") for key in state) - 1

    return OrbPackageHyper(
        channels=state[EMBEDDING].shape[1],
        n_blocks=sum(key.endswith("._receive_attn.weight") for key in state) + 1,
        mlp_width=state[f"{encoder}0.weight"].shape[0],
        mlp_depth=hidden(encoder),
        head_width=state[f"{head}0.weight"].shape[0],
        head_depth=hidden(head),
        confidence=any(key.startswith("heads.confidence.") for key in state),
        **settings,
    )


def network_of(hyper: OrbPackageHyper, state: Mapping[str, Tensor]) -> nn.Module:
    """The vendor's network with given weights.

    Raises
    ------
    RuntimeError
        When they do not fit.
    """
    with package_mode(state[EMBEDDING].dtype):
        network = build_network(hyper)
    network.load_state_dict(state)
    found: nn.Module = network.eval()
    return found


@torch.no_grad()
def copy_weights(potential: OrbPackage, state: Mapping[str, Tensor]) -> None:
    """Set all weights; mean and standard deviation of the labels go into the last layer."""
    rows = list(potential.species)
    potential.embedding.copy_(state[EMBEDDING][rows][None])
    potential.references.copy_(state[REFERENCES].flatten()[rows])
    for ours, theirs in _names(potential):
        potential.get_parameter(ours).copy_(state[theirs])
    last, (mean, deviation) = _last_layer(potential), _statistics(state)
    last.weight.mul_(deviation)
    last.bias.mul_(deviation).add_(mean)


@torch.no_grad()
def vendor_state(potential: OrbPackage) -> dict[str, Tensor]:
    """The reverse, with the mean and standard deviation of a new network; elements that are not known are zero."""
    with package_mode(potential.dtype):
        state: dict[str, Tensor] = dict(build_network(potential.hyper).state_dict())
    own = deepcopy(potential).cpu().double()
    last, (mean, deviation) = _last_layer(own), _statistics(state)
    last.bias.sub_(mean).div_(deviation)
    last.weight.div_(deviation)
    state |= {theirs: own.get_parameter(ours).data.to(potential.dtype) for ours, theirs in _names(own)}
    for name, rows in ((EMBEDDING, own.embedding[0]), (REFERENCES, own.references)):
        state[name] = torch.zeros_like(state[name])
        state[name][list(own.species)] = rows.to(state[name])
    unknown = () if own.hyper.confidence else ("heads.confidence.",)
    return {name: value for name, value in state.items() if not name.startswith(unknown)}


def _names(potential: OrbPackage) -> Iterator[tuple[str, str]]:
    """Names of the parameters here, but for embedding and references, and there."""
    modules = {
        "stages.0.module.encoder": "model._encoder",
        "readout.module": "heads.energy.mlp",
        "unused.decoder": "model._decoder",
    }
    for block in range(potential.hyper.n_blocks - 1):
        modules[f"stages.{block + 1}.module.network"] = f"model.gnn_stacks.{block}"
    if potential.hyper.confidence:
        modules["unused.confidence"] = "heads.confidence"
    for ours, theirs in modules.items():
        for name, _ in potential.get_submodule(ours).named_parameters():
            yield f"{ours}.{name}", f"{theirs}.{name}"


def _last_layer(potential: OrbPackage) -> nn.Linear:
    layer = potential.readout.get_submodule(f"module.NN-{potential.hyper.head_depth}")
    assert isinstance(layer, nn.Linear)
    return layer


def _statistics(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the labels (eV per atom) that the head was trained on."""
    mean, variance = (state[f"heads.energy.normalizer.bn.running_{what}"] for what in ("mean", "var"))
    return mean.double().squeeze(), variance.double().squeeze().sqrt()
