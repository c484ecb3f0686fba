"""The routes of OpenAI's interface, as an ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from entrenar_gpu.errors import UserError
from entrenar_gpu.events import RequestRecord
from entrenar_gpu.infer import Delta
from entrenar_gpu.serve import bodies
from entrenar_gpu.serve.bodies import Asked
from entrenar_gpu.serve.engine import Engine, QueueFull, Ticket
from entrenar_gpu.serve.meters import Meters
from entrenar_gpu.serve.problems import Problem, bad_request
from entrenar_gpu.serve.replies import END, Reply, event
from entrenar_gpu.serve.served import BASE, Served

MOST_BODY_BYTES = 4 << 20
BODY_SECONDS = 30.0  # for a client to send its body
LONGEST_NAME = 200  # characters of a model's name that are kept of what a client sends
CLOSED = 499  # nginx's status for a client that went away

_log = logging.getLogger(__name__)

Observer = Callable[[RequestRecord], None]


def make_app(
    served: Served, queue_limit: int = 64, api_key: str | None = None, observers: Sequence[Observer] = ()
) -> Starlette:
    """The application. It takes the model over while it runs: nothing else may use it then.

    More than `queue_limit` answers beyond the model's slots are turned away with 429. With an `api_key`, everything but
    /health wants it as a bearer token. Observers are told of every request that was understood.
    """
    engine = Engine(served.model.scheduler, queue_limit)
    service = _Service(served, engine, api_key, observers)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await run_in_threadpool(engine.close)

    routes = [
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.complete, methods=["POST"]),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.model),
        Route("/health", service.health),
        Route("/metrics", service.metrics),
    ]
    handlers: dict[Any, Any] = {Problem: _problem, HTTPException: _http_problem, Exception: _fault}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return JSONResponse(error.to_json(), error.status, error.headers)


def _http_problem(request: Request, error: Exception) -> Response:
    """No such route, or no such method there."""
    assert isinstance(error, HTTPException)
    return _problem(request, Problem(error.status_code, error.detail, headers=dict(error.headers or {})))


def _fault(request: Request, error: Exception) -> Response:
    """A fault of ours, which starlette has logged: the client is told nothing of its inside."""
    return _problem(request, Problem(500, "internal error"))


class _Service:
    """What the routes do."""

    def __init__(self, served: Served, engine: Engine, api_key: str | None, observers: Sequence[Observer]) -> None:
        self._served = served
        self._engine = engine
        self._key = None if api_key is None else api_key.encode()
        self._meters = Meters(engine)
        self._observers = (self._meters.count, *observers)

    async def health(self, request: Request) -> Response:
        if self._engine.broken is not None:
            return JSONResponse({"status": "failed", "reason": self._engine.broken}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        self._authorise(request)
        return Response(self._meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        self._authorise(request)
        return JSONResponse({"object": "list", "data": self._served.describe()})

    async def model(self, request: Request) -> Response:
        self._authorise(request)
        name = request.path_params["name"]
        self._served.adapter(name)
        return JSONResponse(next(entry for entry in self._served.describe() if entry["id"] == name))

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, bodies.read_chat, "chatcmpl")

    async def complete(self, request: Request) -> Response:
        return await self._generate(request, bodies.read_completion, "cmpl")

    def _authorise(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._key is not None and not hmac.compare_digest(given.encode("latin-1", "replace"), self._key):
            raise Problem(401, "no valid API key", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _generate(self, request: Request, read: Callable[[dict[str, Any]], Asked], prefix: str) -> Response:
        start_ns = time.time_ns()
        self._authorise(request)
        if self._engine.broken is not None:
            raise Problem(503, self._engine.broken)
        asked = read(bodies.decode(await _body(request)))
        name = (asked.model or BASE)[:LONGEST_NAME]
        record = _Record(f"{prefix}-{uuid.uuid4().hex}", request.url.path, name, start_ns)
        with contextlib.ExitStack() as finish:
            try:
                finish.enter_context(self._engine.place(asked.n * len(asked.prompts)))
            except QueueFull:
                self._tell(record, 429)
                message, wait = "too many requests wait; try again", {"Retry-After": "1"}
                raise Problem(429, message, code="queue_full", headers=wait) from None
            record.ticket = ticket = await self._begin(asked, record)
            finish.callback(self._engine.cancel, ticket)
            reply = Reply(record.request_id, record.model, asked, self._served.model.tokenizer)
            if not asked.stream:
                return await self._whole(request, ticket, reply, record)
            finish.callback(lambda: self._tell(record, record.status))
            return _Stream(self._events(ticket, reply, record), finish.pop_all())

    async def _begin(self, asked: Asked, record: _Record) -> Ticket:
        """Prompts to tokens, and these to the engine. Raises Problem for what cannot be answered."""
        try:
            requests = await run_in_threadpool(self._served.requests, asked)
            return await self._engine.submit(requests)
        except UserError as error:
            problem = bad_request(error)
        except Problem as error:
            problem = error
        self._tell(record, problem.status)
        raise problem

    async def _whole(self, request: Request, ticket: Ticket, reply: Reply, record: _Record) -> Response:
        """All of the answers; or nothing, at once, where the client goes away."""
        gathering = asyncio.ensure_future(_gather(ticket))
        leaving = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait((gathering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not gathering.done():
                self._tell(record, CLOSED)
                return Response(status_code=CLOSED)
            deltas = gathering.result()
        finally:
            gathering.cancel()
            leaving.cancel()
        if failed := [delta.error for _, delta in deltas if delta.finish == "error"]:
            self._tell(record, 500)
            raise Problem(500, failed[0])
        self._tell(record, 200)
        return JSONResponse(reply.whole(deltas, ticket.answers))

    async def _events(self, ticket: Ticket, reply: Reply, record: _Record) -> AsyncIterator[str]:
        """The events of a stream."""
        for chunk in reply.opening():
            yield event(chunk)
        async for prompt, delta in _news(ticket):
            if delta.finish == "error":
                record.status = 500
                yield event(Problem(500, delta.error).to_json())
                return
            yield event(reply.chunk(prompt, delta))
        for chunk in reply.closing(ticket.answers):
            yield event(chunk)
        record.status = 200
        yield END

    def _tell(self, record: _Record, status: int) -> None:
        ended = record.ended(status)
        for observer in self._observers:
            try:
                observer(ended)
            except Exception:  # whoever watches must not break what is watched
                _log.exception("an observer failed on a request")


class _Stream(StreamingResponse):
    """Server-sent events; `finish` is closed when they have ended, or the client has gone away, begun or not."""

    def __init__(self, events: AsyncIterator[str], finish: contextlib.ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._finish = finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._finish:
            await super().__call__(scope, receive, send)


class _Record:
    """What becomes a RequestRecord when the request has ended."""

    def __init__(self, request_id: str, route: str, model: str, start_ns: int) -> None:
        self.request_id, self.route, self.model, self.start_ns = request_id, route, model, start_ns
        self.began = time.monotonic()
        self.ticket: Ticket | None = None
        self.status = CLOSED  # of a stream, until it has ended

    def ended(self, status: int) -> RequestRecord:
        groups = [] if self.ticket is None else self.ticket.answers
        answers = [answer for group in groups for answer in group]
        first = min((a.first_token for a in answers if a.first_token is not None), default=None)
        return RequestRecord(
            request_id=self.request_id,
            route=self.route,
            model=self.model,
            status=status,
            finish=",".join(a.finish or "cancelled" for a in answers),
            prompt_tokens=sum(len(group[0].request.prompt) for group in groups),
            cached_tokens=sum(group[0].shared for group in groups),
            completion_tokens=sum(answer.drawn for answer in answers),
            start_ns=self.start_ns,
            first_token_ns=0 if first is None else self.start_ns + int((first - self.began) * 1e9),
            end_ns=time.time_ns(),
        )


async def _body(request: Request) -> bytes:
    """The body of a request, of a bounded size and within a bounded time."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a page of another site can send without asking is not
        raise Problem(415, "the body must be application/json")
    received = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                received += part
                if len(received) > MOST_BODY_BYTES:
                    raise Problem(413, f"the body is larger than {MOST_BODY_BYTES >> 20} MiB")
    except TimeoutError:
        raise Problem(408, f"the body did not come within {BODY_SECONDS:.0f} s") from None
    except ClientDisconnect:
        raise Problem(400, "the body is incomplete") from None
    return bytes(received)


async def _disconnected(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _news(ticket: Ticket) -> AsyncIterator[tuple[int, Delta]]:
    """What is new of a ticket's answers, until all have ended."""
    left = sum(request.n for request in ticket.requests)
    while left:
        prompt, delta = await ticket.news.get()
        left -= delta.finish is not None
        yield prompt, delta


async def _gather(ticket: Ticket) -> list[tuple[int, Delta]]:
    return [news async for news in _news(ticket)]
