"""Rows on the wire in fewer bytes: each encoding stays within its stated error, whatever the rows. Chapter 15."""

import pytest
import torch

from minprfaas.config import Encoding
from minprfaas.transport.encoding import RowCodec

WIDTHS = (1, 7, 40, 96, 256, 576)


def rows_of(kind, width, generator):
    rows = torch.randn(33, width, generator=generator)
    if kind == "outliers":
        rows[:, ::17] *= 1000
        rows[5] *= 1e4
    elif kind == "shifted":
        rows = rows * 0.01 + 50
    elif kind == "constant":
        rows = torch.full_like(rows, -3.25)
    elif kind == "zero":
        rows.zero_()
    elif kind == "tiny":
        rows = rows * 1e-30
    return rows


def bound(codec, rows):
    """The error that the module's docstring states, and one rounding of the cache's own format."""
    groups = rows.unflatten(1, (-1, codec.group))
    top = groups.abs().amax(-1, keepdim=True)
    span = groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)
    stated = {Encoding.EXACT: 0 * groups, Encoding.BF16: groups.abs() / 2**8,
              Encoding.FP8: groups.abs() / 2**4 + top / 2**18, Encoding.INT8: top / 250 + 0 * groups,
              Encoding.INT4: span / 29 + top / 2**7 + 0 * groups}[codec.encoding]
    return (stated + groups.abs() * torch.finfo(codec.dtype).eps).flatten(1) + 1e-36


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("kind", ["random", "outliers", "shifted", "constant", "zero", "tiny"])
def test_every_row_comes_back_within_the_stated_error(encoding, kind):
    generator = torch.Generator().manual_seed(3)
    for width in WIDTHS:
        for dtype in (torch.float32, torch.bfloat16):
            codec = RowCodec(encoding, width, dtype)
            rows = rows_of(kind, width, generator).to(dtype)
            wire = codec.encode(rows.view(torch.uint8).reshape(-1))
            assert wire.dtype == torch.uint8 and wire.numel() == len(rows) * codec.row_bytes
            back = codec.decode(wire.clone()).view(dtype).view(-1, width)
            error = (back.float() - rows.float()).abs()
            assert (error <= bound(codec, rows.float())).all(), (width, dtype, float(error.max()))


def test_exact_rows_and_bf16_of_a_bf16_cache_are_bit_for_bit_the_same():
    rows = torch.randn(20, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    data = rows.view(torch.uint8).reshape(-1)
    for encoding in (Encoding.EXACT, Encoding.BF16):
        assert torch.equal(RowCodec(encoding, 96, torch.bfloat16).decode(
            RowCodec(encoding, 96, torch.bfloat16).encode(data)), data)
    exact = {(encoding, dtype) for encoding in Encoding for dtype in (torch.float32, torch.bfloat16)
             if RowCodec(encoding, 96, dtype).is_exact}
    assert exact == {(Encoding.EXACT, torch.float32), (Encoding.EXACT, torch.bfloat16), (Encoding.BF16, torch.bfloat16)}
    assert not any(RowCodec(encoding, 96, torch.bfloat16, is_recast=True).is_exact for encoding in Encoding)
    assert [RowCodec(Encoding.INT8, width, torch.float32).group for width in (1, 7, 96, 576)] == [1, 7, 48, 64]
    assert [RowCodec(Encoding.INT4, width, torch.float32).group for width in (1, 7, 96, 576)] == [1, 7, 32, 32]


def test_a_row_can_leave_alone():
    """Chunks may end anywhere, so a row's bytes must not depend on its neighbours."""
    rows = torch.randn(9, 64, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 3, 9)[:, None]
    for encoding in Encoding:
        codec = RowCodec(encoding, 64, torch.float32)
        whole = codec.encode(rows.view(torch.uint8).reshape(-1))
        alone = [codec.encode(row.view(torch.uint8).reshape(-1)) for row in rows]
        assert torch.equal(torch.cat(alone), whole)


def test_what_a_token_weighs():
    """A KV head of 128 in bf16: 512 bytes of key and value become a half and about a quarter."""
    weights = {encoding: RowCodec(encoding, 256, torch.bfloat16).row_bytes for encoding in Encoding}
    assert weights == {"exact": 512, "bf16": 512, "fp8": 264, "int8": 264, "int4": 160}
