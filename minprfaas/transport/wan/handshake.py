"""The handshake: who is there, and do both sides mean the same bytes? Chapter 07; trust is not discussed in the paper.

On every lane, before any KV: both sides say hello with a fresh nonce, prove by an HMAC-SHA256 over everything said so
far and their own role that they hold the shared secret, compare identities, and tell the verdict. A side that refuses
logs why; its peer learns only that it was refused. From the secret and the nonces come the session keys that seal the
frames, so a recorded handshake or frame is worth nothing later.

The KVCache crosses in the clear, and a stranger who reaches the ports needs no secret for this:

- The store's port (`TCPStore`) answers anybody: read, change and delete keys, so keep the two ends from meeting.
- A lane's port (Gloo) takes any connection before a hello can be asked for. A message longer than the receive that
  waits for it ends the process, and so does a flood of connections: both in C++, where no Python can catch it.
- Without a secret, whoever shakes hands is the peer: it can write into blocks what it likes.

So ports listen on loopback unless told otherwise (`binding`). Gloo's TLS is not in the wheels of torch 2.13; between
machines the way out is a private line: both ports inside WireGuard, or a network that nobody else reaches.
"""

import hashlib
import hmac
import json
import logging
import secrets
from dataclasses import dataclass

from minprfaas.transport.base import LinkRefused
from minprfaas.transport.encoding import Wire
from minprfaas.transport.wan.digest import multiplies_bytes, row_sums
from minprfaas.transport.wan.frames import VERSION, Codec, FrameError
from minprfaas.transport.wan.lanes import Lane
from minprfaas.transport.wan.parts import decode_message

log = logging.getLogger(__name__)
NONCE_BYTES = 32
INCARNATION_BYTES = 8
_MAC_BYTES = 32
_GREETING = b"minprfaas link"
_HELLO_BYTES = len(_GREETING) + INCARNATION_BYTES + NONCE_BYTES


@dataclass(frozen=True)
class LinkIdentity:
    """What both ends must agree on. `fingerprint` stands for the model's configuration and weights."""

    fingerprint: bytes
    dtype: str
    block_layout: str
    secret: bytes | None = None
    wire: str = Wire().name

    def as_json(self) -> bytes:
        """What the peer is told: everything but the secret."""
        return json.dumps({"model fingerprint": self.fingerprint.hex(), "dtype": self.dtype,
                           "block layout": self.block_layout, "wire": self.wire}).encode()

    def difference(self, theirs: bytes) -> str | None:
        """What differs, in words; None when both sides mean the same bytes."""
        if theirs == self.as_json():
            return None
        try:
            mine, other = json.loads(self.as_json()), decode_message(theirs)
        except FrameError as error:
            return str(error)
        return "; ".join(f"{name} is {value} here and {other.get(name)} there" for name, value in mine.items()
                         if other.get(name) != value) or "the peer describes itself in other words"


def shake_hands(lane: Lane, terms: str, incarnation: bytes, identity: LinkIdentity) -> bytes:
    """Authenticate one lane and give it its codec; returns the peer's incarnation (8 bytes, new with each process).

    `terms`: what both sides must mean by this lane. Raises LinkRefused, or LinkDown when the lane breaks or is late."""
    key, peer_rank = identity.secret or b"", 1 - lane.rank
    body = f"version {VERSION}, {terms}".encode()
    hello = _GREETING + incarnation + secrets.token_bytes(NONCE_BYTES) + body
    peer_hello = lane.exchange(hello)
    reason = None
    if peer_hello[:len(_GREETING)] != _GREETING or peer_hello[_HELLO_BYTES:] != body:
        reason = f"the peer says {peer_hello[_HELLO_BYTES:][:200]!r}, this side {body!r}"

    hellos = (hello, peer_hello) if lane.rank == 0 else (peer_hello, hello)
    transcript = b"".join(hashlib.sha256(part).digest() for part in hellos)

    def mac(purpose: str, rank: int, data: bytes = b"") -> bytes:
        return hmac.digest(key, f"{purpose} of {rank}: ".encode() + transcript + data, "sha256")

    peer_proof = lane.exchange(b"" if reason else mac("proof", lane.rank))
    if reason is None and not hmac.compare_digest(peer_proof, mac("proof", peer_rank)):
        reason = "the peer does not hold the same secret"

    mine = identity.as_json()
    sealed = lane.exchange(b"" if reason else mac("identity", lane.rank, mine) + mine)
    theirs = sealed[_MAC_BYTES:]
    if reason is None and not hmac.compare_digest(sealed[:_MAC_BYTES], mac("identity", peer_rank, theirs)):
        reason = "the peer's identity was altered on the way"
    reason = reason or identity.difference(theirs)

    skill = bytes([multiplies_bytes()])
    verdict = lane.exchange(b"" if reason else skill + mac("yes", lane.rank, skill))
    if reason is not None:
        log.warning("link refused (%s): %s", terms, reason)
        raise LinkRefused(reason)
    peer_skill = verdict[:1]
    if not hmac.compare_digest(verdict[1:], mac("yes", peer_rank, peer_skill)):
        raise LinkRefused("the peer refused")
    keys = (mac("frames", lane.rank), mac("frames", peer_rank)) if identity.secret is not None else (None, None)
    sums = row_sums(identity.secret, by_bytes=skill == peer_skill == b"\1")
    lane.codec = Codec(lane.codec.payload_limit, *keys, sums)
    return peer_hello[len(_GREETING):len(_GREETING) + INCARNATION_BYTES]
