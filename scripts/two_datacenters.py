"""Prefill in one datacenter process, decode in another: `torchrun --nproc-per-node 2 scripts/two_datacenters.py --help`."""

from minprfaas.errors import run_program

if __name__ == "__main__":
    run_program("minprfaas.commands.two_datacenters")
