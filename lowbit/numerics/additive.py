"""Additive codebooks (AQLM): every 8 consecutive weights of a row are the sum of one vector from each of M codebooks, times the row's scale.

Egiazarian et al., "Extreme Compression of Large Language Models via Additive Quantization", arXiv:2401.06118, section 3. Codebooks and scales are stored in
float16 and belong to one matrix, so their share shrinks as the matrix grows: 2x8 on 4096 x 4096 takes 2.0 bits a weight, on 64 x 256 six.

    w[i, 8 j + t] = scale[i] * sum_m codebook[m, code[i, j, m], t]

Plain rounding is residual k-means: the first codebook's centroids are those of the weights, the next one's those of what is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FormatError
from ..scheme import RangeSearch, Scheme
from ..tensor import QuantizedTensor, matrix_shape

GROUP = 8
KMEANS_STEPS = 50
FULL_STEPS = 10  # at the end of k-means, with all points
SAMPLE = 64  # points for each centroid that k-means looks at, at most
CHUNK_NUMBERS = 1 << 22  # distances that are held at once
# name: (codebooks, bits of a code)
KINDS = {f"aqlm_{count}x{bits}": (count, bits) for count, bits in ((1, 8), (2, 8), (3, 8), (4, 8), (1, 10), (1, 12), (2, 12), (1, 16), (2, 16))}


def quantize(W: Tensor, scheme: Scheme, search: RangeSearch = RangeSearch(), importance: Tensor | None = None) -> QuantizedTensor:
    """Residual k-means of W [out_features, in_features], importance [in_features] weighing the squared errors."""
    codes, codebooks, scale = residual_kmeans(W.float(), scheme, importance)
    return from_codes(codes, codebooks, scale, scheme, str(W.dtype).removeprefix("torch."))


def from_codes(codes: Tensor, codebooks: Tensor, scale: Tensor, scheme: Scheme, dtype: str) -> QuantizedTensor:
    """Wrap codes int64 [out, in / 8, M], codebooks [M, K, 8] and scale [out], which are rounded to float16."""
    rows, vectors, _ = codes.shape
    narrow = codes.to(torch.uint8) if KINDS[scheme.format][1] <= 8 else torch.where(codes >= 1 << 15, codes - (1 << 16), codes).to(torch.int16)
    parts = {"codes": narrow, "codebooks": codebooks.half(), "scale": scale.half()}
    if not bool(torch.isfinite(parts["codebooks"]).all() and torch.isfinite(parts["scale"]).all()):
        raise FormatError(f"a row's scale of {float(scale.abs().max()):.3g} (or a codebook) does not fit float16.")
    return QuantizedTensor(scheme, matrix_shape((rows, vectors * GROUP)), dtype, parts)


def dequantize(qt: QuantizedTensor) -> Tensor:
    """Float32 [out_features, in_features]."""
    return decode(whole_codes(qt), qt.parts["codebooks"].float(), qt.parts["scale"].float())


def whole_codes(qt: QuantizedTensor) -> Tensor:
    """Codes int64 [out, in / 8, M], as they lie in the parts (those of more than 8 bits as signed 16-bit patterns)."""
    return qt.parts["codes"].long() & (1 << KINDS[qt.scheme.format][1]) - 1


def decode(codes: Tensor, codebooks: Tensor, scale: Tensor) -> Tensor:
    """scale times the sum of the coded vectors, [out, in]."""
    total = codebooks[0][codes[..., 0]]
    for m in range(1, codes.shape[2]):
        total = total + codebooks[m][codes[..., m]]
    return total.flatten(1).mul_(scale.unsqueeze(1))


def residual_kmeans(W: Tensor, scheme: Scheme, importance: Tensor | None = None, *, steps: int = KMEANS_STEPS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """codes, codebooks and scale (the rows' root mean squares) to start from; W float32."""
    count, bits = KINDS[scheme.format]
    if not bool(torch.isfinite(W).all()):
        raise FormatError("the weight holds values that are NaN or infinite.")
    scale = W.square().mean(1).sqrt()
    scale = torch.where(scale < 2.0**-24, 2.0**-24, scale).half().float()
    rest = (W / scale.unsqueeze(1)).view(-1, GROUP)
    weights = None if importance is None else (importance / importance.mean().clamp(min=1e-30)).clamp(min=1e-6).view(-1, GROUP)
    codes, books = [], []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        book, code = kmeans(rest, 1 << bits, weights, steps, generator)
        rest = rest - book[code]
        codes.append(code.view(len(W), -1))
        books.append(book)
    return torch.stack(codes, dim=-1), torch.stack(books), scale


def kmeans(x: Tensor, clusters: int, weights: Tensor | None, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm on x [points, 8]: centroids [clusters, 8] and the place of each point.

    weights [in / 8, 8]: of the squared error in each of the eight, the same in every row (points come row by row). Unused centroids are 0 where there are fewer
    points than clusters; an empty cluster keeps its centroid. Ends early when no point moves.
    """
    book = x.new_zeros(clusters, GROUP)
    start = torch.randperm(len(x), generator=generator)[:clusters]
    book[: len(start)] = x[start]
    spread = x.new_ones(x.shape) if weights is None else weights.repeat(len(x) // len(weights), 1)
    whole, whole_spread = x * spread, spread if weights is not None else None
    weighted, full, place = whole, spread, None
    sampled = steps - FULL_STEPS if len(x) > SAMPLE * clusters else 0
    if sampled > 0:  # most steps look at some of the points only
        some = torch.randperm(len(x), generator=generator)[: SAMPLE * clusters].sort().values
        weighted, spread = whole[some], full[some]
    for step in range(steps):
        if step == sampled and sampled > 0:
            weighted, spread, place = whole, full, None
        moved = _nearest(weighted, spread if weights is not None else None, book)
        if place is not None and torch.equal(moved, place):
            if step >= sampled:
                break
            continue
        place = moved
        total = x.new_zeros(clusters, GROUP).index_add_(0, place, weighted)
        mass = x.new_zeros(clusters, GROUP).index_add_(0, place, spread)
        book = torch.where(mass > 0, total / mass, book)
    return book, _nearest(whole, whole_spread, book)


def _nearest(weighted: Tensor, spread: Tensor | None, book: Tensor) -> Tensor:
    """The centroid with the least sum_t h_t (x_t - c_t)^2 of each point: argmin of h . c^2 - 2 (h x) . c."""
    if spread is None:
        return cheapest(weighted, book.square().sum(1).unsqueeze(0), None, book)
    return cheapest(weighted, book.square().T.contiguous(), spread, book)


def cheapest(x: Tensor, power: Tensor, factor: Tensor | None, book: Tensor) -> Tensor:
    """argmin over k of factor @ power[:, k] - 2 x . book[k] of each row of x [n, 8], int64 [n]; factor [n, f], power [f, K] (factor None: power [1, K] alone).

    A buffer of CHUNK_NUMBERS is used again and again.
    """
    left = torch.cat([x, x.new_ones(len(x), 1) if factor is None else factor], dim=1)
    right, chunk = torch.cat([-2 * book.T, power]), max(1, CHUNK_NUMBERS // len(book))
    buffer = x.new_empty(min(chunk, len(x)), len(book))
    found = torch.empty(len(x), dtype=torch.int64)
    for start in range(0, len(x), chunk):
        rows = slice(start, min(start + chunk, len(x)))
        part = torch.mm(left[rows], right, out=buffer[: rows.stop - start])
        torch.argmin(part, 1, out=found[rows])
    return found


def bits(scheme: Scheme, rows: int, columns: int) -> int:
    """Codes, codebooks and scales; what small matrices pay for codebooks of their own is counted."""
    count, each = KINDS[scheme.format]
    return rows * (columns // GROUP) * count * each + 16 * count * (1 << each) * GROUP + 16 * rows


def describe(name: str) -> str:
    count, each = KINDS[name]
    return f"vectors of 8 weights, each the sum of one of {1 << each} from {count} codebook{'s' * (count > 1)} (AQLM)"
