"""Makes observers.safetensors: calibration observers over 8 batches, and fake quantization of activations at run time, each by its own project.

    pip install torch==2.13.0 numpy==2.4.6 onnxruntime==1.31.1 onnx==1.23.2 pytorch-quantization==2.1.3 compressed-tensors==0.20.0 && python tests/oracles/make_observers.py

silu and sym are [8 batches, 64, 32]: after SiLU, and symmetric with outliers; later batches reach further, so histograms have to grow.
torch.*: min-max, moving average (0.01) and histogram (2048 bins) observers, every dtype and scheme: scale, zero_point, and the range they come from.
At 256 levels its search hardly clips such data, so histogram.range.64 and .16 are of the same search with 64 and 16 levels (dst_nbins).
ort.*: onnxruntime's HistogramCollector, (low, high). "once" has all batches in one collect(), as its calibrator does for one data reader; "grown" has one
each. entropy.128.128 is its default, which has one candidate and so is min-max until the histogram has grown; 2048.128 and 2048.256 search.
nv.*: NVIDIA's histogram calibrator with 2048 bins, one collect() a batch, amax for 8 and 4 bits (its mse wants a GPU for no reason: cuda() is a no-op here).
Neighbouring bins' mse differ by 2e-6 only: allow a bin either way.
ct.*: compressed-tensors, x in float32 and bfloat16; dynamic scales have x's dtype. Row [0, 0] is 0, [0, 1] is > 0, [0, 2] is < 0, [1, 0] is tiny.
ct.*.rows is the same for the 2-d x[2]: strategy "token" then makes one scale for the whole of it.
"""

from pathlib import Path

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from onnxruntime.quantization.calibrate import HistogramCollector
from pytorch_quantization.calib import HistogramCalibrator
from safetensors.torch import save_file
from torch.ao.quantization import HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver

DTYPES = {"quint8": torch.quint8, "qint8": torch.qint8}
SCHEMES = {"affine": torch.per_tensor_affine, "symmetric": torch.per_tensor_symmetric}
OBSERVERS = {"minmax": (MinMaxObserver, {}), "average": (MovingAverageMinMaxObserver, {"averaging_constant": 0.01}), "histogram": (HistogramObserver, {"bins": 2048})}
ORT = [("percentile", 2048, 128, p, symmetric) for p in (99.999, 99.9, 99.0) for symmetric in (True, False)]
ORT += [("entropy", bins, quantized, None, False) for bins, quantized in ((128, 128), (2048, 128), (2048, 256))]
INT8, FP8 = preset_name_to_scheme("W8A8", ["Linear"]).input_activations, preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]).input_activations
DYNAMIC = {"int8-sym": INT8, "int8-asym": QuantizationArgs(num_bits=8, type="int", strategy="token", symmetric=False, dynamic=True), "fp8": FP8}
STATIC = {  # per tensor: args, scale, zero point; too small a range for x, which clips
    "int8-sym": (QuantizationArgs(num_bits=8, type="int", strategy="tensor", symmetric=True), 0.03125 * 0.77, None),
    "int8-asym": (QuantizationArgs(num_bits=8, type="int", strategy="tensor", symmetric=False), 0.03125 * 0.77, -37),
    "fp8": (preset_name_to_scheme("FP8", ["Linear"]).input_activations, 0.0077, None),
}


def data() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(104)  # with most seeds rounding decides between two of onnxruntime's entropies; here the best leads by 7e-4
    growth = torch.tensor([1, 0.9, 1.4, 1.1, 1.9, 0.8, 2.0, 1.3]).view(8, 1, 1)
    silu, sym, noise = (torch.randn(8, 64, 32, generator=generator) for _ in range(3))
    silu, sym = silu * (0.5 * noise).exp() * growth, sym * (0.4 * noise).exp() * growth
    sym[2, 11, 7], sym[4, 50, 7], sym[6, 20, 7] = 21.0, -34.0, 29.0
    return {"silu": torch.nn.functional.silu(1.5 * silu), "sym": sym}


def of_torch(X: torch.Tensor) -> dict[str, torch.Tensor]:
    made = {}
    for name, (kind, options) in OBSERVERS.items():
        for dtype in DTYPES:
            for scheme in SCHEMES:
                observer = kind(dtype=DTYPES[dtype], qscheme=SCHEMES[scheme], **options)
                for batch in X:
                    observer(batch)
                key = f"{name}.{dtype}-{scheme}"
                made[f"{key}.scale"], made[f"{key}.zero_point"] = observer.calculate_qparams()
        low, high = observer._non_linear_param_search() if name == "histogram" else (observer.min_val, observer.max_val)  # not a matter of dtype or scheme
        made[f"{name}.range"] = torch.stack([low, high])
        if name == "histogram":
            made |= {"histogram.counts": observer.histogram, "histogram.ends": torch.stack([observer.min_val, observer.max_val])}
            for observer.dst_nbins in (64, 16):
                made[f"histogram.range.{observer.dst_nbins}"] = torch.stack(observer._non_linear_param_search())
    return made


def of_onnxruntime(X: torch.Tensor) -> dict[str, torch.Tensor]:
    made = {}
    for method, bins, quantized, percentile, symmetric in ORT:
        for how, calls in (("once", [list(X.numpy())]), ("grown", list(X.numpy()))):
            collector = HistogramCollector(method, symmetric, bins, quantized, percentile, "same")
            for call in calls:
                collector.collect({"x": call})
            low, high, *_ = collector.compute_collection_result()["x"]
            key = f"entropy.{bins}.{quantized}" if method == "entropy" else f"percentile.{percentile}.{'sym' if symmetric else 'asym'}"
            made[f"{key}.{how}"] = torch.from_numpy(np.array([low, high], np.float32))
    return made


def of_nvidia(X: torch.Tensor) -> dict[str, torch.Tensor]:
    made = {}
    for bits in (8, 4):
        calibrator = HistogramCalibrator(bits, None, False)
        for batch in X:
            calibrator.collect(batch)
        made |= {f"{method}.{bits}": calibrator.compute_amax(method) for method in ("entropy", "mse")}
    made |= {f"percentile.{p}": calibrator.compute_amax("percentile", percentile=p) for p in (99.99, 99.9)}
    return made | {"counts": calibrator._calib_hist, "edges": calibrator._calib_bin_edges}


def of_compressed_tensors() -> dict[str, torch.Tensor]:
    X = torch.randn(4, 7, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 7).unsqueeze(1)
    X[0, 0], X[0, 1], X[0, 2], X[1, 0] = 0, X[0, 1].abs() + 0.5, -X[0, 2].abs() - 0.5, 1e-8 * X[1, 0]
    made, module = {"x": X}, torch.nn.Module()
    module.quantization_status = QuantizationStatus.FROZEN
    for dtype in (torch.float32, torch.bfloat16):
        for name, args in DYNAMIC.items():
            for suffix, x in (("", X.to(dtype)), (".rows", X[2].to(dtype))):
                key = f"dynamic.{name}.{str(dtype)[6:]}{suffix}"
                made[f"{key}.scale"], zero = compute_dynamic_scales_and_zp(x, args, module)
                if not args.symmetric:
                    made[f"{key}.zero_point"] = zero
                made[key] = forward_quantize(module, x, "input", args)
        for name, (args, scale, zero) in STATIC.items():
            module.input_scale = torch.tensor([scale]).to(dtype)
            module.input_zero_point = None if zero is None else torch.tensor([zero], dtype=torch.int8)
            key = f"static.{name}.{str(dtype)[6:]}"
            made |= {f"{key}.scale": module.input_scale, key: forward_quantize(module, X.to(dtype), "input", args)}
            if zero is not None:
                made[f"{key}.zero_point"] = module.input_zero_point
    return made


def main() -> None:
    torch.Tensor.cuda = lambda self, *_: self
    tensors = data()
    for label, X in list(tensors.items()):
        for name, function in (("torch", of_torch), ("ort", of_onnxruntime), ("nv", of_nvidia)):
            tensors |= {f"{label}.{name}.{key}": value for key, value in function(X).items()}
    tensors |= {f"ct.{key}": value for key, value in of_compressed_tensors().items()}
    save_file({key: value.detach().clone().contiguous() for key, value in tensors.items()}, Path(__file__).with_name("observers.safetensors"))


if __name__ == "__main__":
    main()
