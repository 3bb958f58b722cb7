"""Observables of trajectories: pure functions on arrays (positions in Å, times in ps unless said otherwise)."""

from ase_gffmerge.evaluation.analysis.observables import (
    Diffusion,
    Distribution,
    Spectrum,
    diffusion_coefficient,
    distance_distribution,
    distribution_mae,
    mean_squared_displacement,
    pair_distances,
    radial_distributions,
    spectral_overlap,
    velocity_autocorrelation,
    vibrational_spectrum,
    without_drift,
)

__all__ = [
    "Diffusion",
    "Distribution",
    "Spectrum",
    "diffusion_coefficient",
    "distance_distribution",
    "distribution_mae",
    "mean_squared_displacement",
    "pair_distances",
    "radial_distributions",
    "spectral_overlap",
    "velocity_autocorrelation",
    "vibrational_spectrum",
    "without_drift",
]
