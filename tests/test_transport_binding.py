"""Where lanes listen, who shares a port, and what a person is told when that cannot be; errors of C++ as one line.

Chapter 07.
"""

import contextlib
import os
import re
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transport_support import DEADLINE_S, IDENTITY, connected, in_parallel, new_store, wait_until

from minprfaas.config import LinkConfig
from minprfaas.errors import UserError, one_line
from minprfaas.transport.wan.binding import LOOPBACK, Binding, choose_binding
from minprfaas.transport.wan.lanes import connect_pair
from minprfaas.transport.wan.link import Link


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    for name in ("MINPRFAAS_BIND", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


def listening() -> set[str]:
    """The local addresses (hexadecimal, with port) on which this process listens, as the kernel tells."""
    mine, found = set(), set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # it was closed meanwhile
            mine.add(os.readlink(entry))
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
        found |= {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine}
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
def test_lanes_listen_on_loopback_unless_told_otherwise():
    store = new_store()  # kept: it listens too, and before the lanes do
    before = listening()
    with connected(LinkConfig(lanes=3), store=store):
        found = listening()
        assert [address for address in found - before if not address.startswith("0100007F:")] == []
        # Not only new ones: with a link of another test that is not quite gone yet, this one would share its ports.
        assert len([address for address in found if address.startswith("0100007F:")]) >= 3


def threads_of_gloo() -> set[str]:
    """The ids of this process's threads that Gloo, or PyTorch on its behalf, has started."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found[task.name] = (task / "comm").read_text()
    return {number for number, name in found.items() if "gloo" in name}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_links_share_ports_and_threads_lane_by_lane_however_many_they_are():
    store, before = new_store(), threads_of_gloo()
    with contextlib.ExitStack() as links:
        for number in range(5):
            links.enter_context(connected(LinkConfig(lanes=2), store=store, name=f"link {number}"))
        assert len(threads_of_gloo() - before) <= 2, "one for each lane of a link"
    wait_until(lambda: not threads_of_gloo() - before)


class ToldWhen(dist.Store):
    """Tells one side where the other is once `tell` is set; `has_said` and `was_told` are what that side did."""

    def __init__(self, store: dist.Store):
        super().__init__()
        self._store = store
        self.tell, self.has_said, self.was_told = threading.Event(), threading.Event(), threading.Event()

    def set(self, key, value) -> None:
        self._store.set(key, value)
        self.has_said.set()

    def check(self, keys) -> bool:
        return self.tell.is_set() and self._store.check(keys)

    def get(self, key) -> bytes:
        self.was_told.set()
        return self._store.get(key)


def what_a_late_peer_hears(device, patience_s: float) -> str | None:
    """A peer connects to one that has waited for its connection in vain. None if `patience_s` was over before that."""
    store, byte = dist.HashStore(), torch.zeros(1, dtype=torch.uint8)
    awaits, comes = ToldWhen(store), ToldWhen(store)

    def give_up() -> None:
        with pytest.raises(RuntimeError, match="the peer's end of the connection did not come"):
            connect_pair(awaits, 0, device, patience_s)

    def come_late() -> str:
        assert awaits.has_said.wait(DEADLINE_S)  # in this order it is rank 1 that connects to rank 0
        with pytest.raises(RuntimeError) as error:  # its connection may be dropped before it is complete, or after
            connect_pair(comes, 1, device, DEADLINE_S).recv([byte], 0, 0).wait()
        return str(error.value)

    def in_between() -> None:
        assert comes.has_said.wait(DEADLINE_S)
        awaits.tell.set()
        wait_until(lambda: not giving_up.is_alive())
        comes.tell.set()

    giving_up = threading.Thread(target=give_up, daemon=True)
    giving_up.start()
    heard, _ = in_parallel(come_late, in_between)
    return heard if awaits.was_told.is_set() else None


def test_a_peer_that_comes_when_it_is_no_longer_awaited_finds_nobody_and_others_go_on():
    """A device hands its connection to who awaited it, so who has given up must still be there to drop it."""
    device, byte = LOOPBACK.gloo_device(0), torch.zeros(1, dtype=torch.uint8)
    heard = what_a_late_peer_hears(device, 0.5) or what_a_late_peer_hears(device, 10.0)  # on a busy machine
    assert re.search("Connection (closed|reset) by peer", heard)

    others = dist.HashStore()
    one, two = in_parallel(*(lambda rank=rank: connect_pair(others, rank, device, DEADLINE_S) for rank in (0, 1)))
    sent = one.send([byte + 7], 1, 0)
    two.recv([byte], 0, 0).wait()
    sent.wait()
    assert byte.item() == 7


def test_a_store_on_loopback_and_a_store_in_memory_mean_loopback():
    assert choose_binding(dist.PrefixStore("a", dist.PrefixStore("b", new_store()))) == Binding("127.0.0.1")
    assert choose_binding(dist.HashStore()) == Binding("127.0.0.1")


def test_the_environment_names_another_address_or_interface(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert choose_binding(new_store()) == Binding(interface="lo", source="GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("MINPRFAAS_BIND", "127.0.0.1")
    assert choose_binding(new_store()) == Binding("127.0.0.1", source="MINPRFAAS_BIND")


@pytest.mark.parametrize("name, value", [("GLOO_SOCKET_IFNAME", "nope0"), ("MINPRFAAS_BIND", "192.0.2.1"),
                                         ("MINPRFAAS_BIND", "no.such.host.invalid")])
def test_an_impossible_interface_or_address_is_one_line_before_the_peer_is_awaited(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name} '{re.escape(value)}' is no address or network interface") as error:
        Link("a-b", new_store(), 0, LinkConfig(), IDENTITY)
    assert "\n" not in str(error.value) and "lo" in str(error.value)


@pytest.mark.parametrize("text, line", [
    ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection reset by peer", "Connection reset by peer"),
    ("[enforce fail at /gloo/device.cc:84] ifa != nullptr. Unable to find address for: x",
     "ifa != nullptr. Unable to find address for: x"),
    ("Failed to recv, got 0 bytes.\nException raised from recvBytes at Utils.hpp:787 (most recent call first):\n"
     "frame #0: c10::Error::Error + 0x9d", "Failed to recv, got 0 bytes."),
    ("wait timeout. Exception raised from doWait at TCPStore.cpp:1 (most recent call first):", "wait timeout."),
    ("[a.cc:1] Connection closed by peer [127.0.0.1]:4. This is typically caused by a remote worker crashing. GLHF! 🏖️",
     "Connection closed by peer [127.0.0.1]:4."),
    ("", "RuntimeError"), ("x" * 500, "x" * 200)])
def test_errors_of_torch_and_gloo_become_one_line_without_their_stack(text, line):
    assert one_line(RuntimeError(text)) == line
