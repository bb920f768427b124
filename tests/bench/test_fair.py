"""`python -m expertwire.bench fair`."""

import json

import pytest

from expertwire.bench.scheduler import fair


def test_a_good_tenant_is_served_beside_each_storm(tmp_path, capsys):
    file = tmp_path / "fair.json"
    small = ["--ranks", "1", "--num-seqs", "16", "--requests", "40", "--rate", "4"]
    fair.run([*small, "--json", str(file)])
    result = json.loads(file.read_text())
    assert set(result) == {"options", "alone", *fair.STORMS}
    assert all(run["requests"] == 40 and not run["without_a_token"] for run in list(result.values())[1:])
    assert result["streams"]["preemptions"] > 0
    assert capsys.readouterr().out.startswith("beside")


@pytest.mark.slow
def test_without_fair_shares_the_bar_is_missed(capsys):
    """So the bench can fail."""
    small = ["--ranks", "1", "--num-seqs", "16", "--requests", "40", "--rate", "4", "--policy", "fcfs"]
    assert fair.run(small) == 1
