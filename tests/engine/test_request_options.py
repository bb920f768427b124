"""Options of requests and of engines that concern scheduling."""

from __future__ import annotations

import json
import pickle

import pytest

from expertwire.deploy.options import help_texts
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.frontend.api import RequestOptions
from expertwire.scheduler.policy import Priority, ShortestRemaining
from expertwire.scheduler.quotas import TenantQuota


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"priority": -(2**31), "tenant": "x" * 128, "cache_salt": "ä🙂\n", "deadline_s": 0.0},
        {"priority": 2**31 - 1, "deadline_s": 3},
    ],
)
def test_json_carries_them(values):
    options = RequestOptions(**values)
    assert RequestOptions(**json.loads(json.dumps(options.to_dict()))) == options


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"priority": 2**31}, r"priority must be an integer in \[-2\*\*31, 2\*\*31\), got 2147483648"),
        ({"priority": -(2**31) - 1}, "priority"),
        ({"priority": 1.0}, "priority"),
        ({"priority": True}, "priority"),
        (
            {"tenant": "x" * 129},
            "tenant must be a string of at most 128 characters of valid Unicode, got 129 characters",
        ),
        ({"tenant": None}, "tenant"),
        ({"cache_salt": 5}, "cache_salt"),
        ({"cache_salt": "a\ud800"}, "cache_salt .* valid Unicode"),
        ({"deadline_s": -0.5}, "deadline_s must be None or a number of seconds >= 0"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"deadline_s": float("inf")}, "deadline_s"),
    ],
)
def test_bad_ones_are_refused(values, error):
    with pytest.raises(ValueError, match=error):
        RequestOptions(**values)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"scheduling_policy": "lottery"},
            "scheduling_policy must be one of fcfs, priority, shortest, prefix, fair, got 'lottery'",
        ),
        ({"aging": 1.0}, "aging has no effect with scheduling_policy 'fcfs'; use 'priority' or 'shortest'"),
        ({"aging": -1, "scheduling_policy": "priority"}, "aging must be a number from 0 to"),
        ({"aging": float("nan"), "scheduling_policy": "shortest"}, "aging"),
        (
            {"tenant_quotas": {"a": TenantQuota(weight=2)}},
            r"tenant_quotas\['a'\].weight 2 has no effect with scheduling_policy 'fcfs'; use 'fair'",
        ),
        ({"default_tenant_quota": TenantQuota(weight=2)}, "default_tenant_quota.weight 2 has no effect"),
        ({"tenant_quotas": [1]}, r"tenant_quotas must be a dictionary of names and TenantQuotas, got \[1\]"),
        ({"tenant_quotas": {"a": 2}}, r"tenant_quotas\['a'\] must be a TenantQuota, got 2"),
        ({"default_tenant_quota": {}}, "default_tenant_quota must be a TenantQuota, got {}"),
        ({"tenant_quotas": {1: TenantQuota()}}, "tenant_quotas: a tenant must be a string"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching must be True or False"),
        ({"chunked_prefill_size": 0}, "chunked_prefill_size must be an integer >= 1"),
        ({"max_queued_requests_per_tenant": 0}, "max_queued_requests_per_tenant must be an integer >= 1"),
    ],
)
def test_bad_options_of_an_engine_are_refused(options, error):
    with pytest.raises(ValueError, match=error):
        EngineConfig(model="m", **options)


def test_an_engines_options_reach_other_processes():
    quotas = {"a": TenantQuota(weight=2.5, max_running=3)}
    config = EngineConfig(model="m", scheduling_policy="fair", tenant_quotas=quotas)
    quotas["b"] = TenantQuota()
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.tenant_quotas == {"a": TenantQuota(weight=2.5, max_running=3)}


def test_the_documented_rates_of_aging_are_those_of_the_policies():
    assert help_texts(EngineConfig)["aging"].endswith(f"takes {Priority().aging:g} and {ShortestRemaining().aging:g}")
