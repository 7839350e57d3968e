"""Prefill in one datacenter process, decode in another: `torchrun --nproc-per-node 2 scripts/two_datacenters.py --help`."""

import sys

from minprfaas.cluster.two_datacenters import main
from minprfaas.errors import exit_on_user_error

if __name__ == "__main__":
    sys.exit(exit_on_user_error(main)(sys.argv[1:]))
