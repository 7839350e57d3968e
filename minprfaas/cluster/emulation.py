"""Emulated machines of a live run: which node is which, and whether the real work kept up. Chapter 13; paper 4."""

from collections.abc import Mapping
from dataclasses import dataclass

from minprfaas.cluster.messages import Goodbye
from minprfaas.cluster.topology import PD_SITE
from minprfaas.scheduling.profiles import Profile, Scale

MOST_LATE = 0.05  # of the emulated time, of any node: beyond it a run says nothing about the machines


@dataclass(frozen=True)
class Emulation:
    """The machine of a node of each datacenter, in real units, and the scale in which it is run."""

    prfaas: Profile
    pd: Profile
    scale: Scale = Scale()

    def profile_at(self, site: str) -> Profile:
        """The machine of a node of this datacenter, in the run's units."""
        return self.scale.profile(self.pd if site == PD_SITE else self.prfaas)


def verdict(goodbyes: Mapping[str, Goodbye]) -> tuple[str, bool]:
    """Whether the emulation is valid, in words and as a truth."""
    shares = {name: said.late_s / said.allowed_s for name, said in goodbyes.items() if said.allowed_s}
    worst = max(shares, key=shares.get, default="no node")  # the node whose work exceeded its emulated time most
    late = shares.get(worst, 0.0)
    allowed_s = sum(said.allowed_s for said in goodbyes.values())
    needed_s = sum(said.needed_s for said in goodbyes.values())
    is_valid = bool(allowed_s) and late <= MOST_LATE
    real = f"real work took {needed_s / allowed_s:.0%} of the emulated time" if allowed_s else "no node has computed"
    return (f"emulation {'valid' if is_valid else 'NOT VALID'}: {real}; {worst} was late by {late:.1%} of its own "
            f"(limit {MOST_LATE:.0%})"), is_valid
