"""Checks of what an adapter reads, serves and writes, of the layers that a merge solves, and of merges; all in order."""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from torch import Tensor, nn

from ase_gffmerge.errors import FileFormatError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.graphs import batch_graphs, build_graph
from ase_gffmerge.graphs.graph import edge_vectors
from ase_gffmerge.models import Potential
from ase_gffmerge.models.affine_maps import AffineMap, affine_maps, rows_entering
from ase_gffmerge.testing.calculator.harness import NotApplicable, check, raised_by, require, run_check
from ase_gffmerge.testing.calculator.robustness import global_state
from ase_gffmerge.testing.integration.subject import IntegrationSubject, ReadsAndWrites
from ase_gffmerge.testing.potential import check_potential
from ase_gffmerge.testing.report import CheckReport

_ABOVE = "ase_gffmerge.workflows.merge"
"""What merges; a name and no import, as it stands above this room."""

QUICK = {
    "preset": "closed-form",
    "readout": None,
    "messages": False,
    "directions": 0,
    "core_repulsion": "none",
    "allow_identical": True,
}
"""Every layer solved, and nothing that a format may not hold."""


@check(1)
def reads_a_potential_for_evaluation(subject: IntegrationSubject) -> str:
    """What is read is in evaluation mode and frozen, its numbers are finite, and its class is that of its architecture."""
    potential = subject.potential
    require(not potential.training, "the potential is in training mode; call .eval()")
    free = [name for name, value in potential.named_parameters() if value.requires_grad]
    require(
        not free,
        f"{len(free)} weights are not frozen ({free[0] if free else ''}); call .requires_grad_(False)",
    )
    wrong = [name for name, value in potential.state_dict().items() if not value.isfinite().all()]
    require(not wrong, f"{wrong[0] if wrong else ''} holds numbers that are not finite")
    name = potential.architecture
    require(
        name in subject.adapter.architectures, f"the architecture {name!r} is not among those of the adapter"
    )
    require(
        isinstance(potential, subject.adapter.potential_class(name)),
        f"the class of architecture {name!r} is another one",
    )
    return f"{name}, {len(potential.species)} elements"


@check(2)
def reading_is_exact_and_leaves_no_trace(subject: IntegrationSubject) -> None:
    """Two readings hold the same weights; random numbers, default type and the model that was given stay as they are."""
    first = subject.potential.state_dict()
    with torch.random.fork_rng(devices=[]):
        torch.rand(1)  # a seed that reading sets would otherwise be in force already
        before = global_state()
        again = subject.adapter.read(subject.source).potential
        changed = [what for what, value in global_state().items() if value != before[what]]
    require(not changed, f"reading changes {', '.join(changed)}")
    second = again.state_dict()
    require(list(first) == list(second), "two readings have different weights")
    wrong = [name for name in first if not torch.equal(first[name], second[name])]
    require(not wrong, f"two readings differ in {', '.join(wrong[:3])}")


@check(3)
def results_are_the_vendors(subject: IntegrationSubject) -> str:
    """Energy, forces and stress are those of the package's own calculator."""
    if subject.calculator is None:
        raise NotApplicable("no calculator of the package was given")
    return subject.compare(subject.potential, subject.calculator, "the vendor's calculator", subject.limit)


@check(4)
def the_potential_does_what_merging_relies_on(subject: IntegrationSubject) -> str:
    """:func:`check_potential` of it in double precision, but for what its authors decide: invariance and cutoff."""
    authors = ("rotations_and_reflections", "nothing_happens_at_the_cutoff", "order_of_atoms_and_edges")
    report = check_potential(double(subject.potential), subject.structures[0])
    failed = [result for result in report.failed if result.name not in authors]
    require(not failed, "; ".join(f"{result.name}: {result.detail}" for result in failed[:3]))
    known = [result.name for result in report.failed]
    return f"but for {', '.join(known)}" if known else ""


@check(5)
def files_are_read_as_they_were_written(subject: IntegrationSubject) -> str:
    """A file of the potential holds its weights, elements and hyper-parameters."""
    again = subject.again(subject.potential)
    require(again.species == subject.potential.species, f"elements {again.species} are read again")
    return subject.compare(again, subject.potential, "what was written", max(subject.limit, 3e-6))


@check(6)
def the_vendor_serves_what_was_written(subject: IntegrationSubject) -> str:
    """The package's own calculator of that file has the potential's results."""
    if subject.served_by is None:
        raise NotApplicable("no calculator of written files was given")
    with tempfile.TemporaryDirectory() as folder:
        theirs = subject.served_by(subject.written(subject.potential, folder))
        return subject.compare(
            subject.potential, theirs, "the vendor's calculator of the file", max(subject.limit, 3e-6)
        )


@check(7)
def what_the_format_cannot_hold_is_refused(subject: IntegrationSubject) -> None:
    """An embedding per specialist and a widened readout have no place in another package's file."""
    old = subject.potential
    for words, changes in {
        "an embedding per specialist": {"n_embeddings": 2},
        "a widened readout": {"readout_width": 4, "readout_blocks": 1},
    }.items():
        with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
            wide = type(old)(replace(old.hyper, **changes), old.species).to(old.dtype).eval()
            error = raised_by(partial(subject.written, wide, folder))
        _require_refusal(error, f"a potential with {words}")


def _require_refusal(error: BaseException | None, what: str) -> None:
    require(error is not None, f"{what} is not refused")
    require(
        isinstance(error, FileFormatError),
        f"{what} raises {type(error).__name__}, not FileFormatError: {error}",
    )
    lines = str(error).splitlines()
    require(len(lines) == 1, f"{what} is refused in {len(lines)} lines, not one")


class _Executed:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)


@check(8)
def foreign_files_are_refused_in_one_line(subject: IntegrationSubject) -> None:
    """Files that are missing, empty, text, of another package or with code raise one line, and no code is executed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trace, files = folder / "executed", {}
        for words in ("missing", "empty", "text", "weights of another package", "code"):
            files[words] = folder / f"{words.replace(' ', '-')}{subject.suffix or '.pt'}"
        files["empty"].touch()
        files["text"].write_text("no model\n")
        torch.save({"weights": torch.ones(2)}, files["weights of another package"])
        torch.save({"model": _Executed(trace)}, files["code"])
        for words, path in files.items():
            _require_refusal(raised_by(partial(subject.adapter.read, path)), f"a file: {words},")
        require(not trace.exists(), "code in a file that nobody trusted is executed")
    _require_refusal(raised_by(lambda: subject.adapter.read(nn.Linear(1, 1))), "another torch module")


@check(9)
def layers_are_found(subject: IntegrationSubject) -> str:
    """Most weights are in layers that a merge solves."""
    potential = subject.potential
    solved = {id(x) for one in affine_maps(potential).values() for x in one.module.parameters(recurse=False)}
    sizes = {name: value.numel() for name, value in potential.named_parameters() if name != "embedding"}
    rest = [name for name, value in potential.named_parameters() if id(value) not in solved and name in sizes]
    share = 1 - sum(sizes[name] for name in rest) / max(sum(sizes.values()), 1)
    require(
        share > 0.5,
        f"only {share:.0%} of the weights are in layers that are known; left out: {', '.join(rest[:4])}",
    )
    return f"{share:.0%} of the weights; averaged: {', '.join(['embedding', *rest[:8]])}{' ...' if len(rest) > 8 else ''}"


@check(10)
def layers_are_what_their_maps_say(subject: IntegrationSubject) -> str:
    """Every layer is read and written exactly, and a change of its coefficients changes its output by rows times change."""
    potential = double(subject.potential)
    entering = _entering(potential, subject.structures)
    compared = 0
    for name, one in affine_maps(potential).items():
        before = {key: value.detach().clone() for key, value in one.module.named_parameters(recurse=False)}
        theta = one.read().clone()
        one.write(theta)
        for key, value in one.module.named_parameters(recurse=False):
            gap = float((value - before[key]).abs().max())
            require(
                gap <= 1e-12 * (1 + float(value.abs().max())),
                f"writing {name} back changes its {key} by {gap:.2g}",
            )
        if (layer := _layer_name(potential, one)) in entering:
            compared += _responds(one, theta, entering[layer], name)
        with torch.no_grad():
            for key, value in one.module.named_parameters(recurse=False):
                value.copy_(before[key])
    require(compared > 0, "no layer of any map is called")
    return f"{compared} of {len(affine_maps(potential))}; the others are activated within the layer, or not called"


def _layer_name(potential: Potential, one: AffineMap) -> str:
    return next(name for name, module in potential.named_modules() if module is one.module)


def _entering(potential: Potential, structures: Sequence[Atoms]) -> dict[str, tuple[object, ...]]:
    """Arguments of the first call of every layer with maps."""
    found: dict[str, tuple[object, ...]] = {}
    layers = {_layer_name(potential, one): one.module for one in affine_maps(potential).values()}

    def hook(name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def remember(module: nn.Module, inputs: tuple[object, ...]) -> None:
            found.setdefault(name, inputs)

        return remember

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    graph = batch_graphs([build_graph(atoms, potential.hyper.cutoff) for atoms in structures])
    with torch.no_grad():
        potential(edge_vectors(graph), graph)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def _responds(one: AffineMap, theta: Tensor, inputs: tuple[object, ...], name: str) -> int:
    """Whether the layer is linear up to its output, where its response to a change is compared with the rows'."""
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(theta.shape, generator=generator, dtype=torch.float64)
    outputs = []
    for step in (0.0, 1.0, 2.0):
        one.write(theta + step * change)
        outputs.append(one.module(*inputs))
    one.write(theta)
    if not all(isinstance(output, Tensor) for output in outputs):
        return 0
    first, second = (output - outputs[0] for output in outputs[1:])
    if float((second - 2 * first).norm()) > 1e-9 * float(second.norm()):
        return 0
    expected = float((one.design(rows_entering(one.module, inputs)) @ change).norm())
    require(
        abs(float(first.norm()) - expected) <= 1e-9 * (1 + expected),
        f"a change of {name} changes its output by {float(first.norm()):.4g}, the map says {expected:.4g}",
    )
    return 1


def double(potential: Potential) -> Potential:
    """A copy in double precision, with its own weights."""
    with torch.random.fork_rng(devices=[]):
        copy = type(potential)(potential.hyper, potential.species)
    copy.double().load_state_dict(potential.state_dict())
    return copy.eval().requires_grad_(False)


@check(11)
def identical_specialists_merge_into_themselves(subject: IntegrationSubject) -> str:
    """The merge of two copies has their results."""
    original = ForceField(name="copy", potential=double(subject.potential), calibration=subject.structures)
    merged = _merged([original, replace(original, name="other")])
    return subject.compare(merged, original.potential, "the copies that were merged", 1e-8)


@check(12)
def relatives_merge_into_what_can_be_written(subject: IntegrationSubject) -> str:
    """The merge of two models that were moved away from this one is read as it was written."""
    pair = []
    for seed in (1, 2):
        moved, generator = double(subject.potential), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in moved.parameters():
                noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
                value.add_(0.01 * value.abs().mean() * noise)
        pair.append(ForceField(name=f"relative {seed}", potential=moved, calibration=subject.structures))
    merged = _merged(pair)
    return subject.compare(subject.again(merged).double(), merged, "the merge", 1e-5)


def _merged(specialists: Sequence[ForceField]) -> Potential:
    """Their merge by :data:`QUICK`."""
    merge = import_module(_ABOVE).merge
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged, _ = merge(specialists, QUICK, device="cpu")
    found: Potential = merged.potential
    return found


CHECKS = (
    reads_a_potential_for_evaluation,
    reading_is_exact_and_leaves_no_trace,
    results_are_the_vendors,
    the_potential_does_what_merging_relies_on,
    files_are_read_as_they_were_written,
    the_vendor_serves_what_was_written,
    what_the_format_cannot_hold_is_refused,
    foreign_files_are_refused_in_one_line,
    layers_are_found,
    layers_are_what_their_maps_say,
    identical_specialists_merge_into_themselves,
    relatives_merge_into_what_can_be_written,
)


def check_integration(
    adapter: ReadsAndWrites,
    source: object,
    structures: Sequence[Atoms],
    *,
    calculator: BaseCalculator | None = None,
    served_by: Callable[[Path], BaseCalculator] | None = None,
    suffix: str = ".pt",
    tolerance: float | None = None,
) -> CheckReport:
    """Check that an adapter of another package, for example one of your own, does what its users rely on.

    Parameters
    ----------
    adapter
        It reads and writes the package's models, see :class:`~ase_gffmerge.integrations.base.Adapter`.
    source
        A small model of the package, or a file of one.
    structures
        A molecule and a crystal of elements that it knows, say; not in equilibrium.
    calculator
        The package's own, with the same weights.
    served_by
        Gives the package's own calculator of a file that the adapter wrote.
    suffix
        Ending of such files.
    tolerance
        Of energies (eV) and forces (eV/Å) relative to the largest force if that is above 1 eV/Å; default: 1e-9 for weights
        in double precision, else 3e-6.

    Returns
    -------
    report
        ``report.raise_if_failed()`` in a test; printed, it is a table.
    """
    subject = IntegrationSubject(
        adapter=adapter,
        source=source,
        structures=tuple(structures),
        calculator=calculator,
        served_by=served_by,
        suffix=suffix,
        tolerance=tolerance,
    )
    results = tuple(run_check(function, subject) for function in CHECKS)
    return CheckReport(f"adapter {adapter.vendor} on {len(subject.structures)} structures", results)
