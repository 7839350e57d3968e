"""Fewer bytes for the rows of a KVCache on the wire: bf16, fp8, int8 or int4. Chapter 15.

The paper names compression of the KVCache as complementary (section 6; KIVI, CacheGen). Here a row is encoded alone, in
groups of neighbouring channels that lie within one head, each with a scale of its own: a row can then leave as soon as
it is computed. KIVI's scales a channel for keys, over many tokens, would be tighter where a channel stands out in every
token; but they need the tokens that are still to come, and a stream ships layer by layer, chunk by chunk.

Error of an element, with `top` the largest magnitude of its group and `span` the difference of its extremes:
`bf16` 2^-8 of the element; `fp8` (e4m3) 2^-4 of it, and `top` / 2^18 near zero; `int8` `top` / 250; `int4` `span` / 29
and 2^-7 of `top`. Besides that the element is rounded to the cache's own format. bf16 of a bf16 cache is exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from minprfaas.config import Encoding, StateKind
from minprfaas.model.spec import StateSpec
from minprfaas.transport.base import LayerPlan, StreamPlan

FP8_TOP, INT8_TOP, INT4_TOP = 448.0, 127, 15
SCALE = torch.bfloat16  # float32's range in two bytes
RECAST = ", recast"  # in a plan: the caches at the two ends have different number formats


@dataclass(frozen=True)
class Wire:
    """How KVCache crosses between two nodes. `recast` names the number formats of their caches where these differ: rows
    then cross in bf16, unless another encoding is asked for, and request-level state in float32. Without `same_blocks`,
    their blocks hold other numbers of tokens: nothing in a stream depends on that, but one has no snapshot where the
    other wants it. `state` is for request-level state: it crosses exactly, or in bf16 where that is asked for."""

    encoding: Encoding = Encoding.EXACT
    recast: str = ""
    same_blocks: bool = True
    state: Encoding = Encoding.EXACT

    @property
    def rows(self) -> Encoding:
        """How rows of token state cross."""
        return Encoding.BF16 if self.recast and self.encoding is Encoding.EXACT else self.encoding

    def entry(self, layer: int, group: int, spec: StateSpec, tokens: int) -> LayerPlan:
        """What a plan says of a layer: for token state a row, else the state as of `tokens`."""
        nbytes = spec.nbytes if spec.kind is StateKind.TOKEN else spec.bytes_at(tokens)
        is_state = spec.kind is StateKind.REQUEST  # exact unless asked: its error would stay in all that follows
        encoding = self.state if is_state else self.rows
        name = encoding.value + (RECAST if self.recast else "")
        if is_state and name == Encoding.EXACT.value:
            return LayerPlan(layer, group, spec.kind, nbytes)
        return LayerPlan(layer, group, spec.kind, codec_of(spec, name).wire_bytes(nbytes), name)

    @property
    def name(self) -> str:
        """What both ends of a link must mean."""
        return self.rows.value + (f", state in {self.state.value}" if self.state is not Encoding.EXACT else "")


@dataclass(frozen=True)
class StateCodec:
    """Request-level state to `dtype` and back: to float32 between caches of different number formats, or to fewer
    bytes."""

    spec: StateSpec
    dtype: torch.dtype = torch.float32
    is_exact = False

    def wire_bytes(self, nbytes: int) -> int:
        """What the state becomes."""
        return sum(self.dtype.itemsize * tensor.nbytes // tensor.torch_dtype.itemsize for tensor in self.spec.tensors)

    def encode(self, data: Tensor) -> Tensor:
        """uint8 of the tensors in the cache's format, in the spec's order -> uint8 of them in `dtype`."""
        parts = data.split([tensor.nbytes for tensor in self.spec.tensors])
        return torch.cat([_as_bytes(_typed(part, tensor.torch_dtype).to(self.dtype))
                          for part, tensor in zip(parts, self.spec.tensors)])

    def decode(self, data: Tensor) -> Tensor:
        """What `encode` gave, at either end -> uint8 of the tensors in this cache's format."""
        numbers = _typed(data.reshape(-1), self.dtype)
        parts = numbers.split([tensor.nbytes // tensor.torch_dtype.itemsize for tensor in self.spec.tensors])
        return torch.cat([_as_bytes(part.to(tensor.torch_dtype)) for part, tensor in zip(parts, self.spec.tensors)])


@dataclass(frozen=True)
class RowCodec:
    """Rows of `width` elements of the cache's `dtype` to bytes and back.

    >>> codec = RowCodec(Encoding.INT8, width=128, dtype=torch.bfloat16)
    >>> codec.group, codec.row_bytes                # 128 codes and two scales, in place of 256 bytes
    (64, 132)
    """

    encoding: Encoding
    width: int
    dtype: torch.dtype
    is_recast: bool = False  # the other end's cache has another format

    @property
    def is_exact(self) -> bool:
        """Whether what `decode` gives is what `encode` got, to the last bit."""
        is_kept = self.encoding is Encoding.EXACT or (self.encoding is Encoding.BF16 and self.dtype is torch.bfloat16)
        return is_kept and not self.is_recast

    @property
    def group(self) -> int:
        """Channels that share a scale: a divisor of the width, so that no group crosses from one head to the next."""
        most = 32 if self.encoding is Encoding.INT4 else 64
        return max(size for size in range(1, min(most, self.width) + 1) if self.width % size == 0)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row on the wire, its scales included."""
        groups = self.width // self.group
        return {Encoding.EXACT: self.width * self.dtype.itemsize, Encoding.BF16: 2 * self.width,
                Encoding.FP8: self.width + 2 * groups, Encoding.INT8: self.width + 2 * groups,
                Encoding.INT4: groups * ((self.group + 1) // 2 + 4)}[self.encoding]

    def wire_bytes(self, nbytes: int) -> int:
        """What whole rows of `nbytes` in the cache's format become."""
        return nbytes // (self.width * self.dtype.itemsize) * self.row_bytes

    def encode(self, data: Tensor) -> Tensor:
        """uint8 of whole rows in the cache's format -> uint8 of as many rows, `row_bytes` each."""
        if self.encoding is Encoding.EXACT:
            return data
        rows = data.reshape(-1).view(self.dtype).view(-1, self.width)
        if self.encoding is Encoding.BF16:
            return _as_bytes(rows.to(torch.bfloat16)).reshape(-1)
        groups = rows.float().unflatten(1, (-1, self.group))  # [rows, groups, channels]
        if self.encoding is Encoding.INT4:
            parts = _encode_int4(groups)
        else:
            top = FP8_TOP if self.encoding is Encoding.FP8 else INT8_TOP
            scale = _scale(groups.abs().amax(-1, keepdim=True) / top)
            values = (groups / scale.float()).clamp(-top, top)
            is_fp8 = self.encoding is Encoding.FP8
            parts = [values.to(torch.float8_e4m3fn) if is_fp8 else values.round().to(torch.int8), scale]
        return torch.cat([_as_bytes(part) for part in parts], dim=-1).reshape(-1)

    def decode(self, data: Tensor) -> Tensor:
        """What `encode` gave -> uint8 of the rows in the cache's format."""
        if self.encoding is Encoding.EXACT:
            return data
        data = data.reshape(-1)
        if self.encoding is Encoding.BF16:
            return _as_bytes(_typed(data, torch.bfloat16).to(self.dtype)).reshape(-1)
        groups = data.view(-1, self.width // self.group, self.row_bytes // (self.width // self.group))
        if self.encoding is Encoding.INT4:
            values = _decode_int4(groups, self.group)
        else:
            code = torch.float8_e4m3fn if self.encoding is Encoding.FP8 else torch.int8
            scale = _typed(groups[..., self.group:], SCALE)
            values = _typed(groups[..., :self.group], code).float() * scale.float()
        return _as_bytes(values.reshape(-1).to(self.dtype)).reshape(-1)


def row_codec(spec: StateSpec, encoding: Encoding, is_recast: bool = False) -> RowCodec:
    """For a layer of token state or with a window: its one tensor's last dimension is a row."""
    (tensor,) = spec.tensors
    return RowCodec(encoding, tensor.shape[-1], tensor.torch_dtype, is_recast)


def codec_of(spec: StateSpec, name: str) -> RowCodec | StateCodec:
    """By the name that a plan has for it."""
    encoding = Encoding(name.removesuffix(RECAST))
    if spec.kind is StateKind.REQUEST:
        return StateCodec(spec, torch.bfloat16 if encoding is Encoding.BF16 else torch.float32)
    return row_codec(spec, encoding, name.endswith(RECAST))


def codecs(specs: tuple[StateSpec, ...], plan: StreamPlan) -> dict[int, RowCodec | StateCodec]:
    """The codecs of the layers whose state does not cross as it is."""
    return {entry.layer: codec_of(specs[entry.layer], entry.encoding) for entry in plan.entries
            if entry.encoding != Encoding.EXACT}


def _encode_int4(groups: Tensor) -> list[Tensor]:
    """Two codes a byte, then scale and least value: rows are shifted far from zero, which a sign would waste."""
    least = groups.amin(-1, keepdim=True)
    base = least.to(SCALE)
    lower = base - base.abs() * 2**-7 - 1e-37  # a two-byte number that is certainly smaller
    base = torch.where(base.float() > least, lower, base)  # else the least value would be out of reach
    scale = _scale((groups - base.float()).amax(-1, keepdim=True) / INT4_TOP)
    codes = ((groups - base.float()) / scale.float()).round().clamp(0, INT4_TOP).to(torch.uint8)
    codes = F.pad(codes, (0, codes.shape[-1] % 2))
    return [codes[..., 0::2] | codes[..., 1::2] << 4, scale, base]


def _decode_int4(groups: Tensor, size: int) -> Tensor:
    packed = groups[..., :-4]
    scale, base = _typed(groups[..., -4:], SCALE).float().split(1, dim=-1)
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)[..., :size]
    return codes.float() * scale + base


def _scale(wanted: Tensor) -> Tensor:
    """In two bytes, and not below what is wanted: else the largest value would be cut. 1 for a group of zeros."""
    rounded = wanted.to(SCALE)
    rounded = torch.where(rounded.float() < wanted, rounded * (1 + 2**-7), rounded)
    return torch.where(rounded > 0, rounded, torch.ones_like(rounded))


def _typed(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers, in memory of their own: a piece of a message may begin at any byte."""
    return data.clone(memory_format=torch.contiguous_format).view(dtype)


def _as_bytes(values: Tensor) -> Tensor:
    """The bytes of a tensor, along its last dimension."""
    return values.contiguous().view(torch.uint8)
