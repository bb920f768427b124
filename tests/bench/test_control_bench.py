"""The control-channel bench measures every combination and writes JSON."""

import argparse
import json

from expertwire.bench import control


def test_figures_of_our_channels_are_complete(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    control.add_arguments(parser)
    path = tmp_path / "figures.json"
    arguments = ["--ranks", "1", "2", "--steps", "3", "--channels", "direct", "relay", "--json", str(path)]
    assert control.main(parser.parse_args(arguments)) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {(row["channel"], row["ranks"]) for row in rows} == {
        ("direct", 1),
        ("direct", 2),
        ("relay", 1),
        ("relay", 2),
    }
    assert all(0 < row["p50_us"] <= row["p99_us"] for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)
    sizes = sorted({row["bytes"] for row in rows})
    assert sizes[0] < 4 << 10
    assert sizes[-1] > 48 << 10
