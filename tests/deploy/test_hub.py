"""Models by name: from the hub's cache, without a network, and what is said where they are not there."""

from __future__ import annotations

import importlib.resources
import shutil

import pytest
from huggingface_hub import constants

from expertwire.deploy import cli, hub, runtime
from expertwire.engine.config.engine_config import EngineConfig

COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that holds expertwire/demo as the hub's tools write it, and no network."""
    repository = tmp_path / "models--expertwire--demo"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(str(importlib.resources.files("expertwire") / "demo_model"), snapshot)
    (repository / "refs").mkdir()
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_a_name_is_found_in_the_cache(cache, revision):
    config = runtime.with_model_folder(EngineConfig(model="expertwire/demo", revision=revision))
    assert (config.model, config.served_model_name) == (str(cache), "demo")
    assert runtime.open_tokenizer(config) is not None


def test_a_name_of_its_own_stays(cache):
    config = EngineConfig(model="expertwire/demo", served_model_name="mine")
    assert runtime.with_model_folder(config).served_model_name == "mine"


def test_inspect_takes_a_name(cache, capsys):
    assert cli.main(["inspect", "expertwire/demo"]) == 0
    assert capsys.readouterr().out.startswith("Qwen3MoeForCausalLM")


@pytest.mark.parametrize(("model", "revision"), [("expertwire/other", None), ("expertwire/demo", "v2")])
def test_what_is_not_in_the_cache_is_named(cache, model, revision):
    with pytest.raises(ValueError, match=f"model '{model}'.*cannot be reached; .*hf download {model}"):
        runtime.with_model_folder(EngineConfig(model=model, revision=revision))


def test_a_folder_is_a_folder(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "expertwire" / "demo").mkdir(parents=True)
    for model in ("expertwire/demo", "/no/such/folder", "./a/b", "a/b/c", "demo", "../demo"):
        assert not hub.is_name(model)
    config = EngineConfig(model="expertwire/demo")
    assert runtime.with_model_folder(config) is config
    with pytest.raises(ValueError, match="revision has no effect on a folder"):
        runtime.with_model_folder(EngineConfig(model="expertwire/demo", revision="v1"))
