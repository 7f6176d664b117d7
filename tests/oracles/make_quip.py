"""Makes quip.safetensors with the authors' own code (github.com/Cornell-RelaxML/quip-sharp, commit 1d8f873).

    git clone https://github.com/Cornell-RelaxML/quip-sharp  &&  python tests/oracles/make_quip.py quip-sharp/

Their lib.codebook, lib.utils (block_LDL, matmul_hadU, ...) and lib.algo.quip run unchanged on the CPU; the modules named in STUBS (CUDA kernels,
logging, data sets, language models) are imported by them and not used here. Everything is computed in float32, as they do; the script checks that
all codes come out the same in float64, and those of LDLQ in all three forms that they have of its loop, so none hangs on a rounding error.
The names of the tensors:

    codebook.*           the 256 rows |x| of E8P12 (also packed, 4 bits a number), sha256 of the whole 65536 x 8 grid as int8(4 x), 4096 of its
                         rows as int8(4 x), the 256 x 8 grid of the third bit as int8(2 x)
    round.*              X and what quantize makes of it: values and codes; E8P12.codes.0.5 and .2: of 0.5 X[:500] and of 2 X[:500]
    ldlq.*               H as regularize_H leaves it, W, L and D of block_LDL; <codebook>.<tuning passes>: hatW, codes, proxy error of
                         W / Wscale, with Wscale = rms(W) / scale; packed: the codes as their checkpoints hold them (after ten passes)
    layer.*              quantize_linear from W, flatH and mu to what it saves (E8P12, --scale_override 0.9, ten passes, sigma_reg 0.01),
                         and the hatW, in the original basis, that it has for W / rms(W)
    incoherence.MxN.*    W, H, signs and the transformed Wr, Hr (40 x 56: with rescale_WH)
    hadamard.N.*         x, x transformed (U x) and x transformed back (U^T x), a length for each table they have
    mse.*                scale, scale of the residual, mean squared error a weight of 2^16 standard Gaussian vectors: with the authors' scales
                         and with the best ones of a coarse search
"""

import hashlib
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from safetensors.torch import save_file

STUBS = ("quiptools_cuda", "fast_hadamard_transform", "glog", "datasets", "lm_eval", "lm_eval.base", "primefac", "scipy", "transformers")
CODEBOOKS = ("E8P12", "E8P12RVQ3B", "E8P12RVQ4B")
SIZES = (64, 24, 40, 56, 72, 104, 120, 216, 232, 248, 280, 312, 344)  # 64, and twice the size of each table
ROWS, COLUMNS, TOKENS = 48, 128, 512


def options(**kwargs) -> SimpleNamespace:
    """The defaults of their quantize_finetune_llama.py."""
    made = dict(sigma_reg=0.01, incoh_mode="had", lora_rank=0, scale_override=-1, resid_scale_override=-1, quip_tune_iters=10)
    made |= dict(use_fp64=False, no_use_buffered=False, rescale_WH=False, lowmem_ldlq=False)
    return SimpleNamespace(**(made | kwargs))


def error(cb, X: torch.Tensor, scale: float, residual: float) -> float:
    parts = [cb.quantize(x * scale, False, resid_scale_override=residual) / scale - x for x in X.split(2048)]
    return torch.cat(parts).double().square().mean().item()


def rounding(codebooks: dict, made: dict) -> None:
    X = made["round.X"] = torch.randn(2000, 8)
    for name, cb in codebooks.items():
        values, codes = cb.quantize(X)
        assert torch.equal(codes, cb.double().quantize(X.double())[1])
        cb.float()
        made |= {f"round.{name}.values": values, f"round.{name}.codes": codes}
    for factor in (0.5, 2):  # most of the second are outside of the codebook's ball
        codes = made[f"round.E8P12.codes.{factor}"] = codebooks["E8P12"].quantize(X[:500] * factor)[1]
        assert torch.equal(codes, codebooks["E8P12"].double().quantize(X[:500].double() * factor)[1])
        codebooks["E8P12"].float()


def ldlq(quip, utils, codebooks: dict, H: torch.Tensor, W: torch.Tensor, made: dict) -> None:
    L, D = utils.block_LDL(H, 8)
    L64, D64 = utils.block_LDL(H.double(), 8)
    made |= {"ldlq.H": H, "ldlq.W": W, "ldlq.L": L, "ldlq.D": D}
    cases = [(name, cb.opt_scale, passes) for name, cb in codebooks.items() for passes in (0, 10)]
    for name, scale, passes in [*cases, ("E8P12", 0.9, 10)]:
        cb = codebooks[name]
        Wscale = W.square().mean().sqrt() / scale
        Wr, run = W / Wscale, options(quip_tune_iters=passes)
        hatW, codes = quip.LDLQ_buffered(Wr, H, L, D, cb, run)
        for other in (quip.LDLQ, quip.LDLQ_buffered_lowmem):
            assert torch.equal(codes, other(Wr, H, L, D, cb, run)[1])
        assert torch.equal(codes, quip.LDLQ(Wr.double(), H.double(), L64, D64, cb.double(), run)[1])
        cb.float()
        delta, key = (Wr - hatW).double(), f"ldlq.{name}.{passes}" + (".override" if scale == 0.9 else "")
        proxy = ((delta @ H.double()) * delta).sum() / ((Wr.double() @ H.double()) * Wr.double()).sum()
        made |= {f"{key}.hatW": hatW, f"{key}.codes": codes, f"{key}.proxy": proxy, f"{key}.Wscale": Wscale}
        if passes and scale != 0.9:
            made[f"{key}.packed"] = cb.maybe_pack_idxs(codes)
        print(f"{key}: scale {scale}, Wscale {Wscale:.7f}, proxy error {proxy:.6f}")


def layer(quip, utils, cb, covariance: torch.Tensor, mu: torch.Tensor, W: torch.Tensor, made: dict) -> None:
    flat = utils.sym_to_flat(covariance)
    saved, seen, metrics = [], [], utils.show_metrics
    utils.show_metrics = lambda hatW, *rest: seen.append(hatW)  # which is not saved
    for fp64 in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            torch.save({"flatH": flat, "mu": mu, "n": len(mu)}, f"{folder}/H.pt")
            torch.manual_seed(1)  # the signs are drawn in float32 either way
            quip.quantize_linear([W], f"{folder}/W.pt", f"{folder}/H.pt", cb, options(scale_override=0.9, use_fp64=fp64))
            saved.append(torch.load(f"{folder}/W.pt", weights_only=False))
    utils.show_metrics = metrics
    assert torch.equal(saved[0]["Qidxs"], saved[1]["Qidxs"])
    made |= {"layer.W": W, "layer.flatH": flat, "layer.mu": mu, "layer.hatW": seen[0]}
    made |= {f"layer.{name}": saved[0][name] for name in ("Qidxs", "SU", "SV")}


def incoherence(quip, utils, made: dict) -> None:
    for rows, columns, rescale in ((64, 48, False), (40, 56, True)):
        W, X = torch.randn(rows, columns), torch.randn(300, columns) @ (torch.eye(columns) + 0.2 * torch.randn(columns, columns))
        H, run = utils.regularize_H(X.T @ X, columns, 0.01), options(rescale_WH=rescale)
        _, Hr, Wr, SU, SV, scaleWH = quip.incoherence_preprocess(H, W, run)
        assert torch.allclose(quip.incoherence_process(Wr, SU, SV, scaleWH, run), W, atol=1e-5)
        case = {"W": W, "H": H, "Wr": Wr, "Hr": Hr, "SU": SU, "SV": SV} | ({"scaleWH": scaleWH} if rescale else {})
        made |= {f"incoherence.{rows}x{columns}.{name}": t for name, t in case.items()}
    for n in SIZES:
        x = torch.randn(n)
        made |= {f"hadamard.{n}.x": x, f"hadamard.{n}.Ux": utils.matmul_hadU(x), f"hadamard.{n}.Utx": utils.matmul_hadUt(x)}


def gaussian(codebooks: dict, made: dict) -> None:
    X = torch.randn(1 << 16, 8)
    residuals = {"E8P12": [-1], "E8P12RVQ3B": [1.9 + 0.05 * i for i in range(9)], "E8P12RVQ4B": [3.2 + 0.1 * i for i in range(12)]}
    for name, cb in codebooks.items():
        scales = [0.8 + 0.04 * i for i in range(9)]
        few = X[: len(X) // len(residuals[name])]
        best = min((error(cb, few, s, r), s, r) for s in scales for r in residuals[name])[1:]
        cases = {"authors": (cb.opt_scale, getattr(cb, "opt_resid_scale", -1)), "best": best}
        for case, (scale, residual) in (cases | ({"override": (0.9, -1)} if name == "E8P12" else {})).items():
            mse = error(cb, X, scale, residual)
            made[f"mse.{name}.{case}"] = torch.tensor([scale, residual, mse], dtype=torch.float64)
            print(f"mse of {name}, {case}: scale {scale:.2f}, of the residual {residual:.2f}: {mse:.6f}")


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    sys.modules |= {name: mock.MagicMock() for name in STUBS}
    sys.modules["lm_eval.base"].BaseLM = object
    from lib import codebook, utils
    from lib.algo import quip
    from lib.codebook.latticee8_padded12 import get_abs_grid

    codebooks = {name: codebook.get_codebook(name) for name in CODEBOOKS}
    torch.manual_seed(0)
    grid = (4 * codebooks["E8P12"].grid).to(torch.int8)
    made = {"codebook.sha256": torch.tensor([*hashlib.sha256(grid.numpy().tobytes()).digest()], dtype=torch.uint8)}
    made["codebook.codes"] = torch.randint(1 << 16, (4096,), dtype=torch.int32)
    made["codebook.rows4"] = grid[made["codebook.codes"].long()]
    made["codebook.abs"] = get_abs_grid()
    made["codebook.packed_abs"] = codebooks["E8P12"].grid_packed_abs.clone()
    made["codebook.e81b2"] = (2 * codebooks["E8P12RVQ3B"].e81b_grid).to(torch.int8)
    rounding(codebooks, made)

    X = 0.3 + torch.randn(TOKENS, COLUMNS) @ (torch.eye(COLUMNS) + 0.15 * torch.randn(COLUMNS, COLUMNS))
    W, mu = torch.randn(ROWS, COLUMNS), X.mean(0)
    covariance = X.T @ X / TOKENS - mu[:, None] * mu
    covariance = (covariance + covariance.T) / 2
    H = utils.regularize_H(covariance + mu[:, None] * mu, COLUMNS, 0.01)
    ldlq(quip, utils, codebooks, H, W, made)
    layer(quip, utils, codebooks["E8P12"], covariance, mu, 0.02 * W, made)
    incoherence(quip, utils, made)
    gaussian(codebooks, made)
    path = Path(__file__).with_name("quip.safetensors")
    save_file({name: t.contiguous() for name, t in made.items()}, path)
    print(path.stat().st_size, "bytes")


if __name__ == "__main__":
    main(sys.argv[1])
