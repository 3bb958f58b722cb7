"""What each process does that a test starts by torchrun: ``python -m torch.distributed.run ... ranks.py TASK FOLDER``."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from ase_gffmerge.cli import app
from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.merging import augmentation, calibration, readout_fit
from ase_gffmerge.merging.merge import closed_form_merge
from ase_gffmerge.merging.recipe import DistillOptions, load_recipe
from ase_gffmerge.runtime.distributed import sharing
from ase_gffmerge.runtime.progress import is_first
from ase_gffmerge.training import loop
from ase_gffmerge.training.checkpoint import History
from ase_gffmerge.training.config import TrainConfig
from ase_gffmerge.training.distill import distill
from ase_gffmerge.training.train import train, train_jointly
from helpers.toys import labelled

TESTS = Path(__file__).parents[1]
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


def merge_twice(folder: Path) -> None:
    """Merge in both precisions, and by the command."""
    small_batches()
    with sharing():
        for dtype in (torch.float64, torch.float32):
            found = merged(folder, dtype)
            if is_first():
                found.save(folder / f"ranks-{dtype}.safetensors".replace("torch.", ""))
    sources = map(str, sorted(folder.glob("specialist-*.safetensors")))
    command(
        "merge", *sources, "--out", str(folder / "command.safetensors"), "--recipe", "fast", "--overwrite"
    )


DISTILLATION = DistillOptions(
    epochs=4, batch_size=5, copies=1, learning_rate=1e-2, force_weight=10.0, feature_weight=0.1
)
"""Batches of five frames of two kinds: the parts differ in size, and the last batch is smaller."""


def trained(folder: Path) -> dict[str, tuple[ForceField, History]]:
    """Distil the specialists in a folder into their mean, and fine-tune the first on their labelled frames, in float64."""
    specialists = [ForceField.load(path) for path in sorted(folder.glob("specialist-*.safetensors"))]
    specialists = [specialist.to(dtype=torch.float64) for specialist in specialists]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start, _ = closed_form_merge(specialists, load_recipe("mean"), device="cpu")
        student, progress_of_student = distill(
            start,
            specialists,
            DISTILLATION,
            checkpoint=folder / "distilled.checkpoint",
            device="cpu",
        )
    frames = [
        [labelled(atoms, stress=bool(atoms.pbc.all())) for atoms in one.calibration] for one in specialists
    ]
    config = TrainConfig(epochs=4, batch_size=3, learning_rate=1e-2, validation=3)
    potential, history = train_jointly(specialists[0], frames, config, device="cpu")
    joint = ForceField(name="joint", potential=potential, level_of_theory="toy")
    return {"distilled": (student, progress_of_student), "joint": (joint, history)}


def train_both(folder: Path) -> None:
    """Write what :func:`trained` makes where several processes share it."""
    with sharing():
        found = trained(folder)
        if is_first():
            for name, (force_field, history) in found.items():
                force_field.save(folder / f"{name}.safetensors")
                (folder / f"{name}.txt").write_text(repr(history.rows))


KILLED = {
    "hyper": {"channels": 4, "n_blocks": 1, "n_radial": 3},
    "epochs": 4,
    "batch_size": 3,
    "validation": 3,
}


def train_to_death(folder: Path) -> None:
    """Train; at first the second process is killed amid the third epoch, if there is a file of the name ``fatal``."""
    steps, gradient = 0, loop._gradient

    def mortal(*arguments: object) -> float:
        nonlocal steps
        steps += 1
        if steps == 13:  # of 5 per epoch
            os.kill(os.getpid(), signal.SIGKILL)
        return gradient(*arguments)

    first_try = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if (folder / "fatal").exists() and os.environ["RANK"] == "1" and first_try:
        loop._gradient = mortal
    epochs = list[int]()
    with sharing():
        train(
            [folder / "frames.xyz"],
            folder / "model.safetensors",
            TrainConfig(**KILLED),
            n_calibration=2,
            device="cpu",
            callback=lambda epoch, _: epochs.append(epoch),
        )
    if is_first():
        (folder / "epochs.txt").write_text(repr(epochs))


def commands(folder: Path) -> None:
    """Run the commands that share their work, and one that does not."""
    frames, model = str(folder / "frames.xyz"), str(folder / "trained.safetensors")
    sources = list(map(str, sorted(folder.glob("specialist-*.safetensors"))))
    (folder / "options.yaml").write_text("{validation: 3, batch_size: 3}")
    options = ["--init", sources[0], "--epochs", "2", "--config", str(folder / "options.yaml")]
    command("train", frames, "--out", model, *options)
    command("distill", *sources, "--out", str(folder / "student.safetensors"), "--epochs", "2", *STUDENT)
    tests = ["--test", str(folder / "tests.xyz")]
    labels = [*tests, *tests, "--labels", frames, "--labels", frames]
    words = ["--methods", "mean,joint", "--base", str(folder / "base.safetensors"), "--json"]
    command("compare", *sources, *labels, *words)


STUDENT = ["--student", "painn", "--channels", "4", "--blocks", "1"]


def command(*words: str) -> None:
    """Run ``gffmerge`` in this process."""
    assert app(list(words), standalone_mode=False) is None


def torchrun(task: str, folder: Path, n: int = 2, *options: str) -> subprocess.CompletedProcess:
    """Let ``n`` processes do one of :data:`TASKS` together."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "OMP_NUM_THREADS": "1",
        "GFFMERGE_CACHE": str(folder / "cache"),
    }
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", *options]
    return subprocess.run(
        [*start, str(Path(__file__)), task, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


TASKS = {"merge": merge_twice, "train": train_both, "kill": train_to_death, "commands": commands}

if __name__ == "__main__":
    torch.set_num_threads(1)
    TASKS[sys.argv[1]](Path(sys.argv[2]))
