"""`python -m expertwire.bench.first_contact.stage_process TARGET DEVICE OUT ROWS SECONDS`: what `bench
first_contact` runs a stage with."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expertwire.bench.first_contact.stage_record import Record

_PARENT_CHECK_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """Arguments of a stage.

    Args:
        device: "cuda", or "cpu", where the GPU's kernels are interpreted on toy sizes and nothing is timed.
        out: the folder of the results.
        until: on the clock of `time.time`: when it will be ended.
        record: takes what it finds.
    """

    device: str
    out: Path
    until: float
    record: Record

    @property
    def toy(self) -> bool:
        return self.device == "cpu"


def main(argv: Sequence[str]) -> None:
    """Run TARGET ("module:function") with a `Run`."""
    target, device, out, rows, seconds = argv
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    broken = _cuda_is_broken if device == "cuda" else _never
    record = Record(Path(rows), timed=device == "cuda", broken=broken)
    module, _, function = target.partition(":")
    run = Run(device=device, out=Path(out), until=time.time() + float(seconds), record=record)
    getattr(importlib.import_module(module), function)(run)
    record.end()


def _watch(parent: int) -> None:
    """Exit when the supervisor has ended: a stage that outlives it would keep the GPU."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os._exit(1)


def _cuda_is_broken() -> bool:
    import torch

    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def _never() -> bool:
    return False


if __name__ == "__main__":
    main(sys.argv[1:])
