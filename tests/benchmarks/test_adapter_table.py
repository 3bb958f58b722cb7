"""The table of adapters: a run that was stopped measures what is missing, and rows without a merge are shown."""

import sys

import pytest

SPEED = {
    "vendor": "chgnet",
    "package": "chgnet",
    "version": "0.4.2",
    "ms": [10.0, 25.0],
    "speed": 2.5,
    "weights": 1234,
}


@pytest.fixture
def run(script, monkeypatch, capsys, tmp_path):
    """``run(*options)``: what the command prints where CHGNet alone is installed, and what it measured."""
    module, measured = script("adapter_table"), []

    def part(result):
        return lambda name: measured.append(name) or result

    monkeypatch.setattr(module, "find_spec", lambda package: package == "chgnet" or None)
    monkeypatch.setattr(module, "served", part(SPEED))
    monkeypatch.setattr(module, "merged", part({"merge seconds": 42.0, "averaged": ["stages.0.gate"]}))

    def command(*options: str) -> tuple[str, list[str]]:
        measured.clear()
        monkeypatch.setattr(sys, "argv", ["adapter_table", str(tmp_path), *options])
        module.main()
        return capsys.readouterr().out, list(measured)

    return command


def test_a_second_run_measures_what_the_first_left_out(run) -> None:
    assert run("--no-merge")[1] == ["CHGNet 0.3.0"]
    shown, measured = run("--show")
    assert shown.splitlines()[2:] == ["| CHGNet 0.3.0 | `chgnet` 0.4.2 | 1234 | 10 | 25 | 2.50 |  |  |"]
    assert not measured
    assert run()[1] == ["CHGNet 0.3.0"]
    assert run("--show")[0].splitlines()[2:] == [
        "| CHGNet 0.3.0 | `chgnet` 0.4.2 | 1234 | 10 | 25 | 2.50 | 42 | gate |"
    ]
    assert run()[1] == []
