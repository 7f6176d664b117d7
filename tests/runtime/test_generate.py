"""Sampling, pieces of text, stop words, conversations; and the two commands."""

import json

import pytest
import torch
from typer.testing import CliRunner

from lowbit import kernels
from lowbit.cli.main import app
from lowbit.errors import DataError, RecipeError
from lowbit.runtime import Sampling, generate, open_model
from lowbit.runtime.chat import Chat, prompt_of, tokens_of

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture
def engine(model_folder):
    made = open_model(model_folder("llama"), context=96)
    made.stops = frozenset()
    return made


def test_a_seed_makes_it_repeatable(engine):
    prompt = tokens_of(engine, "the quick brown")
    texts = [[text.tokens for _, text in generate(engine, prompt, sampling=Sampling(1.5, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=seed), max_tokens=20)][-1] for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_pieces_join_to_the_text(engine):
    pieces, states = zip(*generate(engine, tokens_of(engine, "the fox"), sampling=Sampling(1.0, seed=0), max_tokens=30), strict=True)
    last = states[-1]
    assert last.finish == "length" and len(last.tokens) == 30 and "".join(pieces) == last.text
    assert engine.tokenizer.decode(last.tokens, skip_special_tokens=True).startswith(last.text)  # but for a character of which bytes are missing at the end
    word = last.text[len(last.text) // 2 :][:3]
    *_, (_, cut) = generate(engine, tokens_of(engine, "the fox"), sampling=Sampling(1.0, seed=0), max_tokens=30, stop=(word,))
    assert cut.finish == "stop" and cut.text == last.text[: last.text.index(word)]


def test_a_stop_token_ends_it(engine):
    *_, (_, text) = generate(engine, tokens_of(engine, "the fox"), sampling=Sampling(0), max_tokens=10)
    engine.stops = frozenset({text.tokens[4]})
    *_, (_, cut) = generate(engine, tokens_of(engine, "the fox"), sampling=Sampling(0), max_tokens=10)
    assert cut.finish == "stop" and cut.tokens == text.tokens[: text.tokens.index(text.tokens[4])]


def test_conversations_keep_what_fits(engine):
    engine.tokenizer.chat_template = TEMPLATE
    chat = Chat(engine, Sampling(0), max_tokens=6, messages=[{"role": "system", "content": "be brief"}])
    for number in range(6):
        *_, (_, text) = chat.say(f"the dog {number}")
        assert text.tokens
    assert chat.dropped > 0 and chat.messages[0]["content"] == "be brief" and chat.messages[-1]["role"] == "assistant"
    assert len(prompt_of(engine, chat.messages)) <= engine.context
    answers = chat.say("the lazy dog")
    next(answers)
    answers.close()  # stopped by the user: what was said so far is in the history
    assert chat.messages[-2:][0]["content"] == "the lazy dog"
    chat.clear()
    assert [message["role"] for message in chat.messages] == ["system"]


def test_without_a_template_there_is_no_conversation(engine):
    engine.tokenizer.chat_template = None
    with pytest.raises(RecipeError, match="no chat template"):
        prompt_of(engine, [{"role": "user", "content": "hello"}])
    engine.tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(DataError, match="refuses"):
        prompt_of(engine, [{"role": "user", "content": "hello"}])


def test_run_and_bench(model_folder):
    runner = CliRunner()
    made = runner.invoke(app, ["run", str(model_folder("llama")), "--raw", "-p", "the quick", "-n", "5", "--temperature", "0", "--json"])
    assert made.exit_code == 0, made.output
    said = json.loads(made.stdout)
    assert len(said["tokens"]) <= 5 and said["prompt"] == "the quick"
    piped = runner.invoke(app, ["run", str(model_folder("llama")), "--raw", "-n", "5", "--temperature", "0"], input="the quick\n")
    assert piped.exit_code == 0 and said["text"].strip() in piped.stdout
    found = runner.invoke(app, ["bench", str(model_folder("llama")), "--prefill", "8,16", "--decode", "4", "--json"])
    speed = json.loads(found.stdout)
    assert [part["tokens"] for part in speed["prefill"]] == [8, 16] and speed["decode_tokens_per_s"] > 0 and speed["weights_bytes"] > 0
    assert speed["decoder"].startswith("native" if kernels.native() else "transformers")
    shown = runner.invoke(app, ["bench", str(model_folder("llama")), "--prefill", "8", "--decode", "2", "--transformers"])
    assert shown.exit_code == 0 and "Not the native decoder" in shown.stdout
    assert runner.invoke(app, ["bench", str(model_folder("llama")), "--prefill", "x"]).exit_code != 0
    if kernels.native():
        portable = runner.invoke(app, ["bench", str(model_folder("llama")), "--prefill", "8", "--decode", "2", "--isa", "portable", "--json"])
        assert json.loads(portable.stdout)["decoder"] == "native, portable"
        with pytest.raises(RecipeError, match="isa is 'sse9'"):
            open_model(model_folder("llama"), isa="sse9")


def test_greedy_is_the_likeliest_token(engine):
    logits = engine.feed(tokens_of(engine, "the quick"))
    assert isinstance(logits, torch.Tensor) and logits.shape == (engine.model.vocabulary,)
    *_, (_, text) = generate(engine, tokens_of(engine, "the quick"), sampling=Sampling(0), max_tokens=1)
    assert text.tokens == [int(logits.argmax())]
