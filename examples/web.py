"""A small web app that starts builds, shows their output while they run, and cancels them.

pip install 'celery-warm-pool[examples]'
celery -A worker_config worker           # one node or more, with the same POOL_* variables
python examples/web.py                   # http://127.0.0.1:8000: a page to try it

POST   /builds {"user": "user-1", "cmd": "make"}    202: its id and where to look
GET    /builds/ID                                   state, progress or result
GET    /builds/ID/events                            server-sent events: begin, output, gap, progress, end
DELETE /builds/ID                                   cancel it, whether it runs or waits

Who reaches this app runs commands as any user: it answers on this machine only, and your login goes in front of it.
"""

import asyncio
import codecs
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import uvicorn
from celery import states, uuid
from celery.exceptions import BackendError
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

sys.path.insert(0, str(Path(__file__).parents[1]))

from pool import ConfigError, InvalidKey, Piece, afollow, check_key
from tasks import run_build
from worker_config import app

PATIENCE = 5.0  # seconds for Redis and the broker to answer a request
QUIET = 1.0  # seconds without output after which the progress is told; it also keeps proxies from hanging up
AWAY = (RedisError, BackendError, OperationalError, TimeoutError)

# A worker waits for Redis as long as it takes. Who waits for a web page is better told that Redis is away.
app.conf.update(result_backend_always_retry=False, redis_socket_timeout=PATIENCE)


async def ask(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Make a call of Celery, which blocks, in a thread. After a `TimeoutError` it goes on there, and may succeed."""
    async with asyncio.timeout(PATIENCE):
        return await asyncio.to_thread(call, *args, **kwargs)


async def start(request: Request) -> Response:
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":  # a foreign page sends others
        raise HTTPException(400, "the content type must be application/json")
    try:
        wanted = await request.json()
        user, cmd = wanted["user"], wanted["cmd"]
    except (ValueError, LookupError, TypeError):
        raise HTTPException(400, 'the body must be a JSON object with "user" and "cmd"') from None
    if not isinstance(cmd, str) or not cmd.strip():
        raise HTTPException(400, f"cmd={cmd!r}: must be a command")
    build, key = uuid(), check_key(user)
    # Celery cannot tell a task that waits from one that never was, unless something is stored of it.
    await ask(app.backend.store_result, build, None, states.PENDING)
    await ask(run_build.apply_async, (key, cmd), task_id=build)
    where = f"/builds/{build}"
    return JSONResponse({"id": build, "build": where, "events": f"{where}/events"}, 202, {"Location": where})


def look(build: str) -> dict[str, Any]:
    """Tell what is known of a build."""
    if not app.backend.task_result_exists(build):
        raise HTTPException(404, f"no build {build!r}, or its result has expired")
    meta = app.backend.get_task_meta(build)
    told, result = {"id": build, "state": meta["status"]}, meta["result"]
    if isinstance(result, Exception):  # CommandFailed has an exit code
        return {**told, "error": f"{type(result).__name__}: {result}", "exit_code": getattr(result, "exit_code", None)}
    if told["state"] == states.SUCCESS:
        return {**told, "exit_code": result["exit_code"], "result": result}
    return {**told, "progress": result} if told["state"] == "PROGRESS" else told


async def status(request: Request) -> Response:
    return JSONResponse(await ask(look, request.path_params["build"]))


def stop(build: str) -> dict[str, Any]:
    """Have the nodes cancel a build: the one that runs it ends it, the others will not start it."""
    state = look(build)["state"]
    if state in states.READY_STATES:
        raise HTTPException(409, f"build {build} has ended: {state}")
    arguments = {"task_id": build, "reason": "cancelled on the web"}
    replies = app.control.broadcast("pool_cancel", arguments, reply=True, timeout=1.0)
    found = [answer.get("found") for reply in replies for answer in reply.values()]
    if not found:
        raise HTTPException(503, "no node answers")
    return {"id": build, "cancelled": "running" if "running" in found else "waiting"}


async def cancel(request: Request) -> Response:
    return JSONResponse(await ask(stop, request.path_params["build"]), 202)


async def events(request: Request) -> Response:
    build = request.path_params["build"]
    await ask(look, build)  # 404 and 503 now, not in mid-stream
    stream = tell(build, afollow(build, app=app), Transcript(request.headers.get("last-event-id")))
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream, media_type="text/event-stream", headers=headers)


async def tell(build: str, pieces: AsyncIterator[Piece], transcript: "Transcript") -> AsyncIterator[str]:
    """Yield the events of a build until it has ended. A client that goes away cancels this, and so its follower."""
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(1)  # a slow client holds up its own follower only
    follower = asyncio.create_task(read(pieces, queue))
    try:
        while True:
            try:
                async with asyncio.timeout(QUIET):
                    piece = await queue.get()
            except TimeoutError:
                with suppress(*AWAY):  # the follower waits for Redis to come back
                    yield event("progress", await ask(look, build))
                continue
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                break
            for each in transcript.events(piece):
                yield each
        # Celery stores the result just after the output has ended.
        while (told := await ask(look, build))["state"] not in states.READY_STATES:  # noqa: ASYNC110 - elsewhere
            await asyncio.sleep(0.05)
        yield event("end", {name: value for name, value in told.items() if name != "result"})
    finally:
        follower.cancel()


async def read(pieces: AsyncIterator[Piece], queue: "asyncio.Queue[Piece | Exception | None]") -> None:
    """Follow in a task of its own: however that ends, its connection to Redis is closed."""
    last = None
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                await queue.put(piece)
    except Exception as error:
        last = error
    await queue.put(last)


def event(name: str, data: dict[str, Any], last_id: dict[str, int] | None = None) -> str:
    mark = "" if last_id is None else f"id: {json.dumps(last_id)}\n"
    return f"{mark}event: {name}\ndata: {json.dumps(data)}\n\n"


class Transcript:
    """Makes events of what a build writes. *last_id*: of the last one that a client had before it came back."""

    def __init__(self, last_id: str | None) -> None:
        self.told: dict[str, int] = {}  # attempts, and bytes of each one's streams: this is the id of an event
        with suppress(ValueError, TypeError, AttributeError, OverflowError):  # an id that is none: from the beginning
            self.told = {name: int(count) for name, count in json.loads(last_id or "{}").items()}

    def events(self, piece: Piece) -> Iterator[str]:
        if piece.kind == "output":
            yield from self.output(piece)
        elif piece.kind == "begin":  # once more for a build that is retried, or whose node has died
            self.attempt = piece.facts["attempt"]
            self.decoders: dict[str, codecs.IncrementalDecoder] = {}
            if self.attempt not in self.told:
                self.told[self.attempt] = 0
                yield event("begin", {"node": piece.facts.get("node")}, self.told)

    def output(self, piece: Piece) -> Iterator[str]:
        name = f"{self.attempt} {piece.stream}"
        told, end = self.told.get(name, 0), piece.offset + len(piece.data)
        begin = max(told, piece.offset)
        if gap := begin - max(told, piece.offset - piece.skipped):
            self.told[name] = begin
            self.decoders.pop(piece.stream, None)
            yield event("gap", {"stream": piece.stream, "bytes": gap}, self.told)
        decoder = self.decoders.setdefault(piece.stream, codecs.getincrementaldecoder("utf-8")("replace"))
        if text := decoder.decode(piece.data[begin - piece.offset :]):  # half a character waits for its rest
            self.told[name] = end - len(decoder.getstate()[0])
            yield event("output", {"stream": piece.stream, "text": text}, self.told)


async def page(_: Request) -> Response:
    return FileResponse(Path(__file__).with_name("web.html"))


async def failed(_: Request, error: Exception) -> Response:
    """Answer with the reason."""
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    if isinstance(error, AWAY):
        reason = f"Redis or the broker does not answer: {error or type(error).__name__}"
        return JSONResponse({"error": reason}, 503)
    return JSONResponse({"error": str(error)}, 400 if isinstance(error, InvalidKey) else 500)


web = Starlette(
    routes=[
        Route("/", page),
        Route("/builds", start, methods=["POST"]),
        Route("/builds/{build}", status),
        Route("/builds/{build}", cancel, methods=["DELETE"]),
        Route("/builds/{build}/events", events),
    ],
    middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])],
    exception_handlers=dict.fromkeys((HTTPException, InvalidKey, ConfigError, *AWAY), failed),
)

if __name__ == "__main__":
    uvicorn.run(web, port=int(sys.argv[1]) if len(sys.argv) > 1 else 8000, timeout_graceful_shutdown=2)
