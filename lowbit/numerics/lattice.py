"""E8P: eight weights at a time on a lattice, after a randomized Hadamard transform has made them look Gaussian (QuIP#), 2, 3 and 4 bits a weight.

Tseng et al., "QuIP#: Even Better LLM Quantization with Hadamard Incoherence and Lattice Codebooks", arXiv:2402.04396, section 3 and 4. With U the transform of numerics/hadamard.py and
random signs s, t for columns and rows

    W' = U^T diag(t) W diag(s) U        W'[i, 8 j : 8 j + 8] = scale * (point of the code)

A point of E8P is v + 1/4 or v - 1/4 in all components, v = one of 256 rows of magnitudes in {1/2, 3/2, 5/2} with signs that make its sum even: 16 bits for eight
numbers. At 3 and 4 bits what is left, times a second scale, is rounded again: to one of 256 points of E8 (8 bits), or to E8P (16 bits). Codes are the authors':

    bits 15..8  row    bits 7..0  signs: bit j of component ORDER[j]; the parity of all eight says which quarter is added (odd: -1/4)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

from ..errors import FormatError
from ..native import native, threads
from ..scheme import RangeSearch, Scheme
from ..tensor import QuantizedTensor, matrix_shape
from . import hadamard, packing

GROUP = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BALL = 10.0  # squared norm of the rows that are all there
# 29 of the rows with five 3/2 and three 1/2: where the 1/2 are.
PADDING = (
    "123", "023", "013", "012", "367", "357", "347", "356", "346", "345", "267", "257", "247", "256", "246", "245", "167", "157", "147", "156", "146",
    "045", "067", "057", "047", "056", "046", "014", "237",
)  # fmt: skip
CHUNK = 1 << 17  # vectors that are rounded at once


@dataclass(frozen=True)
class Kind:
    """bits a weight. scale: root mean square of the numbers that are rounded, with the least error for Gaussian ones; residual: factor of what is left (None: one stage).
    best: the pair with the least error of both stages together (the authors' 4-bit pair tunes the first alone)."""

    bits: int
    scale: float
    residual: float | None
    best: tuple[float, float | None]


KINDS: dict[str, Kind] = {
    "e8p2": Kind(2, 1.03, None, (1.03, None)),
    "e8p3": Kind(3, 0.98, 2.04, (0.98, 2.04)),
    "e8p4": Kind(4, 1.03, 3.45, (0.88, 3.9)),
}


# ------------------------------------------------------------------------------------------------------------------ points and codes


@lru_cache(maxsize=1)
def magnitudes() -> Tensor:
    """The 256 rows of magnitudes, float32 [256, 8]."""
    rows = [row for row in product((0.5, 1.5, 2.5), repeat=GROUP) if sum(x * x for x in row) <= BALL]
    rows += [tuple(0.5 if str(i) in places else 1.5 for i in range(GROUP)) for places in PADDING]
    return torch.tensor(rows)


@lru_cache(maxsize=1)
def points() -> Tensor:
    """The point of every code, float32 [65536, 8]."""
    code = torch.arange(1 << 16)
    row, signs = code >> 8, code & 255
    bits = torch.stack([signs >> ORDER.index(i) & 1 for i in range(GROUP)], dim=1)
    odd = bits.sum(1) & 1
    bits[:, 0] ^= odd
    bits[:, 7] ^= _odd_rows()[row]
    return magnitudes()[row] * (1 - 2 * bits) + (0.25 - 0.5 * odd).unsqueeze(1)


@lru_cache(maxsize=1)
def e81b() -> Tensor:
    """The 256 points of E8 that the third bit of "e8p3" chooses from, float32 [256, 8]."""
    whole = [v for v in product((-1.0, 0.0, 1.0), repeat=GROUP) if sum(v) % 2 == 0 and sum(x * x for x in v) <= 2]
    half = [v for v in product((-0.5, 0.5), repeat=GROUP) if sum(v) % 2 == 0]
    axes = [tuple(sign if i == j else 0.0 for i in range(GROUP)) for sign in (2.0, -2.0) for j in range(GROUP)][:15]
    return torch.tensor(whole + half + axes)


@lru_cache(maxsize=1)
def _odd_rows() -> Tensor:
    return magnitudes().sum(1).long() & 1


@lru_cache(maxsize=1)
def _row_of() -> Tensor:
    """The row of magnitudes whose digits are (0, 1, 2 for 1/2, 3/2, 5/2), int64 [3^8]; -1 where there is none."""
    table = torch.full((3**GROUP,), -1, dtype=torch.int64)
    table[((magnitudes() - 0.5).long() * _powers()).sum(1)] = torch.arange(256)
    return table


@lru_cache(maxsize=1)
def _powers() -> Tensor:
    return 3 ** torch.arange(GROUP)


@lru_cache(maxsize=1)
def _folded() -> tuple[Tensor, Tensor]:
    """All v that can be nearest to a y whose components 0 to 6 are positive and whose last has the sign that makes the number of minus signs even: signed rows
    [candidates, 8] transposed, and half their squared norms. At most one of the first seven is negative, a -1/2 (a larger one would cost more than it could gain)."""
    made = []
    for row, odd in zip(magnitudes(), _odd_rows().tolist(), strict=True):
        for i in [None, *[i for i in range(7) if row[i] == 0.5]]:
            v = row.clone()
            if i is not None:
                v[i] *= -1
            if (odd == 1) != (i is not None):
                v[7] *= -1
            made.append(v)
    table = torch.stack(made)
    return table.T.contiguous(), table.square().sum(1) / 2


def round_points(x: Tensor) -> tuple[Tensor, Tensor]:
    """The point of E8P nearest to each of x float32 [n, 8], and its code, int64 [n]; of a tie the one with + 1/4. On a CPU in C++ where that was built."""
    extension = native() if x.device.type == "cpu" else None
    if extension is None:
        code = encode(x)
        return points()[code], code
    x = x.detach().float().contiguous()
    value, code = torch.empty_like(x), torch.empty(len(x), dtype=torch.int64, device=x.device)
    extension.round_e8p(x.numpy(), *_arrays(), value.numpy(), code.numpy(), threads())
    return value, code


@lru_cache(maxsize=1)
def _arrays() -> tuple[np.ndarray, ...]:
    """What the C++ code needs of the tables: folded rows and halves of their norms (padded to a multiple of 16), rows by digits, which rows are odd."""
    return *_padded(*_folded()), _row_of().int().numpy(), _odd_rows().to(torch.uint8).numpy()


def _padded(table: Tensor, half: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Candidates [8, count] and halves of their squared norms, with some more that are never the nearest."""
    more = -len(half) % 16
    return torch.nn.functional.pad(table, (0, more)).contiguous().numpy(), torch.nn.functional.pad(half, (0, more), value=float("inf")).numpy()


def encode(x: Tensor) -> Tensor:
    """The codes of round_points, in torch: what the C++ code means, and its oracle."""
    if len(x) > CHUNK:
        return torch.cat([encode(part) for part in x.split(CHUNK)])
    plus, minus = _half_integers(x + 0.25), _half_integers(x - 0.25)  # minus: shift + 1/4
    error_plus = (x + 0.25 - plus).square_().sum(1)
    error_minus = (x - 0.25 - minus).square_().sum(1)
    odd = error_plus < error_minus
    v = torch.where(odd.unsqueeze(1), plus, minus)
    row = _row_of()[((v.abs() - 0.5).long() * _powers()).sum(1)]
    bits = (v < 0).long()
    bits[:, 0] ^= odd
    bits[:, 7] ^= _odd_rows()[row]
    signs = sum(bits[:, i] << j for j, i in enumerate(ORDER))
    return row << 8 | signs


def _half_integers(y: Tensor) -> Tensor:
    """The nearest v to each of y [n, 8]: half-integers with an even sum whose magnitudes are one of the 256 rows.

    Rounding each number and, where the sum is odd, the one farthest from its half-integer the other way gives the nearest of all such v (Conway and Sloane, "Fast
    Quantizing and Decoding Algorithms for Lattice Quantizers and Codes", 1982); where that is no row, all rows are compared.
    """
    v = y.floor().add_(0.5)
    rest = y - v
    odd = v.sum(1).long() & 1
    worst = rest.abs().argmax(1, keepdim=True)
    away = torch.where(rest.gather(1, worst) < 0, -1.0, 1.0) * odd.unsqueeze(1)
    v.scatter_add_(1, worst, away)
    outside = ((v.square().sum(1) > BALL) | (v.abs().amax(1) > 2.5)).nonzero().flatten()
    if len(outside):
        v[outside] = torch.cat([_among_rows(part) for part in y[outside].split(1 << 14)])
    return v


def _among_rows(y: Tensor) -> Tensor:
    """As _half_integers, by comparing all rows: y is brought to the signs of the table by an even number of changes, which keep the lattice."""
    table, half = _folded()
    signs = torch.where(y < 0, -1.0, 1.0)
    signs[:, 7] *= signs.prod(1)
    best = torch.addmm(-half, y * signs, table).argmax(1)
    return table.T[best] * signs


def encode_e81b(x: Tensor) -> Tensor:
    """The place of the nearest of 256 points of E8, int64 [n]."""
    grid = e81b()
    extension = native() if x.device.type == "cpu" else None
    if extension is not None:
        found = torch.empty(len(x), dtype=torch.int64, device=x.device)
        extension.nearest(x.detach().float().contiguous().numpy(), *_padded(grid.T, grid.square().sum(1) / 2), found.numpy(), threads())
        return found
    return torch.cat([torch.addmm(grid.square().sum(1).neg(), part, grid.T, alpha=2).argmax(1) for part in x.split(CHUNK)]) if len(x) else x.new_zeros(0, dtype=torch.int64)


def round_vectors(x: Tensor, kind: Kind, residual: float | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """x float32 [n, 8] on the grid of a kind: values [n, 8], codes [n], codes of the second stage [n] or None."""
    value, code = round_points(x)
    if residual is None:
        return value, code, None
    rest = (x - value).mul_(residual)
    if kind.bits == 4:
        step, second = round_points(rest)
    else:
        second = encode_e81b(rest)
        step = e81b()[second]
    return value + step / residual, code, second


# ------------------------------------------------------------------------------------------------------------------ matrices


def random_signs(count: int, generator: torch.Generator) -> Tensor:
    """1 and -1, float32 [count]."""
    return 1.0 - 2.0 * torch.randint(2, (count,), generator=generator).float()


def incoherent(W: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """U^T diag(rows) W diag(columns) U."""
    return hadamard.unmix(hadamard.unmix(W * columns).T.contiguous() * rows).T.contiguous()


def coherent(W: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The inverse of incoherent."""
    return hadamard.mix((hadamard.mix(W.T.contiguous()) * rows).T.contiguous()) * columns


def quantize(W: Tensor, scheme: Scheme, search: RangeSearch = RangeSearch(), importance: Tensor | None = None) -> QuantizedTensor:
    """Transform W [out_features, in_features] with the signs of seed 0 and round every eight numbers to the nearest point."""
    kind = KINDS[scheme.format]
    W32 = W.float()
    if not bool(torch.isfinite(W32).all()):
        raise FormatError("the weight holds values that are NaN or infinite.")
    generator = torch.Generator().manual_seed(0)
    columns, rows = random_signs(W.shape[1], generator), random_signs(W.shape[0], generator)
    turned = incoherent(W32, rows, columns)
    size, residual = kind.best
    scale = scale_of(turned, size)
    _, code, second = round_vectors((turned / scale).view(-1, GROUP), kind, residual)
    return from_codes(code.view(len(W), -1), None if second is None else second.view(len(W), -1), scale, residual, rows, columns, scheme, str(W.dtype).removeprefix("torch."))


def scale_of(W: Tensor, size: float) -> Tensor:
    """The scale with which the numbers of W have the root mean square size, float32 []."""
    mean = W.square().mean().sqrt() / size
    return torch.where(mean < 2.0**-100, 2.0**-100, mean)


def from_codes(
    code: Tensor, second: Tensor | None, scale: Tensor, residual: float | None, rows: Tensor, columns: Tensor, scheme: Scheme, dtype: str
) -> QuantizedTensor:
    """Wrap codes int64 [out, in / 8] (second: of the residual stage), the scale, and the signs of rows and columns."""
    parts = {"points": _signed(code), "scale": scale.reshape(1).float(), "row_signs": _pack(rows), "column_signs": _pack(columns)}
    if second is not None and residual is not None:
        parts |= {"residual": second.to(torch.uint8) if KINDS[scheme.format].bits == 3 else _signed(second), "residual_scale": torch.tensor([residual])}
    return QuantizedTensor(scheme, matrix_shape((code.shape[0], code.shape[1] * GROUP)), dtype, parts)


def dequantize(qt: QuantizedTensor) -> Tensor:
    """Float32 [out_features, in_features], back in the original basis."""
    parts = qt.parts
    values = points()[parts["points"].long() & 0xFFFF]
    if "residual" in parts:
        stage = points()[parts["residual"].long() & 0xFFFF] if KINDS[qt.scheme.format].bits == 4 else e81b()[parts["residual"].long()]
        values = values + stage / parts["residual_scale"]
    return coherent(values.flatten(1) * parts["scale"], _unpack(parts["row_signs"], qt.shape[0]), _unpack(parts["column_signs"], qt.shape[1])) * bool(parts["scale"] > 2.0**-99)


def _signed(code: Tensor) -> Tensor:
    """16-bit patterns as int16, which every program can store."""
    return torch.where(code >= 1 << 15, code - (1 << 16), code).to(torch.int16)


def _pack(signs: Tensor) -> Tensor:
    """32 signs in a word, int32; set: -1."""
    return packing.pack((signs < 0).to(torch.uint8).unsqueeze(0), 1)[0]


def _unpack(packed: Tensor, count: int) -> Tensor:
    return 1.0 - 2.0 * packing.unpack(packed.unsqueeze(0), 1, count)[0].float()


def bits(scheme: Scheme, rows: int, columns: int) -> int:
    """The codes, a scale (two with a residual stage) and a sign for each row and column, in whole words."""
    kind = KINDS[scheme.format]
    return rows * columns * kind.bits + (32 if kind.residual is None else 64) + 32 * (packing.words_per_row(rows, 1) + packing.words_per_row(columns, 1))


def describe(name: str) -> str:
    return f"{KINDS[name].bits} bits on the lattice E8P, in a randomized Hadamard basis (QuIP#)"
