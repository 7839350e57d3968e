"""The fabric's parts alone: what proves a batch whole, what goes into one, and what an epoch's end means to streams.

Chapter 09.
"""

import pytest
import torch
from transport_support import Cargo, in_parallel

from minprfaas.transport.base import LinkDown, StreamAborted
from minprfaas.transport.fabric_sending import PIECES, FabricOutbox, batches_of
from minprfaas.transport.pair_group import ALIGN_BYTES, DIGEST_BYTES, digest, is_sound, seal
from minprfaas.transport.streams import Piece


def test_a_digest_notices_a_changed_word_a_missing_row_and_rows_that_changed_places():
    torch.manual_seed(0)
    data = torch.randint(0, 256, (8 * ALIGN_BYTES,), dtype=torch.uint8)
    rows, sound = data.view(8, -1), int(digest(data))
    for place in (0, 7, ALIGN_BYTES, len(data) - 1):
        changed = data.clone()
        changed[place] ^= 128
        assert int(digest(changed)) != sound
    assert int(digest(rows[[1, 0, 2, 3, 4, 5, 6, 7]].reshape(-1))) != sound
    assert int(digest(rows[[0, 1, 2, 3, 4, 5, 6, 6]].reshape(-1))) != sound, "the last row did not arrive"


def test_a_batch_is_sound_when_all_of_it_is_there_and_it_is_the_one_that_was_announced():
    torch.manual_seed(0)
    batch = torch.randint(0, 256, (4 * ALIGN_BYTES + DIGEST_BYTES,), dtype=torch.uint8)
    seal(batch, 5)
    assert is_sound(batch, 5) and not is_sound(batch, 6), "an earlier batch in the same memory"
    assert not is_sound(torch.zeros_like(batch), 5), "nothing came, into memory that was zero"
    for place in (0, ALIGN_BYTES, len(batch) - DIGEST_BYTES - 1, len(batch) - 1):
        changed = batch.clone()
        changed[place] ^= 1
        assert not is_sound(changed, 5)


def test_a_batch_lays_pieces_where_numbers_can_begin_as_many_as_fit():
    pieces = [Piece(0, 0, 0, 1, nbytes) for nbytes in (5, 32, 16, 17, 99)]
    laid = [[(at, piece.nbytes) for at, piece in batch] for batch in batches_of(pieces, 64)]
    assert laid == [[(0, 5), (16, 32), (48, 16)], [(0, 17)], [(0, 99)]]
    assert [len(batch) for batch in batches_of(pieces[:1] * (PIECES + 1), 2**20)] == [PIECES, 1]
    assert [*batches_of([], 64)] == []


def test_between_two_epochs_streams_wait_and_whoever_ends_says_so_once():
    said = []
    outbox = FabricOutbox("pair", lambda word, **fields: said.append((word, fields["stream"])), print)
    gone, waits = (outbox.open(Cargo(number).plan, 24_576) for number in (1, 2))
    for reason in ("the client left", "said later"):
        gone.abort(reason)
    assert said == [("abort", 1)]
    row = Cargo().sent[0][:1].reshape(-1)
    with pytest.raises(StreamAborted, match="stream 1: the client left"):
        gone.put(0, 64, 65, row)

    def put():
        with pytest.raises(StreamAborted, match="stream 2: the wire broke"):
            waits.put(0, 64, 65, row)

    in_parallel(put, lambda: outbox.end_epoch("the wire broke", is_lost=False))
    assert said == [("abort", 1), ("abort", 2)]
    outbox.settle("older", 99, is_refused=False)  # of an epoch that is over
    again = outbox.open(Cargo(3).plan, 24_576)
    again.unwritten = 1
    with pytest.raises(TimeoutError, match="stream 3: 1 pieces are not acknowledged after 0.0 s"):
        outbox.wait_until_written(again, 0.0)
    outbox.end_epoch("closed", is_lost=True)
    for call in (lambda: outbox.open(Cargo(4).plan, 24_576), lambda: again.put(0, 64, 65, row)):
        with pytest.raises(LinkDown, match="closed"):
            call()
    assert said[2:] == [("abort", 3)]
