"""Where lanes listen, and what a person is told when that cannot be; and errors of C++ as one line. Chapter 07."""

import os
import re
from pathlib import Path

import pytest
import torch.distributed as dist
from transport_support import IDENTITY, connected, new_store

from minprfaas.config import LinkConfig
from minprfaas.errors import UserError, one_line
from minprfaas.transport import Link
from minprfaas.transport.wan.binding import Binding, choose_binding


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    for name in ("MINPRFAAS_BIND", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


def listening() -> set[str]:
    """The local addresses (hexadecimal, with port) on which this process listens, as the kernel tells."""
    mine = {os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
        found |= {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine}
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
def test_lanes_listen_on_loopback_unless_told_otherwise():
    store = new_store()  # kept: it listens too, and before the lanes do
    before = listening()
    with connected(LinkConfig(lanes=3), store=store):
        lanes = listening() - before
        assert [address for address in lanes if not address.startswith("0100007F:")] == []
        assert len(lanes) >= 3


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
