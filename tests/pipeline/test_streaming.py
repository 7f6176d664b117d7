"""Block by block equals the plain forward, and the statistics are those of the plain model's own inputs."""

import contextlib

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowbit.checkpoints import open_checkpoint
from lowbit.errors import JobError, ModelError, ResourceError
from lowbit.models import skeleton as sk
from lowbit.models.linears import find_linears
from lowbit.pipeline import collect
from lowbit.pipeline.collect import Collector, Current, StopBlock, symmetrize
from lowbit.pipeline.hidden import HiddenStates
from lowbit.pipeline.streaming import Batch, Streamer

LENGTH = 24
EXPERTS = ("mixtral", "qwen3-moe")


def make_batches(padded: bool) -> list[Batch]:
    """Micro-batches of 3 and 2 sequences; padded: of unequal lengths, filled up at the right."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for rows in (3, 2):
        ids = torch.randint(3, 280, (rows, LENGTH), generator=generator)
        mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 19, 7][:rows]).unsqueeze(1)
        batches.append(Batch(ids.where(mask, 0), mask) if padded else Batch(ids))
    return batches


def plain_forward(model, batch: Batch) -> torch.Tensor:
    mask = None if batch.mask is None else batch.mask.long()
    with torch.no_grad():
        return model(input_ids=batch.ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_streamed_logits_equal_the_plain_forwards(any_model, padded, model_folder, load_plain, stream):
    folder, batches = model_folder(any_model), make_batches(padded)
    model = load_plain(folder)
    for batch, streamed in zip(batches, stream(folder, batches), strict=True):
        expected = plain_forward(model, batch)
        real = batch.mask if padded else torch.ones_like(batch.ids, dtype=torch.bool)
        assert expected[real].std() > 0.01  # the tiny model says something
        if any_model in EXPERTS:
            assert (streamed - expected)[real].abs().max() <= 2e-6 * max(1, float(expected[real].abs().max()))
        else:
            assert torch.equal(streamed[real], expected[real])


def test_sliding_window_matters(model_folder, load_plain):
    batch = make_batches(False)[0]
    model = load_plain(model_folder("mistral"))
    narrow = plain_forward(model, batch)
    model.config.sliding_window = None
    assert not torch.equal(narrow[:, -1], plain_forward(model, batch)[:, -1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "gemma3"])
def test_half_precision_checkpoints_in_several_shards(name, dtype, save_model, tmp_path, load_plain, stream):
    folder = save_model(name, tmp_path / "m", dtype=dtype, shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    batches = make_batches(False)
    model = load_plain(folder)
    for batch, streamed in zip(batches, stream(folder, batches), strict=True):
        torch.testing.assert_close(streamed, plain_forward(model, batch), rtol=0, atol=2e-6 if name in EXPERTS else 0)


def test_hidden_states_on_disk_and_in_half_precision(model_folder, tmp_path, load_plain, stream):
    folder, batches = model_folder("llama"), make_batches(False)
    on_disk, in_memory = stream(folder, batches, file=tmp_path), stream(folder, batches)
    assert all(torch.equal(a, b) for a, b in zip(on_disk, in_memory, strict=True))
    half = stream(folder, batches, dtype=torch.bfloat16)
    model = load_plain(folder, torch.bfloat16)
    for batch, streamed in zip(batches, half, strict=True):
        assert torch.equal(streamed, plain_forward(model, batch).float())


def test_a_head_in_chunks(model_folder, load_plain, monkeypatch, stream):
    from lowbit.pipeline import streaming

    monkeypatch.setattr(streaming, "HEAD_CHUNK_BYTES", 64 * 4 * 50)  # 50 rows of 320
    for name in ("llama", "llama-tied", "opt"):
        folder, batches = model_folder(name), make_batches(False)
        model = load_plain(folder)
        for batch, streamed in zip(batches, stream(folder, batches), strict=True):
            torch.testing.assert_close(streamed, plain_forward(model, batch), rtol=0, atol=1e-6)


def test_token_outside_the_vocabulary(model_folder):
    with pytest.raises(ModelError, match="a token id is 999, and the embedding has 320 rows"):
        Streamer(sk.build(open_checkpoint(model_folder("llama"))), [Batch(torch.tensor([[1, 999]]))], dtype=torch.float32)


def test_blocks_whose_inputs_are_changed_in_between_are_refused(model_folder):
    streamer = Streamer(sk.build(open_checkpoint(model_folder("llama"))), make_batches(False), dtype=torch.float32)
    streamer._wrap = lambda hidden: hidden + 0.0
    with pytest.raises(ModelError, match="LlamaForCausalLM changes the hidden states between blocks 0 and 1"):
        streamer.record()


def test_hidden_states_of_another_shape_are_refused(model_folder):
    streamer = Streamer(sk.build(open_checkpoint(model_folder("llama"))), make_batches(False), dtype=torch.float32)
    streamer.skeleton.text_config.hidden_size = 63
    with pytest.raises(ModelError, match=r"LlamaForCausalLM hands its blocks \[3, 24, 64\]; expected \[3, 24, 63\]"):
        streamer.record()


# ---- hidden states in files


def test_hidden_states_take_their_room_on_disk_at_once(tmp_path):
    states = HiddenStates([(2, 8)], 16, torch.float32, file=tmp_path / "h.bin")
    assert (tmp_path / "h.bin").stat().st_blocks * 512 >= 2 * 8 * 16 * 4  # no hole, which a full disk would turn into a crash
    states.write(0, torch.ones(2, 8, 16))
    states.sync()
    again = HiddenStates([(2, 8)], 16, torch.float32, file=tmp_path / "h.bin", must_exist=True)
    assert torch.equal(again.read(0, torch.device("cpu")), torch.ones(2, 8, 16))


@pytest.mark.parametrize("content", [None, b"short"])
def test_lost_hidden_states_are_noticed(content, tmp_path):
    if content is not None:
        (tmp_path / "h.bin").write_bytes(content)
    with pytest.raises(JobError, match=r"h\.bin.*--overwrite"):
        HiddenStates([(2, 8)], 16, torch.float32, file=tmp_path / "h.bin", must_exist=True)


def test_hidden_states_that_do_not_fit_the_disk(tmp_path):
    with pytest.raises((ResourceError, OSError)):
        HiddenStates([(1 << 20, 1 << 12)], 1 << 12, torch.float32, file=tmp_path / "h.bin")
    assert not (tmp_path / "h.bin").exists() or (tmp_path / "h.bin").stat().st_blocks < 1000


# ---- statistics


class PlainInputs:
    """Inputs of every linear layer of a plain model, per micro-batch, and where its routers sent the tokens."""

    def __init__(self, model) -> None:
        self.inputs: dict[str, list[torch.Tensor]] = {}
        self.routes: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                module.register_forward_pre_hook(lambda _, args, name=name: self.inputs.setdefault(name, []).append(args[0]))
            if type(module).__name__.endswith("TopKRouter"):
                module.register_forward_hook(lambda _, args, out, name=name: self.routes.setdefault(name, []).append((args[0], out[2])))


def collected(streamer, index, block, groups, source, needs=("hessian", "sum_sq", "absmax")):
    current = Current()
    with Collector(block, find_linears(streamer.skeleton, index)).collect(groups, needs, current):
        for number, batch in enumerate(streamer.batches):
            current.mask = batch.mask
            with contextlib.suppress(StopBlock):
                streamer.run_block(block, index, number, source.read(number, torch.device("cpu")))
    for group in groups:
        if group.stats.hessian is not None:
            symmetrize(group.stats.hessian)


def each_block(streamer):
    """(index, block, groups, source) of every block, advancing the hidden states."""
    source, goal = (HiddenStates(streamer.shapes, streamer.hidden_size, torch.float32) for _ in range(2))
    streamer.record(source)
    for index in range(streamer.depth):
        block = streamer.load_block(index)
        collector = Collector(block, find_linears(streamer.skeleton, index))
        groups = collector.discover(lambda block=block, index=index, source=source: streamer.run_block(block, index, 0, source.read(0, torch.device("cpu"))))
        yield index, block, groups, source
        streamer.run(block, index, source, goal)
        source, goal = goal, source


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_statistics_are_those_of_the_plain_models_inputs(any_model, padded, model_folder, load_plain):
    folder, batches = model_folder(any_model), make_batches(padded)
    model = load_plain(folder)
    plain = PlainInputs(model)
    for batch in batches:
        plain_forward(model, batch)
    streamer = Streamer(sk.build(open_checkpoint(folder)), batches, dtype=torch.float32)
    real = [torch.ones_like(b.ids, dtype=torch.bool) if b.mask is None else b.mask for b in batches]
    seen = 0
    for index, block, groups, source in each_block(streamer):
        collected(streamer, index, block, groups, source)
        prefix = streamer.skeleton.block_name(index)
        for group in groups:
            linear = group.linears[0]
            if linear.expert is None:
                given = plain.inputs[f"{prefix}.{linear.module}"]
                x = torch.cat([x.reshape(-1, x.shape[-1])[keep.flatten()] for x, keep in zip(given, real, strict=True)])
            else:
                x = expert_inputs(model, plain, f"{prefix}.{linear.module}", linear, real)
            check_stats(group.stats, x)
            seen += len(group.linears)
    assert seen == sum(len(find_linears(streamer.skeleton, i)) for i in range(streamer.depth))


def expert_inputs(model, plain, module, linear, real):
    """The inputs of one expert's matrix, from the router's own choice in the plain model."""
    experts = model.get_submodule(module)
    router = f"{module.rpartition('.')[0]}.gate"
    rows = []
    for (x, chosen), keep in zip(plain.routes[router], real, strict=True):
        x = x.reshape(-1, x.shape[-1])[(chosen == linear.expert).any(-1) & keep.flatten()]
        if linear.parameter == "down_proj":
            gate, up = nn.functional.linear(x, experts.gate_up_proj[linear.expert]).chunk(2, dim=-1)
            x = experts.act_fn(gate) * up
        rows.append(x)
    return torch.cat(rows).detach()


def check_stats(stats, x):
    assert stats.n_tokens == len(x)
    if not len(x):
        assert stats.hessian is None
        return
    exact = x.double().T @ x.double()
    assert (stats.hessian - exact).abs().max() <= 1e-4 * exact.abs().max()
    assert (stats.sum_sq - exact.diagonal()).abs().max() <= 1e-4 * exact.diagonal().max()
    assert torch.allclose(stats.absmax, x.abs().amax(0), rtol=1e-5, atol=1e-6)


def names(groups):
    return [[linear.module.rpartition(".")[2] + ("" if linear.expert is None else f".{linear.parameter}.{linear.expert}") for linear in group.linears] for group in groups]


DENSE = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
GROUPS = {
    "llama": DENSE,
    "qwen3": DENSE,
    "gemma3": DENSE,
    "gemma3-vision": DENSE,
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "mixtral": [
        *DENSE[:2],
        *[[f"experts.gate_up_proj.{e}"] * 2 for e in range(4)],
        *[[f"experts.down_proj.{e}"] for e in range(4)],
    ],
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_in_the_order_of_the_calls(name, model_folder):
    streamer = Streamer(sk.build(open_checkpoint(model_folder(name))), make_batches(False), dtype=torch.float32)
    for _, _, groups, _ in each_block(streamer):
        found = names(groups)
        assert [sorted(group) for group in found] == [sorted(group) for group in GROUPS[name]]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_stopping_early_and_watching_change_nothing(name, model_folder):
    streamer = Streamer(sk.build(open_checkpoint(model_folder(name))), make_batches(False), dtype=torch.float32)
    index, block, groups, source = next(each_block(streamer))
    before = streamer.run_block(block, index, 0, source.read(0, torch.device("cpu")))
    collected(streamer, index, block, groups, source)
    assert torch.equal(streamer.run_block(block, index, 0, source.read(0, torch.device("cpu"))), before)
    stopped = [g for g in groups if g.linears[0].expert is None][:1]
    for group in groups:
        group.stats.hessian = None
    collected(streamer, index, block, stopped, source)
    assert stopped[0].stats.hessian is not None


def test_a_stage_stops_the_block_after_its_last_input(model_folder):
    streamer = Streamer(sk.build(open_checkpoint(model_folder("llama"))), make_batches(False), dtype=torch.float32)
    index, block, groups, source = next(each_block(streamer))
    ran = []
    block.mlp.register_forward_pre_hook(lambda *_: ran.append("mlp"))
    collected(streamer, index, block, groups[:2], source)
    assert not ran
    collected(streamer, index, block, groups[2:3], source)
    assert len(ran) == 2


@pytest.mark.parametrize(("tokens", "width", "dtype", "tolerance"), [(100, 40, torch.float32, 1e-6), (100, 33, torch.bfloat16, 5e-3), (1, 16, torch.float32, 1e-6)])
def test_outer_products_in_panels(tokens, width, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(collect, "PANEL", 16)
    monkeypatch.setattr(collect, "TOKENS", 30)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    H = torch.zeros(width, width)
    collect.add_outer_products(H, x)
    exact = x.double().T @ x.double()
    assert (symmetrize(H) - exact).abs().max() <= tolerance * exact.abs().max()
    assert torch.equal(H, H.T) or dtype is not torch.float32 or torch.allclose(H, H.T, rtol=1e-6)


def test_bfloat16_hessians_are_close_to_float32s(model_folder):
    x = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
    H = torch.zeros(64, 64)
    collect.add_outer_products(H, x.bfloat16())
    exact = x.bfloat16().double().T @ x.bfloat16().double()
    assert (H - exact).abs().max() <= 2e-3 * exact.abs().max()
