"""`python -m expertwire.bench NAME`: the benchmarks of `expertwire bench`, and those that it does not list."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run a benchmark and return the exit code: 0 done, 1 something is wrong, 2 a wrong option."""
    if argv[:1] == ["attacks"]:
        from expertwire.bench.attacks import run as attacks

        return attacks.run(argv[1:])
    if argv[:1] == ["crossover"]:
        from expertwire.bench.serving import crossover

        return crossover.run(argv[1:])
    if argv[:1] == ["fair"]:
        from expertwire.bench.scheduler import fair

        return fair.run(argv[1:])
    if argv[:1] == ["first_contact"]:
        from expertwire.bench.first_contact import run as first_contact

        return first_contact.run(argv[1:])
    if argv[:1] == ["front"]:
        from expertwire.bench.front import run as front

        return front.run(argv[1:])
    if argv[:1] == ["kernels"]:
        from expertwire.bench.kernels import run as kernels

        return kernels.run(argv[1:])
    if argv[:1] == ["test-time"]:
        from expertwire.bench.test_time import run as test_time

        return test_time.run(argv[1:])
    from expertwire.deploy import cli

    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m expertwire.bench NAME [OPTION ...]\n")
        own = {
            "attacks": "what hostile clients do to a server and its good clients",
            "crossover": "a hybrid beside attention everywhere, by the length of the context",
            "fair": "first-token times of a tenant beside another one's storm, on simulated ranks",
            "first_contact": "all that the first half an hour on a GPU needs, whatever fails",
            "front": "tokens per second of a front's processor time, without a model",
            "kernels": "the GPU kernels beside the hardware's limits",
            "test-time": "accuracy against tokens and time of strategies of test-time compute",
        }
        for name, text in (own | {name: text for name, (_, text) in cli.BENCHES.items()}).items():
            print(f"  {name:<15}{text}")
        return 0 if argv else 2
    return cli.main(["bench", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
