"""Scaled rotary embeddings of published models give the frequencies and factors that transformers computes for them."""

import expertwire  # noqa: F401  # isort: skip  (first: transformers must not take our `kernels` for another package's)

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from expertwire.kernels.ops import rotary
from expertwire.kernels.ops.variants import LinearScaling, Llama3, LongRope, Rope, Yarn

DEEPSEEK = {"factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0}
# Phi-4-mini's lists rise from 1 over 48 pairs; any other rising ones tell as much.
SHORT, LONG = tuple(1 + i / 100 for i in range(48)), tuple(1.1**i for i in range(48))
# name: (rope of `size` numbers, transformers' name and keys, its max_position_embeddings)
MODELS = {
    "DeepSeek-V3": (
        Rope(theta=1e4, size=64, scaling=Yarn(**DEEPSEEK, original_max_position=4096, mscale=1.0, mscale_all_dim=1.0)),
        ("yarn", {**DEEPSEEK, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}),
        163840,
    ),
    "DeepSeek-V2": (
        Rope(
            theta=1e4, size=64, scaling=Yarn(**DEEPSEEK, original_max_position=4096, mscale=0.707, mscale_all_dim=0.707)
        ),
        ("yarn", {**DEEPSEEK, "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 0.707}),
        163840,
    ),
    "two mscales": (
        Rope(theta=1e4, size=64, scaling=Yarn(**DEEPSEEK, original_max_position=4096, mscale=1.0, mscale_all_dim=0.5)),
        ("yarn", {**DEEPSEEK, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.5}),
        163840,
    ),
    "Kimi K2": (
        Rope(
            theta=5e4,
            size=64,
            scaling=Yarn(
                factor=32.0, original_max_position=4096, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0
            ),
        ),
        (
            "yarn",
            {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096}
            | {"mscale": 1.0, "mscale_all_dim": 1.0},
        ),
        131072,
    ),
    "a ramp without width": (
        Rope(
            theta=1e4,
            size=64,
            scaling=Yarn(factor=8.0, original_max_position=4096, beta_fast=2.0, beta_slow=2.0, truncate=False),
        ),
        (
            "yarn",
            {"factor": 8.0, "beta_fast": 2.0, "beta_slow": 2.0, "original_max_position_embeddings": 4096}
            | {"truncate": False},
        ),
        32768,
    ),
    "gpt-oss": (
        Rope(theta=1.5e5, size=64, scaling=Yarn(factor=32.0, original_max_position=4096, truncate=False)),
        (
            "yarn",
            {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096}
            | {"truncate": False},
        ),
        131072,
    ),
    "Mistral Small 4": (
        Rope(
            theta=1e4,
            size=64,
            scaling=Yarn(factor=128.0, original_max_position=8192, mscale=1.0, mscale_all_dim=1.0),
        ),
        (
            "yarn",
            {"factor": 128.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 8192}
            | {"mscale": 1.0, "mscale_all_dim": 1.0},
        ),
        1048576,
    ),
    "an attention factor": (
        Rope(theta=1e6, size=128, scaling=Yarn(factor=4.0, original_max_position=32768, attention_factor=1.5)),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 32768, "attention_factor": 1.5}),
        131072,
    ),
    "Llama 3.1": (
        Rope(
            theta=5e5,
            size=128,
            scaling=Llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192),
        ),
        (
            "llama3",
            {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        ),
        131072,
    ),
    "linear": (Rope(theta=1e4, size=128, scaling=LinearScaling(factor=4.0)), ("linear", {"factor": 4.0}), 16384),
    "Phi-4-mini": (
        Rope(
            theta=1e4,
            size=96,
            scaling=LongRope(short_factor=SHORT, long_factor=LONG, original_max_position=4096, max_position=131072),
        ),
        (
            "longrope",
            {"short_factor": list(SHORT), "long_factor": list(LONG), "original_max_position_embeddings": 4096},
        ),
        131072,
    ),
}


def transformers_tables(rope, kind, keys, max_position, num_positions):
    """Cosines and sines [positions, size / 2] as transformers' embedding modules make them."""
    config = LlamaConfig(
        head_dim=rope.size,
        hidden_size=rope.size,
        num_attention_heads=1,
        max_position_embeddings=max_position,
        rope_parameters={"rope_type": kind, "rope_theta": rope.theta, "factor": None, **keys},
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=num_positions)
    angles = torch.arange(num_positions).float()[:, None] * frequencies
    return angles.cos() * factor, angles.sin() * factor


@pytest.mark.parametrize("num_positions", [300, 4097])
@pytest.mark.parametrize("name", MODELS)
def test_as_transformers(name, num_positions):
    rope, (kind, keys), max_position = MODELS[name]
    cos, sin = transformers_tables(rope, kind, keys, max_position, num_positions)
    # The rows of long sequences are the last ones.
    tables = [table[-num_positions:] for table in rotary.tables(num_positions, rope, "cpu")]
    # A frequency's last bit turns position 4096 by 2^-12.
    close = {"rtol": 0, "atol": 6e-4}
    torch.testing.assert_close(tables[0], torch.cat((cos, cos), 1), **close)
    torch.testing.assert_close(tables[1], torch.cat((-sin, sin), 1), **close)


def test_long_sequences_have_rows_of_their_own_behind_those_of_short_ones():
    rope = MODELS["Phi-4-mini"][0]
    for number in (0, 1):
        few, short, both = (rotary.tables(num, rope, "cpu")[number] for num in (300, 4096, 5000))
        assert [len(table) for table in (few, short, both)] == [300, 4096, 4096 + 5000]
        assert torch.equal(few, short[:300])
        assert torch.equal(short, both[:4096])
        assert not torch.allclose(both[:300], both[4096:4396], atol=0.1)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 192**-0.5),
        (Llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192), 192**-0.5),
        (Yarn(factor=40.0, original_max_position=4096), 192**-0.5),
        # The figures of DeepSeek-V3 and V2: 1.3689 and 1.2608 squared.
        (Yarn(factor=40.0, original_max_position=4096, mscale=1.0, mscale_all_dim=1.0), 192**-0.5 * 1.3688879**2),
        (Yarn(factor=40.0, original_max_position=4096, mscale=0.707, mscale_all_dim=0.707), 192**-0.5 * 1.2608038**2),
        (Yarn(factor=1.0, original_max_position=4096, mscale=1.0, mscale_all_dim=1.0), 192**-0.5),
    ],
)
def test_softmax_scale(scaling, expected):
    assert rotary.softmax_scale(192, scaling) == pytest.approx(expected, rel=1e-6)


def test_the_attention_factor_of_gpt_oss():
    tables = rotary.tables(1, MODELS["gpt-oss"][0], "cpu")
    assert tables[0].unique().tolist() == pytest.approx([0.1 * math.log(32) + 1])


def test_nothing_rotated():
    assert [table.shape for table in rotary.tables(7, Rope(theta=1e4, size=0), "cpu")] == [(7, 0), (7, 0)]
