"""A control plane that writes down what it was asked and what it said, so that another can be asked the same."""

from dataclasses import dataclass
from typing import Any

from minprfaas.errors import RequestError
from minprfaas.scheduling.control import Action, ControlPlane, ControlSettings, Event
from minprfaas.scheduling.router import Decision, RouteRequest


@dataclass(frozen=True)
class Call:
    """`ask` is the event or the request, None for a tick; `answer` what came back, or a RequestError's text."""

    method: str
    ask: Any
    now_s: float
    answer: Any


class RecordingControlPlane(ControlPlane):
    """Give it to whatever drives a control plane (`Simulation(…, control=…)`, the front end); `calls` is the record."""

    def __init__(self, settings: ControlSettings):
        super().__init__(settings)
        self.calls: list[Call] = []

    def hear(self, event: Event, now_s: float) -> list[Action]:
        return self._note("hear", event, now_s, super().hear(event, now_s))

    def tick(self, now_s: float) -> list[Action]:
        return self._note("tick", None, now_s, super().tick(now_s))

    def route(self, request: RouteRequest, now_s: float) -> Decision:
        try:
            decision = super().route(request, now_s)
        except RequestError as error:
            self._note("route", request, now_s, str(error))
            raise
        return self._note("route", request, now_s, decision)

    def _note(self, method: str, ask: Any, now_s: float, answer: Any) -> Any:
        kept = list(answer) if isinstance(answer, list) else answer
        self.calls.append(Call(method, ask, now_s, kept))
        return answer


def replay(calls: list[Call], settings: ControlSettings) -> list[Call]:
    """The same questions put to a new control plane: the same calls, with its answers."""
    fresh = RecordingControlPlane(settings)
    for call in calls:
        try:
            if call.method == "tick":
                fresh.tick(call.now_s)
            else:
                getattr(fresh, call.method)(call.ask, call.now_s)
        except RequestError:
            pass  # it is in the record
    return fresh.calls
