"""Accuracy of the demo model by difficulty, through the offline API: `python -m expertwire.bench.demo.accuracy --help`.

Every bin is a kind and a size of problem, asked on test problems only (`expertwire.deploy.demo_task`). Columns: greedy; and
of `samples` samples at temperature 0.7 the mean (pass@1), the share of problems with at least one right sample (pass@N) and
the share where the most frequent final answer is right (maj@N; `SUM` only, since a `COUNTDOWN` question contains its
answer). Every figure is a mean over problems of independent scores and comes with the standard error of that mean; for
scores of 0 and 1 that is the binomial sqrt(p (1 - p) / problems). (`COUNTDOWN` with 3 numbers has only some 80 sets of
numbers to test on, so its problems share them and its errors are underestimates.)
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from expertwire.deploy.demo_task import EOS, WORDS, Kind, Problem, check, final_answer, make_problem
from expertwire.scheduler.sampling_params import SamplingParams

BINS: tuple[tuple[Kind, int], ...] = (
    *(("SUM", size) for size in range(3, 9)),
    *(("COUNTDOWN", size) for size in range(3, 6)),
)
DEMO_MODEL = Path(str(resources.files("expertwire"))) / "demo_model"


class Generates(Protocol):
    """An engine as `measure` needs it: `expertwire.LLM`, or anything with its `generate`."""

    def generate(self, prompts: Sequence[str], sampling_params: Sequence[SamplingParams]) -> Sequence[Any]:
        """Return one object per prompt, with `outputs[i].text` and `.token_ids`."""
        ...


@dataclass(frozen=True)
class Share:
    """A mean over problems and its standard error, both in 0..1."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f}±{self.error:.3f}"


@dataclass(frozen=True)
class Row:
    """The accuracy in one bin; `tokens` is the mean number of output tokens of a sample."""

    kind: Kind
    size: int
    problems: int
    samples: int
    greedy: Share
    pass_1: Share
    pass_n: Share
    majority: Share | None
    tokens: float


def measure(
    llm: Generates,
    *,
    bins: Iterable[tuple[Kind, int]] = BINS,
    problems: int = 200,
    samples: int = 8,
    temperature: float = 0.7,
    seed: int = 0,
) -> list[Row]:
    """Asks `llm` the test problems `seed`, `seed + 1`, ... of every bin, greedily and `samples` times with sampling."""
    return [_measure_bin(llm, kind, size, problems, samples, temperature, seed) for kind, size in bins]


def _measure_bin(
    llm: Generates, kind: Kind, size: int, problems: int, samples: int, temperature: float, seed: int
) -> Row:
    asked = [make_problem(kind, size, seed + i) for i in range(problems)]
    # A step takes size + 6 words at most and there are size - 1 of them.
    greedy = SamplingParams(temperature=0.0, max_tokens=size * (size + 6))
    # Draws follow from the seed alone: one seed for all would correlate the problems.
    sampled = [replace(greedy, temperature=temperature, n=samples, seed=seed + i) for i in range(problems)]
    texts = _texts(llm, asked, [greedy] * problems)[0]
    greedy_scores = [float(check(problem, text)) for problem, (text,) in zip(asked, texts, strict=True)]
    texts, tokens = _texts(llm, asked, sampled)
    scores = [[check(problem, text) for text in drawn] for problem, drawn in zip(asked, texts, strict=True)]
    votes = [vote(drawn) == problem.answer for problem, drawn in zip(asked, texts, strict=True)]
    return Row(
        kind,
        size,
        problems,
        samples,
        greedy=mean_share(greedy_scores),
        pass_1=mean_share([sum(drawn) / samples for drawn in scores]),
        pass_n=mean_share([float(any(drawn)) for drawn in scores]),
        majority=mean_share([float(right) for right in votes]) if kind == "SUM" else None,
        tokens=tokens / (problems * samples),
    )


def _texts(llm: Generates, asked: list[Problem], params: list[SamplingParams]) -> tuple[list[list[str]], int]:
    """Return the texts of every problem's outputs, and the number of output tokens in all."""
    results = llm.generate([problem.prompt for problem in asked], params)
    assert len(results) == len(asked), f"{len(results)} results of {len(asked)} prompts"
    texts = [[output.text for output in result.outputs] for result in results]
    return texts, sum(len(output.token_ids) for result in results for output in result.outputs)


def vote(texts: Iterable[str]) -> int | None:
    """Return the most frequent final answer; the first to appear wins a tie; None where no text has one."""
    answers = Counter(answer for text in texts if (answer := final_answer(text)) is not None)
    return answers.most_common(1)[0][0] if answers else None


def mean_share(scores: Sequence[float]) -> Share:
    """Return the mean of independent scores and its standard error."""
    return Share(statistics.fmean(scores), statistics.pstdev(scores) / math.sqrt(len(scores)))


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    n = rows[0].samples
    lines = [f"| bin | greedy | pass@1 | maj@{n} | pass@{n} | tokens/sample |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = (row.greedy, row.pass_1, row.majority or "n/a", row.pass_n, f"{row.tokens:.1f}")
        lines.append(f"| {row.kind}-{row.size} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


class TransformersLLM:
    """transformers behind `generate`, to compare an engine with; prompts of a call must have one length and one setting."""

    def __init__(self, model: str | Path, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()

    def generate(self, prompts: Sequence[str], sampling_params: Sequence[SamplingParams]) -> list[SimpleNamespace]:
        """Generate as `expertwire.LLM.generate` does, but the draws follow from the first request's seed alone."""
        import torch

        params = sampling_params[0]
        settings: dict[str, Any] = {
            "max_new_tokens": params.max_tokens,
            "num_return_sequences": params.n,
            "do_sample": False,
        }
        if params.temperature > 0:
            torch.manual_seed(params.seed or 0)
            settings |= {"do_sample": True, "temperature": params.temperature, "top_k": 0}
        inputs = self._tokenizer(list(prompts), return_tensors="pt", return_token_type_ids=False)
        ids = self._model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        outputs = [self._output(row) for row in ids.tolist()]
        return [SimpleNamespace(outputs=outputs[i : i + params.n]) for i in range(0, len(outputs), params.n)]

    def _output(self, token_ids: list[int]) -> SimpleNamespace:
        eos = WORDS.index(EOS)
        if eos in token_ids:
            token_ids = token_ids[: token_ids.index(eos) + 1]
        return SimpleNamespace(
            text=self._tokenizer.decode(token_ids, skip_special_tokens=True), token_ids=tuple(token_ids)
        )


def main(argv: list[str] | None = None) -> None:
    """Measures the demo model's accuracy by difficulty, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--engine", choices=("expertwire", "transformers"), default="expertwire")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--ep-size", type=int, default=1, help="expert-parallel ranks (expertwire only)")
    parser.add_argument("--problems", type=int, default=200, help="problems per bin")
    parser.add_argument("--samples", type=int, default=8, help="samples per problem")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    if args.engine == "transformers":
        rows = measure(
            TransformersLLM(args.model, args.dtype), problems=args.problems, samples=args.samples, seed=args.seed
        )
    else:
        from expertwire import LLM

        with LLM(str(args.model), dtype=args.dtype, ep_size=args.ep_size) as llm:
            rows = measure(llm, problems=args.problems, samples=args.samples, seed=args.seed)
    seconds = time.perf_counter() - started
    print(f"{args.engine}, {args.dtype}, {args.problems} problems a bin, {seconds:.0f} s\n\n{table(rows)}")
    if args.out is not None:
        run = vars(args) | {"model": args.model.name, "seconds": round(seconds, 1)}
        run["rows"] = [asdict(row) for row in rows]
        del run["out"]
        args.out.write_text(json.dumps(run, indent=1) + "\n")


if __name__ == "__main__":
    main()
