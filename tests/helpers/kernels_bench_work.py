"""Stand-ins for the measuring process of `bench kernels`; a module of its own, so that new processes can import it quickly."""

import os
import time

from expertwire.bench.kernels.results import Results


def dies_once(folder, names, quick, device, deadline):
    """In its first item; the next process goes on behind it."""
    results = Results.read(folder)
    for part in names:
        for key in ("first", "second"):
            if key not in results.suite(part)["items"]:
                results.begin(part, key)
                if key == "first":
                    os._exit(7)
                results.finish(part, key, {"findings": {"a": [0.0, 1.0]}, "ok": True})


def hangs(folder, names, quick, device, deadline):
    """As a kernel does that never returns."""
    results = Results.read(folder)
    results.begin(names[0], "endless")
    time.sleep(60)


def dies_at_once(folder, names, quick, device, deadline):
    """Before it has done anything."""
    os._exit(9)
