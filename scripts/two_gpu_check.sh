#!/usr/bin/env bash
# What needs two GPUs, in one go and in about 11 minutes: bash scripts/two_gpu_check.sh [--cpu] [PART …]
#
#   tests     the fabric's gpu tests
#   demo      two datacenters on two GPUs: the embedded model, a dense and a hybrid checkpoint (float32 --check, bf16)
#   topology  PrfaaS and PD-P on GPU 0, PD-D on GPU 1: KVCache by NCCL inside the PD datacenter, by the link across
#   fabric    the fabric's GB/s beside raw NCCL's; a prefill slowed by streaming; a peer killed in mid-transfer
#   kill      the topology with a second PD-D, in which PD-P and a PD-D are killed and come back
#   figure    figure 1: dense and hybrid over emulated lines of 1, 10, 100 Gbps
#   lanes     1, 2, 4, 8, 16 lanes GPU to GPU beside raw Gloo
#
# Each part writes $OUT/PART.txt (OUT: out/two_gpus) and a failing one stops no other. Where MODELS names a folder, the
# checkpoints stay there for the next time. --cpu rehearses every line with tiny models and Gloo in NCCL's place; its
# figures mean nothing.
set -u
cd "$(dirname "$0")/.."
where=cuda
if [ "${1:-}" = --cpu ]; then where=cpu; shift; fi
parts="${*:-tests demo topology fabric kill figure lanes}"
OUT="${OUT:-out/two_gpus}"; mkdir -p "$OUT"
work="$(mktemp -d)"; trap 'rm -rf "$work"' EXIT
export PYTHONPATH=. TOKENIZERS_PARALLELISM=false NCCL_NVLS_ENABLE=0  # NVLink multicast stays off
export MINPRFAAS_SECRET="$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')"
dense="${MODELS:-$work}/dense" hybrid="${MODELS:-$work}/hybrid" began=$SECONDS

if [ $where = cuda ]; then
    gpus="$(python3 -c 'import torch; print(torch.cuda.device_count())' 2>"$work/errors")" || { cat "$work/errors"; exit 2; } >&2
    [ "$gpus" -ge 2 ] || { echo "error: this needs two GPUs and finds $gpus; --cpu rehearses it without" >&2; exit 2; }
    patience=1
    export OMP_NUM_THREADS=8 NCCL_DEBUG=VERSION
    gpu0=cuda:0 gpu1=cuda:1 shapes="qwen3-0.6b hybrid-1b"
    lengths="8192 8192 512 4096" threshold=4097 chunk=1024
    dtype=bfloat16 rounds=${ROUNDS:-12}
    tests="-m gpu" figure="--models $dense $hybrid --prefill-chunk 8192" fabric="" lanes=""
else
    patience=4  # with a busy machine
    export OMP_NUM_THREADS=1
    gpu0=cpu gpu1=cpu shapes="tiny-dense"
    lengths="300 300 150 200" threshold=250 chunk=128 dtype=float32
    rounds=4
    tests="-k digest" figure="--models $dense --tokens 64 256 --gbps 0.01 0.1 --dtype float32 --prefill-chunk 64"
    fabric="--tokens 256 --mib 1 --repeats 2 --dtype float32" lanes="--lanes 1 2 --mib 16 --chunk-mib 1 --repeats 1"
fi

wants() { [[ " $parts " == *" $1 "* ]]; }

say() { echo "== $* (at $((SECONDS - began)) s)"; }

# step PART SECONDS COMMAND…: what it says goes to the screen and to the part's file; a failure is said, no more.
step() {
    local part=$1 limit=$2; shift 2
    timeout -k 5 $((limit * patience)) "$@" 2>"$work/errors" | tee -a "$OUT/$part.txt"
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || { echo "FAILED with status $status: $*"; tail -8 "$work/errors"; } | tee -a "$OUT/$part.txt"
    grep -v Warning "$work/errors" >>"$OUT/errors.log"
}

two() { step demo 90 python3 scripts/two_datacenters.py --device $where --prefill-chunk $chunk --lanes 8 "$@"; }

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# node NAME DEVICE: one process of the topology, in the background; its process id is in $pid.
node() {
    python3 scripts/cluster.py "${options[@]}" --node "$1" --device "$2" >>"$OUT/nodes.log" 2>&1 &
    pid=$!
    echo $pid >>"$work/nodes"
}

# start TOPOLOGY PART OPTIONS…: the nodes of a topology with PrfaaS and PD-P on one GPU and the PD-Ds on the other.
start() {
    local topology=$1; shift
    options=(--topology "$topology" --split 1 --store "127.0.0.1:$(free_port)" --prompts "$work/prompts.jsonl"
             --threshold $threshold --prefill-chunk $chunk --lanes 8 --link-timeout-s 5 "$@")
    node prfaas-0 $gpu0
    node pd-0 $gpu0; pdp=$pid
    node pd-1 $gpu1; pdd=$pid
    [ "$topology" = prfaas=1,pd=2 ] || node pd-2 $gpu1
}

# front PART SECONDS: the front end of what was started; when it has ended, so have the nodes, or they are ended.
front() {
    step "$1" "$2" python3 scripts/cluster.py "${options[@]}" --node front --device $gpu1 --check \
        --json "$OUT/$1.jsonl"
    for _ in $(seq 50); do
        kill -0 $(cat "$work/nodes") 2>/dev/null || break
        sleep 0.2
    done
    kill -9 $(cat "$work/nodes") 2>/dev/null
    rm "$work/nodes"
}

for part in $parts; do rm -f "$OUT/$part.txt"; done
rm -f "$OUT/nodes.log" "$OUT/errors.log"
python3 - <<'EOF' | tee "$OUT/machine.txt"
import torch
names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
print(f"torch {torch.__version__}, NCCL {torch.cuda.nccl.version() if names else 'none'}, {names or 'no GPU'}")
EOF
python3 scripts/demo_prompts.py "$work/prompts.jsonl" --next-turn 0 --tokens $lengths
if [[ $parts =~ demo|topology|kill|fabric|figure ]]; then
    read -r dense_shape hybrid_shape <<<"$shapes"
    [ -e "$dense/config.json" ] || python3 scripts/random_checkpoint.py --shape "$dense_shape" "$dense" &
    [ -z "$hybrid_shape" ] || [ -e "$hybrid/config.json" ] ||
        python3 scripts/random_checkpoint.py --shape "$hybrid_shape" "$hybrid" &
    wait
    [ -n "$hybrid_shape" ] || hybrid="$dense"
fi

if wants tests; then
    say tests
    step tests 150 python3 -m pytest -q -p no:cacheprovider $tests tests/test_transport_fabric.py
fi
if wants demo; then
    say "demo: embedded model, 100 Mbit/s emulated"
    two --prompts "$work/prompts.jsonl" --threshold $threshold --link-gbps 0.1 --rtt-ms 20 --check
    for model in $dense $hybrid; do
        say "demo: $(basename $model), float32, 10 Gbit/s emulated"
        two --model $model --prompts "$work/prompts.jsonl" --threshold $threshold --link-gbps 10 --rtt-ms 20 --check
        say "demo: $(basename $model), $dtype, unthrottled"
        two --model $model --prompts "$work/prompts.jsonl" --threshold $threshold --dtype $dtype
    done
fi
if wants topology; then
    for model in $dense $hybrid; do
        say "topology: $(basename $model), float32, PrfaaS and PD-P beside each other"
        start prfaas=1,pd=2 --model $model --link-gbps 10 --rtt-ms 20
        front topology 100
    done
fi
if wants fabric; then
    for table in speed prefill failures; do
        say "fabric: $table"
        step fabric 100 python3 scripts/bench.py fabric --device $where --model $dense --table $table $fabric
    done
fi
if wants kill; then
    say "kill: PD-P, then a PD-D, each started again"
    many=$(for _ in $(seq $rounds); do echo $lengths; done)
    python3 scripts/demo_prompts.py "$work/prompts.jsonl" --next-turn 0 --tokens $many
    start prfaas=1,pd=3 --model $dense
    (   answers() { for _ in $(seq 900); do [ "$(grep -c '^\[' "$OUT/kill.txt")" -ge $1 ] && return; sleep 0.1; done; }
        answers 2; kill -9 $pdp; echo "-- killed pd-0, which prefilled" >>"$OUT/kill.txt"; node pd-0 $gpu0
        answers 6; kill -9 $pdd; echo "-- killed pd-1, which decoded" >>"$OUT/kill.txt"; node pd-1 $gpu1 ) &
    front kill 240
fi
if wants figure; then
    say "figure 1"
    step figure 180 python3 scripts/bench.py figure_1 --device $where $figure
fi
if wants lanes; then
    say "lanes"
    step lanes 180 python3 scripts/bench.py link --table lanes $lanes
fi
say "done: tables in $OUT"
