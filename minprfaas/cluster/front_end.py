"""The front end: the one door. It asks the control plane who shall do what, and follows each request to its end.

Chapter 13; paper 3.1 and 3.4.3. No policy lives here: what happens is told to the control plane as events, and its
decisions and actions are carried out.
"""

from collections.abc import Callable
from dataclasses import asdict

from minprfaas.cluster import messages, recovery
from minprfaas.cluster.journey import Journey, Update
from minprfaas.cluster.mail import Mail
from minprfaas.cluster.node import Happening, Part, PeerLost
from minprfaas.config import FRONT, LinkSample, Role, SamplingParams
from minprfaas.errors import RequestError, UserError
from minprfaas.scheduling import control
from minprfaas.scheduling.control import ControlPlane
from minprfaas.scheduling.directory import CacheChanged
from minprfaas.scheduling.roles import RoleChange
from minprfaas.scheduling.router import RouteRequest

LOCAL_DEADLINE_S = 3600.0  # for a prefill inside the PD cluster


class FrontEnd(Part):
    """Takes requests, routes each once (and again after a failure), and gathers what the nodes say.

    `block_keys` makes the chain keys of a prompt's full blocks of `block_tokens` tokens, with which the directory is
    asked. `deadline_s` is the time that an offloaded prefill may take, its transfer included.
    """

    name = FRONT

    def __init__(self, plane: ControlPlane, mail: Mail, block_keys: Callable[[list[int]], list[bytes]],
                 block_tokens: int, deadline_s: float, clock: Callable[[], float]):
        self.plane, self.deadline_s = plane, deadline_s
        self.journeys: dict[str, Journey] = {}  # that have not ended, by request
        self.ready: dict[str, messages.NodeReady] = {}  # the nodes that take work, by name
        self.figures: dict[str, messages.NodeFigures] = {}  # the newest of each node
        self.goodbyes: dict[str, messages.Goodbye] = {}  # of the nodes that have ended
        self.timeline_events: list[dict] = []  # of other processes
        self._mail, self._block_keys, self._block_tokens, self._clock = mail, block_keys, block_tokens, clock
        self._attempts: dict[str, Journey] = {}  # by the id that the nodes know
        self._attempts_made = 0
        self._unrouted: list[Journey] = []  # new ones
        self._without_node: list[Journey] = []  # that no node could take when they were routed last
        self._retry_at_s = 0.0  # when to try again with those
        self._draining: str | None = None  # a node that will change its role
        self._updates: list[Update] = []
        self._actions: list[control.Action] = []

    # What callers use

    def submit(self, id: str, token_ids: list[int], params: SamplingParams) -> Journey:
        """Take a request. UserError when it has no token, or its id is that of one that has not ended."""
        if not token_ids:
            raise UserError(f"request {id!r} has an empty prompt; it needs at least 1 token")
        if id in self.journeys:
            raise UserError(f"request id {id!r} is in use; every request under way needs an id of its own")
        journey = Journey(id, list(token_ids), params, self._keys(token_ids), self._clock())
        self.journeys[id] = journey
        self._unrouted.append(journey)
        return journey

    def abort(self, id: str) -> None:
        """The client of this request went away: free what it holds everywhere. Harmless for one that has ended."""
        journey = self.journeys.get(id)
        if journey is None:
            return
        if journey.attempt:
            self._mail.send(FRONT, journey.decision.decode_node, messages.Abort(journey.attempt))
        self._end(journey, "aborted")

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.journeys)

    @property
    def is_ready(self) -> bool:
        """Whether a request can be routed at once."""
        return bool(self._unrouted)

    def take_updates(self) -> list[Update]:
        """What has happened to requests since the last call, oldest first."""
        taken, self._updates = self._updates, []
        return taken

    def take_actions(self) -> list[control.Action]:
        """What the control plane's loops have done since the last call, for a log or a screen."""
        taken, self._actions = self._actions, []
        return taken

    def shut_down_nodes(self) -> None:
        """Tell every node that no more requests come."""
        for name in self.ready:
            self._mail.send(FRONT, name, messages.Shutdown())

    # What the node's loop calls

    def step(self) -> None:
        """Route what waits; ask the control plane's loops now and then."""
        now_s = self._clock()
        if self._without_node and now_s >= self._retry_at_s:
            self._unrouted[:0], self._without_node = self._without_node, []
            self._retry_at_s = now_s + recovery.RETRY_S
        waiting, self._unrouted = self._unrouted, []
        for journey in waiting:
            self._route(journey)
        self._carry_out(self.plane.tick(now_s))  # which looks at its loops once a second
        if self.plane.draining != self._draining:
            self._draining = self.plane.draining
            self._take_back(self._draining)

    def notice(self, happening: Happening) -> None:
        """Take the loss of a node. What it decoded goes on elsewhere; what it prefilled comes back by itself, for the
        decode nodes lost it as well."""
        if isinstance(happening, PeerLost) and self.ready.pop(happening.name, None) is not None:
            self._tell_plane(control.NodeLeft(happening.name))
            for journey in list(self.journeys.values()):
                if journey.attempt and journey.decision.decode_node == happening.name:
                    recovery.decoder_lost(journey, self._keys(journey.token_ids))
                    self._begin_again(journey)

    def hear(self, sender: str, message: messages.Message) -> None:
        match message:
            case messages.NodeReady(role=role) if role in {one.value for one in Role}:
                self.ready[sender] = message
                self._tell_plane(control.NodeJoined(sender, Role(role)))
                recovery.node_returned(self.journeys.values(), sender)
                self._retry_at_s = 0.0  # who found no node before may find this one
            case messages.CacheNews(sequence=sequence, keys=keys, tokens=tokens, inventory=inventory):
                if sender in self.ready:
                    self._tell_plane(CacheChanged(sender, sequence, list(zip(keys, tokens)), inventory))
            case LinkSample():  # of what its sender puts on the line: a PD node sends towards the PrfaaS cluster
                is_ingress = sender in self.ready and self.ready[sender].role != Role.PRFAAS.value
                self._tell_plane(control.LinkMeasured(sender, message, is_ingress))
            case messages.TimelinePart(events=events):
                self.timeline_events += events
            case messages.NodeFigures():
                self.figures[sender] = message
            case messages.Goodbye():
                self.goodbyes[sender] = message
            case _:
                self._hear_decode_node(sender, message)

    def _hear_decode_node(self, sender: str, message: messages.Message) -> None:
        journey = self._attempts.get(getattr(message, "id", ""))
        if journey is None or journey.decision.decode_node != sender:
            return
        journey.note(message)
        match message:
            case messages.Progress():
                self._updates.append(Update(journey))
            case messages.Prefilled():
                self._tell_plane(control.PrefillEnded(journey.id, message.uncached_tokens, message.prefill_s))
            case messages.Started():
                self._tell_plane(control.DecodeStarted(journey.id))
            case messages.TokenDrawn():
                self._take_token(journey, message)
            case messages.Failed(cause="too_long" | "no_room" as kind, reason=reason):
                self._fail(journey, RequestError(kind, reason))
            case messages.Failed():
                missing = recovery.prefill_failed(journey, message, self._block_tokens)
                if missing is not None:
                    self._tell_plane(missing)
                self._begin_again(journey)

    # A request's way

    def _route(self, journey: Journey) -> None:
        """Ask the control plane, and tell the decode node. Where no node can take it, it waits, up to a deadline."""
        if journey.is_finished:
            return
        now_s = self._clock()
        request = RouteRequest(journey.id, len(journey.token_ids), journey.keys, journey.avoid)
        try:
            decision = self.plane.route(request, now_s)
        except RequestError as error:
            reason = recovery.no_node(journey, error, self.plane, now_s)
            return self._fail(journey, reason) if reason is not None else self._without_node.append(journey)
        self._attempts_made += 1
        journey.decision, journey.attempt = decision, f"{journey.id}#{self._attempts_made}"
        journey.attempts += 1
        self._attempts[journey.attempt] = journey
        deadline_s = self.deadline_s if decision.route is Role.PRFAAS else LOCAL_DEADLINE_S
        prefix = decision.shipment
        self._mail.send(FRONT, decision.decode_node, messages.Serve(
            journey.attempt, list(journey.token_ids), len(journey.output_ids), asdict(journey.params), decision.node,
            deadline_s, prefix.source if prefix else "", prefix.end if prefix else 0))

    def _take_back(self, node: str | None) -> None:
        """What this node has not begun goes to others: it need not wait there for the end of a long queue."""
        for journey in list(self.journeys.values()):
            decision = journey.decision
            if journey.attempt and not journey.prefilled_tokens and node in (decision.node, decision.decode_node):
                self._mail.send(FRONT, decision.decode_node, messages.Abort(journey.attempt))
                self._begin_again(journey)

    def _begin_again(self, journey: Journey) -> None:
        """The newest attempt has come to nothing: make another."""
        del self._attempts[journey.attempt]
        journey.attempt = ""
        self._route(journey)

    def _keys(self, token_ids: list[int]) -> list[str]:
        return [key.hex() for key in self._block_keys(token_ids[:-1])]

    def _take_token(self, journey: Journey, drawn: messages.TokenDrawn) -> None:
        journey.first_token_at_s = journey.first_token_at_s or self._clock()
        journey.token_ids.append(drawn.token_id)
        journey.text += drawn.new_text
        if drawn.finish_reason:
            journey.length_limit = drawn.length_limit or None
            self._end(journey, drawn.finish_reason)
        self._updates.append(Update(journey, drawn.token_id, drawn.new_text))

    def _fail(self, journey: Journey, error: RequestError) -> None:
        journey.error = error
        self._end(journey, "error")
        self._updates.append(Update(journey))

    def _end(self, journey: Journey, finish_reason: str) -> None:
        journey.finish_reason, journey.finished_at_s = finish_reason, self._clock()
        del self.journeys[journey.id]
        self._attempts.pop(journey.attempt, None)
        if journey.decision is not None:
            self._tell_plane(control.RequestEnded(journey.id, len(journey.output_ids)))

    # The control plane

    def _tell_plane(self, event: control.Event) -> None:
        self._carry_out(self.plane.hear(event, self._clock()))

    def _carry_out(self, actions: list[control.Action]) -> None:
        for action in actions:
            match action:
                case control.AskInventory(node):
                    self._mail.send(FRONT, node, messages.SendInventory())
                case RoleChange(node, role):  # it has drained
                    self._mail.send(FRONT, node, messages.ChangeRole(role.value))
            self._actions.append(action)  # a new threshold is in force at once: the plane itself holds it
