"""Options of label-free distillation, a part of recipes."""

from pydantic import BaseModel, Field

from ase_gffmerge.storage.documents import STRICT, Seed, Whole


class DistillOptions(BaseModel):
    """How a merged potential is fine-tuned on its specialists' own energies, forces and stresses.

    Attributes
    ----------
    epochs, batch_size, learning_rate
        Longest duration, frames per step, and the peak of the one-cycle schedule.
    energy_weight, force_weight, stress_weight
        Weights of the mean absolute differences: eV/atom, eV/Å (norm of a force), and eV/Å^3.
    feature_weight
        Weight of the difference between the node features of merged potential and specialist, in units of the latter's size.
    widened
        Start from a merge with the recipe's force-matched readout. Without it the start is further away but sooner there,
        and the result costs no more per step than a specialist.
    start_frames
        Calibration frames per specialist, evenly spread, that the merge without the wide readout is solved on: more make the
        start later, not better.
    copies, max_copied_edges, temperature, interval
        Copies of every frame that the specialist visits by short dynamics, as in
        :class:`~ase_gffmerge.merging.recipe.ReadoutOptions`.
    displacement, strain
        Every frame and copy has a twin with displaced atoms: the standard deviation in Å, and the largest strain of cells.
    sampled
        Frames that each specialist adds by molecular dynamics of its own, from its calibration frames.
    patience
        Stop after so many epochs without progress on held-out frames.
    ema_decay, gradient_clip
        Decay of the moving average of the weights; largest norm of the gradient.
    seed
        Seed of copies, sampling and order.
    """

    model_config = STRICT

    epochs: Whole = Field(default=4, ge=1)
    batch_size: Whole = Field(default=10, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    energy_weight: float = Field(default=1.0, ge=0)
    force_weight: float = Field(default=1.0, ge=0)
    stress_weight: float = Field(default=1.0, ge=0)
    feature_weight: float = Field(default=0.7, ge=0)
    widened: bool = False
    start_frames: Whole = Field(default=25, ge=1)
    copies: Whole = Field(default=12, ge=0)
    max_copied_edges: Whole = Field(default=300_000, ge=0)
    temperature: float = Field(default=500.0, ge=0)
    interval: float = Field(default=10.0, gt=0)
    displacement: float = Field(default=0.03, gt=0)
    strain: float = Field(default=0.02, ge=0, lt=0.5)
    sampled: Whole = Field(default=0, ge=0)
    patience: Whole = Field(default=3, ge=1)
    ema_decay: float = Field(default=0.995, ge=0, lt=1)
    gradient_clip: float = Field(default=10.0, gt=0)
    seed: Seed = 0
