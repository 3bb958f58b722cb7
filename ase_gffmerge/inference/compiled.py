r"""Energies and their derivatives by one function that ``torch.compile`` fused, for any number of atoms and edges.

What is compiled is :math:`(\mathbf d, z) \mapsto (\partial E/\partial\mathbf d, e, x)`: from the edge vectors to their
gradient, the energies per atom and the scalars of every block. The numbers of atoms and edges are symbols in it, so that a
neighbor list that grows and shrinks never compiles again. On a GPU the function is also recorded as a CUDA graph,
compiled or not (:mod:`ase_gffmerge.inference.cuda_graphs`).
"""

import os
import threading
import types
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ase_gffmerge.errors import CompileWarning, first_line
from ase_gffmerge.graphs.derivatives import EdgeDerivatives, EdgeFunction, differentiate
from ase_gffmerge.graphs.graph import Topology, TracedTopology
from ase_gffmerge.inference.cuda_graphs import (
    Arguments,
    CapturedFunction,
    CudaGraphs,
    Size,
    TensorFunction,
    padding_graph,
)
from ase_gffmerge.models import Potential
from ase_gffmerge.models.layers.neighborhoods import evaluated_whole
from ase_gffmerge.runtime.devices import is_out_of_memory

Compile = bool | Literal["auto"]
Way = Literal["compiled", "recorded"]
EAGER_STEPS = 200
"""Evaluations on a GPU before ``auto`` compiles: a relaxation is over by then."""


TRACED = Size(211, 4099, 37)
"""Atoms, edges and neighbors of what is traced. What is equal in it, torch takes to be equal in every structure; with a
first structure of two or three atoms, like the components of a vector, it would have to trace again. And work of this size
is worth sharing among threads."""


class CompiledPotential:
    """A potential's energies and gradient by the fastest function there is: compiled, recorded as a CUDA graph, or eager.

    Parameters
    ----------
    potential
        Frozen, in evaluation mode.
    compile
        ``True``: from the first structure on. ``auto``: on a GPU recorded at once, compiled after :data:`EAGER_STEPS`
        evaluations; never on a CPU, where eager evaluation is already fast and compiling in the middle of a run would
        change its last digits.
    backend
        Of ``torch.compile``.
    """

    def __init__(self, potential: Potential, *, compile: Compile, backend: str = "inductor"):
        if compile is True and not potential.compilable:
            warnings.warn(
                f"a {potential.architecture} force field is not compiled but evaluated step by step, with the same results; "
                "leave compile out",
                CompileWarning,
                stacklevel=4,
            )
        self.potential, self.backend = potential, backend
        self.compile: Compile = compile if potential.compilable else False
        self._forget()

    def _forget(self) -> None:
        """Begin anew, with nothing compiled."""
        self._eager = self.potential.for_inference()
        self._functions: dict[Way, TensorFunction] = {}
        self._evaluations, self._failed = 0, False
        self._process, self._lock = os.getpid(), threading.Lock()

    def __call__(self, vectors: Tensor, graph: Topology) -> EdgeDerivatives:
        """Evaluate the potential and its gradient (:func:`~ase_gffmerge.graphs.derivatives.differentiate`).

        Parameters
        ----------
        vectors
            Edge vectors (n_edges, 3) in Å.
        graph
            One graph or a batch.
        """
        if not self._offers(graph):
            return differentiate(self._eager, vectors, graph)
        self._evaluations += 1
        arguments = traced_arguments(self.potential, vectors, graph)
        if not self._failed and (self.compile is True or self._evaluations > EAGER_STEPS):
            try:
                result = self._evaluate("compiled", *arguments)
            except Exception as error:  # whatever a compiler may say
                if is_out_of_memory(error):
                    raise
                self._give_up(error)
            else:
                self._functions.pop("recorded", None)  # its recordings keep memory
                return result
        return (
            self._evaluate("recorded", *arguments)
            if self._on_gpu
            else differentiate(self._eager, vectors, graph)
        )

    def _offers(self, graph: Topology) -> bool:
        """Whether it has more to offer than eager evaluation. Sizes of 0 and 1 would be compiled on their own."""
        if not self.worthwhile or os.getpid() != self._process:
            return False  # a forked process does not have the compiler's threads
        if self.potential.pads_neighborhoods and not evaluated_whole(graph.n_edges, self.potential.device):
            return False  # eager evaluation goes through its atoms in chunks, in less memory
        return min(len(graph), graph.n_edges) >= 2 and (self._on_gpu or not self._failed)

    @property
    def worthwhile(self) -> bool:
        """Whether it will ever evaluate otherwise than eagerly."""
        return self.compile is True or (self.compile == "auto" and self._on_gpu)

    @property
    def _on_gpu(self) -> bool:
        return self.potential.device.type == "cuda"

    def _evaluate(self, way: Way, *arguments: Tensor) -> EdgeDerivatives:
        """Call a function; other threads wait for its first call, in which it may be compiled."""
        known = self._functions.get(way)  # which another thread may take away
        if known is not None:
            return known(*arguments)
        with self._lock:
            function = self._functions.get(way) or self._made(way)
            result = function(*arguments)
            self._functions[way] = function
        return result

    def _made(self, way: Way) -> TensorFunction:
        padding_atom = self.potential.species[0], self.potential.hyper.cutoff
        if way == "compiled":
            function = compiled(self.potential, backend=self.backend)
            size = TRACED if self.potential.pads_neighborhoods else replace(TRACED, width=0)
            function(*padding_graph(size, padding_atom, like=self.potential.embedding))
        else:
            function = differentiated(self.potential)
        return (
            CapturedFunction(function, padding_atom=padding_atom, record=CudaGraphs())
            if self._on_gpu
            else function
        )

    def _give_up(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            warnings.warn(
                "the force field cannot be compiled here and is evaluated step by step, with the same results: "
                f"{first_line(error)}; install a C++ compiler (CPU) or Triton (GPU), or a newer torch, or say compile=False",
                CompileWarning,
                stacklevel=5,
            )

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what was compiled."""
        return {name: getattr(self, name) for name in ("potential", "compile", "backend")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()


def traced_arguments(potential: Potential, vectors: Tensor, graph: Topology) -> Arguments:
    """Give the tensors that a traced function of a potential takes.

    Parameters
    ----------
    potential
        Whose type is used, and that may pad its neighborhoods.
    vectors
        Edge vectors (n_edges, 3) in Å.
    graph
        One graph or a batch, with one edge or more.
    """
    arguments = (
        vectors.to(potential.dtype),
        graph.edge_index.contiguous(),
        graph.specialist,
        graph.atomic_numbers,
    )
    if not potential.pads_neighborhoods:
        return arguments
    width = 1 + int(torch.bincount(graph.edge_index[1]).max())
    return *arguments, arguments[0].new_zeros(width)


def traced_topology(
    edge_index: Tensor, specialist: Tensor, atomic_numbers: Tensor, *widths: Tensor
) -> TracedTopology:
    """Give what :attr:`.Potential.compilable` networks read of a graph; the rest is empty.

    Parameters
    ----------
    edge_index
        Receivers and senders (2, n_edges).
    specialist
        Row of the embedding tables per atom (n_atoms,).
    atomic_numbers
        (n_atoms,).
    widths
        Nothing, or a tensor as long as neighborhoods are to be wide.
    """
    empty = edge_index.new_zeros(0)
    return TracedTopology(
        atomic_numbers=atomic_numbers,
        specialist=specialist,
        edge_index=edge_index,
        shifts=empty,
        structure_index=empty,
        width=sum(map(len, widths)),
    )


def differentiated(potential: EdgeFunction) -> TensorFunction:
    """Give the function of :func:`traced_arguments` with its gradient by a reverse pass."""

    def evaluate(vectors: Tensor, *constants: Tensor) -> EdgeDerivatives:
        return differentiate(potential, vectors, traced_topology(*constants))

    return evaluate


def compiled(potential: EdgeFunction, *, backend: str) -> TensorFunction:
    """Compile the same function; the reverse pass has to be a function as well to be fused."""

    def energy(vectors: Tensor, *constants: Tensor) -> tuple[Tensor, tuple[Tensor, Sequence[Tensor]]]:
        energies, scalars = potential(vectors, traced_topology(*constants))
        return energies.sum(), (energies, scalars)

    gradient = torch.func.grad(energy, has_aux=True)

    def evaluate(*arguments: Tensor) -> EdgeDerivatives:
        derivative, (energies, scalars) = gradient(*arguments)
        return derivative, energies, scalars

    # torch counts compilations per code object, and stops after eight: every potential gets one of its own
    own = types.FunctionType(evaluate.__code__.replace(), evaluate.__globals__, closure=evaluate.__closure__)
    return cast("TensorFunction", torch.compile(own, dynamic=True, fullgraph=True, backend=backend))
