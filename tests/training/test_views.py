"""What is trained is the file: the forward's weight is, bit for bit, what the quantized view decodes to, for every format of the table, and what a target gives back."""

import pytest
import torch

import lowbit
from lowbit import numerics, training
from lowbit.checkpoints import TARGETS, holds
from lowbit.errors import FormatError, RecipeError, ShapeError
from lowbit.numerics import affine, codebook, floating, ggml, ternary
from lowbit.recipe import Recipe
from lowbit.scheme import INT, RangeSearch, Scheme
from lowbit.training import views
from lowbit.training.modules import FakeQuantEmbedding, FakeQuantLinear
from lowbit.training.prepare import in_cells
from lowbit.training.views import DERIVED, MODES, View

ROWS, COLUMNS = 32, 256
BLOCKS = ((1, 32), (1, -1), (-1, -1), (16, 1), (1, 48))
INTEGERS = [Scheme(bits=bits, block=(1, 32), symmetric=symmetric) for bits in range(2, 9) for symmetric in (True, False)]
INTEGERS += [Scheme(bits=bits, block=block, symmetric=symmetric, scale_dtype="float16") for bits in (2, 4) for block in BLOCKS for symmetric in (True, False)]
INTEGERS += [Scheme(bits=bits, block=(1, 64), range=convention, scale_dtype="bfloat16") for bits in (2, 8) for convention in ("textbook", "half", "full")]
INTEGERS += [Scheme(bits=bits, block=block, symmetric=False, zero_dtype="float", scale_dtype=dtype) for bits in (1, 3, 4) for block in ((1, 64), (16, 1)) for dtype in ("float32", "float16")]
OTHERS = [numerics.scheme_of(name) for name in (*ggml.WRITTEN, *floating.KINDS, *ternary.KINDS)]
OTHERS += [Scheme(name, 4, (1, block), nested=nested) for name in codebook.CODES for block, nested in ((64, None), (32, 256), (48, None), (100, 256), (1 << 20, None))]
OTHERS += [Scheme("fp8_e4m3", 8, (-1, -1)), Scheme("fp8_e4m3", 8, (1, 48)), Scheme("fp8_e5m2", 8, (1, 64)), Scheme("ternary", 2, (1, 64)), Scheme("ternary", 2, (1, -1)), Scheme("binary", 1, (1, 48))]
SCHEMES = INTEGERS + OTHERS
name_of = lambda scheme: "-".join([scheme.name, scheme.scale_dtype, scheme.range, *(["zfloat"] if scheme.zero_dtype == "float" else [])])
of_all = pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)


def weights(seed: int = 0, spread: float = 0.05) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * spread


def modes_of(scheme: Scheme) -> tuple[str, ...]:
    return tuple(mode for mode in MODES if mode != "mse" or scheme.format == INT)


def move(parameters, W: torch.Tensor, amount: float = 0.3) -> torch.Tensor:
    """Learned numbers scaled by chance, as steps of training move them; W with noise added. Returns W."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1 + amount * torch.randn(parameter.shape, generator=generator)).add_(1e-4 * torch.randn(parameter.shape, generator=generator))
        return W.add_(0.02 * torch.randn(W.shape, generator=generator))


def test_the_table_is_covered():
    assert {scheme.format for scheme in SCHEMES} == set(affine.FORMATS)


@of_all
def test_the_forward_is_what_the_view_decodes_to(scheme):
    """At the start and after everything moved; the dtypes of what is stored are those of the start."""
    W = weights()
    start = numerics.quantize(W, scheme)
    for mode in modes_of(scheme):
        view, master = View(start, mode), W.clone()
        assert torch.equal(view(master), numerics.dequantize(view.quantized(master))), mode
        move(view.parameters(), master)
        made = view.quantized(master)
        values = view(master)
        assert values.dtype == torch.float32 and torch.equal(values, numerics.dequantize(made)), mode
        assert {key: (part.dtype, part.shape) for key, part in made.parts.items()} == {key: (part.dtype, part.shape) for key, part in start.parts.items()}
        assert made.scheme == scheme and made.shape == start.shape
        if mode in DERIVED:
            assert torch.equal(values, numerics.dequantize(numerics.quantize(master, scheme, RangeSearch(mode))))


@of_all
def test_masters_in_their_cells_give_the_start_back(scheme):
    """Of the start that is their own rounding, and of one with other codes (as error feedback makes them); masters that need not move do not."""
    W = weights()
    for other in (W, W + 0.02 * weights(1, 1.0)):
        start = numerics.quantize(other, scheme)
        view = View(start)
        master = in_cells(W, start, view)
        values = numerics.dequantize(start)
        assert torch.equal(view(master), values)
        assert torch.equal(numerics.dequantize(view.quantized(master)), values)
        kept = view(W) == values
        assert torch.equal(master[kept], W[kept]) and (other is not W or kept.float().mean() > 0.95)
        assert ((master - values).abs() <= (W - values).abs() + 1e-6).all()  # nearer to the value, never farther


@of_all
def test_groups_of_zeros(scheme):
    W = weights()
    W[3] = 0
    W[:, 64:128] = 0
    start = numerics.quantize(W, scheme)
    view = View(start)
    master = in_cells(W, start, view).requires_grad_()
    values = view(master)
    assert torch.equal(values, numerics.dequantize(start))
    values.square().sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (master, *view.parameters()))
    move(view.parameters(), moved := master.detach().clone())
    assert torch.equal(view(moved), numerics.dequantize(view.quantized(moved)))


@of_all
def test_bad_values_are_refused_when_a_matrix_is_made(scheme):
    start = numerics.quantize(weights(), scheme)
    for bad in (float("nan"), float("inf")):
        W = weights()
        W[5, 9] = bad
        for mode in modes_of(scheme):
            with pytest.raises(FormatError, match="NaN"):
                View(start, mode).quantized(W)


@pytest.mark.parametrize("format_name", ["int", "q4_k", "q4_0"])
def test_nan_in_a_master_shows_in_the_forward(format_name):
    """Also beside groups of zeros, where scales are 0."""
    W = weights()
    W[:, :64] = 0
    view = View(numerics.quantize(W, numerics.scheme_of(format_name) if format_name != INT else Scheme()))
    W[2, 200] = float("nan")
    assert view(W)[2, 200].isnan()


@of_all
def test_in_chunks_of_rows(scheme, monkeypatch):
    """Values and gradients do not depend on how many rows are worked on at once."""
    start = numerics.quantize(weights(), scheme)
    found = []
    for chunk in (views.CHUNK, 3 * COLUMNS):
        monkeypatch.setattr(views, "CHUNK", chunk)
        view, W = View(start), weights(2).requires_grad_()
        values = view(W)
        (values * weights(3)).sum().backward()
        found.append([values, W.grad, *(parameter.grad for parameter in view.parameters()), numerics.dequantize(view.quantized(W))])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-7)
    assert torch.equal(found[0][0], found[1][0])


def test_what_cannot_be_trained_is_refused():
    for name, why in (("aqlm_2x8", "vectors of several weights"), ("e8p2", "vectors of several weights")):
        with pytest.raises(RecipeError, match=why):
            affine.check(numerics.scheme_of(name))
    with pytest.raises(RecipeError, match="outlier channels"):
        affine.check(Scheme(outliers=2))
    with pytest.raises(RecipeError, match="expected one of learned, fixed, minmax, mse"):
        View(numerics.quantize(weights(), Scheme()), "frozen")


def written() -> list[tuple[Scheme, str]]:
    """Schemes and the targets that hold them and keep codes."""
    found = []
    for scheme in SCHEMES:
        for name, target in TARGETS.items():
            own_dtype = scheme.format != INT or target.scale_dtype in (None, scheme.scale_dtype)
            if name != "safetensors" and own_dtype and holds(name, scheme):
                found.append((scheme, name))
    return found


def rounds(target: str, scheme: Scheme) -> bool:
    """Whether a target stores zero-points as products or sums that its dtype rounds; then training is refused."""
    if scheme.format != INT or scheme.symmetric:
        return False
    return target == "gguf" or target == "torchao" and scheme.zero_dtype == "float"


@pytest.fixture(scope="module")
def one_block(save_model, tmp_path_factory):
    """A llama of one block whose matrices are of 256 columns."""
    return save_model("llama", tmp_path_factory.mktemp("model") / "one", hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_key_value_heads=4)


@pytest.mark.parametrize(("scheme", "target"), written(), ids=lambda value: value if isinstance(value, str) else name_of(value))
def test_what_is_trained_is_the_file(scheme, target, one_block, load_plain, tmp_path):
    model = load_plain(one_block)
    recipe = Recipe(scheme.name, scheme, "rtn", target=target)
    try:
        training.prepare(model, recipe)
    except (ShapeError, RecipeError) as error:
        assert isinstance(error, ShapeError) or rounds(target, scheme), error
        pytest.skip(f"refused: {error}")
    assert not rounds(target, scheme)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantLinear | FakeQuantEmbedding)}
    assert len(layers) >= 7
    for layer in layers.values():
        move(layer.view.parameters(), layer.weight.data)
    out = tmp_path / f"out{TARGETS[target].suffix}"
    training.write(model, out, source=one_block)
    read = lowbit.open(out)
    for name, layer in layers.items():
        assert torch.equal(layer.view(layer.weight), numerics.dequantize(read.quantized[f"{name}.weight"].load())), name
