"""The HTTP server: an OpenAI-compatible endpoint and a page that shows who wrote what, for this machine only.

An answer is made in the engine's thread while the event loop passes its tokens on. Whoever stops listening, or
closes the page, stops the answer. Requests that name another host are refused, so that no web page can reach
the server under a name of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

import fedcompose
from fedcompose.errors import FedcomposeError
from fedcompose.serve.engine import AUTO, BASE, EXPERT_PREFIX, Answer, Engine, Job, Token
from fedcompose.serve.protocol import ChatRequest, Reply, error_document, event

HOSTS = ["127.0.0.1", "localhost"]
PAGE_POLICY = (  # the page asks nothing of anybody but this server
    "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PARAMETERS = {  # which field of a request an engine's refusal is about
    "MODEL_NOT_FOUND": "model",
    "MESSAGES_INVALID": "messages",
    "CONTEXT_LENGTH_EXCEEDED": "messages",
}
INVALID = "invalid_request_error"

log = logging.getLogger(__name__)


def create_app(engine: Engine) -> FastAPI:
    """The application around a loaded engine, which it closes when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    # The interactive pages of FastAPI load scripts from elsewhere; openapi.json stays.
    app = FastAPI(title="fedcompose", version=fedcompose.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(FedcomposeError)(_refused)
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(Exception)(_broken)
    page = (files("fedcompose.serve") / "page.html").read_text("utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok", "release": engine.release.dir_hash}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": model_cards(engine)}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        messages = [message.plain() for message in asked.messages]
        job = await asyncio.to_thread(engine.prepare, messages, asked.settings())
        reply = Reply(asked.model, asked.routing)
        if asked.stream:
            events = _events(engine, job, reply, asked.stream_options.include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return JSONResponse(reply.completion(await _whole(engine, job, request)))

    return app


def model_cards(engine: Engine) -> list[dict[str, Any]]:
    """The ids that a request can name, with the site and domain of each expert."""
    release = engine.release
    domains = {expert.site: expert.domain for expert in release.experts}
    cards = []
    for model in engine.models:
        site = model.removeprefix(EXPERT_PREFIX) if model not in (AUTO, BASE) else None
        owner = site or release.provenance.coordinator
        card = {"id": model, "object": "model", "created": int(release.provenance.finished.timestamp())}
        cards.append({**card, "owned_by": owner, "site": site, "domain": domains.get(site or "")})
    return cards


async def _whole(engine: Engine, job: Job, request: Request) -> Answer:
    watcher = asyncio.create_task(_cancel_when_gone(job, request))
    try:
        return await asyncio.wrap_future(engine.submit(job))
    finally:
        watcher.cancel()
        job.cancel()


async def _cancel_when_gone(job: Job, request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.cancel()


async def _events(engine: Engine, job: Job, reply: Reply, include_usage: bool) -> AsyncIterator[str]:
    """The answer as server-sent events. Closed early, which a lost connection does, it cancels the job."""
    loop = asyncio.get_running_loop()
    tokens: asyncio.Queue[Token | None] = asyncio.Queue()
    answer = engine.submit(job, lambda token: loop.call_soon_threadsafe(tokens.put_nowait, token))
    answer.add_done_callback(lambda _: loop.call_soon_threadsafe(tokens.put_nowait, None))
    try:
        yield reply.opening()
        while (token := await tokens.get()) is not None:
            if token.text or reply.routing:
                yield reply.token(token)
        if error := answer.exception():
            log.error("an answer failed", exc_info=error)
            yield event(error_document("server_error", "the answer failed; the server's log says why"))
        else:
            yield reply.closing(answer.result(), include_usage)
    finally:
        job.cancel()


async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    """A body that is not what `ChatRequest` describes. The answer names the field, and never repeats its value."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or None
    if first["type"] == "extra_forbidden":
        return _error(400, f"{where!a} is not supported by this server", where, "unsupported_parameter")
    if first["type"] in ("json_invalid", "model_attributes_type"):
        return _error(400, "the body is not a JSON object of type application/json", None, "invalid_json")
    return _error(400, f"{where!a}: {first['msg']}", where, "invalid_value")


async def _refused(_: Request, error: FedcomposeError) -> JSONResponse:
    status = 404 if error.code == "MODEL_NOT_FOUND" else 400
    return _error(status, error.diagnostics(), PARAMETERS.get(error.code), error.code.lower())


async def _http_error(_: Request, error: HTTPException) -> JSONResponse:
    return _error(error.status_code, str(error.detail), None, None)


async def _broken(_: Request, error: Exception) -> JSONResponse:
    """The server logs what happened, after this is sent."""
    return JSONResponse(error_document("server_error", "the server failed; its log says why"), 500)


def _error(status: int, message: str, param: str | None, code: str | None) -> JSONResponse:
    return JSONResponse(error_document(INVALID, message, param, code), status)
