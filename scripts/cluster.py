"""The live cluster, each node a process: `torchrun --nproc-per-node 6 scripts/cluster.py --help`."""

from minprfaas.errors import run_program

if __name__ == "__main__":
    run_program("minprfaas.commands.cluster")
