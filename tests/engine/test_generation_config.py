"""Defaults of sampling parameters: the model's `generation_config.json`, what a request sets, and what fits."""

from __future__ import annotations

import dataclasses
import json

import pytest
from helpers.fake_controller import INFO

from expertwire.engine.config.generation_config import default_sampling_params
from expertwire.scheduler.sampling_params import SamplingParams

FILE = {
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "repetition_penalty": None,
    "max_new_tokens": 100,
    "eos_token_id": [1, 2],
    "transformers_version": "5.0",
}
FOUND = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_tokens": 100}


@pytest.fixture
def folder(tmp_path):
    def write(**values):
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
        return tmp_path

    return write


def test_the_model_s_file_is_read(folder):
    assert default_sampling_params(folder(**FILE), "auto") == FOUND
    assert default_sampling_params(folder(**FILE), "model") == FOUND
    assert default_sampling_params(folder(**FILE), "none") == {}


def test_a_missing_file_is_an_error_only_if_it_was_asked_for(tmp_path):
    assert default_sampling_params(tmp_path, "auto") == default_sampling_params(tmp_path, "none") == {}
    with pytest.raises(
        ValueError, match=r"generation_config 'model'.*has no generation_config.json; use 'auto' or 'none'"
    ):
        default_sampling_params(tmp_path, "model")


def test_a_bad_value_names_file_and_field(folder):
    with pytest.raises(ValueError, match=r"generation_config.json: top_p must be in \(0, 1\], got 7; with .*'none'"):
        default_sampling_params(folder(top_p=7), "auto")
    assert default_sampling_params(folder(top_p=7), "none") == {}


def test_what_a_request_sets_comes_first():
    info = dataclasses.replace(INFO, default_sampling_params=FOUND)
    assert info.sampling_params() == SamplingParams(**FOUND)
    assert info.sampling_params(temperature=0.0, max_tokens=5) == SamplingParams(
        **{**FOUND, "temperature": 0, "max_tokens": 5}
    )
    assert INFO.sampling_params() == SamplingParams()


def test_without_max_tokens_an_output_takes_what_fits():
    assert SamplingParams().most_output_tokens(10, 64) == 54
    assert SamplingParams(max_tokens=7).most_output_tokens(10, 64) == 7
    assert SamplingParams(max_tokens=700).most_output_tokens(10, 64) == 54
    assert SamplingParams(min_tokens=700).min_tokens == 700
