"""`expertwire experts`: what it reads, what it draws, what it refuses."""

import json

import numpy as np
import pytest

from expertwire.deploy import cli, experts
from expertwire.moe.eplb.load import ExpertLoad
from expertwire.moe.eplb.placement import place


def values(num_experts=8, num_layers=3, dense=(1,)):
    load = ExpertLoad(place(num_experts, 2), num_layers)
    rows = np.full((num_layers, num_experts), 100)
    rows[:, 2] = 1000
    rows[:, 5] = 0
    rows[list(dense)] = 0
    load.add(rows)
    return load.summary()


def test_the_heat_map_shows_hot_and_cold_experts():
    shown = list(experts.lines(values()))
    maps = [line for line in shown if "|" in line]
    # The mean is 200 rows: a tenfold expert is five times that, the others half.
    assert [line.split("|")[1] for line in maps] == ["░░█░░ ░░"] * 2
    assert [line.split()[1] for line in maps] == ["0", "2"], "a layer without experts is shown"
    assert "layer 0 expert 2 5.0x" in shown[-4]
    assert "81.2% of the rows" in shown[-3]
    assert shown[-1].endswith("62.5%")


def test_many_experts_share_columns():
    shown = [line for line in experts.lines(values(num_experts=300)) if "|" in line]
    assert len(shown[0].split("|")[1]) == 100
    assert shown[0].split("|")[1][0] == "█", "the hottest of three experts"


def test_a_file_is_read_written_and_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    written, again, picture = (tmp_path / name for name in ("load.json", "again.json", "load.png"))
    written.write_text(json.dumps(values() | {"num_running": 3}))
    assert cli.main(["experts", str(written), "--json", str(again), "--png", str(picture)]) == 0
    assert json.loads(again.read_text()) == values()
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "hottest" in capsys.readouterr().out


@pytest.mark.parametrize("num_experts", [2, 300])
def test_the_picture_is_whole(tmp_path, monkeypatch, num_experts):
    """Its title fits, and a layer without experts is not drawn as one of cold experts."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    load = ExpertLoad(place(num_experts, 2), 3)
    load.add(np.array([[1], [0], [1]]) * np.arange(num_experts))
    experts.save_png(load.summary(), tmp_path / "load.png")
    [picture] = drawn
    picture.draw_without_rendering()
    [title] = picture.texts
    box = title.get_window_extent()
    assert (box.x0, box.y0) > (0, 0)
    assert box.x1 < picture.bbox.x1
    assert box.y1 < picture.bbox.y1
    assert picture.axes[0].images[0].get_array().mask.all(axis=1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no json", "no JSON file"),
        ("[]", "has no expert_load"),
        ('{"expert_load": [[1]]}', "has no layer_spread, rank_rows, rank_tax"),
        (json.dumps(values(dense=(0, 1, 2))), "no tokens of experts yet"),
    ],
)
def test_what_is_no_load_is_refused(tmp_path, capsys, text, words):
    file = tmp_path / "load.json"
    file.write_text(text)
    assert cli.main(["experts", str(file)]) == 2
    assert words in capsys.readouterr().err


def test_nobody_answers(capsys):
    assert cli.main(["experts", "127.0.0.1:1"]) == 2
    assert "neither a file nor a server" in capsys.readouterr().err
