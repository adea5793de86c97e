"""The HTTP server: an OpenAI-compatible endpoint and a page that shows who wrote what.

An answer is made in the engine's thread while the event loop passes its tokens on. Whoever stops listening, or
closes the page, stops the answer. Requests that name another host are refused, so that no web page can reach
the server under a name of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from importlib.resources import files
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

import fedcompose
from fedcompose.errors import ConfigError, FedcomposeError
from fedcompose.receipt import document, make_receipt, sign_receipt
from fedcompose.serve.card import release_card
from fedcompose.serve.engine import EXPERT_PREFIX, Engine
from fedcompose.serve.limits import Door, Gate
from fedcompose.serve.metrics import CONTENT_TYPE, Metrics
from fedcompose.serve.operations import Verdict, keep_judging
from fedcompose.serve.protocol import ChatRequest, TextRequest
from fedcompose.serve.replies import Reply, error_document, event
from fedcompose.serve.writing import AUTO, BASE, Answer, Job, Token
from fedcompose.signing import Signer
from fedcompose.standing import ends_of_terms

PAGE_POLICY = (  # the page asks nothing of anybody but this server
    "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PARAMETERS = {  # which field of a request an engine's refusal is about
    "MODEL_NOT_FOUND": "model",
    "MESSAGES_INVALID": "messages",
    "CONTEXT_LENGTH_EXCEEDED": "messages",
    "PROMPT_EMPTY": "prompt",
    "PIN_INVALID": "routing",
    "RECEIPTS_OFF": "receipt",
}
INVALID = "invalid_request_error"

Submit = Callable[..., Future[Answer]]  # as `Engine.submit`

log = logging.getLogger(__name__)


def create_app(
    engine: Engine, signer: Signer | None = None, door: Door | None = None, judge: Verdict | None = None
) -> FastAPI:
    """The application around a loaded engine, which it closes when it ends.

    `signer` signs receipts; every request passes the `door`; at `SIGHUP`, and when the time of a site's terms is over,
    the release is judged anew by `judge`.
    """
    door, metrics = door or Door(), Metrics()
    door.seen = metrics.answered
    engine.on_step = metrics.step
    metrics.load(waiting=lambda: engine.waiting, running=lambda: engine.running, cache_free=lambda: engine.cache_free)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        judging = judge and keep_judging(judge, ends_of_terms(engine.release), door, engine.mask, engine.refuse)
        yield
        if judging is not None:
            judging.cancel()
        await asyncio.to_thread(engine.close)

    # The interactive pages of FastAPI load scripts from elsewhere; openapi.json stays.
    app = FastAPI(title="fedcompose", version=fedcompose.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Gate, door=door)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(FedcomposeError)(_refused)
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(Exception)(_broken)
    _add_operations(app, engine, door, metrics)
    _add_answers(app, engine, signer, metrics)
    return app


def _add_operations(app: FastAPI, engine: Engine, door: Door, metrics: Metrics) -> None:
    """The page, and what people and programs that run the server ask for."""
    page = (files("fedcompose.serve") / "page" / "index.html").read_text("utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether this process can still answer; if not, it has to be started again."""
        status = "ok" if engine.alive else "dead"
        return JSONResponse({"status": status, "release": engine.release.dir_hash}, 200 if engine.alive else 503)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether a request sent now would be answered; if not, why."""
        status = "ready" if engine.alive and door.closed is None else door.closed or "ENGINE_DEAD"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @app.get("/metrics")
    async def numbers() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/release")
    async def card() -> dict[str, Any]:
        return release_card(engine.release, datetime.now(UTC), engine.masked)


def _add_answers(app: FastAPI, engine: Engine, signer: Signer | None, metrics: Metrics) -> None:
    """The endpoints of OpenAI's API."""
    reader = ThreadPoolExecutor(1, "reader")

    async def read(prepare: Callable[[], list[Job]]) -> list[Job]:
        """Beside the event loop, and in one thread: what reading a very long prompt took, a hundred megabytes and
        more, the C library keeps for the thread that read it."""
        return await asyncio.get_running_loop().run_in_executor(reader, prepare)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": model_cards(engine)}

    @app.get("/v1/models/{model:path}")
    async def one_model(model: str) -> dict[str, Any]:
        for card in model_cards(engine):
            if card["id"] == model:
                return card
        raise ConfigError("MODEL_NOT_FOUND", "there is no such model here", expected=", ".join(engine.models))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        messages = [message.plain() for message in asked.messages]
        jobs = await read(lambda: engine.prepare(messages, asked.settings()).choices(asked.n))
        return await _answer(asked, jobs, request)

    @app.post("/v1/completions", response_model=None)
    async def complete(asked: TextRequest, request: Request) -> Response:
        def prepare() -> list[Job]:
            prompts = [engine.prepare_text(text, asked.settings()) for text in asked.prompt]
            return [job for prompt in prompts for job in prompt.choices(asked.n)]

        return await _answer(asked, await read(prepare), request)

    async def _answer(asked: ChatRequest | TextRequest, jobs: Sequence[Job], request: Request) -> Response:
        if asked.receipt and signer is None:
            raise ConfigError("RECEIPTS_OFF", "this server signs no receipts")
        reply = Reply(asked, engine.experts, engine.decode, sign)
        if asked.stream:
            headers = {"Cache-Control": "no-store"}
            events = _events(submit, jobs, reply)
            await anext(events)  # what cannot be begun is refused while there is a status to say so with
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        return JSONResponse(reply.whole(await _whole(submit, jobs, request)))

    def submit(job: Job, on_token: Callable[[Token], object] | None = None) -> Future[Answer]:
        watch = metrics.begin()

        def heard(token: Token) -> None:
            watch.token(token.expert)
            if on_token is not None:
                on_token(token)

        return engine.submit(job, heard)

    def sign(name: str, model: str, answer: Answer) -> Any:
        receipt = make_receipt(engine.release, name, model, answer.text, answer.counts, datetime.now(UTC))
        return document(sign_receipt(receipt, cast(Signer, signer)))


def model_cards(engine: Engine) -> list[dict[str, Any]]:
    """The ids that a request can name, with the site and domain of each expert; and who is masked, with `auto`."""
    release = engine.release
    domains = {expert.site: expert.domain for expert in release.experts}
    cards = []
    for model in engine.models:
        site = model.removeprefix(EXPERT_PREFIX) if model not in (AUTO, BASE) else None
        owner = site or release.provenance.coordinator
        card = {"id": model, "object": "model", "created": int(release.provenance.finished.timestamp())}
        cards.append({**card, "owned_by": owner, "site": site, "domain": domains.get(site or "")})
    cards[0]["masked"] = sorted(engine.masked)
    return cards


async def _whole(submit: Submit, jobs: Sequence[Job], request: Request) -> list[Answer]:
    watcher = asyncio.create_task(_cancel_when_gone(jobs, request))
    try:
        answers = await asyncio.to_thread(lambda: [submit(job) for job in jobs])
        return await asyncio.gather(*map(asyncio.wrap_future, answers))
    finally:
        watcher.cancel()
        _cancel(jobs)


async def _cancel_when_gone(jobs: Sequence[Job], request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    _cancel(jobs)


def _cancel(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.cancel()


async def _events(submit: Submit, jobs: Sequence[Job], reply: Reply) -> AsyncIterator[str]:
    """The answers as server-sent events, after a first empty piece that says that they are begun.

    Closed early, which a lost connection does, it cancels the jobs.
    """
    loop = asyncio.get_running_loop()
    news: asyncio.Queue[tuple[int, Token | None]] = asyncio.Queue()

    def tell(index: int, token: Token | None) -> None:
        loop.call_soon_threadsafe(news.put_nowait, (index, token))

    def start() -> list[Future[Answer]]:
        answers = [submit(job, partial(tell, index)) for index, job in enumerate(jobs)]
        for index, answer in enumerate(answers):
            answer.add_done_callback(partial(_then, tell, index))
        return answers

    try:
        answers = await asyncio.to_thread(start)
        yield ""
        for index in range(len(jobs)):
            if opening := reply.opening(index):
                yield opening
        left = len(jobs)
        while left:
            index, token = await news.get()
            if token is not None:
                told = reply.token(index, token)
            elif error := answers[index].exception():
                log.error("an answer failed", exc_info=error)
                yield event(error_document("server_error", "the answer failed; the server's log says why"))
                return
            else:
                told, left = reply.closing(index, answers[index].result()), left - 1
            if told:
                yield told
        yield reply.ending([answer.result() for answer in answers])
    finally:
        _cancel(jobs)


def _then(tell: Callable[[int, Token | None], object], index: int, _: Future[Answer]) -> None:
    tell(index, None)


async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    """A body that is not what `ChatRequest` describes. The answer names the field, and never repeats its value."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or None
    if first["type"] == "extra_forbidden":
        return _error(400, f"{where!a} is not supported by this server", where, "unsupported_parameter")
    if where is None or first["type"] == "json_invalid":
        return _error(400, "the body is not a JSON object of type application/json", None, "invalid_json")
    return _error(400, f"{where!a}: {first['msg']}", where, "invalid_value")


async def _refused(_: Request, error: FedcomposeError) -> JSONResponse:
    status = 503  # of the release or the machine, and not of the request
    if isinstance(error, ConfigError):
        status = 404 if error.code == "MODEL_NOT_FOUND" else 400
    kind = INVALID if status < 500 else "server_error"
    return JSONResponse(
        error_document(kind, error.diagnostics(), PARAMETERS.get(error.code), error.code.lower()), status
    )


async def _http_error(_: Request, error: HTTPException) -> JSONResponse:
    return _error(error.status_code, str(error.detail), None, None)


async def _broken(_: Request, error: Exception) -> JSONResponse:
    """The server logs what happened, after this is sent."""
    return JSONResponse(error_document("server_error", "the server failed; its log says why"), 500)


def _error(status: int, message: str, param: str | None, code: str | None) -> JSONResponse:
    return JSONResponse(error_document(INVALID, message, param, code), status)
