"""One quantizer of another library on the weights, Hessians and inputs of a few blocks, so that its error and time can be set against lowbit's.

    python benchmarks/peer_methods.py PEER D OUT.safetensors        in an environment that holds the peer

PEER is one of gptqmodel, gptqmodel-desc-act, llm-compressor, autoawq, hqq, auto-round. D holds block*.safetensors of Llama blocks: for each linear
`{name}.weight` [out, in], `{name}.hessian` [in, in], the sum over tokens of x x^T, and `hidden` [windows, tokens, width], the block's inputs; in the metadata
`n_tokens`, and if they are not SmolLM2's, `head_dim`, `rope_theta` and `rms_norm_eps`. The norms' weights are read from `input_layernorm.weight` and
`post_attention_layernorm.weight`, or else are found from the Hessians (see decoder_layer).

OUT holds `{block}.{name}.weight`, dequantized, in the basis of the original inputs and in float32, and as JSON in its metadata: `seconds` (of each linear, or of
each step where a peer works on whole blocks), `error` (tr(dW H dW^T) / tr(W H W^T)), `output_mse` of each block, the versions and the threads.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

PATHS = {**{f"{n}_proj": f"self_attn.{n}_proj" for n in "qkvo"}, **{f"{n}_proj": f"mlp.{n}_proj" for n in ("gate", "up", "down")}}
PACKAGES = ("torch", "transformers", "gptqmodel", "llmcompressor", "compressed-tensors", "autoawq", "hqq", "auto-round")


def linear(W: Tensor) -> nn.Linear:
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=torch.float32)
    layer.weight.data = W.detach().to("cpu", torch.float32, copy=True)
    return layer.requires_grad_(False)


def gptqmodel_gptq(W: Tensor, H: Tensor, n_tokens: int, bits: int = 4, group_size: int = 64, sym: bool = True, desc_act: bool = False, damp: float = 0.01) -> tuple[Tensor, float]:
    """GPTQModel's GPTQ.quantize(); its defaults but for `damp` (0.05 there): act_group_aware unless desc_act, scales from the extremes."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    task = GPTQ(linear(W), QuantizeConfig(bits=bits, group_size=group_size, sym=sym, desc_act=desc_act, act_group_aware=not desc_act, damp_percent=damp, offload_to_disk=False))
    task.quantizer.configure(perchannel=True)  # as its GPTQProcessor does: without this there is one scale of a group for all rows
    task.H, task.nsamples = H.to("cpu", torch.float32) * (2 / n_tokens), n_tokens  # what its materialize_global_hessian() leaves; _hessian_dirty is False
    start = time.perf_counter()
    found = task.quantize()
    seconds = time.perf_counter() - start
    if found[6] != damp or task.qcfg.mock_quantization:
        raise SystemExit(f"GPTQModel fell back (damp {found[6]}): not a fair comparison")
    return found[0].float().clone(), seconds


def llmcompressor_gptq(W: Tensor, H: Tensor, n_tokens: int, bits: int = 4, group_size: int = 64, sym: bool = True, actorder: str | None = "static", damp: float = 0.01) -> tuple[Tensor, float]:
    """llm-compressor's observer and quantize_weight(), as GPTQModifier.compress_module_list() calls them."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, initialize_module_for_quantization
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.modifiers.gptq.helpers import prepare_batch
    from llmcompressor.modifiers.quantization.calibration import initialize_observer, observe

    args = QuantizationArgs(num_bits=bits, type="int", symmetric=sym, strategy="group", group_size=group_size, actorder=actorder)
    layer = linear(W)
    initialize_module_for_quantization(layer, QuantizationScheme(targets=["Linear"], weights=args))
    initialize_observer(layer, "weight")
    hessians, samples = {layer: H.to("cpu", torch.float32) * 2}, {layer: torch.tensor(float(n_tokens))}
    with torch.no_grad():
        start = time.perf_counter()
        observe([layer], "weight")
        weights, stacked, scale, zero_point, global_scale = prepare_batch([layer], [layer.weight_observer.get_qparams()], hessians, samples)
        made, _, fallback = quantize_weight(weights, stacked, scale, zero_point, global_scale, args, blocksize=128, percdamp=damp)
        seconds = time.perf_counter() - start
    if fallback.any():
        raise SystemExit("llm-compressor fell back to rounding: not a fair comparison")
    return made[0].float().clone(), seconds


def hqq(W: Tensor, H: Tensor | None = None, n_tokens: int = 0, bits: int = 4, group_size: int = 64) -> tuple[Tensor, float]:
    """hqq's Quantizer, as in hqq_peer.py; it uses no data."""
    from hqq.core.quantize import Quantizer

    W = W.detach().to("cpu", torch.float32, copy=True)
    start = time.perf_counter()
    codes, meta = Quantizer.quantize(W, nbits=bits, group_size=group_size, optimize=True, round_zero=bits == 4, axis=1, bitpack=False, compute_dtype=torch.float32, device="cpu")
    seconds = time.perf_counter() - start
    return ((codes.float() - meta["zero"]) * meta["scale"]).reshape(W.shape).float(), seconds


def autoawq(layer: nn.Module, hidden: Tensor, bits: int = 4, group_size: int = 64, sym: bool = False) -> tuple[dict[str, Tensor], dict[str, float]]:
    """AutoAWQ's AwqQuantizer on one decoder layer: the steps of its quantize() but for the packing and its cast to float16."""
    quantizer_class, scale, awq_llama = import_autoawq()

    class OneLayer(quantizer_class):
        def init_quant(self, **_: int) -> tuple[list[nn.Module], dict, Tensor]:
            return [layer], block_kwargs(layer, hidden), hidden.float().clone()

    layer = copy.deepcopy(layer)
    for module in layer.modules():  # _compute_best_scale keeps the weights by state_dict() and .cpu(), which on the CPU is no copy, and scales them in place
        module.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.update({k: v.clone() for k, v in state.items()}) if not prefix else None)
    family = types.SimpleNamespace(model_type="llama")
    quantizer = OneLayer(family, None, None, bits, group_size, not sym, "gemm", None, None, None, duo_scaling=True)
    linears = {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
    clock = Clock()
    with torch.no_grad():
        features = quantizer._get_input_feat(layer, linears)
        clock("features")
        groups = awq_llama.get_layers_for_scaling(layer, features, quantizer.module_kwargs)
        scales = [quantizer._search_best_scale(layer, **group) for group in groups]  # which calls _compute_best_scale
        scale.apply_scale(layer, scales, input_feat_dict=features)
        clock("scale")
        scale.apply_clip(layer, quantizer._search_best_clip(layer, linears, features))  # which calls _compute_best_clip, but for q_proj and k_proj
        clock("clip")
        made = {name: quantizer.pseudo_quantize_tensor(m.weight.data)[0] for name, m in linears.items()}
        clock("round")
        for before, after, s in scales:  # back to the original basis: of the inputs, and of the outputs where the scaling went into a linear
            for name in after:
                made[name] = made[name] / s.view(1, -1)
            if before in made:
                made[before][-len(s) :] *= s.view(-1, 1)
    return {name.split(".")[-1]: m.float().clone() for name, m in made.items()}, clock.seconds


def import_autoawq() -> tuple:
    """AwqQuantizer, awq.quantize.scale and LlamaAWQForCausalLM, past the packages' __init__, which imports every family of models; newer transformers miss some."""
    import transformers.activations

    if not hasattr(transformers.activations, "PytorchGELUTanh"):  # the name until transformers 4.55
        transformers.activations.PytorchGELUTanh = transformers.activations.GELUTanh
    for name in ("awq", "awq.models"):
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = list(importlib.util.find_spec(name).submodule_search_locations)
            sys.modules[name] = package
    from awq.models.llama import LlamaAWQForCausalLM
    from awq.quantize import scale
    from awq.quantize.quantizer import AwqQuantizer

    return AwqQuantizer, scale, LlamaAWQForCausalLM


def auto_round(
    layer: nn.Module, hidden: Tensor, bits: int = 4, group_size: int = 64, sym: bool = True, iters: int = 200, nsamples: int = 128, batch: int = 8, amp: bool = False
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """auto-round's quantize_block() (as llm-compressor calls it) with the first `nsamples` windows; amp=True is its default: weights and forwards in bfloat16."""
    from auto_round import AutoRound
    from transformers import LlamaForCausalLM

    config = copy.deepcopy(layer.self_attn.config)
    config.num_hidden_layers, config.vocab_size = 1, 8
    model = LlamaForCausalLM(config).float()
    model.model.layers[0].load_state_dict(layer.state_dict())
    model.requires_grad_(False)
    hidden = hidden[:nsamples].float()
    scheme = {"bits": bits, "group_size": group_size, "sym": sym, "data_type": "int", "act_bits": 16}
    tuner = AutoRound(
        model, tokenizer="", scheme=scheme, iters=iters, nsamples=len(hidden), seqlen=hidden.shape[1], batch_size=batch, amp=amp, device_map="cpu", enable_torch_compile=False, seed=42
    )
    tuner.post_init()
    block = model.model.layers[0]
    inputs = [(((), {"hidden_states": window[None], **block_kwargs(layer, hidden)}),) for window in hidden]
    clock = Clock()
    tuner.quantize_block(block, inputs, q_input=None, device="cpu")
    clock("block")
    return {name: block.get_submodule(path).weight.detach().float().clone() for name, path in PATHS.items()}, clock.seconds


class Clock:
    """Seconds of the steps since it was made, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def __call__(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[step], self.last = now - self.last, now


def decoder_layer(tensors: dict[str, Tensor], n_tokens: int, head_dim: int = 64, rope_theta: float = 100000.0, rms_norm_eps: float = 1e-5) -> nn.Module:
    """A LlamaDecoderLayer of the weights. A norm's weights w that are not given are found from H_ij = w_i w_j S_ij, where S is of the normed inputs without w.

    That is exact, but for the sign of all of w, where `hidden` holds all tokens of the Hessian; otherwise it is an estimate, and the gap is told.
    """
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    width, hidden = tensors["q_proj.weight"].shape[1], tensors["hidden"].float()
    heads, key_heads = (tensors[f"{name}_proj.weight"].shape[0] // head_dim for name in "qk")
    config = LlamaConfig(
        hidden_size=width, intermediate_size=len(tensors["up_proj.weight"]), num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=head_dim,
        rms_norm_eps=rms_norm_eps, max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": rope_theta}, attn_implementation="sdpa",
    )  # fmt: skip
    layer = LlamaDecoderLayer(config, 0).float().requires_grad_(False)
    for name, path in PATHS.items():
        layer.get_submodule(path).weight.copy_(tensors[f"{name}.weight"])

    def fill(norm: str, after: str, inputs: Callable[[], Tensor]) -> None:
        weight, given = layer.get_submodule(norm).weight, tensors.get(f"{norm}.weight")
        if given is None:
            normed = layer.get_submodule(norm)(inputs()).reshape(-1, width).double()  # the weight is still 1
            H, S = tensors[f"{after}.hessian"].double() / n_tokens, normed.T @ normed / len(normed)
            given = (H.diagonal() / S.diagonal()).sqrt()
            scale = (H.diagonal() * S.diagonal()).sqrt()
            signs = torch.linalg.eigh(H * S / torch.outer(scale, scale)).eigenvectors[:, -1].sign()  # of a positive matrix but for the signs of w
            given = given * signs * signs.sum().sign()
            gap = float((torch.outer(given, given) * S - H).norm() / H.norm())
            if gap > 1e-3:
                print(f"{norm}: found from the Hessian with a gap of {gap:.1e}, for hidden does not hold its tokens; give {norm}.weight", file=sys.stderr)
        weight.copy_(given)

    fill("input_layernorm", "q_proj", lambda: hidden)
    fill("post_attention_layernorm", "gate_proj", lambda: hidden + layer.self_attn(layer.input_layernorm(hidden), attention_mask=None, **block_kwargs(layer, hidden))[0])
    return layer


def block_kwargs(layer: nn.Module, hidden: Tensor) -> dict:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    positions = torch.arange(hidden.shape[1])[None]
    return {"position_embeddings": LlamaRotaryEmbedding(layer.self_attn.config)(hidden[:1].float(), positions), "position_ids": positions}


@torch.no_grad()
def output_mse(layer: nn.Module, weights: dict[str, Tensor], hidden: Tensor) -> float:
    made = copy.deepcopy(layer)
    for name, path in PATHS.items():
        made.get_submodule(path).weight.copy_(weights[name])
    kwargs, total = block_kwargs(layer, hidden), 0.0
    for window in hidden.float():
        outputs = [found[0] if isinstance(found, tuple) else found for found in (m(window[None], attention_mask=None, **kwargs) for m in (layer, made))]
        total += float((outputs[0] - outputs[1]).square().mean())
    return total / len(hidden)


def error(W: Tensor, made: Tensor, H: Tensor) -> float:
    """tr(dW H dW^T) / tr(W H W^T)"""
    W, H = W.double(), H.double()
    d = made.double() - W
    return float(((d @ H) * d).sum() / ((W @ H) * W).sum())


def by_linear(method: Callable[..., tuple[Tensor, float]], **options: object) -> Callable:
    def run(tensors: dict[str, Tensor], n_tokens: int, layer: nn.Module, hidden: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        found = {name: method(tensors[f"{name}.weight"], tensors[f"{name}.hessian"], n_tokens, **options) for name in PATHS}
        return {name: made for name, (made, _) in found.items()}, {name: seconds for name, (_, seconds) in found.items()}

    return run


def blocks(folder: Path, only: list[str] | None = None) -> Iterator[tuple[str, dict[str, Tensor], dict[str, str]]]:
    for path in sorted((p for p in folder.glob("block*.safetensors") if only is None or p.stem in only), key=lambda p: (len(p.name), p.name)):
        with safe_open(path, "pt") as file:
            yield path.stem, {key: file.get_tensor(key) for key in file.offset_keys() if not key.endswith(".inputs")}, file.metadata()


def main(own: dict[str, Callable] | None = None) -> None:
    """own: methods that are not a peer's, (tensors, n_tokens, layer, hidden, options) -> (weights, seconds), by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=own or ("gptqmodel", "gptqmodel-desc-act", "llm-compressor", "autoawq", "hqq", "auto-round"))
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", nargs="+", help="only these, by their files' names without the ending, such as block0")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--sym", action=argparse.BooleanOptionalAction, help="by default as the peer's: symmetric, but autoawq not; hqq never is")
    parser.add_argument("--damp", type=float, default=0.01)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--windows", type=int, help="for the block peers: so many of `hidden`, the first; default all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--amp", action="store_true", help="auto-round in bfloat16, its default")
    a = parser.parse_args()
    common = {"bits": a.bits, "group_size": a.group_size}
    a.sym = a.sym if a.sym is not None else a.peer not in ("autoawq", "awq")
    signed = common | {"sym": a.sym}
    tune = {"iters": a.iters, "batch": a.batch, "amp": a.amp}
    run = (lambda *given: own[a.peer](*given, a)) if own else {
        "gptqmodel": by_linear(gptqmodel_gptq, **signed, damp=a.damp),
        "gptqmodel-desc-act": by_linear(gptqmodel_gptq, **signed, damp=a.damp, desc_act=True),
        "llm-compressor": by_linear(llmcompressor_gptq, **signed, damp=a.damp),
        "hqq": by_linear(hqq, **common),
        "autoawq": lambda tensors, n_tokens, layer, hidden: autoawq(layer, hidden, **signed),
        "auto-round": lambda tensors, n_tokens, layer, hidden: auto_round(layer, hidden, **signed, **tune),
    }[a.peer]
    made, record = {}, {"seconds": {}, "error": {}, "output_mse": {}}
    for stem, tensors, metadata in blocks(a.data, a.blocks):
        n_tokens, hidden = int(metadata["n_tokens"]), tensors["hidden"][: a.windows]
        layer = decoder_layer(tensors, n_tokens, **{key: float(metadata[key]) for key in ("rope_theta", "rms_norm_eps") if key in metadata}, head_dim=int(metadata.get("head_dim", 64)))
        if not made:
            tune["iters"], a.iters, kept = 1, 1, a.iters
            run(tensors, n_tokens, layer, hidden[:1, :64])  # the first warms up
            tune["iters"] = a.iters = kept
        weights, record["seconds"][stem] = run(tensors, n_tokens, layer, hidden)
        record["error"][stem] = {name: error(tensors[f"{name}.weight"], weights[name], tensors[f"{name}.hessian"]) for name in PATHS}
        record["output_mse"][stem] = output_mse(layer, weights, tensors["hidden"][:16])
        made |= {f"{stem}.{name}.weight": weights[name].contiguous() for name in PATHS}
        print(f"{stem}: {sum(record['seconds'][stem].values()):.2f} s", {k: round(v, 2) for k, v in record["seconds"][stem].items()}, flush=True)
        print("  error", {k: float(f"{v:.4g}") for k, v in record["error"][stem].items()}, f"output mse {record['output_mse'][stem]:.4g}", flush=True)
    record |= {"peer": a.peer, "threads": torch.get_num_threads(), "options": {k: v for k, v in vars(a).items() if k not in ("peer", "data", "out")}, "versions": versions()}
    save_file(made, a.out, metadata={key: json.dumps(value) for key, value in record.items()})


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
