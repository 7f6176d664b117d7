"""A quantized cache of keys and values, through transformers' cache interface: it goes into any generate() as past_key_values.

Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv:2402.02750: values are rounded for each head and token, keys for each
channel over a stretch of tokens (they have channels that are large throughout), and the latest keys stay as they are until a stretch is full. Codes are
asymmetric, x = low + scale * code, with float16 low and scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import RecipeError
from ..numerics import packing

SMALLEST = 2.0**-14  # of a scale: float16's smallest normal number


@dataclass(frozen=True)
class KVScheme:
    """bits: 2 to 8. group: channels of a head that share a scale in the values (0: all). stretch: tokens over which a channel of the keys is rounded."""

    bits: int = 8
    group: int = 0
    stretch: int = 64

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or self.group < 0 or self.stretch < 1:
            raise RecipeError(f"bits is {self.bits}, group {self.group} and stretch {self.stretch}; expected 2 to 8 bits, a group of 0 (all channels) or more, and at least 1 token.")


@dataclass
class Packed:
    """Rounded rows of so many numbers: words int32 [..., words], scale and low float16 [...]."""

    words: Tensor
    scale: Tensor
    low: Tensor
    count: int

    def decode(self, bits: int, dtype: torch.dtype) -> Tensor:
        codes = packing.unpack(self.words.reshape(-1, self.words.shape[-1]), bits, self.count).view(*self.scale.shape, self.count)
        return torch.addcmul(self.low.unsqueeze(-1).float(), codes.float(), self.scale.unsqueeze(-1).float()).to(dtype)

    def map(self, function) -> Packed:
        return Packed(function(self.words), function(self.scale), function(self.low), self.count)

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scale.nbytes + self.low.nbytes


def encode(x: Tensor, bits: int) -> Packed:
    """Round each row of x [..., count] to 2^bits steps between its least and its largest number."""
    low, high = torch.aminmax(x.float(), dim=-1)
    low = low.half()
    scale = ((high - low.float()) / (2**bits - 1)).clamp_(min=SMALLEST).half()
    codes = (x.float() - low.float().unsqueeze(-1)).div_(scale.float().unsqueeze(-1)).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    words = packing.pack(codes.reshape(-1, x.shape[-1]), bits)
    return Packed(words.view(*scale.shape, -1), scale, low, x.shape[-1])


class QuantizedKVLayer(DynamicLayer):
    """The keys and values of one layer, [sequences, heads, tokens, head size] when handed out."""

    is_croppable = False

    keys: Tensor | None

    def __init__(self, scheme: KVScheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.old_keys: Packed | None = None  # rows [sequences, heads, stretches, head size] of so many tokens
        self.old_values: Packed | None = None  # rows [sequences, heads, tokens, groups] of so many channels
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Take in new keys and values, and return all there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys = key_states[:, :, :0]
        assert self.keys is not None
        self.length += key_states.shape[-2]
        size = value_states.shape[-1] if not self.scheme.group else self.scheme.group
        if value_states.shape[-1] % size:
            raise RecipeError(f"groups of {size} do not divide heads of {value_states.shape[-1]} channels.")
        if key_states.shape[-2] or self.old_values is None:
            self.old_values = _joined(self.old_values, encode(value_states.unflatten(-1, (-1, size)), self.scheme.bits), 2)
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        full = self.keys.shape[-2] // self.scheme.stretch * self.scheme.stretch
        if full:
            stretches = self.keys[:, :, :full].unflatten(2, (-1, self.scheme.stretch)).transpose(-1, -2)
            self.old_keys = _joined(self.old_keys, encode(stretches, self.scheme.bits), 2)
            self.keys = self.keys[:, :, full:].contiguous()
        return self._all_keys(), self.old_values.decode(self.scheme.bits, self.dtype).flatten(-2)

    def _all_keys(self) -> Tensor:
        assert self.keys is not None
        if self.old_keys is None:
            return self.keys
        return torch.cat([self.old_keys.decode(self.scheme.bits, self.dtype).transpose(-1, -2).flatten(2, 3), self.keys], dim=-2)

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return (self.old_keys.nbytes if self.old_keys else 0) + (self.old_values.nbytes if self.old_values else 0) + (self.keys.nbytes if self.keys is not None else 0)

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        super().reset()
        self.old_keys = self.old_values = None
        self.length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None:
            self._select(torch.arange(len(self.keys), device=self.keys.device).repeat_interleave(repeats))

    def _select(self, sequences: Tensor) -> None:
        if self.keys is None:
            return
        pick = lambda x: x.index_select(0, sequences.to(x.device))
        self.keys = pick(self.keys)
        self.old_keys = self.old_keys and self.old_keys.map(pick)
        self.old_values = self.old_values and self.old_values.map(pick)


def _joined(old: Packed | None, new: Packed, axis: int) -> Packed:
    if old is None:
        return new
    join = lambda a, b: torch.cat([a, b], dim=axis)
    return Packed(join(old.words, new.words), join(old.scale, new.scale), join(old.low, new.low), new.count)


def kv_cache(config: transformers.PretrainedConfig, scheme: KVScheme) -> Cache:
    """An empty cache for a model of this config, for its generate(past_key_values=...). Layers with a sliding window keep theirs as it is: it is short."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    window = getattr(text, "sliding_window", None)
    return Cache(layers=[DynamicSlidingWindowLayer(sliding_window=window) if kind == "sliding_attention" and window else QuantizedKVLayer(scheme) for kind in kinds])


class BlockCache:
    """What a block's attention takes for a cache in one pass over a whole window: keys and values come back rounded, as if they had been read from a quantized cache."""

    def __init__(self, scheme: KVScheme) -> None:
        self.scheme = scheme

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        return QuantizedKVLayer(self.scheme).update(key_states, value_states)

    def get_seq_length(self, *args: object) -> int:
        return 0
