"""How KV and messages move between nodes: `loopback` within a process, `wan` between datacenters. Chapters 07, 08."""

from minprfaas.transport.base import (ArrivalReport, Event, EventQueue, KVTransport, LayerPlan, LinkDown, LinkLost,
                                      LinkRefused, LinkRestored, MessageChannel, MessageReceived, SendStream, Sink,
                                      StreamAborted, StreamDone, StreamFailed, StreamPlan, StreamReport)
from minprfaas.transport.loopback import Loopback

__all__ = ["ArrivalReport", "Event", "EventQueue", "KVTransport", "LayerPlan", "LinkDown", "LinkLost", "LinkRefused",
           "LinkRestored", "Loopback", "MessageChannel", "MessageReceived", "SendStream", "Sink", "StreamAborted",
           "StreamDone", "StreamFailed", "StreamPlan", "StreamReport"]
