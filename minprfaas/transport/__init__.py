"""How KV and messages move between nodes: `loopback` within a process, `fabric` within a datacenter, `wan` between
datacenters. Chapters 07, 08, 09."""

from minprfaas.config import WeatherChange
from minprfaas.transport.base import (KVTransport, LayerPlan, LinkDown, LinkRefused, MessageChannel, SendStream, Sink,
                                      StreamAborted, StreamPlan)
from minprfaas.transport.events import (ArrivalReport, Event, EventQueue, LinkLost, LinkRestored, MessageReceived,
                                        StreamDone, StreamFailed, StreamReport)
from minprfaas.transport.fabric import Fabric
from minprfaas.transport.loopback import Loopback
from minprfaas.transport.wan.handshake import LinkIdentity
from minprfaas.transport.wan.line import EmulatedLine, load_weather
from minprfaas.transport.wan.link import Link
from minprfaas.transport.wan.monitor import LinkStats

__all__ = ["ArrivalReport", "EmulatedLine", "Event", "EventQueue", "Fabric", "KVTransport", "LayerPlan", "Link",
           "LinkDown", "LinkIdentity", "LinkLost", "LinkRefused", "LinkRestored", "LinkStats", "Loopback",
           "MessageChannel", "MessageReceived", "SendStream", "Sink", "StreamAborted", "StreamDone", "StreamFailed",
           "StreamPlan", "StreamReport", "WeatherChange", "load_weather"]
