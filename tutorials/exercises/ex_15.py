"""The exercises of chapter 15. Fill in the functions, then: python tutorials/15_the_road_to_production.py --check 1"""

import math

from exercises.checking import first_wrong


def int8_and_back(row: list[float], group: int) -> list[float]:
    """The row as a receiver sees it: each `group` neighbours are divided by their scale (their largest magnitude over
    127; 1 where all are zero), rounded (Python's `round`), and multiplied again."""
    raise NotImplementedError


def row_bytes(width: int, group: int, bits: int, numbers_a_group: int) -> int:
    """Bytes of a row of `width` numbers of `bits` bits, with `numbers_a_group` two-byte numbers (scale, and perhaps a
    least value) for each `group` of neighbours. `group` divides `width`; a group's codes fill whole bytes."""
    raise NotImplementedError


def relayed_tokens(transfer_s: float, prefill_s: float, step_s: float, answer_tokens: int) -> int:
    """Whole steps of `step_s` that fit between the end of a prefill and the end of its KVCache's transfer, which began
    with the prefill; no more than the answer has."""
    raise NotImplementedError


def check_1() -> str | None:
    """Against the definition, written out."""
    cases = []
    for row, group in (([1.0, -2.0, 0.5, 4.0], 4), ([1.0, -2.0, 0.5, 100.0], 2), ([0.0, 0.0, 3.0, -1.5], 2)):
        expected = []
        for start in range(0, len(row), group):
            part = row[start:start + group]
            scale = max(map(abs, part)) / 127 or 1.0
            expected += [round(number / scale) * scale for number in part]
        cases.append(((row, group), expected))
    return first_wrong(int8_and_back, cases)


def check_2() -> str | None:
    """Against the package's codecs."""
    import torch

    from minprfaas.config import Encoding
    from minprfaas.transport.encoding import RowCodec

    cases = []
    for width in (64, 128, 576, 7):
        for encoding, bits, numbers in ((Encoding.INT8, 8, 1), (Encoding.INT4, 4, 2)):
            codec = RowCodec(encoding, width, torch.bfloat16)
            cases.append(((width, codec.group, bits, numbers), codec.row_bytes))
    return first_wrong(row_bytes, cases)


def check_3() -> str | None:
    """Against the planner's seconds, in steps."""
    from minprfaas.scheduling.throughput import relay_s

    arguments = [(5.0, 2.0, 0.25, 1024), (1.0, 2.0, 0.25, 1024), (9.0, 1.0, 0.5, 10), (3.1, 2.0, 0.25, 100)]
    return first_wrong(relayed_tokens, [(case, math.floor(relay_s(*case) / case[2])) for case in arguments])
