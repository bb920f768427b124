"""`expertwire bench quantize`: what holding experts in fewer bits costs in accuracy, beside the model as its checkpoint has it.

Both run in this process on a text: at every position how far the quantised model's distribution of the next token is from the
unquantised one's, KL(unquantised || quantised), how often the likeliest token is the same, and how well each predicts the text.

T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expertwire.bench.serving.rank_model import RankModel
from expertwire.deploy import demo_task
from expertwire.deploy.options import model_folder
from expertwire.engine.frontend.tokenizer import Tokenizer
from expertwire.kernels.formats import ON_THE_FLY

_TEXT = """A token enters a layer as a vector, and a small matrix, the router, says which experts shall see it. Most experts never
do: that is the point. The ones that were chosen multiply it by their weights, and the results come home, each weighed by how sure
the router was. When the weights of an expert are held in eight bits, or in four, less has to be read from memory for each token,
and reading memory is what the time is spent on. But a number that is held in four bits is one of sixteen, and whatever lay
between two of them has moved. Whether anyone notices depends on how the sixteen are spaced, on how many neighbours share a scale,
and on the text: a sentence whose next word is certain survives rounding, a list of prime numbers may not."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder of a checkpoint (default: the demo model)")
    text = "formats to measure (default: all)"
    parser.add_argument("--formats", nargs="+", choices=tuple(ON_THE_FLY), default=tuple(ON_THE_FLY), help=text)
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="text to run the model on (default: some prose, or the demo model's own)",
    )
    parser.add_argument(
        "--tokens",
        type=_at_least_two,
        default=512,
        metavar="N",
        help="number of tokens of the text (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")


def _at_least_two(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be an integer >= 2, got {text}")
    return int(text)


def main(args: argparse.Namespace) -> int:
    """Measure and print; the exit code."""
    folder = model_folder(args)
    tokenizer = Tokenizer.open(folder)
    if args.text or args.model:
        texts = [tokenizer.encode(args.text.read_text() if args.text else _TEXT)[: args.tokens]]
    else:
        texts = list(_demo_texts(tokenizer, args.tokens))
    if min(map(len, texts)) < 2:
        raise ValueError("--text must have at least 2 tokens")
    torch.set_num_threads(1)
    found, total = list(measure(folder, texts, args.formats)), sum(map(len, texts))
    print(f"{folder}: {total} tokens")
    print(f"{'experts':<14}{'MB':>10}{'mean KL':>12}{'99 % KL':>12}{'same best':>12}{'nats a token':>15}")
    for row in found:
        print(
            f"{row['experts']:<14}{row['expert_bytes'] / 1e6:>10.2f}{row['mean_kl']:>12.2e}{row['p99_kl']:>12.2e}"
            f"{row['same_best']:>11.1%} {row['nats_per_token']:>15.4f}"
        )
    if args.json:
        args.json.write_text(json.dumps({"model": folder, "tokens": total, "rows": found}, indent=1) + "\n")
    return 0


def _demo_texts(tokenizer: Tokenizer, num_tokens: int) -> Iterator[list[int]]:
    """Problems and their solutions, which are all that the demo model knows."""
    rng, total = random.Random(0), 0
    while total < num_tokens:
        kind = rng.choice(list(demo_task.SIZES))
        problem, solution = demo_task.make_example(kind, rng.choice(demo_task.SIZES[kind]), rng.randrange(1 << 30))
        yield (ids := tokenizer.encode(f"{problem.prompt} {solution}"))
        total += len(ids)


def measure(folder: str, texts: list[list[int]], formats: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Return a row for the unquantised model, then one for each format.

    Raises:
        ValueError: the checkpoint has no experts, or they are quantised already.
    """
    max_tokens = -(-max(map(len, texts)) // 16) * 16
    plain = RankModel(folder, "auto", max_tokens=max_tokens)
    if plain.config.moe is None:
        raise ValueError(f"{folder} has no experts to quantise")
    if plain.config.quantization is not None and plain.config.quantization.expert_method is not None:
        raise ValueError(f"{folder} has experts in the format {plain.config.quantization.expert_method} already")
    right_TV = _log_probabilities(plain, texts)
    yield _row("as they are", plain, right_TV, right_TV, texts)
    for name in formats:
        quantised = RankModel(folder, "auto", max_tokens=max_tokens, quantize=name)
        yield _row(name, quantised, right_TV, _log_probabilities(quantised, texts), texts)


def _log_probabilities(model: RankModel, texts: list[list[int]]) -> np.ndarray:
    """fp64 [T, V], of each token but a text's first."""
    logits_TV = np.concatenate([model.logits(ids[:-1]) for ids in texts])
    return torch.from_numpy(logits_TV).double().log_softmax(-1).numpy()


def _row(
    name: str, model: RankModel, right_TV: np.ndarray, found_TV: np.ndarray, texts: list[list[int]]
) -> dict[str, Any]:
    divergence_T = (np.exp(right_TV) * (right_TV - found_TV)).sum(-1)
    token_T = np.concatenate([ids[1:] for ids in texts])
    moes = [layer.moe for layer in model.model.layers if layer.moe is not None]
    return {
        "experts": name,
        "expert_bytes": sum(tensor.nbytes for moe in moes for tensor in moe.experts.weights),
        "mean_kl": float(divergence_T.mean()),
        "p99_kl": float(np.quantile(divergence_T, 0.99)),
        "same_best": float((right_TV.argmax(-1) == found_TV.argmax(-1)).mean()),
        "nats_per_token": float(-found_TV[np.arange(len(token_T)), token_T].mean()),
    }
