"""Make aqlm.safetensors with the authors' own code: what their k-means, their Adam rounds and their beam search make of the same W and XTX.

    git clone https://github.com/Vahe1994/AQLM  &&  python tests/oracles/make_aqlm.py AQLM/      (commit e79a896; half a minute on one core)

Everything runs on the CPU and no import needs a stub: aq_engine.py, src/ and inference_lib/src/aqlm/utils.py import torch and tqdm only (main.py, which needs more, is not used).
AQ_USE_JIT=0 is their own switch: the same functions without torch.jit.script. Errors are tr(dW XTX dW^T) / tr(W XTX W^T), dW = decoded - W, in float64. Per case:

    errors                [ROUNDS + 1] after k-means, then after each round (STEPS of Adam, then one search of beam 1 in shuffled order); errors_fitted [ROUNDS]: before the search
    errors_by_seed        [SEEDS] at the end, for other seeds of the k-means and of the order: what a difference is worth
    seconds               [ROUNDS + 1] since the start, on the machine that made the file; the only values a second run changes
    init.*                codes, codebooks, scales after k-means (of seed 0): from these, in natural order, beam_1 and beam_4 are the codes that one search finds, beam_errors what they give
    codes, codebooks, ... at the end (of seed 0); weight: decoded by their _dequantize_weight; packed: codes as their checkpoints hold them; bits: per weight, with codebooks and scales in 16 bits
"""

import contextlib
import io
import os
import random
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
from safetensors.torch import save_file

ROWS, COLUMNS, TOKENS = 64, 256, 1024
CASES = [("2x8", 2, 8), ("1x10", 1, 10)]  # name, codebooks, bits of each; vectors are 8 weights of one row
KMEANS, ROUNDS, STEPS, SEEDS = 100, 20, 100, 5  # KMEANS, STEPS and the rate are main.py's defaults


def main(folder: str) -> None:
    os.environ["AQ_USE_JIT"] = "0"
    sys.path[:0] = [folder, f"{folder}/inference_lib/src"]
    import aq_engine as theirs
    from aqlm.utils import pack_int_data, unpack_int_data
    from src.beam_search_xtx import beam_search_optimal_codes
    from src.utils import _dequantize_weight

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    W = 0.02 * (randn(ROWS, COLUMNS) + 0.5 * randn(ROWS, 8) @ randn(8, COLUMNS) / 8**0.5)
    W[:, [17, 90, 201]] *= 5
    X = randn(TOKENS, COLUMNS) @ (torch.eye(COLUMNS) + 0.5 * randn(COLUMNS, COLUMNS) / COLUMNS**0.5) * randn(COLUMNS).exp()
    layer = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    layer.weight.data = W.clone()
    engine = theirs.AQEngine(layer)
    engine.add_batch(X)
    XTX = engine.XTX.float()
    made = {"W": W, "XTX": XTX}

    def error(decoded: torch.Tensor) -> float:
        dW, w, H = (decoded.detach() - W).double(), W.double(), XTX.double()
        return (((dW @ H) * dW).sum() / ((w @ H) * w).sum()).item()

    def quantize(codebooks: int, bits: int, rounds: int, seed: int):
        """Their AQEngine.quantize, and the error and the seconds so far before and after each search."""
        torch.manual_seed(seed)
        random.seed(seed)
        engine = theirs.AQEngine(layer)
        engine.XTX = XTX.double()
        search, heard, start = engine.beam_search_update_codes_, [], time.perf_counter()

        def searched(*args, **kwargs) -> None:
            heard.append((error(engine.quantized_weight()), time.perf_counter() - start))
            search(*args, **kwargs | {"verbose": False})
            heard.append((error(engine.quantized_weight()), time.perf_counter() - start))

        engine.beam_search_update_codes_ = searched
        args = dict(devices=[torch.device("cpu")], out_group_size=1, in_group_size=8, num_codebooks=codebooks, nbits_per_codebook=bits)
        args |= dict(codebook_value_nbits=16, codebook_value_num_groups=1, scale_nbits=0, init_max_iter=KMEANS, init_max_points_per_centroid=None)
        args |= dict(lr=1e-4, max_epochs=rounds, steps_per_epoch=STEPS, relative_mse_tolerance=None, beam_size=1)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            quantized = engine.quantize(args=Namespace(**args), verbose=False)
        return quantized, heard or [(error(quantized()), time.perf_counter() - start)]

    quantize(2, 2, 1, 0)  # to warm up
    for name, codebooks, bits in CASES:
        first, initial = quantize(codebooks, bits, 0, 0)
        last, heard = quantize(codebooks, bits, ROUNDS, 0)
        errors, seconds = (torch.tensor(values, dtype=torch.float64) for values in zip(*initial + heard[1::2], strict=True))
        fitted = torch.tensor([value for value, _ in heard[::2]], dtype=torch.float64)
        by_seed = [heard[-1][0]] + [quantize(codebooks, bits, ROUNDS, seed)[1][-1][0] for seed in range(1, SEEDS)]
        case = {"errors": errors, "errors_fitted": fitted, "errors_by_seed": torch.tensor(by_seed, dtype=torch.float64), "seconds": seconds}
        case["bits"] = torch.tensor([last.estimate_nbits_per_parameter()], dtype=torch.float64)
        for prefix, state in (("init.", first), ("", last)):
            case |= {f"{prefix}codes": state.codes.detach().short(), f"{prefix}codebooks": state.codebooks.detach(), f"{prefix}scales": state.scales.detach()}
        found = {"init": first.codes}
        for beam in (1, 4):
            found[f"beam_{beam}"] = beam_search_optimal_codes(
                XTX=XTX, reference_weight=W, codebooks=first.codebooks.detach(), prev_codes=first.codes, scales=first.scales.detach(), beam_size=beam, verbose=False
            )
            case[f"beam_{beam}"] = found[f"beam_{beam}"].short()
        case["beam_errors"] = torch.tensor([error(_dequantize_weight(codes, first.codebooks, first.scales)) for codes in found.values()], dtype=torch.float64)
        case["weight"] = last().detach()
        case["packed"] = pack_int_data(last.codes.detach().clone(), bits)
        assert torch.equal(_dequantize_weight(unpack_int_data(case["packed"], bits), case["codebooks"], case["scales"]), case["weight"])
        made |= {f"{name}.{key}": value.clone().contiguous() for key, value in case.items()}
        for key in ("bits", "errors", "errors_fitted", "errors_by_seed", "beam_errors", "seconds"):
            print(f"{name}.{key}", " ".join(f"{value:.6f}" for value in case[key].tolist()))
    save_file(made, Path(__file__).with_name("aqlm.safetensors"))


if __name__ == "__main__":
    main(sys.argv[1])
