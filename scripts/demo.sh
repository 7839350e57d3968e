#!/usr/bin/env bash
# The main job, from a bare clone: prefill in one datacenter process, decode in another. Arguments pass through.
set -u
. "$(dirname "$0")/setup.sh"
mkdir -p out
echo "2. documents: inventing towns, people and questions into out/demo_prompts.jsonl"
.venv/bin/python scripts/demo_prompts.py out/demo_prompts.jsonl || exit $?
# One secret for both ends of the link, new for every run.
export MINPRFAAS_SECRET="${MINPRFAAS_SECRET:-$(.venv/bin/python -c 'import secrets; print(secrets.token_hex(16))')}"
echo "3. two datacenters: documents above 1,024 tokens are prefilled in A, their KVCache streams to B, B answers"
echo
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # two processes share the cores
.venv/bin/torchrun --standalone --nproc-per-node 2 scripts/two_datacenters.py --prompts out/demo_prompts.jsonl \
    --threshold 1024 --link-gbps 0.02 --rtt-ms 20 --lanes 4 --check --json out/demo.jsonl --timeline out/demo_timeline.json "$@"
status=$?
echo
[ -s out/demo.jsonl ] && .venv/bin/python -m minprfaas report --json out/demo.jsonl --timeline out/demo_timeline.json
echo "4. also there: out/demo.jsonl (a line a request), out/demo_timeline.json (open in https://ui.perfetto.dev)"
echo "   next: .venv/bin/python tutorials/01_a_transformer_from_a_checkpoint.py"
exit $status
