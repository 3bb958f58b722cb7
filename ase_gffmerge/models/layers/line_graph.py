"""Bonds of edges, and angles of bonds, found on whatever device the edges are on."""

import torch
from torch import Tensor


def undirected(edge_index: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
    """Join the edges j -> i and i -> j of a neighbour list into one bond.

    Parameters
    ----------
    edge_index : (2, n_edges)
        Sender and receiver.
    shifts : (n_edges, 3)
        Cell shifts of the senders, whole numbers.

    Returns
    -------
    bond : (n_edges,)
        Bond of every edge.
    edge : (n_bonds,)
        One edge of every bond.
    """
    sender, receiver = edge_index
    shifts = shifts.long()
    span = 2 * int(shifts.abs().max()) + 1 if len(shifts) else 1
    code = (shifts[:, 0] * span + shifts[:, 1]) * span + shifts[:, 2]
    backward = (sender > receiver) | ((sender == receiver) & (code < 0))
    low, high = torch.minimum(sender, receiver), torch.maximum(sender, receiver)
    code = torch.where(backward, -code, code) + span**3
    key = (low * (int(high.max()) + 1 if len(high) else 1) + high) * (2 * span**3) + code
    _, bond = torch.unique(key, return_inverse=True)
    n_bonds = int(bond.max()) + 1 if len(bond) else 0
    edge = bond.new_zeros(n_bonds).scatter_(0, bond, torch.arange(len(bond), device=bond.device))
    return bond, edge


def angles_between(receiver: Tensor, edges: Tensor) -> Tensor:
    """Ordered pairs (2, n_angles) of different edges that have the same receiver.

    Parameters
    ----------
    receiver : (n_edges,)
        Of all edges.
    edges : (n_chosen,)
        Indices of those that may form angles.
    """
    edges = edges[torch.argsort(receiver[edges], stable=True)]
    _, atom, counts = torch.unique_consecutive(receiver[edges], return_inverse=True, return_counts=True)
    start = (counts.cumsum(0) - counts)[atom]
    partners = counts[atom]
    first = torch.arange(len(edges), device=edges.device).repeat_interleave(partners)
    within = torch.arange(len(first), device=edges.device) - (partners.cumsum(0) - partners)[first]
    second = start[first] + within
    different = first != second
    return torch.stack([edges[first[different]], edges[second[different]]])
