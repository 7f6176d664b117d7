"""What every number format of the table promises; a new entry in FORMATS is tested here by itself."""

import pytest
import torch

from lowbit import numerics
from lowbit.errors import LowbitError, RecipeError, ShapeError
from lowbit.numerics import FORMATS, bits_per_weight, dequantize, nbytes, quantize
from lowbit.scheme import INT, Scheme
from lowbit.tensor import QuantizedTensor

ONLY_READ = [name for name in FORMATS if FORMATS[name].quantize is None]
SCHEMES = [numerics.scheme_of(name) for name in FORMATS if name not in (INT, *ONLY_READ)] + [Scheme("nf4", 4, (1, 32), nested=256), Scheme("fp8_e4m3", 8, (-1, -1)), Scheme("ternary", 2, (1, 32))] + [
    Scheme(bits=b, block=block, symmetric=sym) for b in (2, 3, 4, 5, 8) for block in ((1, 32), (1, -1), (-1, -1)) for sym in (True, False)
]
LARGEST_ERROR = {
    "float32": 0, "float16": 1e-6, "bfloat16": 1e-4, "q8_0": 1e-4, "q6_k": 1e-3, "q5_k": 4e-3, "q5_1": 4e-3, "q5_0": 4e-3, "q4_k": 1e-2, "q4_1": 1e-2,
    "q4_0": 2e-2, "q3_k": 5e-2, "q2_k": 0.15, "nf4": 1.2e-2, "fp4": 2.5e-2, "nvfp4": 1.5e-2, "mxfp4": 2.5e-2, "mxfp6_e2m3": 1.5e-3, "mxfp6_e3m2": 4e-3,
    "iq4_nl": 1e-2, "iq4_xs": 1e-2, "ggml_mxfp4": 2.5e-2, "tq1_0": 0.75, "tq2_0": 0.75,
    "mxfp8_e4m3": 1e-3, "mxfp8_e5m2": 4e-3, "fp8_e4m3": 1e-3, "fp8_e5m2": 4e-3, "ternary": 0.3, "binary": 0.4, "e8p2": 0.12, "e8p3": 0.04, "e8p4": 0.012,
    **{name: 0.1 for name in FORMATS if name.startswith("aqlm")},  # the matrix is so small that codebooks hold most of it
}  # fmt: skip
INT_ERROR = {2: 0.8, 3: 0.3, 4: 0.06, 5: 0.015, 8: 3e-4}


def weights(rows=6, columns=512, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_round_trip(scheme):
    W = weights()
    before = W.clone()
    qt = quantize(W, scheme)
    decoded = dequantize(qt)
    assert decoded.dtype == torch.float32 and decoded.shape == W.shape and qt.shape == tuple(W.shape)
    error = float((decoded - W).square().sum() / W.square().sum())
    assert error <= (INT_ERROR[scheme.bits] if scheme.format == INT else LARGEST_ERROR[scheme.format])
    assert torch.equal(W, before)
    again = quantize(W, scheme)
    assert all(torch.equal(qt.parts[key], again.parts[key]) for key in qt.parts)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_a_decoded_weight_is_on_the_grid(scheme):
    """Quantizing what was decoded changes little: a tenth of the first error at most. (Codebooks that are fitted anew are another grid.)"""
    if scheme.format.startswith("aqlm"):
        pytest.skip("codebooks are fitted to each matrix")
    W = weights()
    first = dequantize(quantize(W, scheme))
    second = dequantize(quantize(first, scheme))
    assert float((second - first).square().sum()) <= 0.6 * float((first - W).square().sum()) + 1e-12


@pytest.mark.parametrize("scheme", [*SCHEMES, Scheme(bits=4, block=(1, 32), outliers=3)], ids=lambda s: s.name)
def test_some_rows_decode_as_they_do_among_all(scheme):
    qt = quantize(weights(), scheme)
    if not numerics.has_rows(scheme, 512):
        assert scheme.block[0] != 1 or scheme.format.startswith(("e8p", "aqlm")) or scheme.nested  # something is shared by all rows
        return
    some = numerics.rows_of(qt, 1, 4)
    assert some.shape == (3, 512) and torch.equal(dequantize(some), dequantize(qt)[1:4])


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_stored_size(scheme):
    qt = quantize(weights(), scheme)
    stored = sum(p.numel() * (scheme.bits if key in ("codes", "zero_point") else 8 * p.element_size()) for key, p in qt.parts.items())
    assert nbytes(scheme, qt.shape) == -(-stored // 8)
    assert bits_per_weight(scheme, qt.shape) == pytest.approx(stored / (6 * 512))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_zeros_stay_zeros_and_bad_values_are_refused(scheme):
    assert float(dequantize(quantize(torch.zeros(3, 512), scheme)).abs().max()) == 0
    if scheme.format == "float32":
        return
    for bad in (float("nan"), float("inf")):
        W = weights()
        W[1, 2] = bad
        with pytest.raises(LowbitError):
            quantize(W, scheme)


@pytest.mark.parametrize("name", ONLY_READ)
def test_formats_that_are_only_read(name):
    """They are refused with what fits, and zeros in their blocks decode to zeros of the size that is announced."""
    scheme = numerics.scheme_of(name)
    with pytest.raises(RecipeError, match=f"{name} is read .* and not made: .* Use "):
        quantize(weights(), scheme)
    blocks = torch.zeros(6, nbytes(scheme, (1, 512)), dtype=torch.uint8)
    decoded = dequantize(QuantizedTensor(scheme, (6, 512), "float16", {"blocks": blocks}))
    assert decoded.dtype == torch.float32 and decoded.shape == (6, 512) and not decoded.any()


def test_shapes_and_names():
    with pytest.raises(ShapeError, match="multiple of 256, and 576 is not"):
        quantize(weights(2, 576), Scheme(format="q4_k"))
    with pytest.raises(LowbitError, match="not known; known: int"):
        quantize(weights(), Scheme(format="nf5"))
    with pytest.raises(LowbitError, match=r"layer 7: 2 of 3072 values are NaN or infinite"):
        W = weights()
        W[0, :2] = float("nan")
        numerics.refuse_bad_values(W, "layer 7")
