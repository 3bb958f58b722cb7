"""What each process does that a test starts by torchrun: ``python -m torch.distributed.run ... ranks.py FOLDER``."""

import sys
import warnings
from pathlib import Path

import torch

from ase_gffmerge.cli import app
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.merging import augmentation, calibration, readout_fit
from ase_gffmerge.merging.merge import closed_form_merge
from ase_gffmerge.merging.recipe import load_recipe
from ase_gffmerge.runtime.distributed import sharing
from ase_gffmerge.runtime.progress import is_first

RECIPE = {"preset": "gffmerge", "refine": None, "select": False, "readout": {"width": 16, "copies": 2}}


def small_batches(patch=setattr) -> None:
    """Make several batches of few frames."""
    patch(calibration, "MAX_EDGES", 250)
    patch(augmentation, "MAX_EDGES", 250)
    patch(readout_fit, "MAX_ATOMS", 20)


def merged(folder: Path, dtype: torch.dtype) -> ForceField:
    """Merge the specialists in a folder."""
    specialists = [
        ForceField.load(path).to(dtype=dtype) for path in sorted(folder.glob("specialist-*.safetensors"))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return closed_form_merge(specialists, load_recipe(RECIPE), device="cpu")[0]


def main(folder: Path) -> None:
    """Merge in both precisions, and by the command."""
    torch.set_num_threads(1)
    small_batches()
    with sharing():
        for dtype in (torch.float64, torch.float32):
            found = merged(folder, dtype)
            if is_first():
                found.save(folder / f"ranks-{dtype}.safetensors".replace("torch.", ""))
    sources = map(str, sorted(folder.glob("specialist-*.safetensors")))
    app(
        ["merge", *sources, "--out", str(folder / "command.safetensors"), "--recipe", "fast", "--overwrite"],
        standalone_mode=False,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
