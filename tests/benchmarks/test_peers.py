"""Comparison with other packages: rows with made-up ones through the same code, and the real ones where installed."""

import json
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from ase.calculators.lj import LennardJones

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.evaluation.benchmark.harness import ROWS, Bench, load_rows
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.models import build_potential

FOLDER = Path(__file__).parents[2] / "md_examples" / "benchmarks"
for name in ("nequip", "schnetpack", "torchmdnet"):
    load_rows(FOLDER / f"peer_{name}.py")
benchmark_nequip, benchmark_schnetpack, benchmark_torchmdnet, peers = (
    sys.modules[name] for name in ("peer_nequip", "peer_schnetpack", "peer_torchmdnet", "peers")
)
CUTOFF, PAINN, Peer, peer_rows = peers.CUTOFF, peers.PAINN, peers.Peer, peers.peer_rows
TINY = {"channels": 4, "n_blocks": 1, "n_radial": 4, "cutoff": 3.0}
REAL = (benchmark_schnetpack.SCHNETPACK, benchmark_nequip.PEER, *benchmark_torchmdnet.PEERS)


@pytest.fixture
def bench() -> Bench:
    """Water, of 3 and 24 atoms; what is asked of the calculator is compiled by nobody."""
    water = molecule("H2O")
    own = ForceField(
        name="tiny", potential=build_potential("painn", TINY, (1, 8)).eval(), calibration=(water,)
    )
    return Bench(
        specialists=(own,),
        force_field=own,
        calculator=lambda force_field, _: GFFMergeCalculator(force_field, device="cpu", compile=False),
        from_files=lambda _: pytest.fail("nothing is built from files"),
        sizes=(3, 24),
        repeats=1,
        compile=True,
    )


def peer(make, **options):
    known = {"package": "other", "module": "ase", "model": "pairs", "architecture": "painn", "hyper": TINY}
    return Peer(**known, make=make, target=2.0, **options)


@pytest.mark.parametrize("asked", [False, True])
def test_eager_against_eager_and_compiled_against_compiled(bench, capsys, asked) -> None:
    made = []

    def make(_, compiled):
        print("other speaks")
        made.append(compiled)
        return LennardJones()

    rows = peer_rows(replace(bench, compile=asked), peer(make, compiles=True))
    assert made == [False, True][: 1 + asked]
    assert [(row.what, row.against, row.note) for row in rows] == [
        (f"MD step, other's pairs{way}", f"ours{way}", f"{n} atoms")
        for way in ("", ", compiled")[: 1 + asked]
        for n in (3, 24)
    ]
    for row in rows:
        theirs, ours = row.milliseconds.values()
        assert row.ratio == theirs / ours > 0
        assert row.met == (row.ratio >= 2.0)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "other speaks\n" * len(made)), "stdout is for one JSON document"


def test_ours_compiled_is_told_where_the_other_cannot(bench) -> None:
    rows = peer_rows(bench, peer(lambda *_: LennardJones()))
    assert [list(row.milliseconds) for row in rows] == 2 * [["other", "ours", "ours, compiled"]]


def test_a_package_that_fails_at_some_size_or_compiled_is_named(bench) -> None:
    class Small(LennardJones):
        def calculate(self, atoms, *args):
            if len(atoms) > 3:
                raise RuntimeError("too many neighbours\nand so on")
            super().calculate(atoms, *args)

    def make(_, compiled):
        if compiled:
            raise FileNotFoundError
        return Small()

    rows = peer_rows(bench, peer(make, compiles=True))
    assert [row.note for row in rows] == [
        "3 atoms",
        "other does not work here: too many neighbours",
        "other does not work here: FileNotFoundError",
    ]
    assert [row.ratio is None for row in rows] == [False, True, True]


def fake_modules(monkeypatch, contents: dict[str, dict]) -> None:
    """Make modules and their packages importable for one test."""
    for name in list(contents):
        while name := name.rpartition(".")[0]:
            contents.setdefault(name, {})
    for name, members in contents.items():
        module = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


def test_torchmdnet_gets_its_checkpoint_and_a_charge(bench, monkeypatch) -> None:
    seen = []

    class TMDNETCalculator(LennardJones):
        def __init__(self, model_file, *, device, compile):
            super().__init__()
            checkpoint = torch.load(model_file, weights_only=True)
            settings = checkpoint["hyper_parameters"]
            assert checkpoint["state_dict"].keys() == {"weight", "bias"}
            seen.append((settings["model"], compile, device, Path(model_file)))
            sizes = ("embedding_dimension", "num_layers", "num_rbf", "cutoff_upper")
            ours = ("channels", "n_blocks", "n_radial", "cutoff")
            assert [settings[key] for key in sizes] == [PAINN[key] for key in ours]

        def calculate(self, atoms, *args):
            assert atoms.info["charge"] == 0
            super().calculate(atoms, *args)

    fake_modules(
        monkeypatch,
        {
            "torchmdnet.calculators": {"TMDNETCalculator": TMDNETCalculator},
            "torchmdnet.models.model": {
                "create_model": lambda settings: torch.nn.Linear(1, settings["num_rbf"])
            },
        },
    )
    rows = ROWS["torchmd-net"](bench)
    made = [("equivariant-transformer", False), ("tensornet", False), ("tensornet", True)]
    assert [entry[:3] for entry in seen] == [(*entry, "cpu") for entry in made]
    assert not any(entry[3].exists() for entry in seen)
    suffix = {False: "", True: ", compiled"}
    assert [row.what for row in rows] == [
        f"MD step, torchmd-net's {model}{suffix[compiled]}" for model, compiled in made for _ in bench.sizes
    ]
    missed = "24 atoms; torchmd-net misses neighbours: the cell is narrower than 10 Å or not lower triangular"
    assert [row.note for row in rows] == 3 * ["3 atoms", missed]
    assert all(row.ratio > 0 and row.met is None for row in rows)


def test_cells_that_a_minimum_image_is_enough_for() -> None:
    assert not benchmark_torchmdnet.neighbours_missed(molecule("H2O"))
    assert not benchmark_torchmdnet.neighbours_missed(bulk("Cu", cubic=True) * 3)
    assert benchmark_torchmdnet.neighbours_missed(bulk("Cu", cubic=True) * 2)
    assert benchmark_torchmdnet.neighbours_missed(bulk("Cu") * 8), "upper triangular"


@pytest.mark.parametrize("sizes", [(3,), (3, 24)], ids=["molecule", "liquid"])
def test_nequip_is_compiled_as_its_command_does(bench, monkeypatch, sizes) -> None:
    class Model:
        def __init__(self, **settings):
            self.metadata = {"r_max": "5.0", "type_names": " ".join(settings["type_names"])}
            sizes = ("num_layers", "l_max", "num_features", "num_bessels", "r_max")
            ours = ("n_blocks", "l_max", "channels", "n_radial", "cutoff")
            assert [settings[key] for key in sizes] == [benchmark_nequip.NEQUIP[key] for key in ours]

        def eval(self):
            return self

    class Calculator(LennardJones):
        def __init__(self, model, *, device, transforms):
            super().__init__()
            self.model, self.device, self.transforms = model, device, transforms

        def atoms_to_data(self, atoms):
            return {"pos": atoms.positions, "volume": atoms.get_volume()}

        @classmethod
        def from_compiled_model(cls, path, *, device, chemical_species_to_atom_type_map):
            assert (device, chemical_species_to_atom_type_map) == ("cpu", True)
            exported.append(json.loads(Path(path).read_text()))
            return cls(path, device=device, transforms=[])

    def aot_export_model(*, model, data, batch_map, output_path, inductor_configs, **options):
        assert output_path.endswith(".nequip.pt2")
        assert options == {"device": "cpu", "input_fields": ["pos"], "output_fields": ["forces"]}
        assert data["volume"] > 0, "stresses are compared"
        shape = {"atoms": len(data["pos"]), "dynamic": sorted(batch_map), "single": data["single"]}
        Path(output_path).write_text(json.dumps(shape | inductor_configs))

    target = {
        "input": ["pos"],
        "output": ["forces"],
        "data_settings": lambda data: data | {"single": True},
        "batch_map_settings": lambda dimensions: {k: v for k, v in dimensions.items() if k != "graph"},
    }
    exported = []
    fake_modules(
        monkeypatch,
        {
            "nequip.data.transforms": dict.fromkeys(
                ("ChemicalSpeciesToAtomTypeMapper", "NeighborListTransform"), lambda *_, **__: None
            ),
            "nequip.integrations.ase": {"NequIPCalculator": Calculator},
            "nequip.model": {"NequIPGNNModel": Model},
            "nequip.scripts._compile_utils": {
                "AOTI_ASE_TARGET": "ase",
                "COMPILE_TARGET_DICT": {"ase": target},
            },
            "nequip.utils.aot": {"aot_export_model": aot_export_model},
            "nequip.utils.global_state": {
                "set_global_state": lambda: None,
                "get_latest_global_state": lambda only_metadata_related: {"allow_tf32": False},
            },
        },
    )
    rows = ROWS["nequip"](replace(bench, sizes=sizes))
    ways = ("MD step, nequip's nequip", "MD step, nequip's nequip, compiled")
    assert [row.what for row in rows] == [way for way in ways for _ in sizes]
    assert all(row.target == 1.0 and row.ratio > 0 for row in rows)
    metadata = {"r_max": "5.0", "type_names": "H O", "allow_tf32": "0"}
    assert exported == [
        {
            "atoms": max(sizes),
            "dynamic": ["edge", "node"],
            "single": True,
            "aot_inductor.metadata": metadata,
        }
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("real", REAL, ids=lambda real: f"{real.package} {real.model}")
def test_real_packages_give_forces(bench, real) -> None:
    pytest.importorskip(real.module, reason=f"{real.package} is not installed", exc_type=ImportError)
    default = torch.get_default_dtype()
    try:
        calculator = real.make(bench, False)
        for n_atoms in (3, 300):
            atoms = bench.structure(n_atoms)
            atoms.calc = calculator
            forces = atoms.get_forces()
            assert forces.shape == (n_atoms, 3)
            assert np.abs(forces).max() > 0
            atoms.positions += 0.1 * CUTOFF
            np.testing.assert_allclose(atoms.get_forces(), forces, atol=1e-4)
    finally:
        torch.set_default_dtype(default)
