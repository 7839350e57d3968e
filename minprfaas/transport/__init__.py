"""Links between datacenters: lanes, an emulated line, acknowledged KV streams, recovery, trust. Chapters 07, 08."""

from minprfaas.transport.events import (ArrivalReport, Event, LinkDown, LinkLost, LinkRefused, LinkRestored,
                                        MessageReceived, StreamAborted, StreamDone, StreamFailed, StreamReport)
from minprfaas.transport.handshake import LinkIdentity
from minprfaas.transport.link import Link
from minprfaas.transport.monitor import LinkStats, Sample
from minprfaas.transport.sending import SendStream
from minprfaas.transport.streams import LayerPlan, Sink, StreamPlan
from minprfaas.transport.throttle import WeatherChange, load_weather

__all__ = ["ArrivalReport", "Event", "LayerPlan", "Link", "LinkDown", "LinkIdentity", "LinkLost", "LinkRefused",
           "LinkRestored", "LinkStats", "MessageReceived", "Sample", "SendStream", "Sink", "StreamAborted",
           "StreamDone", "StreamFailed", "StreamPlan", "StreamReport", "WeatherChange", "load_weather"]
