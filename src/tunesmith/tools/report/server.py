"""The live page: a server that only this machine reaches, and only with the token of its address.

It listens on 127.0.0.1, and reads the runs when a page asks for them: a watch without an open page
costs nothing. Every path begins with the token; a request without it, or for a host name that is
not this machine's (a page elsewhere whose name was bound to 127.0.0.1), gets an empty answer. The
page loads from here alone, by its Content-Security-Policy too.
"""

import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import resources

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn import Config, Server

from tunesmith.errors import UsageError
from tunesmith.reader.curves import curves
from tunesmith.reader.run_files import RunFiles, label_apart, to_json
from tunesmith.tools.report.run_list import RunList

# At any port: `ssh -L` may come by another one.
HOSTS = ("127.0.0.1", "localhost")
# Points of one series, at most.
MAX_POINTS = 4000
# Pages of runs whose records stay in memory for a list.
MAX_PAGES = 4
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


class Page:
    """The data of a page of some runs; each answer is read when it is asked for."""

    def __init__(self, runs: Sequence[RunFiles]) -> None:
        label_apart(runs)
        self.runs = runs
        # Over what the runs hold: threads answer requests.
        self._lock = threading.Lock()

    @contextmanager
    def _read(self) -> Iterator[Sequence[RunFiles]]:
        with self._lock:
            for run in self.runs:
                run.refresh()
            yield self.runs

    def html(self) -> str:
        """The page as it is now."""
        # Its comparison loads numpy, which a server without a browser does without.
        from tunesmith.reader.page import render_report

        with self._read() as runs:
            return render_report(runs, live=True)

    def state(self) -> str:
        """The status of the runs as JSON."""
        with self._read() as runs:
            return to_json({"runs": [run.status() for run in runs]})

    def curves(self, request: Request) -> str:
        """The charts as JSON: `x` is step, tokens or seconds; `from` and `to` bound it, with so
        many `points`; 400 for what is no number.
        """
        query = request.query_params
        try:
            low = float(query.get("from", "-inf"))
            high = float(query.get("to", "inf"))
            points = int(query.get("points", 800))
        except ValueError:
            raise HTTPException(400) from None
        points = min(MAX_POINTS, max(1, points))
        with self._read() as runs:
            return to_json(curves(runs, query.get("x", "step"), low, high, points))

    def texts(self) -> str:
        """The samples of the runs as JSON."""
        with self._read() as runs:
            return to_json([run.texts() for run in runs])


class ListPage:
    """The data of the page that lists all runs, and of the pages that are opened from it."""

    def __init__(self, runs: RunList) -> None:
        self.runs = runs
        self._lock = threading.Lock()
        # The records of a run fill memory: those of the pages opened last are kept.
        self._pages = lru_cache(MAX_PAGES)(self._open)

    def rows(self, request: Request) -> str:
        """The rows that changed after the look `since`, as JSON, with the number of this one.

        400 for what is no number.
        """
        try:
            since = int(request.query_params.get("since", 0))
        except ValueError:
            raise HTTPException(400) from None
        with self._lock:
            self.runs.refresh()
            rows = [row for row in self.runs.rows.values() if row["look"] > since]
            return to_json({"look": self.runs.looks, "rows": rows})

    def page_of(self, request: Request) -> Page:
        """The page of the runs that an address names, such as runs/3,7; 404 for others."""
        return self._pages(request.path_params["numbers"])

    def _open(self, numbers: str) -> Page:
        with self._lock:
            folders = {row["id"]: path for path, row in self.runs.rows.items()}
        try:
            return Page([RunFiles(folders[int(number)]) for number in numbers.split(",")])
        except (ValueError, KeyError, UsageError):  # a run that is not there, or gone
            raise HTTPException(404) from None


def _json(text: str) -> Response:
    return Response(text, media_type="application/json")


def _routes_of(page_of: Callable[[Request], Page], static: StaticFiles) -> list[BaseRoute]:
    """A page of runs that the request names, its data and its files."""
    return [
        Route("/", lambda request: HTMLResponse(page_of(request).html())),
        Route("/state", lambda request: _json(page_of(request).state())),
        Route("/curves", lambda request: _json(page_of(request).curves(request))),
        Route("/texts", lambda request: _json(page_of(request).texts())),
        Mount("/", static),
    ]


def make_app(page: Page | ListPage, token: str) -> Guard:
    """The page, its static files and its data, below `/TOKEN/`."""
    static = StaticFiles(packages=[("tunesmith.reader", "static")])
    if isinstance(page, Page):
        routes = _routes_of(lambda _: page, static)
    else:
        file = str(resources.files("tunesmith.reader") / "static" / "list.html")
        routes = [
            Route("/", lambda _: FileResponse(file)),
            Route("/rows", lambda request: _json(page.rows(request))),
            Mount("/runs/{numbers}", routes=_routes_of(page.page_of, static)),
            Mount("/", static),
        ]
    return Guard(Starlette(routes=[Mount(f"/{token}", routes=routes)]), token)


def serve_page(page: Page | ListPage, on_ready: Callable[[str], object], *, port: int = 0) -> None:
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
        Server(config).run(sockets=[listener])
