"""Where a link's lanes listen: on loopback unless told otherwise. Chapter 07; the paper does not discuss it.

A Gloo port answers whoever reaches it (see `handshake`), so it is opened where the peer is, and nowhere else: on the
address or host name in `MINPRFAAS_BIND`; else on the interface in `GLOO_SOCKET_IFNAME`, as for every program that uses
Gloo; else on loopback if the store is on this machine, and on the address from which this machine reaches it if not.
"""

import os
import socket
import threading
import weakref
from dataclasses import dataclass

import torch.distributed as dist

from minprfaas.errors import UserError, one_line

GlooDevice = dist.ProcessGroupGloo.Device


@dataclass(frozen=True)
class Binding:
    """A `hostname` or address of this machine, or the name of an `interface`; `source` is who said so."""

    hostname: str = ""
    interface: str = ""
    source: str = "the store"

    def gloo_device(self, number: int) -> GlooDevice:
        """A listening port with a thread that moves the bytes of all its connections, and wakes a hundred times a
        second even if there are none. So there is one for each `number`, whoever asks; it is gone with the last of
        them. Raises UserError when this machine has no such address or interface."""
        key = os.getpid(), self, number  # the thread of a process's devices does not follow it through a fork
        with _lock:
            device = _devices.get(key)
            if device is None:
                _devices[key] = device = self._new_device()
            return device

    def _new_device(self) -> GlooDevice:
        try:
            return dist.ProcessGroupGloo.create_device(hostname=self.hostname, interface=self.interface)
        except RuntimeError as error:
            there = ", ".join(name for _, name in socket.if_nameindex())
            raise UserError(f"{self.source} {self.hostname or self.interface!r} is no address or network interface of "
                            f"this machine (interfaces: {there}): {one_line(error)}") from None


_lock = threading.Lock()
_devices: "weakref.WeakValueDictionary[tuple[int, Binding, int], GlooDevice]" = weakref.WeakValueDictionary()
LOOPBACK = Binding("127.0.0.1")


def choose_binding(store: dist.Store) -> Binding:
    """Where to listen for a peer that meets this process at `store`. Raises UserError when that is not there: at once,
    not when the peer's patience is over."""
    address, interface = os.environ.get("MINPRFAAS_BIND"), os.environ.get("GLOO_SOCKET_IFNAME")
    if address:
        binding = Binding(hostname=address, source="MINPRFAAS_BIND")
    elif interface:
        binding = Binding(interface=interface, source="GLOO_SOCKET_IFNAME")
    else:
        binding = _binding_towards(store)
    binding.gloo_device(0)
    return binding


def _binding_towards(store: dist.Store) -> Binding:
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        return LOOPBACK  # a store in a file or in memory: of one machine
    try:
        family, kind, _, _, where = socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)  # of datagrams: nothing is sent, the kernel only chooses a route
            return Binding(probe.getsockname()[0])
    except OSError as error:
        raise UserError(f"no way leads from here to the store at {store.host!r}: {error}") from None
