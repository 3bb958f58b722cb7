"""What is read from the trajectories of one model: distributions of distances, vibrations, drift, diffusion."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols

from ase_gffmerge.dynamics.stopping import StoppingCriteria
from ase_gffmerge.dynamics.trajectory import Trajectory
from ase_gffmerge.evaluation.analysis import (
    Diffusion,
    Distribution,
    Spectrum,
    diffusion_coefficient,
    distance_distribution,
    radial_distributions,
    spectral_overlap,
    velocity_autocorrelation,
    vibrational_spectrum,
    without_drift,
)
from ase_gffmerge.evaluation.md.runs import Protocol

Distributions = Mapping[str, Distribution]
CRYSTAL_RANGE = 6.0


def distribution_range(frames: Sequence[Atoms]) -> float:
    """Range in Å that holds all distances of molecules, with 1 Å to spare; fixed for crystals."""
    if frames[0].pbc.all():
        return CRYSTAL_RANGE
    return float(np.ceil(max(atoms.get_all_distances(mic=True).max() for atoms in frames) + 1))


def distributions(
    positions: np.ndarray, numbers: np.ndarray, cells: np.ndarray, pbc: np.ndarray, *, r_max: float
) -> dict[str, Distribution]:
    """h(r) of molecules and slabs as ``h``; g(r) by pair of elements of structures periodic in three directions.

    Parameters
    ----------
    positions : (n_frames, n_atoms, 3)
        Å; without frames, or with a single atom that is not periodic, there is no distribution.
    numbers : (n_atoms,)
    cells : (n_frames, 3, 3)
        Å; slabs have that of the first frame.
    pbc : (3,)
    """
    if len(positions) and pbc.all():
        return radial_distributions(positions, numbers, cells, r_max=r_max)
    if len(positions) == 0 or len(numbers) < 2:
        return {}
    return {"h": distance_distribution(positions, r_max=r_max, cell=cells[0], pbc=pbc)}


def frames_distributions(frames: Sequence[Atoms], *, r_max: float) -> dict[str, Distribution]:
    """Distributions of frames with the same atoms."""
    positions = np.stack([atoms.positions for atoms in frames])
    cells = np.stack([atoms.cell.array for atoms in frames])
    return distributions(positions, frames[0].numbers, cells, frames[0].pbc, r_max=r_max)


MIN_DIFFUSION_FRAMES = 100


@dataclass(frozen=True, kw_only=True)
class ModelDynamics:
    """Trajectories of one model and what they show.

    Attributes
    ----------
    label
        Name of the model.
    nvt, nve
        One trajectory per seed.
    temperature
        Mean of the NVT runs after equilibration, K; ``None`` when none lasted so long.
    potential_energy
        The same of the potential energy, eV.
    distributions
        h(r), or g(r) by pair, of the NVT runs after equilibration; empty when none lasted so long.
    spectrum
        Vibrational density of states of the NVE runs; ``None`` when none lasted.
    spectral_noise
        Overlap of the spectra of even and odd seeds: what equal models would show; ``None`` for a single seed.
    drifts
        Slope of the total energy of every NVE run that lasted, eV/atom/ps.
    diffusion
        By mobile element and seed, of the NVT runs of crystals that lasted.
    """

    label: str
    nvt: tuple[Trajectory, ...]
    nve: tuple[Trajectory, ...]
    temperature: float | None
    potential_energy: float | None
    distributions: Distributions
    spectrum: Spectrum | None
    spectral_noise: float | None
    drifts: tuple[float, ...]
    diffusion: Mapping[str, tuple[Diffusion, ...]]

    @property
    def stability_times(self) -> list[float]:
        """Time in ps until each NVT run broke; its length when it did not."""
        return [run.duration / 1000 for run in self.nvt]

    def to_dict(self) -> dict[str, object]:
        """Summary for JSON, without curves."""
        return {
            "stability_time": self.stability_times,
            "stability_time_mean": float(np.mean(self.stability_times)),
            "held": sum(run.complete for run in self.nvt),
            "stopped": [f"{run.stopped}: {run.detail}" if run.stopped else None for run in self.nvt],
            "temperature": self.temperature,
            "nve_held": sum(run.complete for run in self.nve),
            "nve_drift": list(self.drifts),
            "nve_drift_mean_absolute": float(np.abs(self.drifts).mean()) if self.drifts else None,
            "vdos_overlap_of_halves": self.spectral_noise,
            **(
                {"diffusion": {e: _diffusion(runs) for e, runs in self.diffusion.items()}}
                if self.diffusion
                else {}
            ),
        }


def _diffusion(runs: Sequence[Diffusion]) -> dict[str, object]:
    value, error = mean_diffusion(runs)
    return {"coefficient": value, "standard_error": error, "fit_ps": list(runs[0].fit), "n_runs": len(runs)}


def mean_diffusion(runs: Sequence[Diffusion]) -> tuple[float, float]:
    """Mean over runs and its standard error from their blocks, Å²/ps."""
    errors = [run.standard_error for run in runs]
    return float(np.mean([run.coefficient for run in runs])), float(np.linalg.norm(errors)) / len(runs)


def observe(
    label: str,
    nvt: Sequence[Trajectory],
    nve: Sequence[Trajectory],
    *,
    protocol: Protocol,
    r_max: float,
) -> ModelDynamics:
    """Read all observables from the runs of one model.

    Parameters
    ----------
    r_max
        Range of the distributions in Å, see :func:`~ase_gffmerge.evaluation.md.observables.distribution_range`.
    """
    begin = 1000 * protocol.equilibration * protocol.length("nvt")
    temperatures = np.concatenate([run.temperatures[run.times >= begin] for run in nvt])
    potential_energies = np.concatenate([run.potential_energies[run.times >= begin] for run in nvt])
    return ModelDynamics(
        label=label,
        nvt=tuple(nvt),
        nve=tuple(nve),
        temperature=float(temperatures.mean()) if len(temperatures) else None,
        potential_energy=float(potential_energies.mean()) if len(temperatures) else None,
        distributions=_equilibrated(nvt, begin, r_max=r_max),
        spectrum=_spectrum(nve, protocol),
        spectral_noise=_overlap_of_halves(nve, protocol),
        drifts=tuple(run.drift_slope_per_atom for run in nve if run.complete),
        diffusion=_mobile_diffusion(nvt, begin),
    )


def _equilibrated(runs: Sequence[Trajectory], begin: float, *, r_max: float) -> Distributions:
    positions = np.concatenate([run.after(begin) for run in runs])
    start = runs[0].start
    cells = np.broadcast_to(start.cell.array, (len(positions), 3, 3))
    return distributions(positions, start.numbers, cells, start.pbc, r_max=r_max)


def _spectrum(runs: Sequence[Trajectory], protocol: Protocol) -> Spectrum | None:
    """Mean over the runs that lasted."""
    interval = protocol.every("nve") * protocol.timestep
    n_lags = min(
        round(protocol.correlation_time / interval), protocol.steps("nve") // protocol.every("nve") // 2
    )
    correlations = [
        velocity_autocorrelation(run.velocities, run.start.get_masses(), n_lags)
        for run in runs
        if run.complete
    ]
    return vibrational_spectrum(np.mean(correlations, axis=0), interval=interval) if correlations else None


def _overlap_of_halves(runs: Sequence[Trajectory], protocol: Protocol) -> float | None:
    halves = [_spectrum(runs[k::2], protocol) for k in (0, 1)]
    return spectral_overlap(halves[0], halves[1]) if halves[0] and halves[1] else None


def _mobile_diffusion(runs: Sequence[Trajectory], begin: float) -> dict[str, tuple[Diffusion, ...]]:
    """Diffusion of the elements that hop, in crystals whose runs lasted long enough for an error estimate."""
    mobile = {atomic_numbers[symbol] for symbol in StoppingCriteria().mobile}
    lasting = [
        r for r in runs if r.complete and r.start.pbc.all() and len(r.after(begin)) >= MIN_DIFFUSION_FRAMES
    ]
    found = {}
    for element in sorted(mobile.intersection(lasting[0].start.numbers.tolist())) if lasting else ():
        found[chemical_symbols[element]] = tuple(
            diffusion_coefficient(
                without_drift(run.after(begin), run.start.get_masses())[:, run.start.numbers == element],
                interval=float(run.times[1] - run.times[0]) / 1000,
            )
            for run in lasting
        )
    return found
