"""BitNet training: transformers' own layer, the files, both programs that read them, schedules, phases, a killed training, refusals."""

import json
import math
import signal
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

import lowbit
from lowbit import numerics
from lowbit.checkpoints import TARGETS, open_checkpoint, safetensors
from lowbit.checkpoints import bitnet as layout
from lowbit.errors import DataError, JobError, LowbitError, ModelError, RecipeError
from lowbit.models import skeleton as sk
from lowbit.pipeline.selfgen import load_model
from lowbit.pipeline.verify import verify
from lowbit.scheme import Rounding
from lowbit.training.bitnet import PHASED, SMALL, BitNetOptions, BitNetTrainer, _ternary, as_gguf, bitnet, configuration, fake_quantize, scheme_of, set_phase
from lowbit.training.job import last_checkpoint
from lowbit.training.losses import divergence
from lowbit.training.modules import ActView, FakeQuantLinear
from lowbit.training.save import as_checkpoint
from lowbit.training.text import split, train_tokenizer, write_tokens
from lowbit.training.views import View

pytest.importorskip("accelerate", reason="accelerate (the extra train) is not installed")
TINY = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
SHORT = BitNetOptions(steps=12, batch=4, seq_len=32, eval_every=4, held_out=8, warmup=0.0)


def scratch(output, text_file, options=SHORT, config=TINY, **more):
    return bitnet(output, data=str(text_file), config=config, options=options, dtype="float32", device="cpu", **more)


def held_out(folder, model, text_file):
    """The windows of 32 tokens that training with SHORT's held_out measures on."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    write_tokens(str(text_file), tokenizer, folder / "tokens.bin")
    _, held = split(folder / "tokens.bin", len(tokenizer), 32, SHORT.held_out)
    return torch.stack([held.row(i) for i in range(len(held))])


def layer(weights="ternary", seed=0):
    torch.manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(48, 64) * 0.3)
    view = View(numerics.quantize(weight.detach(), scheme_of(weights)), "minmax", straight=True)
    return FakeQuantLinear(weight, None, view, ActView(Rounding(layout.ACT)))


# ------------------------------------------------------------------------------------------------------------------- the layer


def test_the_same_outputs_and_gradients_as_transformers_layer():
    from transformers.integrations.bitnet import AutoBitLinear

    ours = layer()
    theirs = AutoBitLinear(64, 48, bias=False, online_quant=True)
    theirs.weight.data = ours.weight.detach().clone()
    x, g = torch.randn(3, 5, 64), torch.randn(3, 5, 48)
    found = []
    with torch.compiler.set_stance("force_eager"):
        for each in (ours, theirs):
            inputs = x.clone().requires_grad_()
            y = each(inputs)
            y.backward(g)
            found.append((y.detach(), inputs.grad, each.weight.grad))
    for mine, other in zip(*found):
        assert (mine - other).abs().max() < 2e-6 * other.abs().max()
    assert (ours.weight.detach().abs() > 1.5 * ours.weight.detach().abs().mean()).float().mean() > 0.1  # clipped codes are among them


@pytest.mark.parametrize("weights", ["ternary", "binary"])
def test_phases(weights):
    ours = layer(weights)
    x = torch.randn(4, 64)
    W, Q, xq = ours.weight, ours.view(ours.weight).detach(), ours.act(x)
    assert torch.equal(Q, numerics.dequantize(ours.view.quantized(W)))
    assert torch.equal(ours(x), torch.nn.functional.linear(xq, Q))
    ours.phase = 0.0
    assert torch.equal(ours(x), torch.nn.functional.linear(x, W))
    ours.phase = 0.25
    inputs = x.clone().requires_grad_()
    y = ours(inputs)
    mixed, into = W + 0.25 * (Q - W), x + 0.25 * (xq - x)
    assert torch.allclose(y, into @ mixed.T, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert torch.allclose(W.grad, into.sum(0).expand(48, 64), rtol=1e-5, atol=1e-5)  # straight through both
    assert torch.allclose(inputs.grad, mixed.sum(0).detach().expand(4, 64), rtol=1e-5, atol=1e-5)


def test_a_view_lets_clipped_gradients_through_only_on_request():
    weight = layer().weight.detach()
    made = numerics.quantize(weight, scheme_of("ternary"))
    clipped = weight.abs() > 1.5 * made.parts["scale"].item()
    for straight in (True, False):
        W = weight.clone().requires_grad_()
        View(made, "minmax", straight=straight)(W).sum().backward()
        assert torch.equal(W.grad, torch.ones_like(W) if straight else (~clipped).float())
    with pytest.raises(RecipeError, match="minmax or mse"):
        View(made, "learned", straight=True)


# ------------------------------------------------------------------------------------------------------------------ the schedule


def test_the_published_schedule():
    o = BitNetOptions(warmup=0.0)
    rates = [o.rate(step, 1000) for step in (0, 250, 499, 500, 750, 999)]
    assert rates == pytest.approx([1.5e-3, 1.15e-3, 8.014e-4, 5e-4, 2.5e-4, 1e-6], rel=1e-6)
    warm = BitNetOptions(warmup=0.02)
    assert warm.rate(0, 1000) == pytest.approx(1.5e-3 / 20) and warm.rate(30, 1000) == o.rate(30, 1000)
    assert [BitNetOptions(switch_at=0.2, phase_in=0.4).phase(step, 100) for step in (0, 19, 20, 40, 60, 99)] == [0, 0, 0, 0.5, 1, 1]
    assert [BitNetOptions(switch_at=0.5).phase(step, 10) for step in (0, 4, 5, 9)] == [0, 0, 1, 1]
    assert BitNetOptions().phase(0, 10) == 1 and PHASED.phase(1, 8) == 0.25


def test_weight_decay_ends_and_phases_rise(tmp_path, text_file):
    seen = []

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **_):
            layers = [module for module in model.modules() if isinstance(module, FakeQuantLinear)]
            seen.append((layers[0].phase, optimizer.param_groups[0]["weight_decay"], {group["weight_decay"] for group in optimizer.param_groups[1:]}))

    inner = BitNetTrainer.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BitNetTrainer, "__init__", lambda self, *a, callbacks, **k: inner(self, *a, callbacks=[*callbacks, Look()], **k))
        scratch(tmp_path / "out", text_file, BitNetOptions(steps=8, batch=2, seq_len=32, eval_every=3, switch_at=0.25, phase_in=0.5))
    assert [phase for phase, _, _ in seen] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]  # also after the measurements in between, which are with all of the rounding
    assert [decay for _, decay, _ in seen] == [0.1] * 4 + [0.0] * 4 and all(rest == {0.0} for _, _, rest in seen)


# ------------------------------------------------------------------------------------------------------------------- the files


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_file):
    """A folder and a GGUF of one short training."""
    out = tmp_path_factory.mktemp("bitnet") / "out"
    config = {**TINY, "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4}
    return scratch(out, text_file, BitNetOptions(steps=40, batch=4, seq_len=32, eval_every=10, held_out=8), config, gguf_type="tq2_0")


def test_the_loss_falls_and_the_work_folder_goes(trained):
    steps, losses = zip(*trained.curve)
    assert steps == (10, 20, 30, 40) and losses[-1] < losses[0] < math.log(300)
    assert not trained.path.with_name("out.train").exists()
    assert json.loads((trained.path / "lowbit.json").read_text())["training"]["weights"] == "ternary"


def test_transformers_writes_the_same_text(trained):
    with torch.compiler.set_stance("force_eager"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(trained.path, dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(trained.path)
        ours = lowbit.load(trained.path, dtype="float32")
        ids = tokenizer("The quick brown", return_tensors="pt")["input_ids"]
        found = [model.generate(ids, do_sample=False, max_new_tokens=24, min_new_tokens=24) for model in (ours, theirs)]
        assert torch.equal(*found) and found[0].shape[1] == ids.shape[1] + 24
        with torch.no_grad():
            assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-5 * theirs(ids).logits.abs().max()


@pytest.mark.consumer
def test_llama_cpp_predicts_alike(trained):
    pytest.importorskip("xllamacpp", reason="xllamacpp (llama.cpp) is not installed")
    found = verify(trained.path.with_name("out.gguf"))
    assert found.verdict == "passed" and found.kl is not None and found.kl < 0.01


@pytest.mark.parametrize("weights", ["ternary", "binary"])
@pytest.mark.parametrize("target", ["bitnet", "tq1_0", "tq2_0"])
def test_what_is_trained_is_the_file(tmp_path, text_file, weights, target):
    config = transformers.BitNetConfig(**{**SMALL, **TINY, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "bos_token_id": None, "eos_token_id": 0})
    torch.manual_seed(1)
    transformers.BitNetForCausalLM(config).save_pretrained(tmp_path / "start")
    train_tokenizer(str(text_file), 300).save_pretrained(tmp_path / "start")
    source = safetensors.open_folder(tmp_path / "start")
    model = fake_quantize(load_model(sk.build(source), torch.float32), scheme_of(weights, "float32" if target == "bitnet" else "float16"))
    made = as_checkpoint(model, source, "bitnet", {})
    made = replace(made, quantized={name: _ternary(entry) for name, entry in made.quantized.items()})
    if target == "bitnet":
        out = tmp_path / "out"
        out.mkdir()
    else:
        made, out = as_gguf(made, target), tmp_path / "out.gguf"
    TARGETS["bitnet" if target == "bitnet" else "gguf"].write(made, out)
    back = open_checkpoint(out)
    layers = {f"{name}.weight": place for name, place in model.named_modules() if isinstance(place, FakeQuantLinear)}
    assert back.quantized.keys() == layers.keys() and len(layers) == 14
    for name, place in layers.items():
        assert torch.equal(numerics.dequantize(back.quantized[name].load()), place.view(place.weight).detach()), name
    plain = {name: value for name, value in model.named_parameters() if name not in layers}
    for name, value in plain.items():
        assert torch.equal(back.dense(name), value.detach()), name


def test_the_written_folder_is_the_best_checkpoint(tmp_path, text_file, monkeypatch):
    """With a rate that ruins the model in the last steps, what is written is from before."""
    monkeypatch.setattr(BitNetOptions, "rate", lambda self, step, steps: 1e-3 if step < 8 else 0.5)
    made = scratch(tmp_path / "out", text_file)
    best = min(loss for _, loss in made.curve)
    assert made.curve[1][1] == best < made.curve[2][1] - 0.1
    model = lowbit.load(tmp_path / "out", dtype="float32")
    ids = held_out(tmp_path, tmp_path / "out", text_file)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(loss) == pytest.approx(best, abs=1e-4)


def test_full_precision_is_written_as_a_plain_folder(tmp_path, text_file):
    made = scratch(tmp_path / "out", text_file, BitNetOptions(weights="full", steps=4, batch=2, seq_len=32, eval_every=4))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text()) and len(made.curve) == 1
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear


# -------------------------------------------------------------------------------------------------------- from an existing model


def test_an_existing_model_is_distilled(tmp_path, text_file, save_model):
    source = save_model("llama-tied", tmp_path / "model")
    options = BitNetOptions(steps=60, batch=4, seq_len=32, eval_every=20, held_out=8, phase_in=0.5, lr=2e-3, loss=0.0)
    made = bitnet(tmp_path / "out", data=str(text_file), model=source, options=options, dtype="float32", device="cpu")
    assert [step for step, _ in made.curve] == [20, 40, 60]
    original = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    begun = fake_quantize(transformers.AutoModelForCausalLM.from_pretrained(source).eval(), scheme_of("ternary"))
    ids = held_out(tmp_path, source, text_file)
    scored = slice(16, 31)
    with torch.no_grad():
        goal = original(ids).logits[:, scored]
        before, after = (float(divergence(model(ids).logits[:, scored], goal)) for model in (begun, lowbit.load(tmp_path / "out", dtype="float32")))
    assert after == pytest.approx(min(kl for _, kl in made.curve), rel=1e-3) and after < 0.6 * before


@pytest.mark.consumer
def test_both_programs_compute_what_was_made_of_an_existing_model(tmp_path, text_file, save_model):
    pytest.importorskip("xllamacpp", reason="xllamacpp (llama.cpp) is not installed")
    source = save_model("llama", tmp_path / "model", dtype=torch.bfloat16, hidden_size=256, intermediate_size=256, num_hidden_layers=2, initializer_range=0.02)
    options = BitNetOptions(steps=4, batch=2, seq_len=32, eval_every=4, held_out=4, phase_in=0.5, loss=0.5)
    bitnet(tmp_path / "out", data=str(text_file), model=source, options=options, gguf_type="tq1_0", device="cpu")
    folder, file = verify(tmp_path / "out"), verify(tmp_path / "out.gguf")
    assert (folder.verdict, file.verdict) == ("passed", "passed") and file.kl < 0.01
    ours, theirs = (open_checkpoint(path).quantized for path in (tmp_path / "out", tmp_path / "out.gguf"))
    for name in ours.keys() - {name for name in ours if "q_proj" in name or "k_proj" in name}:
        assert torch.equal(numerics.dequantize(ours[name].load()), numerics.dequantize(theirs[name].load())), name


def test_a_file_of_a_configuration_has_the_class_defaults(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"hidden_size": 64, "rope_theta": 20000.0}))
    found = configuration(tmp_path / "c.json", {"num_hidden_layers": 3})
    assert (found["hidden_act"], found["hidden_size"], found["num_hidden_layers"], found["rope_theta"]) == ("relu2", 64, 3, 20000.0) and "rope_parameters" not in found
    assert configuration(None)["hidden_act"] == "silu" and "rope_theta" not in configuration({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}})


# ----------------------------------------------------------------------------------------------------------------------- resumed

RUN = """
import os, signal
from lowbit.training.bitnet import BitNetOptions, bitnet
import torch
torch.set_num_threads(1)
if kill:
    from transformers import Trainer
    inner = Trainer.training_step
    count = 0
    def step(self, *a, **k):
        global count
        count += 1
        if count == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(self, *a, **k)
    Trainer.training_step = step
options = BitNetOptions(steps=12, batch=4, seq_len=32, eval_every=4, held_out=8, switch_at=0.5)
bitnet(out, data=data, config=config, options=options, dtype="float32", device="cpu", resume=resume)
"""


def test_a_killed_training_goes_on_to_the_same_bytes(fork_server, tmp_path, text_file):
    whole = fork_server.run(RUN, out=tmp_path / "whole", data=text_file, config=TINY, kill=False, resume=False)
    assert whole["status"] == 0, whole["output"]
    killed = fork_server.run(RUN, out=tmp_path / "out", data=text_file, config=TINY, kill=True, resume=False)
    assert killed["status"] == -signal.SIGKILL, killed["output"]
    assert last_checkpoint(tmp_path / "out.train" / "steps").endswith("checkpoint-8")
    refused = fork_server.run(RUN, out=tmp_path / "out", data=text_file, config=TINY, kill=False, resume=False)
    assert "unfinished training" in refused["output"]
    again = fork_server.run(RUN, out=tmp_path / "out", data=text_file, config=TINY, kill=False, resume=True)
    assert again["status"] == 0, again["output"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "whole" / "lowbit.json").read_text() == (tmp_path / "out" / "lowbit.json").read_text()  # with the curve


def test_a_checkpoint_that_was_being_written_is_passed_over(tmp_path):
    for step, state in ((4, "{}"), (12, '{"half'), (8, "{}")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-16").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-8"]
    assert last_checkpoint(tmp_path / "none") is None


def test_another_training_is_refused(tmp_path, text_file):
    with pytest.raises(ModelError):
        scratch(tmp_path / "out", text_file, BitNetOptions(steps=4, batch=2, seq_len=32, lr=1e25))
    with pytest.raises(JobError, match="unfinished training"):
        scratch(tmp_path / "out", text_file)
    with pytest.raises(JobError, match="its options differ"):
        scratch(tmp_path / "out", text_file, resume=True)


# ---------------------------------------------------------------------------------------------------------------------- stopped


def test_nan_names_the_layer(tmp_path, text_file):
    with pytest.raises(ModelError, match=r"the loss is not finite at step \d: model\.\S+ holds NaN or infinity. Lower the learning rates"):
        scratch(tmp_path / "out", text_file, BitNetOptions(steps=8, batch=2, seq_len=32, lr=1e25))


@pytest.mark.parametrize("phase", [0.0, 1.0])
def test_an_overflow_names_the_layer(phase):
    from lowbit.training.trainer import first_bad

    config = transformers.BitNetConfig(**{**TINY, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 0})
    model = fake_quantize(transformers.BitNetForCausalLM(config), scheme_of("ternary"))
    set_phase(model, phase)
    ids = torch.arange(8)[None]
    assert "a difference of logits overflowed" in first_bad(model, ids)
    model.model.layers[1].input_layernorm.weight.data.fill_(3e38)
    assert "the output of model.layers.1.input_layernorm is not" in first_bad(model, ids)
    model.model.layers[0].mlp.up_proj.weight.data.fill_(3e38)  # whose mean is infinite
    assert "the quantized weight of model.layers.0.mlp.up_proj is not finite" in first_bad(model, ids)


REFUSED = [
    (dict(config={**TINY, "hidden_size": 50}), "makes no BitNet model"),
    (dict(config={**TINY, "hidden_size": 34, "num_attention_heads": 1, "num_key_value_heads": 1}), "34 rows are not a multiple of 4"),
    (dict(config={**TINY, "layers": 2}), "layers, which transformers' BitNetConfig does not know"),
    (dict(config={**TINY, "model_type": "llama"}), "another model_type"),
    (dict(gguf_type="tq2_0"), "tq2_0 needs in_features to be a multiple of 256"),
    (dict(gguf_type="q4_0", config={**TINY, "hidden_size": 256}), "expected one of tq1_0, tq2_0"),
    (dict(gguf_type="tq2_0", config={**TINY, "hidden_act": "relu2"}), "hidden_act = 'relu2'"),
    (dict(gguf_type="tq2_0", config={**TINY, "tie_word_embeddings": False}), "tie_word_embeddings = False"),
    (dict(options=BitNetOptions(seq_len=65)), "64 positions"),
    (dict(options=BitNetOptions(loss=0.5, seq_len=32)), "no original to distil from"),
    (dict(options=BitNetOptions(weights="full", seq_len=32), gguf_type="tq2_0"), "weights is full"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused_before_work(tmp_path, text_file, given, message):
    with pytest.raises(LowbitError, match=message):
        scratch(tmp_path / "out", text_file, **{"options": SHORT, **given})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [dict(weights="int4"), dict(switch_at=0.6, phase_in=0.4), dict(weights="full", switch_at=0.5), dict(batch=4, micro=3), dict(loss=2.0), dict(lr=0.0), dict(seq_len=1)])
def test_options_that_mean_nothing(bad):
    with pytest.raises(RecipeError):
        BitNetOptions(**bad)


def test_a_shape_for_transformers_only_says_so(tmp_path, text_file):
    from lowbit.progress import Progress

    notes = []

    class Notes(Progress):
        def note(self, message):
            notes.append(message)

    scratch(tmp_path / "out", text_file, BitNetOptions(steps=2, batch=2, seq_len=32), progress=Notes())
    assert any("For transformers only" in note and "multiple of 256" in note for note in notes)


# ------------------------------------------------------------------------------------------------------------------------- text


def test_tokens_and_windows(tmp_path, text_file):
    tokenizer = train_tokenizer(str(text_file), 400)
    write_tokens(str(text_file), tokenizer, tmp_path / "tokens.bin")
    train, held = split(tmp_path / "tokens.bin", len(tokenizer), 16, 10)
    text = text_file.read_text(encoding="utf-8")
    assert tokenizer.decode(train.ids.tolist()) == text + "<|end|>"
    assert len(held) == 10 and not set(train.windows) & set(held.windows) and len(train) + 10 == len(train.ids) // 16
    assert train.row(3).tolist() == train.ids[16 * train.windows[3] :][:16].tolist()
    with pytest.raises(DataError, match="at least 20 windows"):
        split(tmp_path / "tokens.bin", len(tokenizer), len(train.ids) // 10, 10)
    with pytest.raises(DataError, match="257"):
        train_tokenizer(str(text_file), 200)


def test_each_record_is_a_text_that_ends(tmp_path):
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("one two", "three")))
    tokenizer = train_tokenizer(str(tmp_path / "t.jsonl"), 300)
    write_tokens(str(tmp_path / "t.jsonl"), tokenizer, tmp_path / "tokens.bin")
    ids = __import__("numpy").fromfile(tmp_path / "tokens.bin", dtype="uint16").tolist()
    assert tokenizer.decode(ids) == "one two<|end|>three<|end|>"
