"""Compare an own scheduling policy with first come, first served, on four simulated ranks.

python examples/own_policy.py

To serve with it, add it to `PolicyName` and `_POLICIES` in scheduler/policy.py; docs/extending.md names its test.
"""

from dataclasses import dataclass

from expertwire.bench.scheduler.run import report
from expertwire.bench.scheduler.simulation import EOS, Simulation, StepModel
from expertwire.bench.scheduler.traces import Poisson
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.policy import Fcfs, Policy
from expertwire.scheduler.request import Request


@dataclass(frozen=True)
class ShortPromptsFirst(Policy):
    """Short prompts first; a second of waiting counts as much as `aging` fewer tokens, so nothing starves."""

    aging: float = 500.0

    def place(self, request: Request, now: float) -> tuple[float, ...]:
        return (len(request.prompt) + self.aging * now,)


def main() -> None:
    trace = Poisson(num_requests=400, rate=120.0)
    config = SchedulerConfig(
        num_ranks=4,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        max_model_len=trace.max_model_len,
        block_size=16,
        num_blocks=16384,
        max_queued_requests=4096,
        eos_token_ids=(EOS,),
        vocab_size=trace.vocab_size,
    )
    for policy in (Fcfs(), ShortPromptsFirst()):
        simulation = Simulation(trace, config, model=StepModel(), overlap=True, policy=policy)
        simulation.run()
        summary = report(simulation, ttft_s=2.0, tpot_s=0.08)
        print(f"{type(policy).__name__:<20}goodput {summary['goodput']['share']:.0%}, TTFT {summary['ttft_ms']}")


if __name__ == "__main__":
    main()
