"""`python -m minprfaas inspect`: what a KVCache weighs, and how it lies in blocks. Chapter 00; paper 2.1 and 3.2."""

import argparse
import json
from collections import Counter

from minprfaas.commands.options import inspect as add_arguments  # noqa: F401
from minprfaas.config import CacheConfig, ModelConfig, StateKind
from minprfaas.errors import UserError
from minprfaas.kvcache.layout import Layout, plan_layout
from minprfaas.model.checkpoint import EMBEDDED
from minprfaas.model.families import PUBLISHED, read_config, read_published
from minprfaas.model.spec import kv_bytes, model_state_specs
from minprfaas.observe.tables import table
from minprfaas.scheduling.paper_case import TABLE_3_GBPS, TABLE_3_TOKENS

LENGTHS = [1024 << doubling for doubling in range(8)]  # 1K to 128K tokens


def run(args: argparse.Namespace) -> None:
    """Print the layout; only `config.json` is read, no weights."""
    if args.directory is not None and args.config is not None:
        raise UserError(f"DIR {args.directory} and --config {args.config} are both given; it must be one of them")
    name = args.config or str(args.directory or EMBEDDED)
    config = read_published(args.config) if args.config else read_config(name)
    block_tokens = CacheConfig(num_blocks=1, block_tokens=args.block_tokens).block_tokens
    layout = plan_layout(model_state_specs(config, args.dtype), block_tokens)
    report = describe(config, layout, args.dtype)
    if args.config:
        report["kv_throughput"] = paper_throughput(PUBLISHED[args.config], layout)
    if args.json:
        print(json.dumps({"config" if args.config else "directory": name, **report}))
    else:
        show(name, report)


def describe(config: ModelConfig, layout: Layout, dtype: str) -> dict:
    """Everything that the command prints, as plain values."""
    mixers = Counter()
    for layer, spec in zip(config.layers, layout.specs):
        name = type(layer.mixer).__name__.removesuffix("Config")
        mixers["SWA" if spec.kind is StateKind.WINDOW else name] += 1
    return {
        "family": config.family, "layers": len(config.layers), "mixers": dict(mixers), "dtype": dtype,
        "hidden_size": config.hidden_size, "vocab_size": config.vocab_size,
        "max_context_tokens": config.max_context_tokens,
        "block_tokens": layout.block_tokens, "block_bytes": layout.block_bytes,
        "groups": [{
            "index": group.index, "kind": group.spec.kind.value, "layers": list(group.layers),
            "state": {tensor.name: [*tensor.shape, tensor.dtype] for tensor in group.spec.tensors},
            "bytes": group.spec.nbytes * len(group.layers), "blocks_per_request": group.state_blocks,
            "waste": layout.waste(group)} for group in layout.groups],
        "bytes_per_token": sum(spec.nbytes for spec in layout.specs if spec.kind is StateKind.TOKEN),
        "window_bytes": sum(spec.nbytes for spec in layout.specs if spec.kind is StateKind.WINDOW),
        "state_bytes": sum(spec.nbytes for spec in layout.specs if spec.kind is StateKind.REQUEST),
        "s_kv": [{"tokens": tokens, "bytes": kv_bytes(layout.specs, tokens), "blocks": layout.blocks_for(tokens),
                  "pool_bytes": layout.blocks_for(tokens) * layout.block_bytes} for tokens in LENGTHS],
    }


def paper_throughput(name: str, layout: Layout) -> list[dict]:
    """Phi_kv of the model, which the paper measured (table 3), and the prefill time that our S_kv makes of it:
    T_prefill = S_kv / Phi_kv (equation 1)."""
    rows = []
    for tokens, gbps in zip(TABLE_3_TOKENS, TABLE_3_GBPS[name]):
        nbytes = kv_bytes(layout.specs, tokens)
        rows.append({"tokens": tokens, "bytes": nbytes, "paper_gbps": gbps, "implied_prefill_s": nbytes * 8e-9 / gbps})
    return rows


def show(name: str, report: dict) -> None:
    """The report as tables."""
    mixers = ", ".join(f"{count} {name}" for name, count in report["mixers"].items())
    print(f"{name}: {report['family']}, {report['layers']} layers ({mixers}), hidden size "
          f"{report['hidden_size']:,}, vocabulary {report['vocab_size']:,}, "
          f"context {report['max_context_tokens']:,} tokens")
    print(f"KVCache in {report['dtype']} (recurrent matrices in float32): {report['bytes_per_token']:,} bytes a token; "
          f"a request has {report['window_bytes']:,} bytes of windows and {report['state_bytes']:,} of state")
    print(f"one pool of equal blocks of {report['block_bytes']:,} bytes; "
          f"a token group keeps {report['block_tokens']} tokens in one\n")
    print(table(["group", "kind", "layers", "state", "bytes", "blocks", "waste"], [
        [group["index"], group["kind"], _ranges(group["layers"]), ", ".join(group["state"]),
         f"{group['bytes']:,} a {group['kind']}", group["blocks_per_request"] or f"1 a {report['block_tokens']} tokens",
         f"{group['waste']:.1%}"] for group in report["groups"]]))
    print()
    print(table(["tokens", "S_kv MiB", "pool blocks", "pool MiB", "alignment"], [
        [f"{row['tokens'] // 1024}K", f"{row['bytes'] / 2**20:,.2f}", row["blocks"],
         f"{row['pool_bytes'] / 2**20:,.2f}", f"+{row['pool_bytes'] / row['bytes'] - 1:.1%}"]
        for row in report["s_kv"]]))
    if "kv_throughput" in report:
        print("\nThe paper's KV throughput of one instance of 8 H200 (table 3), and the prefill time that it implies "
              "with the S_kv above")
        print(table(["tokens", "S_kv MiB", "Phi_kv Gbps (paper's)", "T_prefill s (implied)"], [
            [f"{row['tokens'] // 1024}K", f"{row['bytes'] / 2**20:,.2f}", f"{row['paper_gbps']:.2f}",
             f"{row['implied_prefill_s']:.2f}"] for row in report["kv_throughput"]]))


def _ranges(layers: list[int]) -> str:
    """`0, 4, 8, …, 24` for a long list."""
    shown = [str(layer) for layer in layers]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "…", shown[-1]])
