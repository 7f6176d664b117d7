"""The endpoint, asked by OpenAI's own client over a real socket: answers, streams, fairness, errors, clients that go away."""

import contextlib
import json
import socket
import threading
import time

import pytest

from lowbit.runtime import Sampling, generate, open_model
from lowbit.runtime.chat import prompt_of

pytest.importorskip("fastapi")
httpx, openai, uvicorn = (pytest.importorskip(name) for name in ("httpx", "openai", "uvicorn"))
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
ASKED = [{"role": "user", "content": "the quick brown fox"}]


@pytest.fixture(scope="module")
def engine(model_folder):
    made = open_model(model_folder("llama"), context=128)
    made.stops = frozenset()
    made.tokenizer.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def served(engine):
    from lowbit.runtime.server import make_app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = make_app(engine, slots=2)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}", app.state.scheduler
    server.should_exit = True
    thread.join(10)
    app.state.scheduler.close()


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0) as made:
        yield made


def expected(engine, size=12):
    *_, (_, text) = generate(engine.another(9), prompt_of(engine, ASKED), sampling=Sampling(0), max_tokens=size)
    return text


def test_chat_whole_and_streamed(client, engine):
    goal = expected(engine)
    whole = client.chat.completions.create(model="any", messages=ASKED, temperature=0, max_tokens=12)
    assert whole.choices[0].message.content == goal.text and whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12 and whole.usage.prompt_tokens == goal.prompt_tokens
    pieces = list(client.chat.completions.create(model="any", messages=ASKED, temperature=0, max_tokens=12, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == goal.text
    assert pieces[0].choices[0].delta.role == "assistant" and pieces[-1].usage.completion_tokens == 12
    again = client.chat.completions.create(model="any", messages=ASKED, temperature=0, max_tokens=12)
    assert again.usage.prompt_tokens_details.cached_tokens == goal.prompt_tokens - 1


def test_completions_and_models(client, engine):
    ids = engine.tokenizer("the fox")["input_ids"]
    made = [client.completions.create(model="any", prompt=prompt, temperature=0, max_tokens=6).choices[0].text for prompt in ("the fox", ids)]
    assert made[0] == made[1]
    assert [model.id for model in client.models.list().data] == [engine.name]
    streamed = client.completions.create(model="any", prompt="the fox", temperature=0, max_tokens=6, stream=True)
    assert "".join(piece.choices[0].text for piece in streamed) == made[0]
    seeded = [client.completions.create(model="any", prompt="the fox", temperature=1.5, max_tokens=6, seed=seed).choices[0].text for seed in (1, 1)]
    assert seeded[0] == seeded[1]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {}, "messages"),
        ("chat/completions", {"messages": ASKED, "temperature": 9}, "temperature"),
        ("chat/completions", {"messages": ASKED, "n": 2}, "one answer"),
        ("chat/completions", {"messages": ASKED, "tools": [{}]}, "tools"),
        ("chat/completions", {"messages": ASKED, "presence_penalty": 1}, "repetition_penalty"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ("chat/completions", {"messages": [{"role": "user", "content": "the fox " * 100}]}, "the context is 128"),
        ("completions", {"prompt": [10**7]}, "no token"),
        ("completions", {"prompt": ""}, "0 tokens"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ("nothing", {}, "Not Found"),
    ],
)
def test_bad_requests_get_a_sentence(served, path, body, said):
    answer = httpx.post(f"{served[0]}/v1/{path}", json=body)
    assert 400 <= answer.status_code < 500 and said in answer.json()["error"]["message"], answer.text
    broken = httpx.post(f"{served[0]}/v1/completions", content=b"{not json", headers={"Content-Type": "application/json"})
    assert broken.status_code == 400 and broken.json()["error"]["message"]


def test_clients_take_turns(served, engine):
    """A short answer does not wait for a long one that began before it, and both are what they are alone."""
    done, texts = {}, {}

    def ask(name, size):
        found = httpx.post(f"{served[0]}/v1/chat/completions", json={"messages": ASKED, "temperature": 0, "max_tokens": size}, timeout=60).json()
        done[name], texts[name] = time.perf_counter(), found["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=("long", 90))]
    threads[0].start()
    time.sleep(0.02)
    threads += [threading.Thread(target=ask, args=(f"short {number}", 3)) for number in range(3)]
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts["long"] == expected(engine, 90).text and texts["short 0"] == texts["short 2"] == expected(engine, 3).text


def test_a_client_that_goes_away_frees_its_work(served):
    scheduler = served[1]
    with contextlib.suppress(httpx.HTTPError), httpx.stream("POST", f"{served[0]}/v1/completions", json={"prompt": "the fox", "max_tokens": 110, "stream": True}, timeout=60) as answer:
        first = next(line for line in answer.iter_lines() if line)
        assert json.loads(first.removeprefix("data: "))["choices"]
    for _ in range(500):
        if not scheduler.running and not scheduler.waiting and len(scheduler._free) == 2:
            return
        time.sleep(0.01)
    raise AssertionError("the work of a client that has gone goes on")
