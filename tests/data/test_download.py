"""Downloads from a local server that serves right, altered, truncated and missing files."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from ase import units
from typer.testing import CliRunner

from ase_gffmerge.cli import data as cli
from ase_gffmerge.data.download import SEEN_HASHES, convert_to_extxyz, data_directory, fetch
from ase_gffmerge.data.manifest import Manifest
from ase_gffmerge.data.readers import read_frames
from ase_gffmerge.errors import DataError, FileFormatError

KCAL = units.kcal / units.mol


class Predictor:
    """Serves files of a folder; names in `truncated` are cut short, every request is counted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.truncated, self.requests = folder, set[str](), list[str]()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                server.requests.append(name)
                if not (server.folder / name).is_file():
                    self.send_error(404)
                    return
                content = (server.folder / name).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if name in server.truncated else content)

            def log_message(self, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def write_frames(path: Path, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        path,
        nuclear_charges=np.array([8, 1, 1]),
        coords=rng.normal(size=(3, 3, 3)),
        energies=np.arange(3.0),
        forces=rng.normal(size=(3, 3, 3)),
    )
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Predictor]:
    server = Predictor(tmp_path / "served")
    yield server
    server.close()


def manifest(server: Predictor, *files: dict, reader: str = "npz") -> Manifest:
    return Manifest.model_validate(
        {
            "schema_version": 1,
            "name": "tiny",
            "title": "Tiny",
            "citations": [{"text": "Nobody (2000)"}],
            "licence": "CC0-1.0",
            "homepage": server.url,
            "base_url": server.url,
            "reader": reader,
            "units": {"length": "Å", "energy": "kcal/mol", "force": "kcal/mol/Å"},
            "keys": {},
            "level_of_theory": "none",
            "elements": ["H", "O"],
            "splits": "none",
            "files": list(files),
        }
    )


def known(server: Predictor, name: str = "water_train.npz", seed: int = 0) -> dict:
    return {
        "path": name,
        "system": "water",
        "split": "train",
        "sha256": write_frames(server.folder / name, seed),
    }


def unknown(server: Predictor, name: str = "water_train.npz") -> dict:
    return known(server, name) | {"sha256": None, "reason": "none published"}


def test_right_file_is_converted_and_not_fetched_twice(server: Predictor, tmp_path: Path) -> None:
    tiny = manifest(server, known(server))
    paths = fetch(tiny, directory=tmp_path / "data", progress=False)
    assert paths == [tmp_path / "data" / "water_train.extxyz"]
    frames = read_frames(paths[0])
    raw = np.load(server.folder / "water_train.npz")
    np.testing.assert_allclose([a.get_potential_energy() for a in frames], raw["energies"] * KCAL)
    np.testing.assert_allclose([a.get_forces() for a in frames], raw["forces"] * KCAL, atol=1e-7)
    np.testing.assert_allclose([a.positions for a in frames], raw["coords"], atol=1e-7)
    stamp = paths[0].stat().st_mtime_ns
    assert fetch(tiny, directory=tmp_path / "data", progress=False) == paths
    assert len(server.requests) == 1
    assert paths[0].stat().st_mtime_ns == stamp
    assert not (tmp_path / "data" / SEEN_HASHES).exists()


def test_altered_file_is_refused_and_leaves_nothing(server: Predictor, tmp_path: Path) -> None:
    file = known(server)
    found = write_frames(server.folder / file["path"], seed=1)
    with pytest.raises(DataError, match="wrong hash for water_train") as caught:
        fetch(manifest(server, file), directory=tmp_path / "data", progress=False)
    assert file["sha256"] in str(caught.value)
    assert found in str(caught.value)
    assert "do not use it" in str(caught.value)
    assert [p.name for p in (tmp_path / "data").iterdir() if not p.name.startswith(".lock")] == []


@pytest.mark.parametrize("with_hash", [True, False])
def test_truncated_file_is_refused_and_leaves_nothing(
    server: Predictor, tmp_path: Path, with_hash: bool
) -> None:
    file = known(server) if with_hash else unknown(server)
    server.truncated.add(file["path"])
    with pytest.raises(DataError, match=r"cannot download water_train.npz from .*check the connection"):
        fetch(manifest(server, file), directory=tmp_path / "data", progress=False)
    assert [p.name for p in (tmp_path / "data").iterdir() if not p.name.startswith(".lock")] == []


def test_missing_file_and_silent_server(server: Predictor, tmp_path: Path) -> None:
    file = known(server)
    (server.folder / file["path"]).unlink()
    with pytest.raises(DataError, match=r"cannot download water_train.npz .*404"):
        fetch(manifest(server, file), directory=tmp_path, progress=False)
    with pytest.raises(DataError, match="cannot download"):
        fetch(manifest(server, file), directory=tmp_path, base_url="http://127.0.0.1:1", progress=False)


def test_a_damaged_local_file_is_fetched_anew(server: Predictor, tmp_path: Path) -> None:
    tiny = manifest(server, known(server))
    (path,) = fetch(tiny, directory=tmp_path / "data", progress=False)
    good = path.read_text()
    (tmp_path / "data" / "water_train.npz").write_bytes(b"damaged")
    fetch(tiny, directory=tmp_path / "data", progress=False)
    assert path.read_text() == good
    assert len(server.requests) == 2


def test_the_hash_of_first_use_is_kept_and_a_different_one_refused(server: Predictor, tmp_path: Path) -> None:
    file = unknown(server)
    tiny, folder = manifest(server, file), tmp_path / "data"
    first = hashlib.sha256((server.folder / file["path"]).read_bytes()).hexdigest()
    fetch(tiny, directory=folder, progress=False)
    assert json.loads((folder / SEEN_HASHES).read_text()) == {file["path"]: first}
    (folder / file["path"]).unlink()
    second = write_frames(server.folder / file["path"], seed=1)
    with pytest.raises(DataError, match="seen on first use") as caught:
        fetch(tiny, directory=folder, progress=False)
    assert first in str(caught.value)
    assert second in str(caught.value)
    assert not (folder / file["path"]).exists()
    (folder / SEEN_HASHES).unlink()
    fetch(tiny, directory=folder, progress=False)
    assert json.loads((folder / SEEN_HASHES).read_text()) == {file["path"]: second}


def test_damaged_record_of_hashes(server: Predictor, tmp_path: Path) -> None:
    (tmp_path / SEEN_HASHES).write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        fetch(manifest(server, unknown(server)), directory=tmp_path, progress=False)


def test_patterns_choose_files(server: Predictor, tmp_path: Path) -> None:
    tiny = manifest(
        server, known(server), known(server, "ethanol_test.npz") | {"system": "ethanol", "split": "test"}
    )
    for pattern in ("*ethanol*", "ethanol", "*/test", ["nothing", "ethanol"]):
        assert [p.name for p in fetch(tiny, directory=tmp_path, files=pattern, progress=False)] == [
            "ethanol_test.extxyz"
        ]
    assert not (tmp_path / "water_train.npz").exists()
    with pytest.raises(DataError, match=r"no file of tiny matches 'benzene'; systems: water, ethanol"):
        fetch(tiny, directory=tmp_path, files="benzene")


def test_a_deepmd_folder_comes_whole(server: Predictor, tmp_path: Path) -> None:
    source = server.folder / "salt" / "raw"
    (source / "set.000").mkdir(parents=True)
    (source / "type.raw").write_text("0\n1\n")
    (source / "type_map.raw").write_text("Li\nS\n")
    for name, value in {
        "coord": np.ones((2, 6)),
        "box": np.eye(3).reshape(1, 9).repeat(2, 0) * 5,
        "energy": np.arange(2.0),
        "force": np.zeros((2, 6)),
    }.items():
        np.save(source / "set.000" / f"{name}.npy", value)
    files = [
        {
            "path": p.relative_to(server.folder).as_posix(),
            "system": "salt",
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
        }
        for p in sorted(source.rglob("*.*"))
        if p.is_file()
    ]
    paths = fetch(
        manifest(server, *files, reader="deepmd"),
        directory=tmp_path / "data",
        files="*coord.npy",
        progress=False,
    )
    assert paths == [tmp_path / "data" / "salt" / "raw.extxyz"]
    assert len(server.requests) == 6
    frames = read_frames(paths[0])
    assert [a.get_potential_energy() for a in frames] == [0, 1]
    assert frames[0].pbc.all()


def test_a_failed_conversion_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    out = tmp_path / "bad.extxyz"
    out.write_text("old")
    with pytest.raises(FileFormatError):
        convert_to_extxyz(tmp_path / "bad.npz", out)
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.extxyz", "bad.npz"]


def test_a_folder_that_cannot_be_written(server: Predictor, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(DataError, match="cannot write to the folder"):
        fetch(manifest(server, known(server)), directory=tmp_path / "data", progress=False)


def test_unknown_data_set() -> None:
    with pytest.raises(DataError, match="did you mean rmd17"):
        fetch("rmd-17")
    assert data_directory("rmd17").name == "rmd17"


def test_the_command_line(server: Predictor, tmp_path: Path) -> None:
    tiny = manifest(server, known(server))
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny.model_dump(), allow_unicode=True), encoding="utf-8")
    run = CliRunner().invoke
    arguments = ["fetch", str(path), "--file", "water", "--dir", str(tmp_path / "data")]
    result = run(cli.app, [*arguments, "--json"], catch_exceptions=False)
    assert json.loads(result.stdout)["files"] == [str(tmp_path / "data" / "water_train.extxyz")]
    assert "water_train.extxyz" in run(cli.app, arguments, catch_exceptions=False).stdout
    listed = json.loads(run(cli.app, ["list", "--json"], catch_exceptions=False).stdout)
    assert {"rmd17", "lips20", "md22"} <= {entry["name"] for entry in listed}
    assert "rmd17" in run(cli.app, ["list"], catch_exceptions=False).stdout
    assert (
        json.loads(run(cli.app, ["show", "acac", "--json"], catch_exceptions=False).stdout)["licence"]
        == "MIT"
    )
    assert "not stated" in run(cli.app, ["show", "lips20"], catch_exceptions=False).stdout
    with pytest.raises(DataError):
        run(cli.app, ["show", "nothing"], catch_exceptions=False)
