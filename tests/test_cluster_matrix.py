"""Every size of cluster, as programs: a burst of conversations that share prefixes gets the answers of one process.

`python -m pytest -m heavy -s tests/test_cluster_matrix.py`; a line for each topology. Chapter 13.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minprfaas.simulator.arrivals import write_conversations

PROGRAM = [sys.executable, str(Path(__file__).resolve().parent.parent / "scripts" / "cluster.py")]
REQUESTS = 32
DEADLINE_S = 300


@pytest.mark.heavy
@pytest.mark.parametrize("topology, split", [
    ("prfaas=1,pd=1", None), ("prfaas=1,pd=2", 1), ("prfaas=1,pd=5", 2), ("prfaas=2,pd=1", None), ("prfaas=2,pd=3", 1),
    ("prfaas=2,pd=4", 3), ("prfaas=3,pd=2", 1), ("prfaas=3,pd=5", 0), ("prfaas=3,pd=5", 2), ("prfaas=3,pd=5", 4)])
def test_a_burst_of_conversations_gets_the_answers_of_one_process(checkpoints, tmp_path, topology, split):
    """All are due within a second, and later turns find the caches warm."""
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out.jsonl"
    write_conversations(trace, requests=REQUESTS, rate_rps=40.0, seed=2)
    options = ["--topology", topology, *(["--split", str(split)] if split is not None else []),
               "--model", str(checkpoints["kimi_linear"]), "--threshold", "60", "--load", f"trace:{trace}:1",
               "--block-tokens", "4", "--prefill-chunk", "64", "--lanes", "1", "--link-gbps", "0.05", "--rtt-ms", "5",
               "--ship-prefixes", "--check", "--json", str(out)]
    done = subprocess.run(PROGRAM + options, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0 and f"{REQUESTS} of {REQUESTS} answers are identical" in done.stdout, (
        done.stdout, done.stderr)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    routes = [row["route"] for row in rows]
    warm = sum(row["cached_tokens"] > 0 for row in rows)
    used = {name for row in rows for name in re.findall(r"(?:prfaas|pd)-\d", row["reason"])}
    print(f"\n{topology}, split {split}: {routes.count('prfaas')} by PrfaaS, {routes.count('pdp')} by PD-P, {warm} "
          f"with a warm cache, prefill by {', '.join(sorted(used))}; "
          f"{re.search('[0-9]+ answers in [0-9.]+ s', done.stdout)[0]}, all identical")
    assert set(routes) == ({"prfaas"} if split == 0 else {"prfaas", "pdp"}) and warm
    assert all(row["kv_bytes"] > 0 for row in rows if row["route"] == "prfaas")
