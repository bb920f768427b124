"""Run an engine whose ranks are Ray actors: on this machine, or on a running cluster.

python examples/ray_cluster.py                    # starts a Ray of its own here
python examples/ray_cluster.py --address HEAD:6379 --ep-size 16 --model MODEL
"""

import argparse

from expertwire import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="expertwire/demo_model")
    parser.add_argument("--address", help="of a running Ray cluster (deploy/ray_cluster.sh); unset: start one here")
    parser.add_argument("--ep-size", type=int, default=2)
    args = parser.parse_args()
    with LLM(args.model, launcher="ray", ray_address=args.address, ep_size=args.ep_size) as llm:
        for output in llm.generate(["SUM 40 70 15 ?"], SamplingParams(temperature=0, max_tokens=64)):
            print(output.prompt, output.outputs[0].text)


if __name__ == "__main__":
    main()
