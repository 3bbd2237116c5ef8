"""The live page: a server that only this machine reaches, and only with the token of its address.

It listens on 127.0.0.1, at a port that the kernel picks. Every path begins with the token; a request without it, or for a
host name that is not this machine's (a page elsewhere whose name was bound to 127.0.0.1), gets an empty answer. The page
loads from here alone, by its Content-Security-Policy too.
"""

import asyncio
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn import Config, Server

from tunesmith.watch.feed import WatchedRun, curves, to_json

HOSTS = (b"127.0.0.1", b"localhost")  # any port: `ssh -L` may come by another one
POLL = 1.0  # seconds between two looks at the runs
SHARE = 0.02  # of one core, at most, goes into curves that nobody asked for: those of a long run come less often
QUIET = 15.0  # seconds after which a line is sent to find out whether the page is still there
POINTS = 4000  # of one series, at most
JSON = "application/json"
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Lets requests through that name the token and this machine, and adds HEADERS to the answers."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        hosts = [value.rpartition(b":")[0] or value for name, value in scope["headers"] if name == b"host"]
        given = scope["path"][1:].partition("/")[0].encode()
        known = len(hosts) == 1 and hosts[0] in HOSTS and secrets.compare_digest(given, self.token)
        if not known or scope["method"] != "GET":
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [row for row in message["headers"] if row[0].decode() not in HEADERS] + ours
            await send(message)

        await self.app(scope, receive, guarded)


class Page:
    """The page's data, and the task that looks at the runs while a page is open."""

    def __init__(self, runs: Sequence[WatchedRun]) -> None:
        self.runs = runs
        self.lock = threading.Lock()  # over what the runs hold, for requests are answered by threads
        self.changed = asyncio.Event()
        self.ended = False
        self._open, self._cost = 0, 0.0

    def state(self) -> str:
        """Where the runs stand, and the seconds that the page lets pass before it asks for curves of its own accord."""
        with self.lock:
            return to_json({"runs": [run.status() for run in self.runs], "pause": self._cost / SHARE})

    def curves(self, request: Request) -> Response:
        """The charts, or the first `panels`: `x` is step, tokens or seconds, `from` and `to` bound it, with so many `points`."""
        low, high, points = _window(request, "points", 800, POINTS)
        most = _window(request, "panels", 1000, 1000)[2]
        began = time.thread_time()
        with self.lock:
            body = to_json(curves(self.runs, request.query_params.get("x", "step"), low, high, points, most))
        self._cost = time.thread_time() - began
        return Response(body, media_type=JSON)

    def table(self, request: Request) -> Response:
        """The records of a window of steps, `rows` of them."""
        window = _window(request, "rows", 25, POINTS)
        with self.lock:
            return Response(to_json([run.table(*window) for run in self.runs]), media_type=JSON)

    def texts(self, request: Request) -> Response:
        with self.lock:
            return Response(to_json([run.texts() for run in self.runs]), media_type=JSON)

    async def events(self, request: Request) -> Response:
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        self._open += 1
        try:
            while not self.ended:
                told = self.changed
                yield f"data: {await asyncio.to_thread(self.state)}\n\n"
                while not told.is_set():
                    with suppress(TimeoutError):
                        await asyncio.wait_for(told.wait(), QUIET)
                        continue
                    yield ": still here\n\n"
        finally:
            self._open -= 1

    async def look(self) -> None:
        """Read what the runs have added, for as long as a page is open."""
        while not self.ended:
            if self._open:
                seen = [await asyncio.to_thread(run.refresh, self.lock) for run in self.runs]
                if any(seen):
                    self.tell()
            await asyncio.sleep(POLL)

    def tell(self) -> None:
        told, self.changed = self.changed, asyncio.Event()
        told.set()

    def end(self) -> None:
        self.ended = True
        self.tell()


def _window(request: Request, name: str, usual: int, most: int) -> tuple[float, float, int]:
    """`from`, `to` and a count of a request; 400 for what is no number."""
    given = request.query_params
    try:
        low, high = float(given.get("from", "-inf")), float(given.get("to", "inf"))
        return low, high, min(most, max(1, int(given.get(name, usual))))
    except ValueError:
        raise HTTPException(400) from None


def make_app(page: Page, token: str) -> Guard:
    """The page, its static files and its data, below `/TOKEN/`."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(page.look())
        yield
        task.cancel()

    static = StaticFiles(packages=[("tunesmith.watch", "static"), ("tunesmith.report", "static")], html=True)
    data = [page.events, page.curves, page.table, page.texts]
    below = [*(Route(f"/{answer.__name__}", answer) for answer in data), Mount("/", static)]
    return Guard(Starlette(routes=[Mount(f"/{token}", routes=below)], lifespan=lifespan), token)


class WatchServer(Server):
    """On ctrl-C the pages are told first: their requests for events would never end by themselves."""

    page: Page

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.page.end()
        await super().shutdown(sockets)


def serve_page(runs: Sequence[WatchedRun], told: Any) -> None:
    """Serve until SIGINT or SIGTERM. `told` is called with the address once it can be opened."""
    token, page = secrets.token_urlsafe(24), Page(runs)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        told(f"http://127.0.0.1:{listener.getsockname()[1]}/{token}/")
        # No web sockets, no forwarded addresses, and no log of requests, which would name the token.
        config = Config(
            make_app(page, token), ws="none", proxy_headers=False, log_level="critical", server_header=False, date_header=False,
            timeout_graceful_shutdown=2,
        )  # fmt: skip
        server = WatchServer(config)
        server.page = page
        server.run(sockets=[listener])
