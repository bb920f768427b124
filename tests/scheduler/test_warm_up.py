import subprocess
import sys
from pathlib import Path

CODE = """
from helpers.sim_ranks import WINDOWED, SimCluster, make_config, make_request
from expertwire.scheduler._compiled import admissions, blocks, prefixes, rows, steps
from expertwire.scheduler.warm_up import warm_up

MODULES = (admissions, blocks, prefixes, rows, steps)

def compiled():
    functions = [f for module in MODULES for f in vars(module).values() if hasattr(f, "signatures")]
    return {f"{f.__module__}.{f.__name__}": len(f.signatures) for f in functions}

warm_up()
before = compiled()
cluster = SimCluster(make_config(num_blocks=9, max_num_seqs=4), specs=WINDOWED, overlap=True, check=False)
cluster.submit(*(make_request(key, 2 + 5 * key % 17, shared=6, max_tokens=5 + key % 13, ignore_eos=True) for key in range(30)))
for key in range(6):
    cluster.step()
running = next(key for key in cluster.tokens if cluster.tokens[key] and key not in cluster.finish)
parent = make_request(running, 2 + 5 * running % 17, shared=6)
child = make_request(100, 5, max_tokens=13)
child.prompt = parent.prompt
cluster.fork(running, child)
cluster.break_at(running, len(parent.prompt) + len(cluster.tokens[running]))
cluster.drain()
assert cluster.failed
assert cluster.scheduler.stats()["preemptions"], "no preemption"
print({name: (count, compiled()[name]) for name, count in before.items() if compiled()[name] != count})
"""


def test_warm_up_compiles_every_loop():
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1]
    )
    assert (done.returncode, done.stdout.strip()) == (0, "{}"), done.stderr
