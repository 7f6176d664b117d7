"""Commands that run a model: run, serve, bench."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from .options import Json, Model, Threads, prepare

Context = Annotated[int | None, typer.Option(help="Tokens of prompt and answer together (default: the model's limit, at most 4096).", min=8, show_default=False)]
KVCache = Annotated[str, typer.Option("--kv-cache", help="Keys and values: fp16, int8 or int4 (for each head and token, in groups of 32 channels).")]
Isa = Annotated[str, typer.Option(help="Instruction set of the native kernels: avx512, avx2, neon, portable (default: the best here).", show_default=False)]
Native = Annotated[bool | None, typer.Option("--native/--transformers", help="Insist on the native decoder, or leave it (default: native where it knows the architecture).", show_default=False)]


def run(
    model: Model,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="One question, and its answer; without it, a conversation.", show_default=False)] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt for the conversation.", show_default=False)] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the model's chat template.")] = False,
    max_tokens: Annotated[int | None, typer.Option("-n", "--max-tokens", help="Of an answer (default: until it ends).", min=1, show_default=False)] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.", min=0)] = 0.7,
    top_k: Annotated[int, typer.Option(help="Only the k likeliest tokens; 0: all.", min=0)] = 0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest tokens that have this share together.")] = 0.95,
    min_p: Annotated[float, typer.Option(help="Only tokens at least this likely, relative to the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages what was said already.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes answers repeatable.", show_default=False)] = None,
    context: Context = None,
    kv_cache: KVCache = "fp16",
    threads: Threads = None,
    isa: Isa = "",
    native: Native = None,
    as_json: Json = False,
) -> None:
    """Run a model: one answer, or a conversation in the terminal.

    In a conversation, /clear forgets it, /system TEXT begins anew with a system prompt, /exit ends it.

    Examples:

      lowbit run model-q4_0.gguf -p "Why is the sky blue?"

      lowbit run ./out

      lowbit run ./out --raw -p "Once upon a time" -n 100 --temperature 0

      echo "Summarize: ..." | lowbit run ./out
    """
    from .console import BarProgress, err, plain

    prepare(threads)
    from ..runtime import Sampling, open_model
    from ..runtime.chat import Chat, has_template

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().rstrip("\n")
    engine = open_model(model, context=context, kv_cache=kv_cache, threads=threads, isa=isa, native=native, progress=BarProgress(quiet=as_json))
    if not as_json:
        err.print(f"{plain(engine.name)}: {engine.model.nbytes / 1e6:,.0f} MB of weights, {engine.how}, loaded in {engine.load_seconds:.1f} s", style="dim", highlight=False, soft_wrap=True)
        for note in engine.model.notes:
            err.print(plain(note), style="dim", highlight=False, soft_wrap=True)
    if prompt is not None:
        _answer(engine, prompt, system, raw or not has_template(engine), sampling, max_tokens, as_json)
        return
    if raw or not has_template(engine):
        from ..errors import LowbitError

        raise LowbitError(f"{engine.name} {'has no chat template' if not raw else 'was asked to run raw'}, so there is no conversation. Give a text to continue with -p.")
    _converse(Chat(engine, sampling, max_tokens, [{"role": "system", "content": system}] if system else []))


def _answer(engine: Any, prompt: str, system: str | None, raw: bool, sampling: Any, max_tokens: int | None, as_json: bool) -> None:
    from ..runtime import generate
    from ..runtime.chat import prompt_of, tokens_of
    from .console import print_json

    messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}]
    ids = tokens_of(engine, prompt) if raw else prompt_of(engine, messages)
    text = None
    for piece, now in generate(engine, ids, sampling=sampling, max_tokens=max_tokens):
        text = now
        if not as_json:
            print(piece, end="", flush=True)
    assert text is not None
    if as_json:
        print_json({**vars(text), "prompt": prompt})
        return
    print(flush=True)
    _speed(text)


def _speed(text: Any) -> None:
    from .console import err

    read, made = text.prompt_tokens - text.cached_tokens, len(text.tokens)
    parts = [f"{read} tokens read at {read / max(text.prefill_seconds, 1e-9):,.0f}/s", f"{made} written at {made / max(text.decode_seconds, 1e-9):,.1f}/s"]
    err.print(f"[{', '.join(parts)}{', cut at the limit' if text.finish == 'length' else ''}]", style="dim", highlight=False, markup=False)


def _converse(chat: Any) -> None:
    from .console import err, plain

    err.print("/clear forgets, /system TEXT begins anew, /exit ends (or Ctrl-D); Ctrl-C stops an answer.", style="dim", highlight=False)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line:
            continue
        if line in ("/exit", "/quit"):
            return
        if line == "/clear":
            chat.clear()
            continue
        if line.startswith("/system"):
            words = line.removeprefix("/system").strip()
            chat.messages = [{"role": "system", "content": words}] if words else []
            continue
        text = None
        try:
            for piece, now in chat.say(line):
                text = now
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        print(flush=True)
        if text is not None:
            _speed(text)
        if chat.dropped:
            err.print(plain(f"The conversation no longer fits into {chat.engine.context} tokens; the oldest {chat.dropped} exchange(s) are forgotten."), style="dim", highlight=False)
            chat.dropped = 0


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 lets other machines in, and anyone there may then use the model.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    slots: Annotated[int, typer.Option(help="Texts that are written at once; each has a cache of its own.", min=1, max=64)] = 4,
    context: Context = None,
    kv_cache: KVCache = "fp16",
    threads: Threads = None,
    isa: Isa = "",
    native: Native = None,
) -> None:
    """Serve a model to programs that speak to OpenAI's API: chat/completions and completions, streamed or whole.

    Examples:

      lowbit serve model-q4_0.gguf

      curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" -d '{"messages": [{"role": "user", "content": "Hello"}]}'
    """
    from importlib.util import find_spec

    from ..errors import missing_extra
    from .console import BarProgress, err, plain

    for package in ("fastapi", "uvicorn"):
        if find_spec(package) is None:
            raise missing_extra(package, "serve", purpose="serving")
    prepare(threads)
    import uvicorn

    from ..runtime import open_model
    from ..runtime.server import make_app

    engine = open_model(model, context=context, kv_cache=kv_cache, threads=threads, isa=isa, native=native, progress=BarProgress())
    err.print(f"{plain(engine.name)}: {engine.how}; context {engine.context:,}, {slots} texts at once. http://{host}:{port}/v1", highlight=False, soft_wrap=True)
    uvicorn.run(make_app(engine, slots=slots), host=host, port=port, log_level="warning")


def bench(
    model: Model,
    prefill: Annotated[str, typer.Option(help="Lengths of prompts, with commas.")] = "128,512",
    decode: Annotated[int, typer.Option(help="Tokens that are generated.", min=1)] = 64,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    kv_cache: KVCache = "fp16",
    threads: Threads = None,
    isa: Isa = "",
    native: Native = None,
    as_json: Json = False,
) -> None:
    """How fast a model reads and writes here, and how near that is to what the memory allows.

    Examples:

      lowbit bench model-q4_0.gguf

      lowbit bench ./out --prefill 32,2048 --threads 1 --json
    """
    from dataclasses import asdict

    from ..errors import LowbitError
    from .console import BarProgress, out, plain, print_json, table

    prepare(threads)
    from ..runtime import open_model
    from ..runtime.bench import bench as measure

    if not all(part.strip().isdigit() and int(part) > 0 for part in prefill.split(",")):
        raise LowbitError(f"--prefill is {prefill!r}; expected lengths such as 128,512.")
    sizes = tuple(int(part) for part in prefill.split(","))
    engine = open_model(model, context=max(sizes) + decode + 1, kv_cache=kv_cache, threads=threads, isa=isa, native=native, progress=BarProgress(quiet=as_json))
    found = measure(engine, prefill=sizes, decode=decode, repeats=repeats)
    if as_json:
        print_json(asdict(found))
        return
    shown = table("", "tokens/s", "ms per token")
    for part in found.prefill:
        shown.add_row(f"prompt of {part.tokens}", f"{part.tokens_per_s:,.0f}", f"{1e3 / part.tokens_per_s:.3f}")
    shown.add_row(f"decode after {found.context}", f"{found.decode_tokens_per_s:,.1f}", f"{found.ms_p50:.2f} (p95 {found.ms_p95:.2f})")
    out.print(f"[bold]{plain(found.model)}[/]  {plain(found.decoder)}, {found.threads} threads; loaded in {found.load_s:.1f} s, peak memory {found.peak_memory_bytes / 1e6:,.0f} MB", highlight=False)
    out.print(shown)
    out.print(
        f"Each token reads {found.weights_bytes / 1e6:,.1f} MB of weights: {found.weights_bytes / found.ms_p50 / 1e6:.1f} GB/s, {found.share:.0%} of the {found.read_gbs:.1f} GB/s "
        "that memory gives to a plain sum.",
        style="dim", highlight=False,
    )  # fmt: skip
    for note in [*([f"Not the native decoder: {engine.reason}."] if engine.reason else []), *engine.model.notes]:
        out.print(f"  {plain(note)}", style="dim", highlight=False, soft_wrap=True)
