"""What the nodes of each datacenter are made of, where the two may be unequal. Chapters 13 and 15."""

import argparse
from dataclasses import dataclass

from minprfaas.cluster.topology import PD_SITE, PRFAAS_SITE
from minprfaas.commands.options import DTYPES
from minprfaas.config import block_tokens_for
from minprfaas.errors import UserError, require_number, shown


def add_machine_options(p: argparse.ArgumentParser) -> None:
    """Device, number format and block size: one for all, or one for each datacenter."""
    p.add_argument("--device", default="cpu", help="cpu or cuda; on cuda each process takes its own GPU (cpu). This "
                   "and the next two may be unequal: prfaas=cuda,pd=cpu")
    p.add_argument("--dtype", default="float32", help=f"{', '.join(DTYPES)} (float32); between unequal ones rows cross "
                   "in bf16, or as --wire says, and request-level state in float32")
    p.add_argument("--block-tokens", metavar="TOKENS", help="tokens of a KVCache block (64; where all is on cuda 256)")


@dataclass(frozen=True)
class Machine:
    """A node of one datacenter."""

    device: str
    dtype: str
    block_tokens: int


def machine_at(args: argparse.Namespace, site: str) -> Machine:
    """What the options say of one datacenter. UserError when they say nothing that can be."""
    # Left alone, datacenters with unequal devices have equal blocks: then snapshots may cross.
    block_tokens = args.block_tokens or str(block_tokens_for(args.device))
    dtype, tokens = _said_of(site, "--dtype", args.dtype), _said_of(site, "--block-tokens", block_tokens)
    if dtype not in DTYPES:
        raise UserError(f"--dtype is {shown(dtype)}; it must be one of {', '.join(DTYPES)}")
    block_tokens = int(tokens[:9]) if tokens.isascii() and tokens.isdigit() else tokens
    require_number("--block-tokens", block_tokens, least=1, whole=True)
    return Machine(_said_of(site, "--device", args.device), dtype, block_tokens)


def _said_of(site: str, option: str, text: str) -> str:
    """`64` is for all datacenters, `prfaas=64,pd=32` for each (`prfaas` for all that prefill only)."""
    if "=" not in text:
        return text
    values = dict(item.partition("=")[::2] for item in text.split(","))
    if {*values} != {PRFAAS_SITE, PD_SITE} or text.count(",") != 1:
        raise UserError(f"{option} is {shown(text)}; for each datacenter it is like {PRFAAS_SITE}=…,{PD_SITE}=…")
    return values[PD_SITE if site == PD_SITE else PRFAAS_SITE]
