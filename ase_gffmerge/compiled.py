r"""Energies and their derivatives by one function that ``torch.compile`` fused, for any number of atoms and edges.

What is compiled is :math:`(\mathbf d, z) \mapsto (\partial E/\partial\mathbf d, e, x)`: from the edge vectors to their
gradient, the energies per atom and the scalars of every block. The numbers of atoms and edges are symbols in it, so that a
neighbour list that grows and shrinks never compiles again.
"""

import os
import threading
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch_geometric.data import Data

from ase_gffmerge.graphs import Prediction
from ase_gffmerge.graphs.batches import edge_vectors
from ase_gffmerge.graphs.derivatives import assemble
from ase_gffmerge.memory import is_out_of_memory
from ase_gffmerge.models import Potential

Compile = bool | Literal["auto"]
EAGER_STEPS = 200
"""Evaluations on a GPU before ``auto`` compiles: a relaxation is over by then."""


class CompileWarning(UserWarning):
    """A force field could not be compiled and is evaluated step by step, with the same results."""


@dataclass
class EdgeGraph:
    """What a potential reads of a graph, in a form that can be traced."""

    edge_vectors: Tensor
    edge_index: Tensor
    specialist: Tensor
    atomic_numbers: Tensor


class CompiledPotential:
    """Predictions of a potential by a compiled function.

    Parameters
    ----------
    potential
        Frozen, in evaluation mode.
    compile
        ``True``: from the first structure on. ``auto``: on a GPU, after :data:`EAGER_STEPS` evaluations; never on a CPU,
        where eager evaluation is already fast and compiling in the middle of a run would change its last digits.
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
        self._function: Callable[..., Any] | None = None
        self._evaluations, self._failed = 0, False
        self._process, self._lock = os.getpid(), threading.Lock()

    def __call__(self, graph: Data) -> tuple[Prediction, list[Tensor]] | None:
        """Give prediction and scalars of every block for a graph or a batch; ``None`` where eager evaluation is due."""
        if not self._due(graph):
            return None
        vectors = edge_vectors(graph)
        arguments = (
            vectors.to(self.potential.dtype),
            graph.edge_index,
            graph.specialist,
            graph.atomic_numbers,
        )
        try:
            gradient, (energies, scalars) = self._compiled(*arguments)
        except Exception as error:  # whatever a compiler may say
            if is_out_of_memory(error):
                raise
            self._give_up(error)
            return None
        return assemble(graph, energies, vectors, gradient.to(vectors.dtype)), scalars

    def _due(self, graph: Data) -> bool:
        """Whether to compute with the compiled function. Sizes of 0 and 1 would be compiled on their own."""
        if self.compile is False or self._failed or os.getpid() != self._process:
            return False  # a forked process does not have the compiler's threads
        if min(len(graph.pos), graph.edge_index.shape[1]) < 2:
            return False
        self._evaluations += 1
        return self.compile is True or (
            self.potential.device.type == "cuda" and self._evaluations > EAGER_STEPS
        )

    def _compiled(self, *arguments: Tensor) -> Any:
        """Call the function; the first call compiles it while other threads wait."""
        if self._function is not None:
            return self._function(*arguments)
        with self._lock:
            function = self._function or compiled_gradient(self.potential, backend=self.backend)
            result = function(*arguments)
            self._function = function
        return result

    def _give_up(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(
                f"the force field cannot be compiled here and is evaluated step by step, with the same results: {reason}; "
                "install a C++ compiler (CPU) or Triton (GPU), or a newer torch, or say compile=False",
                CompileWarning,
                stacklevel=5,
            )

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what was compiled."""
        return {name: getattr(self, name) for name in ("potential", "compile", "backend")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()


def compiled_gradient(potential: Potential, *, backend: str) -> Callable[..., Any]:
    """Compile ``(vectors, edge_index, specialist, atomic_numbers) -> (gradient, (energies, scalars))``."""

    def energy(vectors: Tensor, *rest: Tensor) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
        graph: Any = EdgeGraph(vectors, *rest)
        scalars = potential.features(graph)
        energies = potential.energies(scalars, graph)
        return energies.sum(), (energies, scalars)

    gradient = torch.func.grad(energy, has_aux=True)

    def evaluate(*arguments: Tensor) -> Any:
        return gradient(*arguments)

    # torch counts compilations per code object, and stops after eight: every potential gets one of its own
    own = types.FunctionType(evaluate.__code__.replace(), evaluate.__globals__, closure=evaluate.__closure__)
    return torch.compile(own, dynamic=True, fullgraph=True, backend=backend)
