"""ggml blocks: decoding and the 32-element types bit for bit against gguf-py, the searched types by error against libggml; IQ4, the ternary types and
MXFP4 bit for bit against libggml.

Values of libggml are in tests/oracles/ggml_types.safetensors; what needs more of them asks the library itself.
The library is found by the fixture libggml.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lowbit import numerics
from lowbit.errors import FormatError, RecipeError, ShapeError
from lowbit.numerics import ggml, ggml_tables
from lowbit.numerics.ggml_kquants import KQUANTS, error_weights

gguf = pytest.importorskip("gguf")

LEGACY = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
EXACT = ("iq4_nl", "iq4_xs", "tq1_0", "tq2_0", "ggml_mxfp4")
GGML_TYPES = 43  # GGML_TYPE_COUNT
ORACLE = load_file(Path(__file__).parents[1] / "oracles" / "ggml_types.safetensors")

# The bytes of the float16 fields of a block, by type: random bytes there would mostly be NaN or infinity sooner or later. (0,) where not said.
HALVES = {
    **dict.fromkeys(("ggml_mxfp4", "ggml_nvfp4", "iq1_m"), ()),
    **dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), (0, 2)),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q6_k": (208,),
    "tq1_0": (52,),
    "tq2_0": (64,),
}

# Relative error ||W - decode(encode(W))||^2 / ||W||^2 of a standard normal matrix that no type may exceed.
NORMAL_ERROR = {
    "q4_0": 9e-3, "q4_1": 7.5e-3, "q5_0": 2.1e-3, "q5_1": 1.8e-3, "q8_0": 4e-5,
    "q2_k": 9e-2, "q3_k": 2.5e-2, "q4_k": 5.5e-3, "q5_k": 1.4e-3, "q6_k": 4.5e-4,
    "iq4_nl": 6e-3, "iq4_xs": 6e-3, "ggml_mxfp4": 1.4e-2, "tq1_0": 0.75, "tq2_0": 0.75,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a busy machine, threads that wait for each other after every small operation take minutes for these tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def quantize_chunk(libggml):
    """ggml_quantize_chunk as a function (W, type_name, importance) -> blocks."""
    function = libggml.ggml_quantize_chunk
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
    if name == "iq1_m":
        blocks[:, -1] &= 0xBF  # the top half bytes of its scales are a float16, which is finite without this bit
    for at in HALVES.get(name, (0,)):
        half = torch.randint(-(2**15), 2**15, (rows * 3,), dtype=torch.int16, generator=g).view(torch.float16)
        half = torch.where(torch.isfinite(half), half, torch.zeros_like(half))
        blocks[:, at : at + 2] = half.unsqueeze(1).view(torch.uint8)
    return blocks.view(rows, -1)


def gguf_type(name: str):
    try:
        return gguf.GGMLQuantizationType(ggml.BLOCK_TYPES[name].type_id)
    except ValueError:
        pytest.skip(f"this release of gguf-py does not know {name}")


def gguf_values(name: str, blocks: Tensor) -> np.ndarray:
    """gguf-py's decoding. MXFP4's largest scales are infinite."""
    try:
        with np.errstate(over="ignore"):
            return gguf.quants.dequantize(blocks.numpy(), gguf_type(name))
    except NotImplementedError:
        pytest.skip(f"this release of gguf-py does not decode {name}")


def assert_same_bits(mine: np.ndarray, theirs: np.ndarray) -> None:
    different = mine.view(np.uint8) != theirs.view(np.uint8)
    assert not different.any(), f"{int(different.sum())} of {different.size} bytes differ, first at {np.argwhere(different)[0].tolist()}"


def ggml_weights(W: Tensor, name: str, importance: Tensor | None) -> Tensor:
    """The weights of squared errors in ggml's own search; 1 where it does not search."""
    if name in LEGACY:
        return torch.ones_like(W) if importance is None else importance * (W.square() + W.square().mean(1, keepdim=True)).sqrt()
    if name in EXACT or (importance is None and name in ("q3_k", "q6_k")):
        return W.square()
    return error_weights(W.view(-1, 256), name, None if importance is None else importance.expand_as(W).reshape(-1, 256)).view_as(W)


def total_error(W: Tensor, blocks: Tensor, name: str, weights: Tensor) -> float:
    return float((weights * (ggml.decode(blocks, name) - W).square()).sum(dtype=torch.float64))


@pytest.mark.parametrize("name", ggml.BLOCK_TYPES)
def test_layout_agrees_with_gguf(name):
    kind = ggml.BLOCK_TYPES[name]
    assert gguf_type(name).name.lower() == name.removeprefix("ggml_")
    assert gguf.GGML_QUANT_SIZES[gguf_type(name)] == (kind.block_size, kind.block_bytes)


def test_every_weight_type_of_ggml_is_known(libggml):
    libggml.ggml_type_name.restype, libggml.ggml_type_size.restype, libggml.ggml_blck_size.restype = ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int64
    known = {kind.type_id: kind for kind in ggml.BLOCK_TYPES.values()}
    found = {i for i in range(GGML_TYPES) if libggml.ggml_is_quantized(i) and libggml.ggml_type_size(i)}
    assert found - known.keys() == {9, 15}  # Q8_1 and Q8_K, of inputs that are multiplied
    for i, kind in known.items():
        assert libggml.ggml_type_name(i).decode().lower() == kind.name.removeprefix("ggml_")
        assert (libggml.ggml_blck_size(i), libggml.ggml_type_size(i)) == (kind.block_size, kind.block_bytes)


@pytest.mark.parametrize("name", ggml.BLOCK_TYPES)
def test_decode_is_gguf_bit_for_bit(name):
    blocks = random_blocks(name)
    assert_same_bits(ggml.decode(blocks, name).numpy(), gguf_values(name, blocks))


@pytest.mark.parametrize("name", ggml.BLOCK_TYPES)
def test_decode_is_libggml_bit_for_bit(name, dequantize_row):
    blocks = random_blocks(name, rows=1000)  # enough for every point of the largest grid
    assert_same_bits(ggml.decode(blocks, name).numpy(), dequantize_row(blocks, name).numpy())


@pytest.mark.parametrize("name", [key.partition(".")[0] for key in ORACLE if key.endswith(".decoded")])
def test_decode_is_that_of_the_oracle(name):
    assert_same_bits(ggml.decode(ORACLE[f"{name}.blocks"], name).numpy(), ORACLE[f"{name}.decoded"].numpy())


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
def test_encode_is_that_of_the_oracle(name, weighted):
    made = ggml.encode(ORACLE["W"], name, importance=ORACLE["importance"] if weighted else None)
    assert_same_bits(made.numpy(), ORACLE[f"{name}.{'weighted' if weighted else 'plain'}"].numpy())


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encode_is_libggml_bit_for_bit(name, weighted, dtype, quantize_chunk):
    importance = uneven_importance(2048) if weighted else None
    for W in (*matrices().values(), hard_matrix(name)):
        W = W.to(dtype)
        assert_same_bits(ggml.encode(W, name, importance=importance).numpy(), quantize_chunk(W.float(), name, importance).numpy())


def hard_matrix(name: str) -> Tensor:
    """Rows of 2048 of many magnitudes, ties of every kind, the largest number below a power of two, zeros."""
    g = torch.Generator().manual_seed(9)
    top = 60 if name == "ggml_mxfp4" else 4  # of MXFP4, whose exponents have eight bits, also where log2 is whole before its time
    return torch.cat([
        torch.randn(60, 2048, generator=g) * torch.logspace(-6, 4, 60).unsqueeze(1),
        torch.ldexp(torch.randint(-64, 65, (60, 2048), generator=g).float() / 8, torch.randint(-20, 12, (60, 1), generator=g)).clamp_(-65000, 65000),
        torch.ldexp(torch.ones(2 * top, 2048), torch.arange(-top, top).unsqueeze(1)).nextafter(torch.zeros(())) * torch.randn(2 * top, 2048, generator=g).sign(),
        torch.zeros(1, 2048), torch.full((1, 2048), -3.5), torch.eye(1, 2048) * 7, torch.randn(1, 2048, generator=g) * 1e-16,
    ])  # fmt: skip


def test_mxfp4_of_numerics_is_stored_with_its_codes():
    """The same exponents as ggml's; the codes differ only where a weight lies halfway, and survive being packed."""
    W = matrices()["student t3"][:32]
    qt = numerics.quantize(W, numerics.scheme_of("mxfp4"))
    blocks = ggml_tables.pack_mxfp4(qt.parts["codes"], qt.parts["scale"])
    assert torch.equal(ggml.decode(blocks, "ggml_mxfp4"), numerics.dequantize(qt))
    assert torch.equal(blocks.view(-1, 17)[:, 0], ggml.encode(W, "ggml_mxfp4").view(-1, 17)[:, 0])


@pytest.mark.parametrize("name", [name for name in ggml.BLOCK_TYPES if name not in ggml.WRITTEN])
def test_types_that_are_only_read_are_refused_with_what_fits(name):
    instead = ggml.BLOCK_TYPES[name].instead
    with pytest.raises(RecipeError, match=f"^{name} is read from GGUF files and not made: .* Use {instead}, the nearest"):
        ggml.encode(torch.zeros(1, 256), name)
    with pytest.raises(RecipeError, match="is read from GGUF files and not made"):
        numerics.quantize(torch.zeros(1, 256), numerics.scheme_of(name))
    assert instead in ggml.WRITTEN


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


@pytest.mark.parametrize("name", ggml.WRITTEN)
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


@pytest.mark.parametrize("name", ggml.WRITTEN)
def test_error_of_a_normal_matrix(name):
    W = torch.randn(3, 4096, generator=torch.Generator().manual_seed(4))
    before = W.clone()
    error = total_error(W, ggml.encode(W, name), name, torch.ones(())) / float(W.square().sum())
    assert error < NORMAL_ERROR[name]
    assert torch.equal(W, before)


@pytest.mark.parametrize("name", ggml.WRITTEN)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
def test_special_rows(name, weighted):
    importance = uneven_importance(512) if weighted else None

    def decoded(W: Tensor) -> Tensor:
        return ggml.decode(ggml.encode(W, name, importance=importance), name)

    assert not decoded(torch.zeros(3, 512)).any()
    loose = {"iq4_nl": 0.02, "iq4_xs": 0.02, "ggml_mxfp4": 0.26}.get(name, 0)  # IQ4's nearest to zero is 1 of 127; FP4 has 4 and 6, and 6 for all up to 8
    for constant in (1.0, -0.37, 0.02):  # of 0.02, the float16 scale of Q6_K is subnormal and has seven bits
        W = torch.full((3, 512), constant)
        torch.testing.assert_close(decoded(W), W, rtol=max(loose, 4e-3), atol=0)
    hot = torch.zeros(3, 512)
    hot[0, 5], hot[1, 300], hot[2, 511] = 2.5, -0.01, 40.0
    torch.testing.assert_close(decoded(hot), hot, rtol=max(loose, 0.05), atol=0.4 if name.startswith("iq4") else 1e-4)
    assert torch.isfinite(decoded(torch.full((3, 512), 1e-30))).all()
    extreme = torch.randn(3, 512, generator=torch.Generator().manual_seed(5)).sign() * 65504
    torch.testing.assert_close(decoded(extreme), extreme, rtol=max(loose, 0.13), atol=0)


@pytest.mark.parametrize("name", ggml.WRITTEN)
def test_columns_without_importance_are_still_stored(name):
    W = torch.randn(3, 1024, generator=torch.Generator().manual_seed(6))
    importance = torch.ones(1024)
    importance[:512] = 0
    blocks = ggml.encode(W, name, importance=importance)
    error = (ggml.decode(blocks, name) - W).square()
    assert error[:, :512].mean() < 1.5 * NORMAL_ERROR[name]
    uniform = ggml.encode(W, name, importance=torch.full((1024,), 2.0**-66))
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


@pytest.mark.parametrize("name", [name for name in ggml.WRITTEN if name != "ggml_mxfp4"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("magnitude", [1e9, 1e30])
def test_values_beyond_float16_scales_are_refused(name, weighted, magnitude):
    W = torch.randn(3, 256, generator=torch.Generator().manual_seed(8)) * magnitude
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
