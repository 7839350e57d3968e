"""How fast one GPU runs what is here, beside what the card could do and beside other libraries. Chapters 04, 05.

    python scripts/bench.py gpu                        all cases, the models' pieces compiled
    python scripts/bench.py gpu --cases decode --no-compile
    python scripts/bench.py gpu --peers DIR            and the checkouts that lie in DIR

First the card's ceilings: a copy and a matrix product. A decode step's floor is its weights and KVCache, each read once
at the copy's speed; a prefill's is its products at the matrix product's. The models have random weights and real
shapes; the KVCache that a decode step reads is random. Without decode among the cases the process is one that only
prefills, whose cuBLAS has no workspaces. Then, in the same run, the peers: Transformers, gpt-fast,
flash-linear-attention and nano-vllm, as far as they are installed or lie in DIR under these names.
"""

import torch

from benches import gpu_cases
from benches import at_least_one
from benches.peers import MODULES
from benches.reading import measure_machine, print_readings, write_readings
from minprfaas.engine.pieces import Phase, suit_products_to
from minprfaas.errors import ArgumentParser, UserError


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=sorted(gpu_cases.CASES), choices=sorted(gpu_cases.CASES),
                        help="what to time (all); kda is the delta rule alone, streams a prefill whose KVCache leaves")
    parser.add_argument("--models", nargs="+", default=list(gpu_cases.MODELS), choices=list(gpu_cases.MODELS),
                        help="shapes (all); llama-3-8b decodes only")
    parser.add_argument("--batches", nargs="+", type=at_least_one, default=[1, 64], metavar="N",
                        help="of a decode step (1 64)")
    parser.add_argument("--no-compile", action="store_true", help="leave the models' pieces as they are")
    parser.add_argument("--peers", metavar="DIR",
                        help="folder with checkouts of gpt-fast, flash-linear-attention, nano-vllm, transformers")
    parser.add_argument("--without", nargs="+", default=[], choices=sorted(MODULES), metavar="PEER",
                        help=f"of {', '.join(sorted(MODULES))}: those that are not to be timed")
    parser.add_argument("--json", metavar="FILE", help="write the readings, and what the card can do, to a file")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("bench.py gpu needs CUDA, and there is none here")
    if "decode" not in args.cases:
        suit_products_to({Phase.PREFILL}, torch.device("cuda"))
    machine = measure_machine(torch.cuda.get_device_name(), "cuda")
    torch.cuda.empty_cache()
    print(machine, flush=True)
    chosen = gpu_cases.Chosen(args.models, args.batches, not args.no_compile, args.peers, args.without)
    readings = []
    for name in args.cases:
        for reading in gpu_cases.CASES[name](machine, chosen):
            readings.append(reading)
            for line in reading.rows():
                print("  " + "  ".join(line), flush=True)
        torch.cuda.empty_cache()
    print_readings(readings)
    if args.json:
        write_readings(args.json, machine, readings)
    return 0
