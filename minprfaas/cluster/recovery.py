"""What becomes of a request when a node that worked for it fails: another attempt, elsewhere.

Chapters 13 and 14; paper 3.4.3.

An attempt is one pair of nodes at work, under an id of its own, so that a late word about an old one is known as such.
When the node that decoded is lost, the tokens that the client has are part of the next attempt's prompt: the draw of a
token depends on its number in the answer, so the stream goes on as if nothing had happened.
"""

from collections.abc import Iterable

from minprfaas.cluster import messages
from minprfaas.cluster.journey import Journey
from minprfaas.config import Role
from minprfaas.errors import RequestError
from minprfaas.scheduling.control import ControlPlane, PrefixMissing

MOST_ATTEMPTS = 64  # of one request: far more than nodes that die beside it, and an end for what kills them all
WAIT_FOR_NODE_S = 3600.0  # how long a request may wait for a node that can take it
RETRY_S = 0.5  # between looks at whether there is one


def prefill_failed(journey: Journey, lost: messages.Failed, block_tokens: int) -> PrefixMissing | None:
    """Note that the newest attempt's prefill will not complete: the next one goes to another node, or (where only the
    cached prefix did not come) is decided anew without that prefix, which the control plane is to hear of."""
    decision = journey.decision
    journey.prefilled_tokens = journey.received_bytes = journey.expected_bytes = 0
    if lost.cause == "no_prefix" and decision.shipment is not None:
        source, end = decision.shipment.source, decision.shipment.end
        return PrefixMissing(source, journey.keys[end // block_tokens - 1])
    journey.avoid |= {decision.node}
    if lost.cause == "refused":
        journey.refused |= {decision.node}
    if decision.route is Role.PRFAAS:
        journey.fallback = lost.reason
    return None


def decoder_lost(journey: Journey, keys: list[str]) -> None:
    """Note that the node which decoded is gone. `keys` are those of the prompt and the answer so far."""
    journey.keys = keys
    journey.recoveries += 1
    journey.prefilled_tokens = journey.received_bytes = journey.expected_bytes = 0


def node_returned(journeys: Iterable[Journey], name: str) -> None:
    """A node is there anew: what it failed before says nothing any more."""
    for journey in journeys:
        journey.avoid -= {name}
        journey.refused -= {name}


def no_node(journey: Journey, error: RequestError, plane: ControlPlane, now_s: float) -> RequestError | None:
    """No node can take it at present: why it is given up, or None when it shall wait. Nodes that failed it may have
    been in trouble for a moment; those that refused it were not."""
    able = {*plane.nodes(Role.PRFAAS), *plane.nodes(Role.PDP)}
    if able and able <= journey.refused:
        return error
    if journey.attempts >= MOST_ATTEMPTS:
        return RequestError("no_node", f"{journey.attempts} attempts failed; {error}")
    if now_s - journey.arrived_at_s > WAIT_FOR_NODE_S:
        return error
    journey.avoid = journey.refused
    return None
