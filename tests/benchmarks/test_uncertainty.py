"""The benchmark of standard deviations, on bundled frames; its full run needs the rMD17 files."""

from ase_gffmerge import ForceField
from ase_gffmerge.forcefield.force_field import bundled_test_frames
from ase_gffmerge.inference.errors import labels
from ase_gffmerge.inference.predict import predict_frames


def test_rows_of_a_specialist_that_labels_calibrate(script, tmp_path, capsys) -> None:
    """Inside: its own test frames; outside: those of another molecule."""
    benchmark = script("benchmark_uncertainty")
    specialists = [ForceField.load(f"rmd17-{name}") for name in benchmark.INSIDE]
    home, foreign = (bundled_test_frames(s.name) for s in specialists)
    field = specialists[0].with_uncertainty(home[:12])
    rows = {
        "test frames, labels": benchmark.row(field, specialists, home[12:24], labels(home[12:24])),
        "other molecules, labels": benchmark.row(field, specialists, foreign[:8], labels(foreign[:8])),
        "1000 K, specialist": benchmark.row(
            field, specialists, foreign[8:12], predict_frames(specialists[1].potential, foreign[8:12])
        ),
    }
    both = rows["test frames, labels"] + rows["other molecules, labels"]
    assert both.forces().rank_correlation > 0.6
    assert 0.7 < rows["test frames, labels"].forces().ratio < 1.5
    assert rows["test frames, labels"].forces().calibration_error < 0.1
    summaries = {name: one.summary() for name, one in rows.items()}
    assert (
        summaries["other molecules, labels"]["median_force_std"]
        > 2 * summaries["test frames, labels"]["median_force_std"]
    )
    benchmark.show({"rows": summaries, "factors": [1.0, 2.0]})
    assert "other molecules" in capsys.readouterr().out
    benchmark.draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    near, far = (benchmark.pairs(field, specialists, [home[:2], home[2:4]]) for _ in range(2))
    assert near == far
