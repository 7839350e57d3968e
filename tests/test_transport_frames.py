"""Frames: what a peer may send, and that nothing else is believed. Chapter 07."""

import hashlib
import random
from array import array
from operator import mul

import pytest
import torch

from minprfaas.transport.wan import frames
from minprfaas.transport.wan.digest import ROW_BYTES, Digest, row_sums
from minprfaas.transport.wan.frames import (CONTROL_LIMIT_BYTES, HEADER_BYTES, Codec, FrameError, Header, Kind, Slot,
                                            SlotPool, control_frame, decode_acks, encode_acks)
from minprfaas.transport.wan.gpu_sums import LEAST_ROWS, SumsOfPieces, queue_sums
from minprfaas.transport.wan.parts import PartsOut, decode_message, encode_message

LIMIT = 32 * 1024


def sealed(codec: Codec, header: Header, payload: bytes) -> Slot:
    slot = Slot(LIMIT)
    slot.view[HEADER_BYTES:HEADER_BYTES + len(payload)] = payload
    codec.seal(header, slot.view)
    return slot


@pytest.mark.parametrize("key", [None, b"k" * 32], ids=["checksum", "keyed"])
def test_a_frame_survives_the_wire_field_by_field(key):
    codec, payload = Codec(LIMIT, key, key), bytes(range(256)) * 5
    header = Header(Kind.CHUNK, 2**63, 2**64 - 1, 2**16 - 1, 7, 2**32 - 2, 2**32 - 1, 12, len(payload))
    slot = sealed(codec, header, payload)
    read = codec.open(slot.view)
    assert read == Header(**{**header.__dict__, "payload_digest": read.payload_digest})
    assert codec.payload_is_intact(read, slot.view)
    slot.view[HEADER_BYTES + 100] ^= 1
    assert not codec.payload_is_intact(read, slot.view)


def test_a_slot_sums_the_whole_rows_of_its_payload_where_sums_are_by_bytes():
    slot, by_bytes = Slot(3 * ROW_BYTES - 1), row_sums(b"secret", by_bytes=True)
    slot.payload.copy_(torch.randint(256, slot.payload.shape, generator=torch.Generator().manual_seed(1)))
    for nbytes, rows in (ROW_BYTES, 1), (2 * ROW_BYTES - 1, 1), (2 * ROW_BYTES, 2), (3 * ROW_BYTES - 1, 2):
        whole = slot.payload[:rows * ROW_BYTES].view(torch.int8).view(rows, -1).long()
        assert torch.equal(slot.sums(nbytes, by_bytes).long(), whole @ by_bytes.keys.long())
    assert slot.sums(ROW_BYTES - 1, by_bytes) is None and Slot(100).sums(100, by_bytes) is None
    assert slot.sums(2 * ROW_BYTES, row_sums(b"secret", by_bytes=False)) is None


def test_what_is_no_chunk_says_nothing_of_tokens_or_layers():
    assert control_frame(Kind.BYE).header == Header(Kind.BYE, 0, 0, 0, 0, 0, 0, 0, 0, b"")
    assert control_frame(Kind.ACK, b"12345678").nbytes == HEADER_BYTES + 8


def test_a_slot_is_used_again_when_nothing_refers_to_it_any_more():
    pool = SlotPool(1000)
    first, other = pool.take(1000, pinned=False), pool.take(501, pinned=False)
    assert len(first.view) == len(other.view) == HEADER_BYTES + 1000 and len(first.payload) == 1000
    memory = first.tensor.data_ptr()
    assert memory != other.tensor.data_ptr() and pool.take(700, False).tensor.data_ptr() != memory
    del first
    again = pool.take(700, pinned=False)
    assert again.tensor.data_ptr() == memory
    again.payload[0] = 7
    assert again.view[HEADER_BYTES] == 7
    for nbytes in (500, 1001):  # what is much less would keep a whole slot, and what is more does not fit one
        assert len(pool.take(nbytes, pinned=False).view) == HEADER_BYTES + nbytes


def test_a_frame_under_another_key_or_direction_is_refused():
    slot = sealed(Codec(LIMIT, b"a" * 32, b"b" * 32), Header(Kind.ACK), b"")
    for key in (b"b" * 32, b"c" * 32, None):
        with pytest.raises(FrameError, match="tag is wrong"):
            Codec(LIMIT, None, key).open(slot.view)


@pytest.mark.parametrize("header, complaint", [
    (Header(Kind.CHUNK, nbytes=LIMIT + 1), "above the limit of 32768"),
    (Header(Kind.CHUNK, nbytes=2**32 - 1), "above the limit of 32768"),
    (Header(Kind.MESSAGE, nbytes=CONTROL_LIMIT_BYTES + 1), "MESSAGE of 16385 bytes is above the limit of 16384"),
    (Header(99), "kind 99 is unknown"),
    (Header(Kind.CHUNK, start=5, end=4), "reversed")])
def test_absurd_fields_are_refused_although_their_checksum_is_right(header, complaint):
    codec = Codec(LIMIT)
    with pytest.raises(FrameError, match=complaint):
        codec.open(sealed(codec, header, b"").view)


@pytest.mark.parametrize("name, value", [("MAGIC", b"HTTP"), ("VERSION", 2)])
def test_a_frame_of_another_protocol_or_version_is_refused_although_its_checksum_is_right(monkeypatch, name, value):
    codec = Codec(LIMIT)
    with monkeypatch.context() as patched:
        patched.setattr(frames, name, value)
        slot = sealed(codec, Header(Kind.ACK), b"")
    with pytest.raises(FrameError, match="this side speaks b'PFKV' version 3"):
        codec.open(slot.view)


def test_ten_thousand_mutated_frames_raise_a_frame_error_or_parse_within_the_limits():
    """Half of them get a fresh checksum, as an enemy without the key would do when there is no key."""
    generator, codec = random.Random(7), Codec(LIMIT)
    message = encode_message({"prompt": "Once upon a time"})
    parsed = 0
    for number in range(10_000):
        kind = generator.choice(list(Kind))
        payload = message if kind == Kind.MESSAGE else generator.randbytes(generator.randrange(200))
        header = Header(kind, nbytes=len(payload), **{name: generator.choice([0, 1, 65535, generator.randrange(2**16)])
                                                      for name in ("seq", "stream", "layer", "group", "start", "end")})
        if number % 2:
            name = generator.choice(["nbytes", "start", "end", "offset"])
            header = Header(**{**header.__dict__, name: generator.randrange(2**32)})
            slot = sealed(codec, header, b"") if header.nbytes > LIMIT else sealed(codec, header, payload)
        else:
            slot = sealed(codec, header, payload)
            for _ in range(generator.randrange(1, 6)):
                slot.view[generator.randrange(HEADER_BYTES + len(payload))] ^= 1 << generator.randrange(8)
        try:
            read = codec.open(slot.view)
            body = slot.view[HEADER_BYTES:HEADER_BYTES + read.nbytes]
            if codec.payload_is_intact(read, slot.view):
                if read.kind == Kind.MESSAGE:
                    decode_message(bytes(body))
                if read.kind == Kind.ACK:
                    decode_acks(body)
        except FrameError:
            continue
        parsed += 1
        assert read.nbytes <= LIMIT and len(body) == read.nbytes
    assert 0 < parsed < 9_000, "the mutations must reach both sides of the parser"


@pytest.mark.parametrize("by_bytes, beyond", [(False, 4), (False, 1000), (True, 0), (True, 1000)])
def test_the_digest_of_much_data_is_that_of_its_sums_as_they_are_defined(by_bytes, beyond):
    """Written out: both ends of a link must come to the same, whatever machine they run on."""
    key, data = b"k" * 32, random.Random(6).randbytes(2 * 16_384 + beyond)
    secret = hashlib.shake_256(b"keys of the sums: " + b"the link's").digest(16_384 * (16 if by_bytes else 2))
    if by_bytes:
        keys = [number >> 1 for number in array("b", secret)]
        rows = [array("b", data[at:at + 16_384]) for at in (0, 16_384)]
        sums = array("i", (sum(map(mul, keys[column::16], row)) for row in rows for column in range(16)))
    else:
        keys = array("q", secret)
        rows = [(keys[half * 2048:][:2048], array("q", data[at + 4 * half:][:16_384]))
                for half in (0, 1) for at in (0, 16_384)]
        sums = array("Q", (sum(map(mul, *row)) % 2**64 for row in rows))
    expected = hashlib.blake2b(sums.tobytes() + data[2 * 16_384:], key=key, digest_size=16).digest()
    digest = Digest(key, row_sums(b"the link's", by_bytes)).of
    assert digest(memoryview(bytearray(data))) == expected
    little = data[:16_384 - by_bytes]  # of a row alone there are no four bytes more; it is hashed as it is
    assert digest(little) == hashlib.blake2b(little, key=key, digest_size=16).digest()


@pytest.mark.parametrize("key", [None, b"k" * 32], ids=["public", "keyed"])
@pytest.mark.parametrize("by_bytes", [False, True], ids=["by words", "by bytes"])
def test_the_digest_of_much_data_notices_every_flipped_bit_and_everything_that_is_swapped(key, by_bytes):
    generator, digest = random.Random(5), Digest(key, row_sums(key, by_bytes)).of
    data = bytearray(generator.randbytes(20 * 8192 + 5000))
    true = digest(memoryview(data))
    for at in [0, 7, 8191, 8192, 20 * 8192, len(data) - 1, *(generator.randrange(len(data)) for _ in range(200))]:
        bit = 1 << generator.randrange(8)
        data[at] ^= bit
        assert digest(memoryview(data)) != true, f"a flipped bit in byte {at} went unnoticed"
        data[at] ^= bit
    for at in range(7, 60 * 8, 8):  # the topmost bits of words, which half of all keys multiply away
        data[at] ^= 128
        assert digest(memoryview(data)) != true, f"a flipped bit in byte {at} went unnoticed"
        data[at] ^= 128
    for size in (1, 8, 4096, 8192):
        first, second = (number * size for number in generator.sample(range(20 * 8192 // size), 2))
        swapped = bytearray(data)
        swapped[first:first + size] = data[second:second + size]
        swapped[second:second + size] = data[first:first + size]
        assert swapped == data or digest(memoryview(swapped)) != true, f"{size} swapped bytes went unnoticed"
    assert digest(memoryview(data)) == true


@pytest.mark.parametrize("rows, beyond", [(LEAST_ROWS, 0), (LEAST_ROWS, 16_383), (LEAST_ROWS + 1, 1)])
def test_sums_that_are_made_where_the_bytes_lie_seal_a_frame_as_a_core_would(rows, beyond):
    """By what a GPU runs, on a CPU. They are made before it is known on which lane, or in which epoch, they leave."""
    payload, sums = random.Random(8).randbytes(rows * 16_384 + beyond), row_sums(b"the link's", by_bytes=True)
    known, slot = queue_sums(torch.tensor(list(payload), dtype=torch.uint8), sums), Slot(len(payload))
    slot.view[HEADER_BYTES:] = payload
    assert known.shape == (rows, 16) and torch.equal(known, sums.of(slot.view[HEADER_BYTES:], rows))
    for key in (b"of one epoch", b"of the next"):
        codec = Codec(len(payload), key, key, sums)
        codec.seal(Header(Kind.CHUNK, nbytes=len(payload)), slot.view, known)
        header = codec.open(slot.view)
        assert codec.payload_is_intact(header, slot.view) and codec.payload_is_intact(header, slot.view, known)
        assert not codec.payload_is_intact(header, slot.view, known + 1), "sums that are known are not made again"
    for at in (0, rows * 16_384 - 1, len(payload) - 1):
        slot.view[HEADER_BYTES + at] ^= 1
        landed = torch.frombuffer(slot.view[HEADER_BYTES:], dtype=torch.uint8)
        assert not codec.payload_is_intact(header, slot.view, queue_sums(landed, sums)), f"bit {at} went unnoticed"
        slot.view[HEADER_BYTES + at] ^= 1


def test_pieces_of_what_leaves_together_have_the_sums_that_they_would_have_alone():
    data = torch.randint(0, 256, (3 * LEAST_ROWS * 16_384 + 100,), dtype=torch.uint8)
    sums = row_sums(b"the link's", by_bytes=True)
    all_of_them = SumsOfPieces(data, sums)
    for begin in (0, LEAST_ROWS * 16_384, LEAST_ROWS * 16_384 + 32, 2 * LEAST_ROWS * 16_384):
        piece = data[begin:begin + LEAST_ROWS * 16_384 + 100]
        assert torch.equal(all_of_them.of(piece), queue_sums(piece, sums)), f"from byte {begin}"


def test_sums_are_made_by_a_core_of_few_rows_and_for_a_peer_that_digests_by_words():
    data = torch.randint(0, 256, (LEAST_ROWS * 16_384 + 16,), dtype=torch.uint8)
    by_bytes, by_words = (row_sums(b"the link's", form) for form in (True, False))
    assert queue_sums(data[:-17], by_bytes) is None and queue_sums(data, by_words) is None
    assert queue_sums(data[1:], by_bytes) is None, "a GPU multiplies nothing that begins anywhere"
    known, slot = queue_sums(data, by_bytes), Slot(len(data))
    slot.payload.copy_(data)
    codec, header = Codec(len(data), sums=by_words), Header(Kind.CHUNK, nbytes=len(data))
    codec.seal(header, slot.view, known)
    assert codec.payload_is_intact(codec.open(slot.view), slot.view)


def test_a_message_is_a_json_object_and_nothing_else():
    for data in (b"[1]", b"{", b"\xff", b"[" * 100_000, b"1", b""):
        with pytest.raises(FrameError):
            decode_message(data)
    out, parts = PartsOut(), []
    out.push(encode_message({"tokens": [1] * 50_000}), 0.0)
    while out.queued_at_s is not None:
        parts.append(bytes(out.pop().slot.view[HEADER_BYTES:]))
    assert len(parts) > 1 and max(map(len, parts)) <= CONTROL_LIMIT_BYTES
    assert decode_message(b"".join(parts)) == {"tokens": [1] * 50_000}


def test_acknowledgements_are_a_list_of_numbers():
    assert decode_acks(memoryview(encode_acks([1, 2**64 - 1]))) == [1, 2**64 - 1]
    with pytest.raises(FrameError, match="no list"):
        decode_acks(memoryview(b"1234567"))
