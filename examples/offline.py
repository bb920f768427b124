"""Generate offline: batches, seeds, log-probabilities and chats, with experts sharded over two ranks.

python examples/offline.py [MODEL]
"""

import sys

from expertwire import LLM, SamplingParams


def main(model: str) -> None:
    with LLM(model, ep_size=2) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=64, logprobs=1)
        for output in llm.generate(["SUM 40 70 15 ?", "COUNTDOWN 3 4 2 TO 14 ?"], greedy):
            completion = output.outputs[0]
            print(f"{output.prompt} {completion.text} (log-probability {completion.cumulative_logprob:.3f})")

        # Four samples of one prompt; the seed reproduces them in any batch.
        sampled = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=64, n=4, seed=7)
        [output] = llm.generate(["SUM 12 34 56 ?"], sampled)
        for completion in output.outputs:
            print(f"  sample {completion.index}: {completion.text}")

        [answer] = llm.chat([{"role": "user", "content": "SUM 40 70 15"}], greedy)
        print(answer.outputs[0].text)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "expertwire/demo_model")
