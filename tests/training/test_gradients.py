"""Gradients against the papers' formulas: straight-through, LSQ and LSQ+ written out with plain autograd, finite differences of what is smooth, and the loss."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from lowbit import numerics
from lowbit.numerics import activations, affine, codebook, floating, ggml
from lowbit.scheme import INT, Activation, Rounding, Scheme
from lowbit.training import losses
from lowbit.training.modules import ActView
from lowbit.training.views import View

ROWS, COLUMNS = 8, 256
SCHEMES = [
    Scheme(bits=2), Scheme(bits=4, symmetric=False), Scheme(bits=3, block=(1, 48), symmetric=False), Scheme(bits=8, block=(1, -1)), Scheme(bits=4, block=(-1, -1), symmetric=False),
    Scheme(bits=4, block=(4, 1), symmetric=False), Scheme(bits=2, symmetric=False, zero_dtype="float"), Scheme("nf4", 4, (1, 64)), Scheme("fp4", 4, (1, 48)), Scheme("nf4", 4, (1, 64), nested=256),
    Scheme("fp8_e4m3", 8, (1, -1)), Scheme("ternary", 2, (1, 64)), Scheme("binary", 1, (-1, -1)), *[numerics.scheme_of(name) for name in ("mxfp4", "nvfp4", *ggml.WRITTEN)],
]  # fmt: skip
of_all = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)


def weights(seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.05


def expanded(value: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """A number of each group, by loops over the matrix: as many as there are weights, float64 [out, in]."""
    if scheme.format in codebook.CODES:
        return value.reshape(-1).repeat_interleave(scheme.block[1])[: ROWS * COLUMNS].view(ROWS, COLUMNS)
    if scheme.format == INT and scheme.block[0] > 1:
        n, out = scheme.block[0], torch.zeros(ROWS, COLUMNS, dtype=value.dtype)
        flat = value.reshape(-1)
        places = torch.tensor([[(i % (ROWS // n)) * COLUMNS + j for j in range(COLUMNS)] for i in range(ROWS)])  # element i, j of [n, out * in / n] has column i * in + j mod it
        return out + flat[places]
    width = -(-COLUMNS // value.shape[1]) if scheme.block[1] == -1 or scheme.format in ggml.BLOCK_TYPES else scheme.block[1]
    return value.expand(ROWS, -1).repeat_interleave(width, dim=1)[:, :COLUMNS]


def bounds(scheme: Scheme) -> tuple[float, float, float, list[float] | None]:
    """Least and largest q, how far beyond them a weight still has their code, and the values of q where they are a table."""
    if scheme.format == INT:
        return 0, 2**scheme.bits - 1, 0.5, None
    if scheme.format == "ternary":
        return -1, 1, 0.5, None
    if scheme.format == "binary":
        return -1, 1, 0.0, [-1.0, 1.0]
    if scheme.format in codebook.CODES:
        return -1, 1, 0.0, list(codebook.CODES[scheme.format])
    if scheme.format in ggml.BLOCK_TYPES:
        low, high = ggml.bounds(scheme.format)
        return low, high, 0.0 if ggml.nearest(scheme.format) else 0.5, [] if ggml.nearest(scheme.format) else None
    largest = floating.KINDS[scheme.format].element.largest
    return -largest, largest, 0.0, []


class Straight(torch.autograd.Function):
    """Any rounding, with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x, rounded):
        return rounded.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def reference(scheme: Scheme, W: torch.Tensor, scale: torch.Tensor, shift, offset, q: torch.Tensor) -> torch.Tensor:
    """LSQ's own way to write it (arXiv:1902.08153, appendix A): s * (round_pass(clip(w / s)) - z) + o, where the codes q are given and autograd does the rest."""
    low, high, margin, _ = bounds(scheme)
    x = (W - (0 if offset is None else offset)) / scale + shift
    return scale * (Straight.apply(x.clamp(low - margin, high + margin), q) - shift) + (0 if offset is None else offset)


@of_all
def test_gradients_are_those_of_lsq_and_lsq_plus(scheme):
    start = numerics.quantize(weights(), scheme)
    view = View(start)
    W = (weights() * 1.5).requires_grad_()  # a part of the codes is clipped
    G = weights(5)
    values = view(W)
    (values * G).sum().backward()

    grid = affine.affine(view.quantized(W.detach()))
    numbers = {name: value.double().requires_grad_() for name, value in affine.parameters_of(start).items()}
    V = W.detach().double().requires_grad_()
    if scheme.format in ggml.BLOCK_TYPES:
        if numbers:
            units, minima = ggml.affine(scheme.format, affine.with_parameters(start, {key: torch.ones_like(value, dtype=torch.float32) for key, value in numbers.items()}).parts["blocks"])
            spread = lambda value, of: (value.unsqueeze(-1) * of.double().view(*value.shape, -1)).reshape(of.shape)
            scale, offset = spread(numbers["d"], units), None if minima is None else spread(numbers["dmin"], minima)
        else:
            scale, offset = grid.scale.double(), None if grid.offset is None else grid.offset.double()
        shift = torch.zeros(1, 1, dtype=torch.float64)
    else:
        name = "absmax" if scheme.format in codebook.CODES else "scale"
        scale, offset = numbers[name] if name in numbers else grid.scale.double(), None
        shift = numbers.get("zero_point", torch.full((1, 1), float(grid.shift) if not isinstance(grid.shift, torch.Tensor) else 0.0, dtype=torch.float64))
    share = W.numel() / scale.numel() * max(bounds(scheme)[1], 1.0)
    lessen = lambda x: x / share**0.5 + (x - x / share**0.5).detach()  # the value of x, with a gradient sqrt(N Q) times smaller
    s, z, o = (value if value is None or value.numel() == 1 and not value.requires_grad else expanded(lessen(value), scheme) for value in (scale, shift, offset))
    q = ((values.detach().double() - (0 if o is None else o.detach())) / s.detach() + (0 if z is None else z.detach())).nan_to_num(0.0, 0.0, 0.0)
    found = reference(scheme, V, s, z, o, q)
    torch.testing.assert_close(found.detach().float(), values.detach(), rtol=1e-4, atol=1e-6)
    (found * G.double()).sum().backward()
    torch.testing.assert_close(W.grad, V.grad.float(), rtol=1e-4, atol=1e-6)
    assert scheme.format in ("mxfp4", "nvfp4") or float((W.grad == 0).float().mean()) > 0.001  # some are clipped
    for name, value in numbers.items():
        expected = value.grad if name == "zero_point" else value.grad * value.detach()  # parameters are factors, those of zero-points codes
        torch.testing.assert_close(getattr(view, name).grad, expected.float(), rtol=2e-3, atol=2e-5 * float(expected.abs().max()), msg=lambda text, name=name: f"{name}: {text}")


def test_one_group_by_hand():
    """Eq. 3 of LSQ and eq. 8 of LSQ+, weight by weight."""
    s, z, top = 0.1, 4.0, 15
    w, g = [0.03, 0.26, -0.9, 1.6, -0.41], [1.0, -2.0, 0.5, 3.0, 0.25]  # codes 4, 7 (6.6), 0 (clipped), 15 (clipped), 0 (-0.1)
    start = numerics.quantize(torch.tensor([w]), Scheme(bits=4, block=(1, -1), symmetric=False))
    start = affine.with_parameters(start, {"scale": torch.tensor([[s]]), "zero_point": torch.tensor([[z]])})
    view, W = View(start), torch.tensor([w]).requires_grad_()
    values = view(W)
    (values * torch.tensor([g])).sum().backward()
    norm = (5 * top) ** 0.5
    torch.testing.assert_close(values.detach(), torch.tensor([[0.0, 0.3, -0.4, 1.1, -0.4]]))
    torch.testing.assert_close(W.grad, torch.tensor([[1.0, -2.0, 0.0, 0.0, 0.25]]))
    to_scale = 1.0 * (0 - 0.3) - 2.0 * (3 - 2.6) + 0.5 * (0 - 4) + 3.0 * (15 - 4) + 0.25 * (-4 + 4.1)
    assert float(view.scale.grad) == pytest.approx(s * to_scale / norm, rel=1e-4)
    assert float(view.zero_point.grad) == pytest.approx(-s * (0.5 + 3.0) / norm, rel=1e-4)


@pytest.mark.parametrize("scheme", [Scheme(bits=4, symmetric=False, zero_dtype="float"), Scheme(bits=4), Scheme("nf4", 4, (1, 64)), Scheme("ternary", 2, (1, 64))], ids=lambda s: s.name)
def test_finite_differences_where_all_is_clipped(scheme):
    """Then the forward is smooth in scale and zero-point, and their gradients (times sqrt(N Q)) are its derivatives."""
    start = numerics.quantize(weights(), scheme)
    W, G = weights().sign() * 50, weights(5)
    view = View(start)
    (view(W) * G).sum().backward()
    share = W.numel() / affine.affine(start).scale.numel() * max(bounds(scheme)[1], 1.0)
    for name in view.learned:
        parameter = getattr(view, name)
        for place in (0, parameter.numel() - 1):
            ends = []
            for step in (1, -1):
                moved = View(start)
                with torch.no_grad():
                    getattr(moved, name).view(-1)[place] += step * 1e-3 * float(parameter.view(-1)[place].abs() + 0.01)
                    ends.append((float(getattr(moved, name).view(-1)[place]), float((moved(W).double() * G).sum())))
            slope = (ends[0][1] - ends[1][1]) / (ends[0][0] - ends[1][0])
            assert float(parameter.grad.view(-1)[place]) * share**0.5 == pytest.approx(slope, rel=1e-2), name


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_1", "q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs", "tq2_0"])
def test_finite_differences_of_blocks_with_codes_held(name):
    """What d and dmin of a block do to its values is linear: scale and offset as the view has them, against the decoder of the bytes."""
    start = numerics.quantize(weights(), numerics.scheme_of(name))
    numbers = {key: value.requires_grad_() for key, value in affine.parameters_of(start).items()}
    grid, plain = affine.affine(start, numbers), affine.affine(start)
    groups = affine.grouped(numerics.dequantize(start), start.scheme)
    at = lambda grid: (0.0 if grid.offset is None else grid.offset.unsqueeze(-1))
    q = ((groups - at(plain)) / plain.scale.unsqueeze(-1)).nan_to_num(0.0, 0.0, 0.0).round()
    G = affine.grouped(weights(5), start.scheme)
    ((grid.scale.unsqueeze(-1) * q + at(grid)) * G).sum().backward()
    for key, value in numbers.items():
        moved = {other: number.detach().clone() for other, number in numbers.items()}
        moved[key][2] *= 2  # exactly a float16
        change = numerics.dequantize(affine.with_parameters(start, moved)).double() - numerics.dequantize(start).double()
        slope = float((change * weights(5).double()).sum())
        assert float((value.grad[2] * value.detach()[2]).sum()) == pytest.approx(slope, rel=1e-3, abs=1e-7), key


@pytest.mark.parametrize("scales", ["fixed", "minmax"])
def test_straight_through_without_learned_scales(scales):
    view, W = View(numerics.quantize(weights(), Scheme(bits=2)), scales), weights().requires_grad_()
    assert not list(view.parameters())
    (view(W) * weights(5)).sum().backward()
    outside = view.quantized(W).parts["codes"]
    assert torch.equal(W.grad[W.grad != 0], weights(5)[W.grad != 0]) and (W.grad != 0).float().mean() > 0.9
    assert set(outside[W.grad == 0].tolist()) <= {0, 3}


@pytest.mark.parametrize("act", [
    Activation(bits=8, per="tensor", static=True), Activation(bits=4, per="tensor", static=True, symmetric=False), Activation("fp8_e4m3", per="tensor", static=True),
], ids=lambda act: act.name)  # fmt: skip
def test_a_static_scale_of_inputs(act):
    rounding = Rounding(act, 0.011 if act.bits == 8 and act.format == INT else 0.12 if act.format == INT else 0.004, 6.0 if not act.symmetric else 0.0)
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    G = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2))
    view = ActView(rounding)
    y = view(x)
    assert torch.equal(y, activations.fake_quantize(x.detach(), rounding))
    (y * G).sum().backward()

    s, v = torch.tensor(rounding.scale, dtype=torch.float64, requires_grad=True), x.detach().double().requires_grad_()
    if act.format == INT:
        low, high = (-rounding.zero_point, 15 - rounding.zero_point) if not act.symmetric else (-128, 127)
        low, high = low - 0.5, high + 0.5
    else:
        low, high = -448, 448
    q = y.detach().double() / s.detach()
    (s * Straight.apply((v / s).clamp(low, high), q) * G).sum().backward()
    assert 0 < float((v.grad == 0).float().mean()) < 0.9
    torch.testing.assert_close(x.grad, v.grad.float(), rtol=1e-4, atol=1e-6)
    assert float(view.scale.grad) == pytest.approx(float(s.grad * s.detach()) / (32 * max(-low, high)) ** 0.5, rel=1e-3)


def test_inputs_rounded_per_token_pass_their_gradient_on():
    x = torch.randn(4, 16).requires_grad_()
    ActView(Rounding(Activation(bits=4)))(x).mul(2).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))


@pytest.mark.parametrize("chunk", [1 << 23, 90])
def test_divergence(chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_NUMBERS", chunk)
    student = (torch.randn(3, 7, 40) * 3).requires_grad_()
    teacher = torch.randn(3, 7, 40) * 3
    mine = losses.divergence(student, teacher)
    (mine * 2.5).backward()
    exact = student.detach().double().requires_grad_()
    other = kl_div(exact.log_softmax(-1).flatten(0, 1), teacher.double().log_softmax(-1).flatten(0, 1), log_target=True, reduction="batchmean")
    (other * 2.5).backward()
    assert float(mine.detach()) == pytest.approx(float(other.detach()), rel=1e-6)
    torch.testing.assert_close(student.grad, exact.grad.float(), rtol=1e-4, atol=1e-7)
    assert float(losses.divergence(student.detach(), student.detach())) == 0
    half = losses.divergence(student.detach().bfloat16().requires_grad_(), teacher.bfloat16())
    assert half.dtype == torch.float32 and float(half.detach()) == pytest.approx(float(other.detach()), rel=0.02)


def test_cross_entropy():
    logits, ids = torch.randn(2, 6, 40), torch.randint(0, 40, (2, 6))
    assert float(losses.cross_entropy(logits, ids)) == pytest.approx(float(cross_entropy(logits[:, :5].reshape(10, 40), ids[:, 1:].reshape(10))), rel=1e-6)
