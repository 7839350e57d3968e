#!/usr/bin/env bash
# Everything that needs GPUs, in one go: the gpu tests, the demo on two GPUs with the embedded model and with a checkpoint
# of Qwen3-0.6B's shape (random weights), and the link's lanes from GPU to GPU. Usage: bash scripts/two_gpu_check.sh OUT
set -u
cd "$(dirname "$0")/.."
out="${1:-out/two_gpus}"; mkdir -p "$out"
export PYTHONPATH=. OMP_NUM_THREADS=8 TOKENIZERS_PARALLELISM=false
two() { timeout 80 python3 -m torch.distributed.run --standalone --nproc-per-node 2 scripts/two_datacenters.py --device cuda "$@" 2>"$out/errors.log" || tail -5 "$out/errors.log"; }
python3 scripts/random_checkpoint.py --shape qwen3-0.6b /tmp/qwen3-0.6b &
python3 scripts/demo_prompts.py /tmp/embedded.jsonl
python3 scripts/demo_prompts.py /tmp/qwen.jsonl --tokens 8192 8192 512
echo "== embedded model, 100 Mbit/s emulated"
two --prompts /tmp/embedded.jsonl --link-gbps 0.1 --rtt-ms 20 --check --json "$out/embedded.jsonl" --timeline "$out/embedded_timeline.json"
wait
echo "== Qwen3-0.6B shape, float32, 10 Gbit/s emulated"
two --model /tmp/qwen3-0.6b --prompts /tmp/qwen.jsonl --link-gbps 10 --rtt-ms 20 --lanes 8 --check --json "$out/qwen_float32.jsonl" --timeline "$out/qwen_timeline.json"
echo "== Qwen3-0.6B shape, bfloat16, unthrottled"
two --model /tmp/qwen3-0.6b --prompts /tmp/qwen.jsonl --lanes 8 --dtype bfloat16 --json "$out/qwen_bfloat16.jsonl"
echo "== link lanes, GPU 0 to GPU 1"
timeout 90 python3 scripts/bench.py link --table lanes 2>>"$out/errors.log"
echo "== gpu tests"
timeout 120 python3 -m pytest -q -m gpu tests 2>&1 | tail -15
