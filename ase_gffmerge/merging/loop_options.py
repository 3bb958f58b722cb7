"""Options of closed-loop calibration, a part of recipes."""

from pydantic import BaseModel, Field

from ase_gffmerge.storage.documents import STRICT, Seed, Whole


class TrajectoryOptions(BaseModel):
    """Short Langevin dynamics of a merged potential.

    Attributes
    ----------
    temperature
        K.
    replicas
        Per specialist, each from another of its calibration frames.
    time
        Of every replica, ps.
    timestep, friction
        fs and 1/fs.
    max_grade
        A replica stops when an atom's extrapolation grade passes this; ``None``: it may go anywhere.
    seed
        Of starts, velocities and thermostat.
    """

    model_config = STRICT

    temperature: float = Field(default=500.0, gt=0)
    replicas: Whole = Field(default=8, ge=1)
    time: float = Field(default=1.0, gt=0)
    timestep: float = Field(default=1.0, gt=0)
    friction: float = Field(default=0.02, ge=0)
    max_grade: float | None = Field(default=3.0, gt=0)
    seed: Seed = 0


class ClosedLoopOptions(TrajectoryOptions):
    """Rounds of dynamics and merging.

    Attributes
    ----------
    rounds
        How often to merge again at most.
    frames
        Visited frames that join each specialist's calibration frames per round.
    tolerance
        The loop ends when all replicas hold and the mean disagreement fell by less than this fraction.
    """

    rounds: Whole = Field(default=2, ge=1)
    frames: Whole = Field(default=150, ge=1)
    tolerance: float = Field(default=0.03, ge=0, lt=1)
