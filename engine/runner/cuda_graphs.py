"""Work of a GPU that is captured once and replayed: CUDA graphs. Never run on a GPU by us."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Captured(NamedTuple):
    """`replay` does it again, with what its inputs hold by then, and into `out`."""

    replay: Callable[[], None]
    out: Tensor


# Of work on the current device that waits for nothing and leaves its inputs where they are.
Capture = Callable[[Callable[[], Tensor]], Captured]


def cuda(barrier: Callable[[], None]) -> Capture:
    """Graphs that share memory: what one leaves in `out` is good until another is replayed. The largest comes first.

    Args:
        barrier: waits for all ranks. They wait for each other in the work, and one that is late, as it has compiled or loaded for
            longer, must not let the others' kernels run out of time (vllm#55319).
    """
    pool = torch.cuda.graph_pool_handle()

    def capture(work: Callable[[], Tensor]) -> Captured:
        barrier()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()  # what allocates or compiles on first use does so now
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Only of this thread: the process group's watchdog asks for events meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            out = work()
        return Captured(graph.replay, out)

    return capture
