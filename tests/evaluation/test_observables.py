"""Observables against analytical results, ASE, and slow loops."""

import numpy as np
import pytest
from ase import units
from ase.build import bulk, molecule
from ase.geometry.rdf import get_rdf
from hypothesis import given, settings
from hypothesis import strategies as st

from ase_gffmerge.dynamics.trajectory import energy_slope, harmonic_temperature
from ase_gffmerge.errors import ArgumentError
from ase_gffmerge.evaluation.analysis import (
    Distribution,
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

# -- interatomic distances --


def rattled_molecule(n_frames: int = 5) -> np.ndarray:
    rng = np.random.default_rng(0)
    positions = molecule("CH3CH2OH").positions
    return positions + 0.1 * rng.standard_normal((n_frames, *positions.shape))


def test_distances_are_counted_as_in_the_definition() -> None:
    positions, width = rattled_molecule(), 0.25
    h = distance_distribution(positions, r_max=6.0, width=width)
    n = positions.shape[1]
    expected = np.zeros(24)
    for frame in positions:
        for i in range(n):
            for j in range(n):
                if i != j:
                    expected[int(np.linalg.norm(frame[i] - frame[j]) / width)] += 1
    np.testing.assert_allclose(h.values, expected / (len(positions) * n * (n - 1) * width))
    assert h.values @ np.diff(h.edges) == pytest.approx(1)
    assert h.centres[0] == width / 2


def test_a_short_range_keeps_the_norm() -> None:
    positions = rattled_molecule()
    short, long = (distance_distribution(positions, r_max=r, width=0.1) for r in (2.0, 6.0))
    np.testing.assert_allclose(short.values, long.values[:20])


def test_distances_of_nearest_images() -> None:
    atoms = bulk("Cu", cubic=True) * (2, 1, 1)
    atoms.rattle(0.3, seed=1)
    atoms.set_cell(atoms.cell @ [[1, 0.2, 0], [0, 1, -0.3], [0.1, 0, 1]], scale_atoms=True)
    atoms.pbc = (True, False, True)
    pairs = np.stack(np.triu_indices(len(atoms), k=1), axis=1)
    found = pair_distances(atoms.positions[None], pairs, cell=atoms.cell.array, pbc=atoms.pbc)
    np.testing.assert_allclose(found[0], atoms.get_all_distances(mic=True)[tuple(pairs.T)])


def test_mae_of_shifted_boxes() -> None:
    """Two unit boxes that overlap by half differ by an area of 1; without overlap by 2."""
    edges = np.linspace(0, 4, 9)
    box = [
        Distribution(edges, np.where((edges[:-1] >= a) & (edges[:-1] < a + 1), 1.0, 0.0)) for a in (0, 0.5, 2)
    ]
    assert [distribution_mae(box[0], other) for other in box] == pytest.approx([0, 1, 2])


# -- radial distribution functions --


def test_an_ideal_gas_has_no_structure() -> None:
    rng = np.random.default_rng(1)
    cell = np.array([[9.0, 0, 0], [2.0, 8.0, 0], [-1.0, 1.5, 10.0]])
    numbers = np.array([3] * 60 + [16] * 40)
    positions = rng.uniform(size=(60, 100, 3)) @ cell
    found = radial_distributions(positions, numbers, cell, r_max=6.0, width=0.5)
    assert list(found) == ["Li-Li", "Li-S", "S-S"]
    for pair, correction in (("Li-Li", 59 / 60), ("Li-S", 1.0), ("S-S", 39 / 40)):
        np.testing.assert_allclose(found[pair].values[2:], correction, atol=0.06)
        assert found[pair].values[2:].mean() == pytest.approx(correction, abs=0.01)


def test_radial_distributions_agree_with_ase() -> None:
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True) * 3
    frames = []
    for seed in range(3):
        frame = atoms.copy()
        frame.rattle(0.2, seed=seed)
        frame.set_cell(frame.cell * (1 + 0.01 * seed), scale_atoms=True)
        frames.append(frame)
    found = radial_distributions(
        np.stack([f.positions for f in frames]),
        atoms.numbers,
        np.stack([f.cell.array for f in frames]),
        r_max=7.0,
        width=0.1,
    )
    for pair, elements in (("Na-Na", (11, 11)), ("Na-Cl", (11, 17)), ("Cl-Cl", (17, 17))):
        expected, centres = get_rdf(frames, 7.0, 70, elements=elements)
        np.testing.assert_allclose(found[pair].centres, centres)
        np.testing.assert_allclose(found[pair].values, expected)


def test_images_beyond_half_the_cell() -> None:
    """The primitive cell gives the same function as a supercell."""
    small = bulk("Cu")
    large = small * (4, 4, 4)
    first, second = (
        radial_distributions(a.positions[None], a.numbers, a.cell.array, r_max=6.0, width=0.2)["Cu-Cu"].values
        for a in (small, large)
    )
    np.testing.assert_allclose(first, second)
    assert first.max() > 5


# -- diffusion --


def slow_displacement(positions: np.ndarray, lag: int) -> float:
    steps = [positions[t + lag] - positions[t] for t in range(len(positions) - lag)]
    return float(np.mean([np.square(step).sum(axis=1).mean() for step in steps]))


@settings(deadline=None, max_examples=15)
@given(n_frames=st.integers(2, 30), n_atoms=st.integers(1, 4), offset=st.floats(-100, 100))
def test_displacement_agrees_with_a_loop(n_frames: int, n_atoms: int, offset: float) -> None:
    positions = offset + np.random.default_rng(n_frames).standard_normal((n_frames, n_atoms, 3)).cumsum(
        axis=0
    )
    expected = [slow_displacement(positions, lag) for lag in range(n_frames)]
    np.testing.assert_allclose(mean_squared_displacement(positions), expected, atol=1e-9)
    np.testing.assert_allclose(mean_squared_displacement(positions, 2), expected[:2], atol=1e-9)


def test_drift_is_that_of_all_atoms() -> None:
    rng = np.random.default_rng(0)
    masses = np.array([1.0, 2.0, 5.0])
    moving = rng.standard_normal((10, 3, 3)) + np.arange(10)[:, None, None]
    found = without_drift(moving, masses)
    np.testing.assert_allclose((found * masses[:, None]).sum(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(np.diff(found, axis=1), np.diff(moving, axis=1))


def test_random_walk_has_its_diffusion_coefficient() -> None:
    """Steps of variance s^2 per direction every dt: D = s^2 / 2 dt."""
    rng = np.random.default_rng(2)
    interval, spread = 0.05, 0.1
    walk = spread * rng.standard_normal((4000, 30, 3)).cumsum(axis=0)
    found = diffusion_coefficient(walk, interval=interval, fit=(0.01, 0.1))
    exact = spread**2 / (2 * interval)
    assert found.coefficient == pytest.approx(exact, rel=0.1)
    assert 0 < found.standard_error < 0.1 * exact
    assert abs(found.coefficient - exact) < 4 * found.standard_error
    assert found.fit == pytest.approx((0.5, 5.0))
    assert found.n_blocks == 4
    assert len(found.lags) == len(found.displacements) == 4000
    assert found.displacements[1] == pytest.approx(3 * spread**2, rel=0.02)


def test_the_standard_error_covers_repeated_walks() -> None:
    rng = np.random.default_rng(3)
    runs = [
        diffusion_coefficient(rng.standard_normal((400, 5, 3)).cumsum(axis=0), interval=1.0, fit=(0.02, 0.2))
        for _ in range(40)
    ]
    spread = np.std([run.coefficient for run in runs])
    assert np.sqrt(np.mean([run.standard_error**2 for run in runs])) == pytest.approx(spread, rel=0.5)


def test_a_crystal_does_not_diffuse() -> None:
    rng = np.random.default_rng(4)
    found = diffusion_coefficient(0.2 * rng.standard_normal((400, 8, 3)), interval=0.1)
    assert abs(found.coefficient) < 1e-3
    assert found.displacements[1:200].mean() == pytest.approx(6 * 0.04, rel=0.05)


# -- vibrations --


@pytest.mark.parametrize("wavenumber", [400.0, 1700.0, 3700.0])
def test_harmonic_oscillator_gives_its_wavenumber(wavenumber: float) -> None:
    interval, n_lags = 2.0, 1000
    times = interval * np.arange(6000)
    omega = 2 * np.pi * 100 * units._c * wavenumber * 1e-15
    velocities = np.zeros((6000, 2, 3))
    velocities[:, 0, 1] = np.cos(omega * times + 0.3)
    velocities[:, 1, 1] = -velocities[:, 0, 1]
    spectrum = vibrational_spectrum(
        velocity_autocorrelation(velocities, np.ones(2), n_lags), interval=interval
    )
    assert spectrum.resolution == pytest.approx(16.68, abs=0.01)
    assert spectrum.wavenumbers[np.argmax(spectrum.density)] == pytest.approx(
        wavenumber, abs=spectrum.resolution / 4
    )
    high = spectrum.wavenumbers[spectrum.density > spectrum.density.max() / 2]
    assert np.ptp(high) == pytest.approx(spectrum.resolution, rel=0.3)
    assert spectrum.density.sum() * spectrum.wavenumbers[1] == pytest.approx(1)


def test_lines_are_weighted_by_mass() -> None:
    """Equal kinetic energies give equal areas, whatever the masses."""
    times = np.arange(8000.0)
    velocities = np.zeros((8000, 2, 3))
    velocities[:, 0, 0] = np.cos(0.1 * times)
    velocities[:, 1, 2] = np.cos(0.4 * times) / np.sqrt(12.0)
    correlation = velocity_autocorrelation(velocities, np.array([1.0, 12.0]), 1000)
    spectrum = vibrational_spectrum(correlation, interval=1.0)
    low = spectrum.density[spectrum.wavenumbers < 1200].sum() * spectrum.wavenumbers[1]
    assert low == pytest.approx(0.5, abs=0.01)


def test_autocorrelation_agrees_with_a_loop() -> None:
    rng = np.random.default_rng(0)
    velocities, masses = rng.standard_normal((20, 3, 3)), np.array([1.0, 2.0, 3.0])
    expected = [
        np.mean([(masses[:, None] * velocities[t] * velocities[t + lag]).sum() for t in range(20 - lag)])
        for lag in range(8)
    ]
    np.testing.assert_allclose(velocity_autocorrelation(velocities, masses, 8), expected)


def test_overlap() -> None:
    times = np.arange(4000.0)
    spectra = []
    for omega in (0.1, 0.1, 0.3):
        velocities = np.cos(omega * times)[:, None, None] * np.ones((1, 1, 3))
        correlation = velocity_autocorrelation(velocities, np.ones(1), 500)
        spectra.append(vibrational_spectrum(correlation, interval=1.0))
    assert spectral_overlap(spectra[0], spectra[1]) == pytest.approx(1)
    assert spectral_overlap(spectra[0], spectra[2]) < 0.01


# -- energies --


def test_energy_slope() -> None:
    times = np.linspace(0, 2, 21)
    assert energy_slope(times, -1000 + 0.03 * times, n_atoms=3) == pytest.approx(0.01)


@pytest.mark.parametrize(("periodic", "modes"), [(False, 21), (True, 24)])
def test_harmonic_modes_tell_the_temperature(periodic: bool, modes: int) -> None:
    """Potential energies of independent oscillators at 700 K, seen from 500 K."""
    rng = np.random.default_rng(0)
    coordinates = rng.standard_normal((20_000, modes))
    mean = {t: 0.5 * units.kB * t * np.square(coordinates).sum(axis=1).mean() for t in (500.0, 700.0)}
    found = harmonic_temperature(500.0, mean[700.0] - mean[500.0], n_atoms=9, periodic=periodic)
    assert found == pytest.approx(700, rel=0.01)


def test_what_does_not_fit_together_is_refused() -> None:
    one, other = (Distribution(np.linspace(0, 1, n + 1), np.ones(n)) for n in (4, 5))
    with pytest.raises(ArgumentError, match="different bins"):
        distribution_mae(one, other)
    with pytest.raises(ArgumentError, match="fewer than 10"):
        diffusion_coefficient(np.zeros((20, 3, 3)), interval=0.1, n_blocks=4)
    with pytest.raises(ArgumentError, match="5 lags need as many frames, and there are 4"):
        velocity_autocorrelation(np.zeros((4, 2, 3)), np.ones(2), n_lags=5)
    short, long = (vibrational_spectrum(np.ones(n), interval=1.0) for n in (4, 5))
    with pytest.raises(ArgumentError, match="different wavenumbers"):
        spectral_overlap(short, long)
