"""Observables of trajectories: pure functions on arrays (positions in Å, times in ps unless said otherwise)."""

from ase_gffmerge.dynamics.energies import (
    energy_slope,
    harmonic_temperature,
    kinetic_energies,
)
from ase_gffmerge.evaluation.analysis.diffusion import (
    Diffusion,
    diffusion_coefficient,
    mean_squared_displacement,
    without_drift,
)
from ase_gffmerge.evaluation.analysis.distances import (
    Distribution,
    distance_distribution,
    distribution_mae,
    pair_distances,
)
from ase_gffmerge.evaluation.analysis.rdf import radial_distributions
from ase_gffmerge.evaluation.analysis.vdos import (
    Spectrum,
    spectral_overlap,
    velocity_autocorrelation,
    vibrational_spectrum,
)

__all__ = [
    "Diffusion",
    "Distribution",
    "Spectrum",
    "diffusion_coefficient",
    "distance_distribution",
    "distribution_mae",
    "energy_slope",
    "harmonic_temperature",
    "kinetic_energies",
    "mean_squared_displacement",
    "pair_distances",
    "radial_distributions",
    "spectral_overlap",
    "velocity_autocorrelation",
    "vibrational_spectrum",
    "without_drift",
]
