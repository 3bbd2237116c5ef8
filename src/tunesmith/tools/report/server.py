"""The live page: a server that only this machine reaches, and only with the token of its address.

It listens on 127.0.0.1. Every path begins with the token; a
request without it, or for a host name that is not this machine's (a page elsewhere whose name was
bound to 127.0.0.1), gets an empty answer. The page loads from here alone, by its
Content-Security-Policy too.
"""

import asyncio
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from importlib import resources

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn import Config, Server

from tunesmith.errors import UsageError
from tunesmith.reader.curves import curves
from tunesmith.reader.run_files import RunFiles, label_apart, to_json
from tunesmith.tools.report.run_list import Row, RunList

# At any port: `ssh -L` may come by another one.
HOSTS = ("127.0.0.1", "localhost")
# Seconds between two looks at the runs.
POLL_SECONDS = 1.0
# Of one core, at most, goes into curves without a request: those of a long run come less often.
MAX_CORE_SHARE = 0.02
# Seconds after which a line is sent to find out whether the page is still there.
QUIET_SECONDS = 15.0
# Points of one series, at most.
MAX_POINTS = 4000
# Seconds of reading between two messages to the page that lists runs.
BATCH_SECONDS = 0.3
# Pages of runs whose records stay in memory for a list, and runs of such a page.
MAX_PAGES = 4
MAX_RUNS = 16
JSON = "application/json"
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Lets requests through that name the token and this machine, and adds HEADERS to answers."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app = app
        self.token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["method"] != "GET" or not self._is_permitted(scope):
            await Response(status_code=404)(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _is_permitted(self, scope: Scope) -> bool:
        """Tell if the request is for this machine's name, and its path begins with the token."""
        hosts = Headers(scope=scope).getlist("host")
        if len(hosts) != 1:
            return False
        host = hosts[0].rpartition(":")[0] or hosts[0]  # without the port
        token = scope["path"][1:].partition("/")[0].encode()
        return host in HOSTS and secrets.compare_digest(token, self.token)


class LivePage:
    """A sender of events to open pages, which looks at runs only while there are any."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.ended = False
        self._open_pages = 0

    def reader(self) -> Callable[[], str]:
        """For one open page: what gives the JSON to send it now."""
        raise NotImplementedError

    async def look_once(self) -> None:
        """Read what the runs have added, if a page is open."""
        raise NotImplementedError

    def routes(self, static: StaticFiles) -> list[BaseRoute]:
        raise NotImplementedError

    async def events(self, request: Request) -> Response:
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        self._open_pages += 1
        read = self.reader()
        try:
            while not self.ended:
                # Noted before the state is read: a change during the read is not missed.
                changed = self.changed
                yield f"data: {await asyncio.to_thread(read)}\n\n"
                while not changed.is_set():
                    with suppress(TimeoutError):
                        await asyncio.wait_for(changed.wait(), QUIET_SECONDS)
                        continue
                    yield ": still here\n\n"
        finally:
            self._open_pages -= 1

    async def look(self) -> None:
        while not self.ended:
            await self.look_once()
            await asyncio.sleep(POLL_SECONDS)

    def wake_pages(self) -> None:
        """Let each open page send the state as it is now."""
        previous = self.changed
        self.changed = asyncio.Event()
        previous.set()

    def end(self) -> None:
        self.ended = True
        self.wake_pages()


class Page(LivePage):
    """The data of a page with the curves of some runs."""

    def __init__(self, runs: Sequence[RunFiles]) -> None:
        super().__init__()
        label_apart(runs)
        self.runs = runs
        # Over what the runs hold: threads answer requests.
        self.lock = threading.Lock()
        # CPU time of the last answer with curves: the page asks the less often, the longer it took.
        self._curves_seconds = 0.0

    def routes(self, static: StaticFiles) -> list[BaseRoute]:
        return [*routes_of(lambda _: self), Mount("/", static)]

    def reader(self) -> Callable[[], str]:
        return self.state

    async def look_once(self) -> None:
        if self._open_pages and await asyncio.to_thread(self._refresh):
            self.wake_pages()

    def _refresh(self) -> bool:
        with self.lock:
            changes = [run.refresh() for run in self.runs]
        return any(changes)

    def state(self) -> str:
        """Return the status of the runs as JSON.

        `pause`: the seconds that the page lets pass before it asks for curves of its own accord.
        """
        with self.lock:
            runs = [run.status() for run in self.runs]
            return to_json({"runs": runs, "pause": self._curves_seconds / MAX_CORE_SHARE})

    def html(self, request: Request) -> Response:
        with self.lock:
            # Its comparison loads numpy, which a server without a browser does without.
            from tunesmith.reader.page import render_report

            return HTMLResponse(render_report(self.runs, live=True))

    def curves(self, request: Request) -> Response:
        """The charts, or the first `panels`.

        `x` is step, tokens or seconds; `from` and `to` bound it, with so many `points`.
        """
        low, high, points = _window(request, "points", 800, MAX_POINTS)
        most = _window(request, "panels", 1000, 1000)[2]
        axis = request.query_params.get("x", "step")
        start = time.thread_time()
        with self.lock:
            body = to_json(curves(self.runs, axis, low, high, points, most))
        self._curves_seconds = time.thread_time() - start
        return Response(body, media_type=JSON)

    def texts(self, request: Request) -> Response:
        with self.lock:
            body = to_json([run.texts() for run in self.runs])
        return Response(body, media_type=JSON)


class ListPage(LivePage):
    """The data of the page that lists all runs, and of the pages that are opened from it."""

    def __init__(self, runs: RunList) -> None:
        super().__init__()
        self.runs = runs
        # By the runs' numbers, the last one opened at the end.
        self._pages: dict[tuple[int, ...], Page] = {}
        self._lock = threading.Lock()

    def routes(self, static: StaticFiles) -> list[BaseRoute]:
        page = str(resources.files("tunesmith.reader") / "static" / "list.html")
        return [
            Route("/", lambda _: FileResponse(page)),
            Route("/events", self.events),
            Mount("/runs/{numbers}", routes=[*routes_of(self.page_of), Mount("/", static)]),
            Mount("/", static),
        ]

    def reader(self) -> Callable[[], str]:
        """Each time the rows that have changed since the last."""
        sent: list[Row] = []

        def read() -> str:
            # A row that changes is a new one.
            rows = [row for row in list(self.runs.rows.values()) if "state" in row]
            earlier = {id(row) for row in sent}
            sent[:] = rows
            return to_json({"rows": [row for row in rows if id(row) not in earlier]})

        return read

    async def look_once(self) -> None:
        if self._open_pages:
            looks = self.runs.refresh()
            # Many runs take seconds at first: the page shows those that were read so far.
            is_over = False
            while not is_over:
                changed, is_over = await asyncio.to_thread(_look_for_a_while, looks)
                if changed:
                    self.wake_pages()
        for page in list(self._pages.values()):
            await page.look_once()

    def page_of(self, request: Request) -> Page:
        """The page of the runs that an address names, such as runs/3,7; 404 for others."""
        try:
            numbers = tuple(map(int, request.path_params["numbers"].split(",")[:MAX_RUNS]))
        except ValueError:
            raise HTTPException(404) from None
        with self._lock:
            page = self._pages.pop(numbers, None) or self._open(numbers)
            self._pages[numbers] = page
            # The records of a run fill memory: those of the page opened longest ago are dropped.
            while len(self._pages) > MAX_PAGES:
                self._pages.pop(next(iter(self._pages))).end()
        return page

    def _open(self, numbers: Sequence[int]) -> Page:
        folders = dict(enumerate(self.runs.rows))
        try:
            return Page([RunFiles(folders[number]) for number in numbers])
        except (KeyError, UsageError):  # a run that is not there, or gone
            raise HTTPException(404) from None

    def end(self) -> None:
        super().end()
        for page in self._pages.values():
            page.end()


def _look_for_a_while(looks: Iterator[bool]) -> tuple[bool, bool]:
    """Tell whether some of the next runs changed, and whether these were the last."""
    end = time.monotonic() + BATCH_SECONDS
    changed = False
    for has_changed in looks:
        changed |= has_changed
        if time.monotonic() > end:
            return changed, False
    return changed, True


def routes_of(page_of: Callable[[Request], Page]) -> list[BaseRoute]:
    """The data of a page that the request names."""

    async def events(request: Request) -> Response:
        page = await asyncio.to_thread(page_of, request)
        return await page.events(request)

    return [
        Route("/", lambda request: page_of(request).html(request)),
        Route("/events", events),
        Route("/curves", lambda request: page_of(request).curves(request)),
        Route("/texts", lambda request: page_of(request).texts(request)),
    ]


def _window(request: Request, name: str, default: int, most: int) -> tuple[float, float, int]:
    """`from`, `to` and a count of a request; 400 for what is no number."""
    query = request.query_params
    try:
        low = float(query.get("from", "-inf"))
        high = float(query.get("to", "inf"))
        count = int(query.get(name, default))
    except ValueError:
        raise HTTPException(400) from None
    return low, high, min(most, max(1, count))


def make_app(page: LivePage, token: str) -> Guard:
    """The page, its static files and its data, below `/TOKEN/`."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(page.look())
        yield
        task.cancel()

    routes = page.routes(StaticFiles(packages=[("tunesmith.reader", "static")]))
    app = Starlette(routes=[Mount(f"/{token}", routes=routes)], lifespan=lifespan)
    return Guard(app, token)


class WatchServer(Server):
    """Tells the pages of ctrl-C: their requests for events would never end by themselves."""

    page: LivePage

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.page.end()
        await super().shutdown(sockets)


def serve_page(page: LivePage, on_ready: Callable[[str], object], *, port: int = 0) -> None:
    """Serve until SIGINT or SIGTERM.

    `on_ready` is called with the address once it can be opened. Port 0 is one that the kernel
    picks; UsageError if another one cannot be had.
    """
    token = secrets.token_urlsafe(24)
    with socket.socket() as listener:
        # Connections of a server that has just ended would hold its port for a minute.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen()
        except OSError as error:
            raise UsageError(
                f"port {port} cannot be used",
                where="--port",
                why=str(error.strerror),
                fix="name another, or leave --port out to take a free one",
            ) from error
        on_ready(f"http://127.0.0.1:{listener.getsockname()[1]}/{token}/")
        # No web sockets, no forwarded addresses; a log of requests would name the token.
        config = Config(
            make_app(page, token),
            ws="none",
            proxy_headers=False,
            log_level="critical",
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=2,
        )
        server = WatchServer(config)
        server.page = page
        server.run(sockets=[listener])
