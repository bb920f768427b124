"""Quotas of tenants."""

import pytest

from expertwire.scheduler.quotas import TenantQuota


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight": 0}, "weight must be a number from 0.001 to 1000, got 0"),
        ({"weight": "2"}, "weight must be a number from 0.001 to 1000, got '2'"),
        ({"max_requests": 0}, "max_requests must be an integer >= 1 or None, got 0"),
        ({"max_running": True}, "max_running must be an integer >= 1 or None, got True"),
        ({"tokens_per_minute": 1.5}, "tokens_per_minute must be an integer >= 1 or None, got 1.5"),
        ({"requests_per_minute": -1}, "requests_per_minute must be an integer >= 1 or None, got -1"),
        ({"kv_share": 0}, r"kv_share must be a number in \(0, 1\] or None, got 0"),
        ({"kv_share": 1.01}, r"kv_share must be a number in \(0, 1\] or None, got 1.01"),
    ],
)
def test_a_quota_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TenantQuota(**values)
