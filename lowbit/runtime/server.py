"""An endpoint that speaks as OpenAI's does: chat/completions and completions, streamed or whole."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from ..errors import LowbitError, RecipeError
from .chat import prompt_of, tokens_of
from .engine import Engine
from .generate import Sampling, Text
from .scheduler import Job, Scheduler

Stop = str | Annotated[list[str], Field(max_length=16)] | None


class StreamOptions(BaseModel):
    include_usage: bool = False


class Request_(BaseModel):
    """What both endpoints take. Fields that are not known are ignored, as OpenAI's clients expect."""

    model_config = ConfigDict(extra="ignore")
    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    seed: int | None = None
    stop: Stop = None
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


class Part(BaseModel):
    type: str
    text: str = ""


class Message(BaseModel):
    role: str
    content: str | list[Part] | None = None


class ChatRequest(Request_):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[Any] | None = None


class CompletionRequest(Request_):
    prompt: str | list[int]
    echo: bool = False


def make_app(engine: Engine, *, slots: int = 4) -> FastAPI:
    """The application. slots: texts at once; more wait."""
    app = FastAPI(title="lowbit", docs_url=None, redoc_url=None)
    scheduler = Scheduler(engine, slots)
    app.state.scheduler = scheduler
    created = int(time.time())

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return _error(400, f"{where or 'the request'}: {first['msg']}", where or None)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(LowbitError)
    async def bad(_: Request, error: LowbitError) -> JSONResponse:
        return _error(400, str(error))

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok", "running": len(scheduler.running), "waiting": len(scheduler.waiting)}

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [{"id": engine.name, "object": "model", "created": created, "owned_by": "lowbit"}]}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Any:
        if body.tools:
            raise RecipeError("tools: this server calls no tools. Leave them out.")
        ids = prompt_of(engine, [{"role": message.role, "content": _words(message)} for message in body.messages])
        return await _respond(engine, scheduler, request, body, ids, body.max_completion_tokens or body.max_tokens, chat=True)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Any:
        if body.echo:
            raise RecipeError("echo: the prompt is not repeated here. Leave it out.")
        ids = tokens_of(engine, body.prompt) if isinstance(body.prompt, str) else body.prompt
        if wrong := next((token for token in ids if not 0 <= token < engine.model.vocabulary), None):
            raise RecipeError(f"prompt: {wrong} is no token of this model.")
        return await _respond(engine, scheduler, request, body, ids, body.max_tokens or 16, chat=False)

    return app


def _words(message: Message) -> str:
    if not isinstance(message.content, list):
        return message.content or ""
    if other := next((part.type for part in message.content if part.type != "text"), None):
        raise RecipeError(f"messages: a part is of the type {other!r}; this server reads text.")
    return "".join(part.text for part in message.content)


def _sampling(engine: Engine, body: Request_) -> Sampling:
    """What the request says, else the model's generation config, else OpenAI's defaults."""
    given = lambda name, default: next((value for value in (getattr(body, name), getattr(engine.defaults, name, None)) if value is not None), default)
    if body.n != 1:
        raise RecipeError(f"n is {body.n}: this server gives one answer. Ask again for another.")
    if body.presence_penalty or body.frequency_penalty:
        raise RecipeError("presence_penalty and frequency_penalty are not known here; repetition_penalty is.")
    return Sampling(given("temperature", 1.0), body.top_k, given("top_p", 1.0), body.min_p, body.repetition_penalty, body.seed)


async def _respond(engine: Engine, scheduler: Scheduler, request: Request, body: Request_, ids: list[int], max_tokens: int | None, *, chat: bool) -> Any:
    sampling = _sampling(engine, body)
    if not ids or len(ids) >= engine.context:
        raise RecipeError(f"the prompt has {len(ids)} tokens, and the context is {engine.context}; it has to leave room for an answer.")
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[str, Text | None, BaseException | None]]()

    def tell(piece: str, text: Text | None, error: BaseException | None) -> None:
        with suppress(RuntimeError):  # the server has ended
            loop.call_soon_threadsafe(queue.put_nowait, (piece, text, error))

    job = Job(ids, sampling, max_tokens, tuple(word for word in stop if word), tell)
    scheduler.submit(job)
    name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
    head = {"id": name, "created": int(time.time()), "model": engine.name}
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(_events(job, queue, head, chat, usage), media_type="text/event-stream")
    answer = ""
    try:
        while True:
            try:
                piece, text, error = await asyncio.wait_for(queue.get(), 0.5)
            except TimeoutError:
                if await request.is_disconnected():
                    return JSONResponse({}, status_code=499)
                continue
            if error is not None:
                return _error(400 if isinstance(error, LowbitError) else 500, str(error))
            answer += piece
            assert text is not None
            if text.finish:
                break
    finally:
        job.cancel()
    choice = {"index": 0, "finish_reason": text.finish, "logprobs": None, **({"message": {"role": "assistant", "content": answer}} if chat else {"text": answer})}
    return {**head, "object": "chat.completion" if chat else "text_completion", "choices": [choice], "usage": _usage(text)}


async def _events(job: Job, queue: asyncio.Queue, head: dict, chat: bool, usage: bool) -> AsyncIterator[str]:
    head = {**head, "object": "chat.completion.chunk" if chat else "text_completion"}
    line = lambda data: f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
    choice = lambda delta, finish=None: {**head, "choices": [{"index": 0, "finish_reason": finish, "logprobs": None, **delta}]}
    try:
        if chat:
            yield line(choice({"delta": {"role": "assistant", "content": ""}}))
        while True:
            piece, text, error = await queue.get()
            if error is not None:
                yield line({"error": {"message": str(error), "type": "invalid_request_error" if isinstance(error, LowbitError) else "server_error"}})
                return
            if piece:
                yield line(choice({"delta": {"content": piece}} if chat else {"text": piece}))
            if text.finish:
                yield line(choice({"delta": {}} if chat else {"text": ""}, text.finish))
                if usage:
                    yield line({**head, "choices": [], "usage": _usage(text)})
                yield "data: [DONE]\n\n"
                return
    finally:  # also where the client has gone away
        job.cancel()


def _usage(text: Text) -> dict:
    made = len(text.tokens)
    return {"prompt_tokens": text.prompt_tokens, "completion_tokens": made, "total_tokens": text.prompt_tokens + made, "prompt_tokens_details": {"cached_tokens": text.cached_tokens}}


def _error(status: int, message: str, param: str | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error" if status < 500 else "server_error", "param": param, "code": None}}, status_code=status)
