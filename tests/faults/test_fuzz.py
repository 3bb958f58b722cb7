"""Thousands of broken files and recipes: each is read, or refused with an error of ours.

A quick run draws a few hundred cases. ``GFFMERGE_FUZZ_CASES=10000`` asks for that many in all, and ``.ci/run`` does: half a
minute on one core, and workers share the tests. The cases of a test are the same every time; ``GFFMERGE_FUZZ_SEED=1`` draws
others.
"""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ase.build import molecule
from hypothesis import HealthCheck, event, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save

from ase_gffmerge import GFFMergeCalculator
from ase_gffmerge.errors import FileFormatError, GFFMergeError, RecipeError
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.merging.recipe import PRESETS, ReadoutOptions, Recipe, load_recipe
from ase_gffmerge.storage.tensor_file import SCHEMA, digest, read_file, read_metadata
from ase_gffmerge.training.config import load_config
from helpers.faults import HYPER, explains, tiny_specialists

CASES = int(os.environ.get("GFFMERGE_FUZZ_CASES", "0"))
SEED = os.environ.get("GFFMERGE_FUZZ_SEED")
TESTS = 8


def fuzz(share: int = 40):
    """Settings of one of the tests here; ``share`` is its number of cases when nobody asks for more."""
    options = settings(
        max_examples=-(-CASES // TESTS) or share,
        deadline=None,
        derandomize=SEED is None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    return options if SEED is None else lambda test: options(seed(int(SEED))(test))


# -- files --


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def sound(folder) -> bytes:
    """A sound file with everything in it."""
    return tiny_specialists()[0].with_extrapolation_grade().save(folder / "sound.safetensors").read_bytes()


def read_or_refuse(path: Path) -> ForceField | None:
    """Every reader gives something or an error of ours that names the file; a model that loads can be used and saved."""
    for read in (read_metadata, read_file):
        try:
            read(path)
        except FileFormatError as error:
            explains(error, named=path)
    try:
        found = ForceField.load(path)
    except FileFormatError as error:
        explains(error, named=path)
        return None
    event("loads")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            calc = GFFMergeCalculator(found, device="cpu")
            atoms = molecule("CH3OH")
            atoms.calc = calc
            atoms.get_forces()
            event("is served")
            assert calc.report is None or calc.report.verdict
        except GFFMergeError:
            pass
    again = ForceField.load(found.save(path.with_name("again.safetensors")))
    assert again.fingerprint == found.fingerprint
    return found


@fuzz()
@given(head=st.integers(0, 2**64 - 1) | st.integers(0, 300), body=st.binary(max_size=300))
def test_bytes(folder, head, body):
    path = folder / "bytes.safetensors"
    for content in (body, head.to_bytes(8, "little") + body, len(body).to_bytes(8, "little") + body):
        path.write_bytes(content)
        assert read_or_refuse(path) is None


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "double", "blank"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 64),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, edits: list) -> bytes:
    for kind, where, length, content in edits:
        place = int(where * len(data))
        piece = data[place : place + length]
        new = {
            "flip": bytes(a ^ b for a, b in zip(piece, content, strict=False)) + piece[len(content) :],
            "cut": b"",
            "insert": content + piece,
            "double": piece + piece,
            "blank": bytes(len(piece)),
        }[kind]
        data = data[:place] + new + data[place + length :]
    return data


@fuzz()
@given(edits=EDITS)
def test_edited_files(folder, sound, edits):
    path = folder / "edited.safetensors"
    path.write_bytes(edited(sound, edits))
    found = read_or_refuse(path)
    if found is not None:
        (folder / "whole.safetensors").write_bytes(sound)
        assert found.fingerprint == ForceField.load(folder / "whole.safetensors").fingerprint


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 20)
    | st.integers()
    | st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**30])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["painn", "nequip", "gffmerge", "F32", "U8", "F8_E4M3", "a" * 500])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw, tree: object) -> object:
    """A copy of a JSON tree with one branch replaced, removed or added, or its key renamed."""
    if not isinstance(tree, dict | list) or not tree or draw(st.integers(0, 3)) == 0:
        return draw(JSON)
    tree = dict(tree) if isinstance(tree, dict) else dict(enumerate(tree))
    key = draw(st.sampled_from(sorted(tree, key=str)))
    action = draw(st.sampled_from(["deeper", "deeper", "deeper", "remove", "add", "rename"]))
    if action == "deeper":
        tree[key] = draw(changed(tree[key]))
    elif action == "remove":
        del tree[key]
    elif action == "add":
        tree[draw(st.text(max_size=5))] = draw(JSON)
    else:
        tree[draw(st.text(max_size=5))] = tree.pop(key)
    return tree if all(isinstance(k, str) for k in tree) else list(tree.values())


@fuzz()
@given(data=st.data())
def test_headers(folder, sound, data):
    """The lengths are right, the JSON is JSON, but it says something else about the tensors."""
    end = 8 + int.from_bytes(sound[:8], "little")
    text = json.dumps(data.draw(changed(json.loads(sound[8:end])))).encode(errors="surrogatepass")
    path = folder / "header.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + sound[end:])
    read_or_refuse(path)


TENSOR_TYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.float8_e5m2,
]
NUMBERS = st.sampled_from([0.0, 1.0, -1.0, 7.0, 118.0, 1e9, -1e30, float("nan"), float("inf")])


@st.composite
def tensors_like(draw, tensors: dict) -> dict:
    """The tensors of a file, some of them with other values, types or shapes, or missing."""
    tensors = dict(tensors)
    for name in draw(st.lists(st.sampled_from(sorted(tensors)), max_size=2, unique=True)):
        action = draw(st.sampled_from(["value", "type", "shape", "remove", "rename"]))
        if action == "value":
            flat = tensors[name].clone().reshape(-1)
            if len(flat):
                value = np.array(draw(NUMBERS)).astype(np.float64)
                flat[draw(st.integers(0, len(flat) - 1))] = torch.as_tensor(value).to(flat.dtype)
            tensors[name] = flat.reshape(tensors[name].shape)
        elif action == "type":
            tensors[name] = tensors[name].to(draw(st.sampled_from(TENSOR_TYPES)))
        elif action == "shape":
            tensors[name] = torch.zeros(
                draw(st.lists(st.integers(0, 5), max_size=4)), dtype=tensors[name].dtype
            )
        elif action == "rename":
            tensors[draw(st.sampled_from(["potential.x", "extrapolation_grade.species", "x"]))] = tensors.pop(
                name
            )
        else:
            del tensors[name]
    return tensors


@fuzz()
@given(data=st.data())
def test_sealed_files(folder, sound, data):
    """Metadata and tensors that cannot be, with a right digest: what only another program can write."""
    (folder / "whole.safetensors").write_bytes(sound)
    metadata, tensors = read_file(folder / "whole.safetensors")
    tensors = data.draw(tensors_like(tensors))
    if data.draw(st.booleans()):
        metadata = data.draw(changed(metadata))
    text = json.dumps(metadata)
    header = {
        "format": "ase-gffmerge",
        "schema": str(SCHEMA),
        "metadata": text,
        "sha256": digest(text, tensors),
    }
    path = folder / "sealed.safetensors"
    path.write_bytes(save(tensors, metadata=header))
    read_or_refuse(path)


# -- recipes --


def parse_or_refuse(source: object) -> None:
    """A recipe that survives a round trip, or an error of ours of a sensible length."""
    try:
        recipe = load_recipe(source)
    except RecipeError as error:
        explains(error, longest=1500)
        return
    event("is a recipe")
    assert Recipe(**json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe


OPTIONS = [
    *Recipe.model_fields,
    *ReadoutOptions().model_dump(),
    "preset",
    "ridge_",
    "Ridge",
]
KEYS = st.sampled_from(OPTIONS) | st.text(max_size=8)
VALUES = SCALARS | st.sampled_from(
    [*PRESETS, "closed-form", "mean", "shared", "1e-3", float("inf"), 10**4200]
)
MAPPINGS = st.recursive(
    st.dictionaries(KEYS, VALUES, max_size=4),
    lambda inner: st.dictionaries(KEYS, VALUES | st.lists(VALUES, max_size=3) | inner, max_size=4),
    max_leaves=5,
)


@fuzz(80)
@given(mapping=MAPPINGS | st.dictionaries(st.integers() | st.none() | st.booleans(), VALUES, max_size=2))
def test_recipe_mappings(mapping):
    parse_or_refuse(mapping)


@fuzz(80)
@given(
    source=st.text(max_size=400)
    | st.integers()
    | st.none()
    | st.binary(max_size=5)
    | st.lists(st.text(max_size=3))
)
def test_recipe_names(source):
    parse_or_refuse(source)


TOKENS = [
    *OPTIONS,
    ": ", ":", "\n", "\n  ", "- ", "[", "]", "{", "}", ", ", "&a ", "*a", "<<: ", "? ", "| ", "> ", "# ", "---\n", "...\n",
    "!!int ", "!!float ", "!!bool ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!pairs ", "!!null ", "!x ",
    "!!python/object/apply:os.system ", "!!python/name:os.system ", "%YAML 9.9\n", "%TAG ! tag:x,2000:\n",
    "2024-13-45", "2024-01-01T99:99:99", "0x", "0b", "0o9", "1e999", ".inf", ".nan", "1:99:99", "1__", "~", "''", '"', "'",
    '"\\x', '"\\ud800"', "\t", "\0", "\x85", "\ufeff", "é", "[" * 600, "{a: " * 300, "9" * 5000,
]  # fmt: skip


@fuzz(80)
@given(tokens=st.lists(st.sampled_from(TOKENS) | st.text(max_size=4), max_size=12))
def test_recipe_documents(folder, tokens):
    path = folder / "recipe.yaml"
    path.write_bytes("".join(tokens).encode(errors="surrogatepass"))
    parse_or_refuse(path)
    try:
        load_config(path)
    except RecipeError as error:
        explains(error, longest=1500)


@fuzz(40)
@given(mapping=MAPPINGS)
def test_recipe_files(folder, mapping):
    path = folder / "mapping.yaml"
    try:
        path.write_text(yaml.safe_dump(mapping, allow_unicode=True), encoding="utf-8")
    except (UnicodeEncodeError, ValueError):  # lone surrogates, more digits than Python prints
        path.write_text(json.dumps({key: 1 for key in mapping}), encoding="utf-8")
    parse_or_refuse(path)


# -- found by hand: what a random search would hardly meet --


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:pathlib.Path.touch [executed]",
        "ridge: !!python/object/apply:os.system ['touch executed']",
        "ridge: !!python/object/new:os.system ['touch executed']",
        "ridge: !!python/name:os.system",
        "ridge: !!python/module:os",
    ],
)
def test_nothing_is_executed(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(
        RecipeError, match=r"recipe\.yaml is not valid YAML: could not determine a constructor"
    ):
        load_recipe("recipe.yaml")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 2000,
        "a: " * 3000 + "1",
        "ridge: &a [*a]",
        "readout: &a {copies: *a}",
        "a: &a {<<: *a}",
        "x: &a " + "[" + ", ".join(["1"] * 10) + "]\n" + "y: &b [*a, *a, *a, *a, *a, *a, *a, *a]\n"
        "z: &c [*b, *b, *b, *b, *b, *b, *b, *b]\nu: &d [*c, *c, *c, *c, *c, *c, *c, *c]\n"
        "v: &e [*d, *d, *d, *d, *d, *d, *d, *d]\nw: &f [*e, *e, *e, *e, *e, *e, *e, *e]\n"
        "s: &g [*f, *f, *f, *f, *f, *f, *f, *f]\nt: &h [*g, *g, *g, *g, *g, *g, *g, *g]\nridge: [*h, *h, *h, *h, *h]\n",
        "width: " + "9" * 10_000,
        "readout: {width: 0x" + "f" * 10_000 + "}",
        "0x" + "f" * 10_000 + ": 1",
        "x" * 100_000 + ": 1",
        "\x00",
        "ridge: 2024-13-45",
    ],
    ids=lambda text: text[:12],
)
def test_documents_that_grow(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.yaml") as caught:
        load_recipe(path)
    assert len(str(caught.value)) < 1500
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        load_config(path)


def test_architectures_with_absurd_sizes_take_no_memory(folder, sound):
    """Each size must have left its trace among the weights of the file."""
    (folder / "whole.safetensors").write_bytes(sound)
    metadata, tensors = read_file(folder / "whole.safetensors")
    for key, value in HYPER.items():
        if isinstance(value, int):
            text = json.dumps({**metadata, "hyper": {**metadata["hyper"], key: 10**6}})
            header = {"format": "ase-gffmerge", "schema": str(SCHEMA), "metadata": text}
            path = folder / "large.safetensors"
            path.write_bytes(save(tensors, metadata=header | {"sha256": digest(text, tensors)}))
            with pytest.raises(FileFormatError, match=f"{key} is larger than a file of this size can be"):
                ForceField.load(path)
