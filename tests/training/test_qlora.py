"""QLoRA: an adapter on a packed base learns as peft's on the decoded one, goes on where it was killed, and loads in plain peft."""

import json

import pytest
import torch

import lowbit
from lowbit import training
from lowbit.errors import LowbitError
from lowbit.training import adapters, qlora
from lowbit.training.qlora import QloraOptions

peft = pytest.importorskip("peft")
IDS = torch.arange(32).unsqueeze(0) * 7 % 256
OPTIONS = QloraOptions(rank=4, seq_len=32, batch=2, micro=2, steps=6, eval_every=3, dropout=0.0, lr=5e-3)


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    talk = lambda n: {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"the quick fox {n}"}]}
    path.write_text("".join(json.dumps(talk(n)) + "\n" for n in range(40)))
    return path


def test_train_and_load_in_plain_peft(model_folder, chat_file, tmp_path, load_plain):
    made = qlora(model_folder("llama"), tmp_path / "adapter", data=str(chat_file), options=OPTIONS, dtype="float32")
    assert made.perplexity[1] < 0.9 * made.perplexity[0]
    assert not (tmp_path / "adapter.train").exists()
    base = lowbit.quantize(model_folder("llama"), "nf4-dq", tmp_path / "base", target_name="lowbit").path
    lowbit.quantize(model_folder("llama"), "nf4-dq", tmp_path / "dense", target_name="safetensors")
    with torch.no_grad():
        ours = training.load_adapter(lowbit.load(base, dtype="float32"), tmp_path / "adapter").eval()(input_ids=IDS).logits
        plain = peft.PeftModel.from_pretrained(load_plain(tmp_path / "dense"), str(tmp_path / "adapter")).eval()(input_ids=IDS).logits
        without = load_plain(tmp_path / "dense")(input_ids=IDS).logits
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert float((without - plain).abs().max()) > 0.01
