"""The native kernels, each instruction set that this processor has, against their meaning in plain torch."""

import shutil

import pytest
import torch

from lowbit import kernels, numerics
from lowbit.errors import FormatError
from lowbit.kernels import decode, reference
from lowbit.numerics import affine, ggml, ggml_kquants, ggml_tables, lattice, parts
from lowbit.pipeline import recipes
from lowbit.tensor import QuantizedTensor

FORMATS = [
    "int2-asym-g64", "int2-sym-g16", "int3-asym-g64", "int3-sym-g16", "int3-asym-channel", "int4-asym-g128", "int4-sym-g32", "int4-sym-channel", "int5-asym-g64", "int6-sym-g32", "int6-asym-g16",
    "int8-sym-channel", "int8-asym-g64", "int7-sym-g32", "int4-asym-g64-hqq", "nf4", "nf4-dq", "fp4", "mxfp4", "nvfp4", "binary", "ternary", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k",
    "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "tq1_0", "tq2_0",
]  # fmt: skip
needs_native = pytest.mark.skipif(kernels.native() is None, reason=f"no native extension: {kernels.why_not()}")


def matrix(name: str, rows: int = 83, cols: int = 768, seed: int = 0):
    recipe = recipes.parse(name if name.endswith("hqq") or name in ("binary", "ternary") else f"{name}-rtn").recipe
    torch.manual_seed(seed)
    return numerics.quantize(torch.randn(rows, cols) * 0.05 + 0.01, recipe.scheme)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_the_extension_is_built_where_there_is_a_compiler():
    assert kernels.native() is not None, kernels.why_not()
    assert kernels.instruction_sets()[-1] == "portable"


@needs_native
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_the_decoded_matrix(name):
    """Packed, a matrix decodes to what it was (IQ4_XS's products of scales: within float16); products with rounded inputs are float32 sums of them, few rows and many, in every instruction set."""
    qt = matrix(name)
    packed = kernels.pack(qt)
    W, goal = packed.dequantize(), numerics.dequantize(qt)
    tolerance = 1.5e-3 if name == "iq4_xs" else 3e-5 if name.startswith("nf4") else 1e-6
    assert (W - goal).abs().max() <= tolerance * goal.abs().max()
    for rows in (1, 2, 3, 4, 5, 13, 64):
        x = torch.randn(rows, 768, generator=torch.Generator().manual_seed(rows))
        expected = reference.matmul(W, x, packed.block)
        for isa in kernels.instruction_sets():
            error = (packed.matmul(x, isa=isa) - expected).abs().max() / expected.abs().max()
            assert error < 1e-6, (rows, isa)


@needs_native
def test_rounded_inputs_explain_the_error():
    """Against exact inputs the error is that of 8 bits: each input moves by at most half a step of its block."""
    qt = matrix("int4-asym-g128")
    packed, x = kernels.pack(qt), torch.randn(32, 768)
    exact = x.double() @ numerics.dequantize(qt).double().T
    step = x.view(32, -1, packed.block).abs().amax(-1) / 127
    bound = (step.unsqueeze(-1) / 2).expand(-1, -1, packed.block).reshape(32, 768).double() @ numerics.dequantize(qt).double().abs().T
    error = (packed.matmul(x) - exact).abs()
    assert bool((error <= bound + 1e-6).all()) and float(error.norm() / exact.norm()) < 0.012


@needs_native
@pytest.mark.parametrize(
    ("rows", "cols", "name"), [(1, 64, "int4-sym-g32"), (16, 96, "int4-asym-g32"), (17, 576, "int4-asym-g128"), (250, 200, "int8-sym-channel"), (40, 1536, "nf4"), (31, 144, "int2-sym-g16")]
)
def test_odd_shapes(rows, cols, name):
    """Rows that fill no tile, groups that do not divide the columns (each is then several), blocks of other sizes."""
    qt = matrix(name, rows, cols)
    packed, x = kernels.pack(qt), torch.randn(9, cols)
    W = packed.dequantize()
    assert torch.allclose(W, numerics.dequantize(qt), rtol=1e-6, atol=1e-5)
    for isa in kernels.instruction_sets():
        expected = reference.matmul(W, x, packed.block)
        assert (packed.matmul(x, isa=isa) - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1e-3)
        assert torch.equal(packed.matmul(x[:1], isa=isa), packed.matmul(x[:1].clone(), isa=isa))


@needs_native
@pytest.mark.parametrize("isa", kernels.instruction_sets())
def test_inputs_are_rounded_as_the_reference_does(isa):
    x = torch.randn(300, 768)
    x[0], x[1, :128], x[2, 5] = 0, 1e-30, 3e4
    for block in (8, 32, 96, 128):
        codes, scales = torch.empty(x.shape, dtype=torch.int8), torch.empty(300, 768 // block)
        sums = torch.empty_like(scales)
        kernels.native().round_inputs(x.numpy(), block, codes.numpy(), scales.numpy(), sums.numpy(), isa)
        goal, goal_scales = reference.round_inputs(x, block)
        assert torch.equal(codes, goal) and torch.equal(scales, goal_scales)
        assert torch.equal(sums, goal.view(300, -1, block).sum(-1, dtype=torch.int32).float())


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_rows(dtype):
    W, x = torch.randn(37, 100).to(dtype), torch.randn(6, 100)
    array = W.numpy() if dtype == torch.float32 else W.view(torch.int16).numpy()
    rows = kernels.native().Dense(array, {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}[dtype])
    for isa in kernels.instruction_sets():
        y = torch.empty(6, 37)
        kernels.native().dense_matmul(rows, x.numpy(), y.numpy(), 2, isa)
        torch.testing.assert_close(y, x @ W.float().T, rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.skipif(kernels.native() is None or not kernels.native().attention_supported(), reason="needs a processor with AVX-512 BF16")
@pytest.mark.parametrize(("rows", "cols"), [(64, 64), (100, 96), (37, 2080), (200, 4128)])
def test_dense_rows_in_bfloat16(rows, cols):
    """Many rows of inputs are rounded to bfloat16, too; sums are float32."""
    W, x = torch.randn(rows, cols).bfloat16(), torch.randn(19, cols)
    y = torch.empty(19, rows)
    kernels.native().dense_matmul(kernels.native().Dense(W.view(torch.int16).numpy(), 2), x.numpy(), y.numpy(), 2, "avx512")
    goal = x.bfloat16().double() @ W.double().T
    assert float((y - goal).abs().max()) < 5e-6 * float(goal.abs().max())


@needs_native
def test_what_the_kernels_do_not_take_is_refused():
    for name in ("int4-sym-g12", "e8p12-quip"):
        scheme = recipes.parse(f"{name}-rtn").recipe.scheme if "quip" not in name else recipes.parse("quip-2").recipe.scheme
        if "quip" in name:
            assert not kernels.can_pack(scheme)
            continue
        with pytest.raises(FormatError, match="no multiple of 8"):
            kernels.pack(numerics.quantize(torch.randn(16, 36), scheme))
    native = kernels.native()
    with pytest.raises(ValueError, match="isa is 'sse9'"):
        kernels.pack(matrix("q8_0")).matmul(torch.randn(1, 768), isa="sse9")
    with pytest.raises(ValueError, match="x is"):
        native.matmul(kernels.pack(matrix("q8_0")).held, torch.randn(2, 32).numpy(), torch.empty(2, 83).numpy(), 1, "")
    with pytest.raises(ValueError, match="group must divide"):
        native.Packed(16, 100, 4, 64, 0, 0, 0.0, None)
    held = native.Packed(16, 64, 4, 32, 0, 0, 8.0, None)
    for shape, groups in (((16, 32), 2), ((32, 64), 2), ((16, 64), 3)):
        with pytest.raises(ValueError):
            held.fill(0, torch.zeros(shape, dtype=torch.uint8).numpy(), torch.ones(shape[0], groups).numpy(), None)


def test_reference_rounds_half_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.0, 126.5]])
    codes, scales = reference.round_inputs(x, 8)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, 0, 126]] and scales.tolist() == [[1.0]]


@needs_native
@pytest.mark.parametrize("name", ["int4-asym-g64", "int3-sym-g64", "int2-asym-g32"])
@pytest.mark.parametrize("isa", kernels.instruction_sets())
def test_groups_of_any_columns(name, isa):
    """GPTQ's act-order: the layout has the groups' columns side by side, and inputs are gathered when they are rounded."""
    qt = matrix(name)
    index = torch.arange(qt.shape[1], dtype=torch.int32) // qt.scheme.group_size
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(1))]
    turned = QuantizedTensor(qt.scheme, qt.shape, qt.dtype, {**qt.parts, "g_idx": index})
    packed, goal = kernels.pack(turned), numerics.dequantize(turned)
    assert torch.equal(packed.dequantize(), goal)
    order = torch.argsort(index.long(), stable=True)
    for rows in (1, 3, 9):
        x = torch.randn(rows, qt.shape[1], generator=torch.Generator().manual_seed(rows))
        expected = reference.matmul(goal[:, order], x[:, order], packed.block)
        assert float((packed.matmul(x, isa=isa) - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
    uneven = torch.where(index == 1, 0, index)
    with pytest.raises(FormatError, match="different sizes"):
        kernels.pack(QuantizedTensor(qt.scheme, qt.shape, qt.dtype, {**qt.parts, "g_idx": uneven}))


INTEGERS = [f"int{bits}-{kind}-g64" for bits in (2, 3, 4, 5, 6, 8) for kind in ("sym", "asym")]


@needs_native
@pytest.mark.parametrize("name", [*INTEGERS, "int4-sym-channel", "int4-asym-g64-hqq", "nf4", "nf4-dq", "fp4", "mxfp4", "mxfp6", "binary", "ternary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_is_that_of_numerics_bit_for_bit(name, dtype):
    qt = matrix(name)
    stored = parts.store(qt)
    goal = numerics.dequantize(qt).to(dtype)
    found = decode.decode(stored, qt.scheme, qt.shape, dtype)
    assert found is not None and found.dtype == dtype and torch.equal(found, goal)
    for through in (torch.float32, torch.float16, torch.bfloat16):
        found = decode.decode(stored, qt.scheme, qt.shape, dtype, through)
        assert found is not None and found.dtype == dtype and torch.equal(found, numerics.dequantize(qt).to(through).to(dtype)), through
    words, bits = stored["codes"].view(torch.uint8), parts.code_bits(qt.scheme)
    scale, zero = decode._scales(stored, qt.scheme, qt.shape, qt.shape[1] // decode._group(qt.scheme, qt.shape[1]))
    for isa in kernels.instruction_sets():
        out = torch.empty(qt.shape, dtype=dtype)
        kernels.native().decode(words, bits, decode._table(qt.scheme, bits), scale, zero, out.view(torch.uint16) if dtype == torch.bfloat16 else out, 2, isa)
        assert torch.equal(out, goal), isa


def test_what_decoding_leaves_to_numerics():
    for name in ("nvfp4", "int4-sym-g16", "q4_0", "e8p2-ldlq"):
        qt = matrix(name) if name != "e8p2-ldlq" else numerics.quantize(torch.randn(64, 64), recipes.parse(name).recipe.scheme)
        assert decode.decode(parts.store(qt), qt.scheme, qt.shape, torch.float32) is None


def weights(rows=37, cols=1536):
    """With rows of zeros, of small and of large numbers, of one sign, and one weight far from all."""
    W = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)) * 0.02
    W[3], W[4, :256], W[5, 7], W[6] = 0, 1e-3, 3.0, W[6].abs() + 0.1
    return W


@needs_native
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", [*ggml_kquants.KQUANTS, "q4_0", "q4_1", "q5_0", "q5_1"])
def test_encoding_is_that_of_torch(name, weighted):
    """The same searches, with sums in another order: nearly all bytes, and the weighted error; and the same bytes with every instruction set and number of threads."""
    if not weighted and name not in ggml_kquants.KQUANTS:
        pytest.skip("made in torch")
    W, kind = weights(), ggml.BLOCK_TYPES[name]
    importance = ggml._relative_importance(torch.rand(1536, generator=torch.Generator().manual_seed(1)).square() + 0.01, W) if weighted else None
    goal = ggml._encode_rows(W, kind, importance).view(len(W), -1)
    found = []
    for isa in kernels.instruction_sets():
        for threads in (1, 3):
            found.append(torch.empty_like(goal))
            assert kernels.native().encode(W.numpy(), name, None if importance is None else importance.numpy(), found[-1].numpy(), threads, isa)
    assert all(torch.equal(each, found[0]) for each in found)
    assert float((found[0] == goal).float().mean()) > 0.985
    squares = W.view(-1, 256) if kind.block_size == 256 else W
    spread = importance.expand_as(W).reshape(squares.shape) if importance is not None else None
    weight = ggml_kquants.error_weights(squares, name, spread).view_as(W) if kind.block_size == 256 else (W.square() + W.square().mean(1, keepdim=True)).sqrt() * importance
    errors = lambda blocks: (weight * (ggml.decode(blocks, name) - W).square()).view(-1, kind.block_size).sum(1) + 1e-20
    assert float((errors(found[0]) / errors(goal)).mean()) < 1.002  # a block may come out a little better or worse
    assert torch.equal(ggml.decode(found[0], name)[3], torch.zeros(1536))


@needs_native
@pytest.mark.parametrize("name", ["q2_k", "q4_k", "q5_k", "q6_k", "q4_0"])
def test_scales_that_float16_does_not_hold_are_refused(name):
    with pytest.raises(FormatError, match="too large for the float16"):
        ggml.encode(torch.randn(4, 256) * 1e8, name, importance=torch.ones(256))
    if name not in ("q6_k", "q4_0"):  # the minimum alone does not fit
        with pytest.raises(FormatError, match="too large for the float16"):
            ggml.encode(torch.randn(2, 256) - 5e6, name)
    with pytest.raises(ValueError, match="out is"):
        kernels.native().encode(torch.randn(4, 256).numpy(), name, torch.ones(256).numpy(), torch.empty(4, 100, dtype=torch.uint8).numpy(), 1)
    with pytest.raises(ValueError, match="not made here"):
        kernels.native().encode(torch.randn(4, 256).numpy(), "q8_0", torch.ones(256).numpy(), torch.empty(4, 272, dtype=torch.uint8).numpy(), 1)


@needs_native
@pytest.mark.parametrize("isa", kernels.instruction_sets())
def test_other_searches_are_those_of_torch_bit_for_bit(isa):
    """IQ4's scales, the lattice E8P inside and outside of its ball, and the 256 points of its third bit; not a multiple of 16 of each."""
    X = torch.cat([weights(), torch.full((1, 1536), 1e-20)]).view(-1, 32)[:1001].contiguous()
    W, found = X.square(), torch.empty(1001)
    kernels.native().search_iq4(X.numpy(), W.numpy(), ggml_tables._iq4_values().numpy(), ggml_tables.IQ4_VALUES[0], found.numpy(), 2, isa)
    assert torch.equal(found, ggml_tables._search_iq4_groups(X, W.t().contiguous()))
    x = torch.randn(5003, 8, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 5003).unsqueeze(1)
    points, codes = torch.empty_like(x), torch.empty(5003, dtype=torch.int64)
    kernels.native().round_e8p(x.numpy(), *lattice._arrays(), points.numpy(), codes.numpy(), 2, isa)
    assert torch.equal(codes, lattice.encode(x)) and torch.equal(points, lattice.points()[codes])
    grid = lattice.e81b()
    kernels.native().nearest(x.numpy(), *lattice._padded(grid.T, grid.square().sum(1) / 2), codes.numpy(), 2, isa)
    assert torch.equal(codes, torch.addmm(grid.square().sum(1).neg(), x, grid.T, alpha=2).argmax(1))


@needs_native
def test_what_is_written_to_is_not_a_copy():
    """An array of another dtype or order would be filled in a copy of it."""
    x, codes = torch.randn(4, 8), torch.empty(4, dtype=torch.int32)
    with pytest.raises(TypeError):
        kernels.native().round_e8p(x.numpy(), *lattice._arrays(), torch.empty(4, 8).numpy(), codes.numpy(), 1)
    for made in (x.double(), torch.nn.Parameter(x), torch.empty(8, 4).T.copy_(x)):
        assert torch.equal(lattice.round_points(made)[1], lattice.encode(x))


@needs_native
def test_searches_survive_what_is_not_finite():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30]).repeat(4, 8).reshape(16, 8).contiguous()
    points, codes = lattice.round_points(x)
    assert bool(torch.isfinite(points).all()) and bool(((codes >= 0) & (codes < 1 << 16)).all())
    out = torch.empty(4)
    kernels.native().search_iq4(x.view(4, 32).numpy(), x.view(4, 32).numpy(), ggml_tables._iq4_values().numpy(), -127.0, out.numpy(), 1)


@needs_native
@pytest.mark.parametrize("name", [*ggml_kquants.KQUANTS, "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_any_blocks_of_a_file_are_packed(name):
    """Scales and minima of any sign and size, as a file may hold them: the layout decodes to what ggml's decoder gives."""
    kind, generator = ggml.BLOCK_TYPES[name], torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (37, 512 // kind.block_size, kind.block_bytes), dtype=torch.uint8, generator=generator)
    for at in affine.HALVES[name].values():
        blocks[..., at : at + 2] = (torch.randn(37, blocks.shape[1], 1, generator=generator) * 0.01).half().view(torch.uint8)
    qt = QuantizedTensor(numerics.scheme_of(name), (37, 512), "float16", {"blocks": blocks.flatten(1)})
    goal = numerics.dequantize(qt)
    torch.testing.assert_close(kernels.pack(qt).dequantize(), goal, rtol=1e-6, atol=1e-6 * float(goal.abs().max()))
