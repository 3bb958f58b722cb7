"""Checks of an adapter: a sound one passes all of them, and each broken promise is caught by its check."""

from typing import ClassVar

import pytest
import torch
from ase.build import bulk, molecule

from ase_gffmerge import ForceField, GFFMergeCalculator
from ase_gffmerge.errors import FileFormatError, first_line
from ase_gffmerge.integrations import Adapter, ConvertedModel
from ase_gffmerge.integrations.base import load_checkpoint
from ase_gffmerge.models import Potential, build_potential
from ase_gffmerge.models.painn import PaiNN
from ase_gffmerge.testing import check_integration
from ase_gffmerge.testing.calculator.harness import run_check
from ase_gffmerge.testing.integration import checks
from ase_gffmerge.testing.integration.subject import IntegrationSubject

HYPER = {"channels": 6, "n_blocks": 1, "n_radial": 4, "cutoff": 3.0}


class Toy(Adapter):
    """Files of a package that has PaiNN, too."""

    vendor, models, package = "toy", "Toy", ""
    architectures: ClassVar = {"painn": "ase_gffmerge.models.painn:PaiNN"}

    def read(self, source, *, trust=False):
        state = source
        if isinstance(source, PaiNN):
            state = source.state_dict()
        elif not isinstance(source, dict):
            if isinstance(source, torch.nn.Module):
                raise FileFormatError("this is no Toy; give its file")
            state = self.load(source, trust)
        return ConvertedModel(potential=self.convert(state), vendor="toy")

    def load(self, path, trust):
        return load_checkpoint(path, trust=trust, source=f"toy:{path}")

    def convert(self, state) -> Potential:
        with torch.random.fork_rng(devices=[]):
            potential = build(self.make())
        try:
            potential.load_state_dict(state)
        except (RuntimeError, TypeError) as error:
            raise FileFormatError(f"this is no Toy ({first_line(error)}); give its file") from None
        return potential

    def make(self):
        return build_potential("painn", HYPER, (1, 6, 8))

    def vendor_content(self, potential):
        return potential.state_dict()


def build(potential) -> Potential:
    return potential.double().eval().requires_grad_(False)


class Free(Toy):
    def convert(self, state):
        return super().convert(state).requires_grad_(True)


class Seeds(Toy):
    def convert(self, state):
        torch.manual_seed(3)
        return super().convert(state)


class OtherUnit(Toy):
    def convert(self, state):
        potential = super().convert(state)
        potential.readout.out.weight.mul_(1.01)
        return potential


class Reads(PaiNN):
    def energies(self, scalars, vectors, graph):
        return super().energies(scalars, vectors, graph) + 0.1 * graph.positions[:, 0]


class Halved(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


class Hidden(torch.nn.Module):
    """A linear layer that nobody registered."""

    def __init__(self, layer):
        super().__init__()
        self.coefficients, self.offset = layer.weight, layer.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.coefficients, self.offset)


def replaced(potential, make):
    for parent in list(potential.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, torch.nn.Linear):
                setattr(parent, name, make(layer))


class HalvedLayers(PaiNN):
    def __init__(self, hyper, species):
        super().__init__(hyper, species)
        replaced(
            self, lambda layer: Halved(layer.in_features, layer.out_features, bias=layer.bias is not None)
        )


class HiddenLayers(PaiNN):
    def __init__(self, hyper, species):
        super().__init__(hyper, species)
        replaced(self, Hidden)


def makes(kind):
    """An adapter of another class."""

    class Makes(Toy):
        def make(self):
            potential = super().make()
            return kind(potential.hyper, potential.species)

        def convert(self, state):
            with torch.random.fork_rng(devices=[]):
                potential = build(self.make())
            own = potential.state_dict()
            potential.load_state_dict({**own, **{name: x for name, x in state.items() if name in own}})
            return potential

    return Makes


class LosesReferences(Toy):
    def vendor_content(self, potential):
        state = potential.state_dict()
        return {**state, "references": torch.zeros_like(state["references"])}


class SecretSign(Toy):
    """What it writes, only it can read."""

    def load(self, path, trust):
        state = super().load(path, trust)
        return {name: -x if name == "embedding" else x for name, x in state.items()}

    def vendor_content(self, potential):
        return {name: -x if name == "embedding" else x for name, x in potential.state_dict().items()}


class HoldsAnything(Toy):
    def require_exportable(self, potential):
        pass

    def write(self, potential, path):
        torch.save(self.vendor_content(potential), path)
        return path


class Trusts(Toy):
    def load(self, path, trust):
        return super().load(path, True)


class Raises(Toy):
    def load(self, path, trust):
        return torch.load(path, weights_only=True)


class WritesTheFirst(Toy):
    first = None

    def vendor_content(self, potential):
        self.first = self.first or potential.state_dict()
        return self.first


BROKEN = {
    "reads_a_potential_for_evaluation": (Free, "not frozen"),
    "reading_is_exact_and_leaves_no_trace": (Seeds, "random state"),
    "results_are_the_vendors": (OtherUnit, "differ by"),
    "the_potential_does_what_merging_relies_on": (makes(Reads), "another position"),
    "files_are_read_as_they_were_written": (LosesReferences, "differ by"),
    "the_vendor_serves_what_was_written": (SecretSign, "calculator of the file"),
    "what_the_format_cannot_hold_is_refused": (HoldsAnything, "not refused"),
    "foreign_files_are_refused_in_one_line": (Trusts, "executed|FileFormatError"),
    "layers_are_found": (makes(HiddenLayers), "only 0%"),
    "layers_are_what_their_maps_say": (makes(HalvedLayers), "changes its output"),
    "relatives_merge_into_what_can_be_written": (WritesTheFirst, "differ by"),
}


@pytest.fixture(scope="module")
def model() -> Potential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        potential = build(build_potential("painn", HYPER, (1, 6, 8)))
    potential.references.copy_(torch.tensor([-1.0, -2.0, -3.0]))
    return potential


def structures():
    ethanol, crystal = molecule("CH3CH2OH"), bulk("C", cubic=True)
    for atoms in (ethanol, crystal):
        atoms.rattle(0.1, seed=1)
    return ethanol, crystal


def calculator(potential):
    specialist = ForceField(name="vendor", potential=potential)
    return GFFMergeCalculator(specialist, dtype="float64", device="cpu")


def served(path):
    return calculator(Toy().read(path).potential)


def test_a_sound_adapter_passes_all_checks(model):
    report = check_integration(Toy(), model, structures(), calculator=calculator(model), served_by=served)
    report.raise_if_failed()
    assert not report.of("skipped")
    assert {result.name for result in report.results} >= BROKEN.keys()


def subject(adapter, source) -> IntegrationSubject:
    return IntegrationSubject(
        adapter=adapter,
        source=source,
        structures=structures(),
        calculator=calculator(source),
        served_by=served,
        suffix=".pt",
        tolerance=None,
    )


@pytest.mark.parametrize("name", BROKEN)
def test_each_check_catches(name, model):
    adapter, words = BROKEN[name]
    given = subject(adapter(), model)
    if adapter is WritesTheFirst:
        run_check(checks.files_are_read_as_they_were_written, given)
    result = run_check(getattr(checks, name), given)
    assert result.outcome == "failed", result
    assert any(word in result.detail for word in words.split("|")), result.detail


def test_errors_of_other_libraries_are_no_refusals(model):
    result = run_check(checks.foreign_files_are_refused_in_one_line, subject(Raises(), model))
    assert result.outcome == "failed"
    assert "not FileFormatError" in result.detail


def test_without_calculators_of_the_package_something_is_skipped(model):
    report = check_integration(Toy(), model, structures()[:1])
    assert {result.name for result in report.of("skipped")} == {
        "results_are_the_vendors",
        "the_vendor_serves_what_was_written",
    }
    assert report.passed
