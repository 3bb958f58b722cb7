"""Releases of packages that are installed but cannot be read are said to be so."""

import sys
from pathlib import Path

import pytest

from ase_gffmerge import load_force_field
from ase_gffmerge.errors import FileFormatError


def test_orb_models_that_are_built_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lacks the modules that 0.5 to 0.7 have; the same line whether a file is named with its model or not."""
    folder = tmp_path / "orb_models" / "forcefield"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    (tmp_path / "orb_models-0.9.0.dist-info").mkdir()
    (tmp_path / "orb_models-0.9.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: orb-models\nVersion: 0.9.0\n"
    )
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "orb_models"}
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        for source in ("orb:a.ckpt", "orb:orb-v3-conservative-20-omat@a.ckpt"):
            with pytest.raises(
                FileFormatError, match=r"orb-models 0\.9\.0 is installed.*'orb-models>=0\.5\.5,<0\.8'"
            ):
                load_force_field(source)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "orb_models"]:
            del sys.modules[name]
        sys.modules.update(kept)
