"""Which processes a run has, who lives in each, and between which of them lies a line. Chapters 09, 13; paper 3.1.

A node keeps its name when its role changes: `pd-0` may prefill now and decode later. Every process has a link to every
other: inside a datacenter a plain one, between the two one that crosses the (emulated) line.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from minprfaas.config import FRONT, Role
from minprfaas.errors import UserError, shown

PRFAAS_SITE, PD_SITE = "prfaas", "pd"  # the two datacenters
MAX_NODES = 64  # of one datacenter


@dataclass(frozen=True)
class Place:
    """One process: its name, its datacenter, and who lives there: roles by the name of their part, the front end."""

    name: str
    site: str
    roles: Mapping[str, Role]
    has_front: bool = False

    @property
    def parts(self) -> list[str]:
        """Whom a message to this process can be addressed to."""
        return [FRONT, *self.roles] if self.has_front else [*self.roles]


@dataclass(frozen=True)
class Topology:
    """So many nodes a datacenter. `split` of the PD nodes begin as PD-P; with None, half of them do, and a single one
    plays both PD roles. `sites` has the PrfaaS datacenters with their nodes, where there is not just one."""

    prfaas: int
    pd: int
    split: int | None = None
    sites: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        for name, value, least in (("prfaas", self.prfaas, 0), ("pd", self.pd, 1)):
            if not least <= value <= MAX_NODES:
                raise UserError(f"topology has {name}={shown(value)}; it must be from {least} to {MAX_NODES} nodes")
        least = 0 if self.prfaas else 1
        if self.split is not None and not least <= self.split < self.pd:
            raise UserError(f"split is {shown(self.split)}; of {self.pd} PD nodes, with {self.prfaas} PrfaaS nodes, "
                            f"from {least} to {self.pd - 1} can begin as PD-P")

    @property
    def prfaas_sites(self) -> dict[str, int]:
        """The PrfaaS datacenters with their nodes."""
        return dict(self.sites) or {PRFAAS_SITE: self.prfaas}

    @staticmethod
    def parse(text: str, split: int | None = None) -> "Topology":
        """`prfaas=2,pd=3`, in any order, or `prfaas-a=1,prfaas-b=1,pd=3`. UserError when it is anything else."""
        counts = {}
        for item in text.split(","):
            name, _, number = item.strip().partition("=")
            is_site = name == PD_SITE or re.fullmatch(f"{PRFAAS_SITE}(-[a-z]+)?", name)
            if not is_site or name in counts or not (number.isascii() and number.isdigit()):
                raise UserError(f"topology {shown(text)} is not like prfaas=2,pd=3")
            counts[name] = int(number[:9])
        if len(counts) < 2 or PD_SITE not in counts:
            raise UserError(f"topology {shown(text)} is not like prfaas=2,pd=3")
        pd = counts.pop(PD_SITE)
        return Topology(sum(counts.values()), pd, split, tuple(counts.items()))

    def places(self) -> list[Place]:
        """The processes by rank. The front end has one of its own, so that no node takes it along when it dies, and
        comes first: torchrun's MASTER_ADDR is the machine of rank 0, and the front end's process serves the store."""
        nodes = [Place(f"{site}-{number}", site, {f"{site}-{number}": Role.PRFAAS})
                 for site, count in self.prfaas_sites.items() for number in range(count)]
        nodes += [Place(f"pd-{number}", PD_SITE, self._pd_roles(number)) for number in range(self.pd)]
        return [Place(FRONT, PD_SITE, {}, has_front=True), *nodes]

    def two_places(self) -> list[Place]:
        """Of the topology prfaas=1,pd=1: each datacenter one process, the front end beside the PD node, as the last."""
        _, prfaas, pd = self.places()
        return [prfaas, Place(pd.name, pd.site, pd.roles, has_front=True)]

    def _pd_roles(self, number: int) -> dict[str, Role]:
        name = f"pd-{number}"
        if self.pd == 1 and self.split is None:
            return {f"{name}/pdp": Role.PDP, f"{name}/pdd": Role.PDD}
        split = self.pd // 2 if self.split is None else self.split
        return {name: Role.PDP if number < split else Role.PDD}
