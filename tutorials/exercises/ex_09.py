"""The exercises of chapter 09. Fill in the functions, then: python tutorials/09_inside_a_datacenter.py --check 1"""

import random

import torch
from exercises.checking import first_wrong

from minprfaas.transport import fabric_sending
from minprfaas.transport.fabric_sending import PIECE_ALIGN_BYTES
from minprfaas.transport.pair_group import ALIGN_BYTES, digest
from minprfaas.transport.streams import Piece


def digest_of(data: bytes, row_bytes: int) -> int:
    """The digest of `data`, whose length is a multiple of `row_bytes`: cut it into rows, and each row into words of 8
    bytes (little-endian); add up a row's words, and add up the rows' sums, the first times 1, the second times 3, the
    third times 5 …, all modulo 2**64."""
    raise NotImplementedError


def batches_of(sizes: list[int], batch_bytes: int, align: int) -> list[int]:
    """How many pieces go into each batch. Pieces of these sizes (bytes, none larger than a batch) are put in one after
    another, each at the next multiple of `align`; one that no longer fits begins the next batch."""
    raise NotImplementedError


def check_1() -> str | None:
    """Against the package's digest."""
    cases, generator = [], torch.Generator().manual_seed(0)
    for rows in (1, 2, 5):
        data = torch.randint(0, 256, (rows * ALIGN_BYTES,), dtype=torch.uint8, generator=generator)
        cases.append(((bytes(data.tolist()), ALIGN_BYTES), int(digest(data)) % 2**64))
    for arguments, expected in cases:
        got = digest_of(*arguments)
        if got != expected:
            return f"digest_of(of {len(arguments[0]):,} random bytes): expected {expected}, got {got}"
    return None


def check_2() -> str | None:
    """Against the package's batches."""
    rng, cases = random.Random(0), []
    for most, sizes in [(64, [16, 16, 16, 16, 16]), (64, [33, 15, 16]), (100, [90, 1, 5, 90]),
                        (1000, [rng.randint(1, 300) for _ in range(20)])]:
        batches = fabric_sending.batches_of([Piece(0, 0, 0, 1, size) for size in sizes], most)
        cases.append(((sizes, most, PIECE_ALIGN_BYTES), [len(batch) for batch in batches]))
    return first_wrong(batches_of, cases)
