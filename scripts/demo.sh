#!/usr/bin/env bash
# The main job, from a bare clone: prefill in one datacenter process, decode in another. Arguments pass through to
# scripts/two_datacenters.py; paths among them are relative to where you stand.
set -u
. "$(dirname "$0")/setup.sh"
out="${at}out"
mkdir -p "$out" || exit 1
echo "2. documents: inventing towns, people and questions into $out/demo_prompts.jsonl"
"$python" "${at}scripts/demo_prompts.py" "$out/demo_prompts.jsonl" || exit
# One secret for both ends of the link, new for every run.
export MINPRFAAS_SECRET="${MINPRFAAS_SECRET:-$("$python" -c 'import secrets; print(secrets.token_hex(16))')}"
echo "3. two datacenters: documents above 1,024 tokens are prefilled in A, their KVCache streams to B, B answers"
echo
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # two processes share the cores
"$python" "${at}scripts/two_datacenters.py" --prompts "$out/demo_prompts.jsonl" --threshold 1024 --link-gbps 0.02 \
    --rtt-ms 20 --lanes 4 --check --json "$out/demo.jsonl" --timeline "$out/demo_timeline.json" "$@"
status=$?

# made NAME: whether this run has written it: what an earlier one left is older than the documents.
made() { [ "$out/$1" -nt "$out/demo_prompts.jsonl" ]; }

if made demo.jsonl && made demo_timeline.json; then
    echo
    "$python" -m minprfaas report --json "$out/demo.jsonl" --timeline "$out/demo_timeline.json" --out "$out/report.html"
    echo "4. written: $out/demo.jsonl (a line a request), $out/demo_timeline.json (opens in https://ui.perfetto.dev)"
fi
[ $status -ne 0 ] || echo "   next: . ${at}.venv/bin/activate && python ${at}tutorials/00_the_bandwidth_wall.py"
exit $status
