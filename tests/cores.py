"""How many processes a test may start that compute: the cores, shared by the processes of tests."""

import os

NUM_CORES = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
