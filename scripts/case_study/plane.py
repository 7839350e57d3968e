"""The control plane of an emulated run, in the emulated machines' time. Chapters 12 and 13; paper 4."""

from dataclasses import replace

from minprfaas.scheduling.control import Action, ControlPlane, ControlSettings, Event, LinkMeasured, RequestEnded
from minprfaas.scheduling.router import Decision, RouteRequest


class EmulatedPlane(ControlPlane):
    """A control plane that lives in the emulated machines' seconds, for which its loops' constants are made: the run's
    clock, of which a second takes `time` seconds, and its rates are converted. Its fleet has the run's tokens and
    bytes, and no longer seconds. With `cache_aware` False it does not see what nodes hold."""

    def __init__(self, settings: ControlSettings, time: float, cache_aware: bool = True):
        super().__init__(replace(settings, link_gbps=settings.fleet.link_gbps))
        self._time, self._cache_aware = time, cache_aware

    def hear(self, event: Event, now_s: float) -> list[Action]:
        """See `ControlPlane.hear`. The first token of an answer comes from its prefill, and counts for no decode."""
        match event:
            case LinkMeasured(sample=sample):
                event = replace(event, sample=replace(sample, gbps=sample.gbps * self._time))
            case RequestEnded(output_tokens=tokens):
                event = replace(event, output_tokens=max(tokens - 1, 0))
        return super().hear(event, now_s / self._time)

    def route(self, request: RouteRequest, now_s: float) -> Decision:
        """See `ControlPlane.route`."""
        return super().route(request if self._cache_aware else request._replace(keys=()), now_s / self._time)

    def tick(self, now_s: float) -> list[Action]:
        """See `ControlPlane.tick`."""
        return super().tick(now_s / self._time)
