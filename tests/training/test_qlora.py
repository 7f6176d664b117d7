"""QLoRA: an adapter on a packed base learns as peft's on the decoded one, goes on where it was killed, and loads in plain peft."""

import json
import math
import signal

import pytest
import torch
import transformers

import lowbit
from lowbit import numerics, training
from lowbit.checkpoints import open_checkpoint
from lowbit.errors import CheckpointError, DataError, JobError, LowbitError, ModelError, RecipeError
from lowbit.models.quantized import QuantLinear
from lowbit.pipeline import recipes
from lowbit.pipeline.quantize import fingerprint
from lowbit.training import adapters, starts
from lowbit.training.chat import IGNORED, Document, conversation, pack, read_documents
from lowbit.training.qlora import QloraOptions, qlora

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
IDS = torch.arange(32).unsqueeze(0) * 7 % 256
OPTIONS = {"rank": 4, "seq_len": 32, "batch": 2, "micro": 2, "steps": 6, "eval_every": 3, "dropout": 0.0, "lr": 5e-3}
PROMPTED = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
)
STRIPPED = "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}<{{ m['role'] }}>{{ m['content'] }}{% endif %}{% endfor %}"


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    talk = lambda n: {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"the quick fox {n}"}]}
    path.write_text("".join(json.dumps(talk(n)) + "\n" for n in range(40)))
    return path


@pytest.fixture(scope="module")
def run(model_folder, chat_file):
    """run(output, model=..., more of qlora, options by name): a short training in float32."""

    def call(output, *, model=None, **more):
        options = QloraOptions(**{**OPTIONS, **{name: more.pop(name) for name in list(more) if name in QloraOptions.__dataclass_fields__}})
        return qlora(model or model_folder("llama"), output, **{"data": str(chat_file), "options": options, "dtype": "float32", **more})

    return call


# ------------------------------------------------------------------------------------------------------------------ data


@pytest.fixture
def tokenizer(tokenizer_folder):
    return transformers.AutoTokenizer.from_pretrained(tokenizer_folder)


TALK = [
    {"role": "user", "content": "the quick"}, {"role": "assistant", "content": "brown fox"}, {"role": "user", "content": "jumps"}, {"role": "assistant", "content": "over the dog"},
]  # fmt: skip


@pytest.mark.parametrize("template", [PROMPTED, MARKED], ids=["by rendering", "by the template"])
def test_only_answers_are_learned(tokenizer, template):
    tokenizer.chat_template = template
    made = conversation(TALK, tokenizer, "here")
    assert tokenizer.decode(made.ids) == "<user>the quick<|end|><assistant>brown fox<|end|><user>jumps<|end|><assistant>over the dog<|end|>"
    assert tokenizer.decode([number for number, learned in zip(made.ids, made.learned, strict=True) if learned]) == "brown fox<|end|>over the dog<|end|>"


def test_a_template_that_changes_what_was_said(tokenizer):
    """Templates that strip earlier answers (of their thoughts) render a conversation's beginning differently."""
    tokenizer.chat_template = STRIPPED
    with pytest.raises(DataError, match=r"renders the beginning of this conversation differently.*generation"):
        conversation(TALK, tokenizer, "line 1")


def test_packing():
    """Every document whole in one window, positions anew for each, no label at its first token nor in what is left free."""
    documents = [Document(list(range(10 * n, 10 * n + size)), [n % 2 == 0] * size) for n, size in enumerate((5, 3, 8, 2, 6, 4))]
    rows = pack(documents, 8, filler=99)
    assert len(rows) == 4  # 28 tokens
    seen = []
    for row in range(len(rows)):
        starts_at = [i for i in range(8) if rows.positions[row, i] == 0]
        assert torch.equal(rows.labels[row, starts_at], torch.full((len(starts_at),), IGNORED))
        for first, last in zip(starts_at, [*starts_at[1:], 8], strict=True):
            ids = rows.ids[row, first:last].tolist()
            assert rows.positions[row, first:last].tolist() == list(range(last - first))
            if ids[0] == 99:
                assert (rows.labels[row, first:last] == IGNORED).all()
                continue
            seen.append(ids)
            number = ids[0] // 10
            assert rows.labels[row, first + 1 : last].tolist() == (ids[1:] if number % 2 == 0 else [IGNORED] * (len(ids) - 1))
    assert sorted(seen) == [document.ids for document in documents]


def test_a_document_does_not_see_its_neighbours(model_folder, load_plain):
    model = load_plain(model_folder("llama"))
    one, two = list(range(1, 15)), list(range(40, 58))
    rows = pack([Document(one, [True] * 14), Document(two, [True] * 18)], 32, filler=0)
    with torch.no_grad():
        together = model(input_ids=rows.ids, position_ids=rows.positions, use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in (two, one)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_long_texts_are_cut_in_pieces_and_long_talks_off(tokenizer, tmp_path):
    tokenizer.chat_template = PROMPTED
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps " * 40)
    documents, notes = read_documents(str(text), tokenizer, length=32)
    assert sum((document.ids for document in documents), []) == [*tokenizer(text.read_text())["input_ids"], tokenizer.eos_token_id]
    assert all(len(document.ids) <= 32 for document in documents)
    assert not notes
    talks = tmp_path / "talks.jsonl"
    long = [{"role": "user", "content": "fox " * 50}, TALK[1]]
    talks.write_text("\n".join(json.dumps({"messages": messages}) for messages in (TALK[:2], [TALK[0], {"role": "assistant", "content": "dog " * 50}], long)))
    documents, notes = read_documents(str(talks), tokenizer, length=32)
    assert [len(document.ids) for document in documents][1:] == [32]
    assert "2 of 3 conversations are longer than 32 tokens" in notes[0]
    assert "1 of 3 documents hold nothing to learn" in notes[1]


# -------------------------------------------------------------------------------------------------------------- training


def test_a_fingerprint_tells_models_of_one_shape_apart(save_model, tmp_path):
    """A base that was trained on looks the same from outside: merge would take it for the adapter's."""
    first, second = (fingerprint(open_checkpoint(save_model("llama", tmp_path / str(seed), seed=seed))) for seed in (0, 1))
    assert first != second == fingerprint(open_checkpoint(save_model("llama", tmp_path / "again", seed=1)))


def test_train_and_load_in_plain_peft(run, model_folder, tmp_path, load_plain):
    made = run(tmp_path / "adapter", steps=7)
    assert [step for step, _ in made.curve] == [0, 3, 6, 7]
    assert [step for step, _ in made.losses] == list(range(1, 8))
    assert made.perplexity[1] < 0.9 * made.perplexity[0]
    assert math.log(made.perplexity[1]) == pytest.approx(min(loss for _, loss in made.curve), rel=1e-6)
    assert not (tmp_path / "adapter.train").exists()
    base = lowbit.quantize(model_folder("llama"), "nf4-dq", tmp_path / "base", target_name="lowbit").path
    lowbit.quantize(model_folder("llama"), "nf4-dq", tmp_path / "dense", target_name="safetensors")
    with torch.no_grad():
        ours = training.load_adapter(lowbit.load(base, dtype="float32"), tmp_path / "adapter").eval()(input_ids=IDS).logits
        plain = peft.PeftModel.from_pretrained(load_plain(tmp_path / "dense"), str(tmp_path / "adapter")).eval()(input_ids=IDS).logits
        without = load_plain(tmp_path / "dense")(input_ids=IDS).logits
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert float((without - plain).abs().max()) > 0.01


def test_losses_are_those_of_plain_peft(model_folder, tmp_path, load_plain):
    """Same adapter start, same data: packed and decoded bases give the same losses, and adapters, for ten steps."""
    base = lowbit.quantize(model_folder("llama"), "nf4-dq", tmp_path / "base", target_name="lowbit").path
    lowbit.quantize(model_folder("llama"), "nf4-dq", tmp_path / "dense", target_name="safetensors")
    packed = adapters.attach(lowbit.load(base, dtype="float32"), rank=4, alpha=8, dropout=0.0, seed=0)
    packed.save_pretrained(tmp_path / "start", save_embedding_layers=False)
    plain = peft.PeftModel.from_pretrained(load_plain(tmp_path / "dense"), str(tmp_path / "start"), is_trainable=True)
    assert sum(isinstance(module, QuantLinear) for module in packed.modules()) == 21
    windows = torch.randint(0, 256, (10, 2, 32), generator=torch.Generator().manual_seed(0))

    def losses(model) -> list[float]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for ids in windows:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
        return found

    assert losses(packed) == pytest.approx(losses(plain), rel=1e-5)
    for (name, mine), (other, theirs) in zip(peft.get_peft_model_state_dict(packed, save_embedding_layers=False).items(), peft.get_peft_model_state_dict(plain).items(), strict=True):
        assert name == other
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-4)


def test_the_base_stays_packed(model_folder, tmp_path):
    """Of a packed matrix nothing else is held, and a step with checkpointing keeps no tensor of its size."""
    base = lowbit.quantize(model_folder("llama"), "nf4-dq", tmp_path / "base", target_name="lowbit").path
    model = adapters.attach(lowbit.load(base, dtype="bfloat16"), rank=4, alpha=4, dropout=0.0, seed=0)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    held = sum(buffer.numel() * buffer.element_size() for layer in layers for buffer in layer.buffers())
    assert held <= sum(0.55 * layer.in_features * layer.out_features for layer in layers)
    assert {parameter.dtype for name, parameter in model.named_parameters() if "lora_" not in name} == {torch.bfloat16}
    sizes: list[tuple] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=IDS[:, :8], labels=IDS[:, :8]).loss
    loss.backward()
    assert not [size for size in sizes if size in {(layer.out_features, layer.in_features) for layer in layers}]


RESUME = """
import os, signal, torch
import transformers
from lowbit.training.qlora import QloraOptions, qlora

torch.set_num_threads(1)
if kill:
    def on_step_end(self, args, state, control, **more):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
    from lowbit.training.job import Report
    Report.on_step_end = on_step_end
qlora(model, out, data=data, options=QloraOptions(**options), dtype="float32", resume=resume)
"""


def test_a_killed_training_goes_on(fork_server, model_folder, chat_file, tmp_path):
    """On the CPU it ends bit for bit where the undisturbed one ends; dropout included."""
    values = {"model": str(model_folder("llama")), "data": str(chat_file), "options": {**OPTIONS, "dropout": 0.1, "steps": 8}, "kill": False, "resume": False}
    assert fork_server.run(RESUME, **values, out=tmp_path / "whole")["status"] == 0
    done = fork_server.run(RESUME, **{**values, "kill": True}, out=tmp_path / "killed")
    assert done["status"] == -signal.SIGKILL, done["output"]
    assert not (tmp_path / "killed").exists()
    with pytest.raises(JobError, match="--resume"):
        qlora(values["model"], tmp_path / "killed", data=str(chat_file), options=QloraOptions(**values["options"]), dtype="float32")
    done = fork_server.run(RESUME, **{**values, "resume": True}, out=tmp_path / "killed")
    assert done["status"] == 0, done["output"]
    whole, again = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == again
    records = [json.loads((tmp_path / name / "lowbit.json").read_text()) for name in ("whole", "killed")]
    assert records[0] == records[1]


@pytest.mark.parametrize(("name", "recipe", "target"), [("llama", "int4-sym-g32-gptq", "gptq"), ("llama", "q8_0", "gguf"), ("llama", "nf4-dq", "bitsandbytes"), ("gpt2", "nf4-dq", "lowbit")])
def test_quantized_bases_stay_as_they_are(run, model_folder, tmp_path, load_plain, text_file, name, recipe, target):
    base = tmp_path / f"base{'.gguf' if target == 'gguf' else ''}"
    lowbit.quantize(model_folder(name), recipe, base, target_name=target, **({"calibration": text_file, "n_samples": 4, "seq_len": 32} if "gptq" in recipe else {}))
    made = run(tmp_path / "adapter", model=base)
    assert made.perplexity[1] < made.perplexity[0]
    lowbit.convert(base, "safetensors", tmp_path / "dense")
    with torch.no_grad():
        ours = training.load_adapter(lowbit.load(base, dtype="float32"), made.path).eval()(input_ids=IDS).logits
        plain = peft.PeftModel.from_pretrained(load_plain(tmp_path / "dense"), str(made.path)).eval()(input_ids=IDS).logits
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_bfloat16(run, tmp_path):
    """The file holds bfloat16, and what was measured last is the file."""
    made = run(tmp_path / "adapter", dtype="bfloat16")
    tensors = open_file_of(made.path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert made.perplexity[1] < made.perplexity[0]


def open_file_of(path):
    from safetensors.torch import load_file

    return load_file(path / "adapter_model.safetensors")


# ------------------------------------------------------------------------------------------------------------------ starts


def test_low_rank_parts_are_the_best():
    """Against the plain SVD of E L with L the Cholesky factor, tall and wide; a singular Hessian has a least error, too."""
    torch.manual_seed(0)
    for rows, columns in ((40, 24), (24, 40)):
        E, X = torch.randn(rows, columns).double(), torch.randn(200, columns).double() * torch.linspace(0.1, 3, columns)
        H = X.T @ X
        for hessian, L in ((None, torch.eye(columns).double()), (H, torch.linalg.cholesky(H))):
            A, B = starts.low_rank(E.float(), 5, None if hessian is None else hessian.float())
            U, S, V = torch.linalg.svd(E @ L)
            expected = torch.linalg.solve_triangular(L, (U[:, :5] * S[:5]) @ V[:5], upper=False, left=False)
            torch.testing.assert_close(B.double() @ A.double(), expected, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-3, atol=1e-4)
    flat = X[:10].T @ X[:10]
    A, B = starts.low_rank(E.float(), 10, flat.float())
    left = (E - B.double() @ A.double()) @ X[:10].T
    assert float(left.norm()) < 1e-2 * float((E @ X[:10].T).norm())


def test_loftq_and_weighted_take_error_away():
    torch.manual_seed(0)
    W = torch.randn(96, 128) * torch.linspace(0.2, 3, 128)
    plan = recipes.LayerPlan(recipes.parse("nf4-dq").recipe.scheme, "rtn", recipes.make_options("rtn", {}))
    plain = W - numerics.dequantize(numerics.quantize(W, plan.scheme))
    A, B = starts.low_rank(plain, 16)
    once = plain - B @ A
    made, A, B = starts.loftq(W, plan, 16)
    error = (W - numerics.dequantize(made) - B @ A).norm()
    assert error < once.norm() < plain.norm()


@pytest.mark.parametrize("init", ["loftq", "weighted"])
def test_starts_begin_nearer_to_the_original(run, model_folder, tmp_path, load_plain, init):
    """Before the first step the held-out loss is nearer to the original's than with peft's start."""
    made = {name: run(tmp_path / name, init=name, recipe="int3-asym-g32-rtn", rank=16, steps=1, lr=1e-9) for name in ("default", init)}
    base = made[init].base or lowbit.quantize(model_folder("llama"), "int3-asym-g32-rtn", tmp_path / "base", target_name="lowbit").path
    adapted = training.load_adapter(lowbit.load(base, dtype="float32"), made[init].path)
    plain = lowbit.quantize(model_folder("llama"), "int3-asym-g32-rtn", tmp_path / "plain", target_name="lowbit").path
    with torch.no_grad():
        goal = load_plain(model_folder("llama"))(input_ids=IDS).logits
        assert float((adapted(input_ids=IDS).logits - goal).norm()) < 0.9 * float((lowbit.load(plain, dtype="float32")(input_ids=IDS).logits - goal).norm())
    if init == "loftq":
        assert made[init].base == tmp_path / "loftq-base"
        assert json.loads((made[init].path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(made[init].base)
        assert open_checkpoint(made[init].base).provenance["refinement"]["method"] == "loftq"


def test_a_base_that_calibration_made_is_kept(run, model_folder, tmp_path, text_file):
    """int4-asym-g32 is GPTQ's: nobody can make this base again, so it lies beside the adapter, and merge asks for it; a base that is plainly rounded is made again."""
    made = run(tmp_path / "adapter", recipe="int4-asym-g32", steps=1)
    assert made.base == tmp_path / "adapter-base" and made.provenance["base"] == fingerprint(open_checkpoint(made.base))
    with pytest.raises(RecipeError, match="adapter-base"):
        training.merge(model_folder("llama"), made.path, tmp_path / "out", measure=False)
    training.merge(made.base, made.path, tmp_path / "out", recipe="int8-rtn", measure=False)
    plain = run(tmp_path / "plain", steps=1)
    again = training.merge(model_folder("llama"), plain.path, tmp_path / "again", recipe="int8-rtn", measure=False)
    assert plain.base is None and again.provenance["merged"]["base_recipe"] == "nf4-dq"


def test_weighted_start_of_a_quantized_base(run, model_folder, tmp_path, text_file):
    base = lowbit.quantize(model_folder("llama"), "int3-asym-g32-gptq", tmp_path / "base", calibration=text_file, n_samples=4, seq_len=32).path
    made = run(tmp_path / "adapter", model=base, init="weighted", original=model_folder("llama"), steps=1)
    assert float(open_file_of(made.path)["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"].abs().max()) > 0.01


# -------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        (DataError, {"data": "nowhere.jsonl"}, "is no file"),
        (RecipeError, {"init": "pissa"}, "default, loftq, weighted"),
        (RecipeError, {"rank": 0}, "rank of at least 1"),
        (RecipeError, {"batch": 3, "micro": 2}, "multiple"),
        (RecipeError, {"dtype": "float16"}, "bfloat16 or float32"),
        (RecipeError, {"recipe": "nf5"}, "not known"),
        (RecipeError, {"recipe": "int4-sym-g32-gptq", "init": "loftq"}, "without data"),
        (RecipeError, {"rank": 65, "init": "loftq"}, "smaller --rank"),
        (RecipeError, {"original": "elsewhere"}, "Leave it out"),
        (ModelError, {"seq_len": 4096}, "at most 128"),
        (CheckpointError, {"model": "no/such.gguf"}, "does not exist"),
    ],
)
def test_bad_input_is_one_error(run, tmp_path, kind, more, message):
    with pytest.raises(kind, match=message):
        run(tmp_path / "adapter", **more)
    assert not (tmp_path / "adapter").exists()


def test_a_quantized_base_takes_no_recipe(run, model_folder, tmp_path):
    base = lowbit.quantize(model_folder("llama"), "nf4-dq", tmp_path / "base").path
    for more, message in (({"recipe": "nf4-dq"}, "Leave out the recipe"), ({"init": "loftq"}, "Give the dense model"), ({"init": "weighted"}, "--original")):
        with pytest.raises(RecipeError, match=message):
            run(tmp_path / "adapter", model=base, **more)


def test_bad_records(run, tmp_path):
    for line, message in (("{", "is not JSON"), ("[1]", "expected an object"), ('{"prompt": "a"}', "expected text"), ('{"messages": ["a"]}', "role and content"), ('{"text": ""}', "nothing to learn")):
        path = tmp_path / "data.jsonl"
        path.write_text(line + "\n")
        with pytest.raises(DataError, match=message):
            run(tmp_path / "adapter", data=str(path))


def test_packed_codes_are_not_merged_into(model_folder, tmp_path):
    base = lowbit.quantize(model_folder("llama"), "nf4-dq", tmp_path / "base").path
    model = adapters.attach(lowbit.load(base, dtype="float32"), rank=4, alpha=4, dropout=0.0, seed=0)
    with pytest.raises(ModelError, match="rounded anew"):
        model.merge_and_unload()
    with pytest.raises(LowbitError, match="holds no adapter"):
        training.load_adapter(lowbit.load(base), tmp_path)


@pytest.mark.consumer
@pytest.mark.parametrize("folder", ["base", "original"])
def test_the_adapter_on_a_base_of_bitsandbytes(run, model_folder, tmp_path, folder):
    """transformers loads lowbit's folder with bitsandbytes, or rounds the original with it (which decides a few ties of magnitudes otherwise); peft puts the adapter onto it: lowbit's logits."""
    pytest.importorskip("bitsandbytes")
    made = run(tmp_path / "adapter")
    base = lowbit.quantize(model_folder("llama"), "nf4-dq", tmp_path / "base", target_name="bitsandbytes").path
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    source, more = (base, {}) if folder == "base" else (model_folder("llama"), {"quantization_config": config})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, device_map="cpu", **more)
    with torch.no_grad():
        plain = peft.PeftModel.from_pretrained(theirs, str(made.path)).train()(input_ids=IDS).logits  # in eval mode its kernel for the CPU multiplies in bfloat16
        ours = training.load_adapter(lowbit.load(base, dtype="float32"), made.path).eval()(input_ids=IDS).logits
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4 if folder == "base" else 5e-3)
