"""The server of `watch`: one page, which only this machine reaches, with the token of its URL.

It listens on 127.0.0.1 and reads the runs when the page asks, so that a watch without an open page
does nothing. A request without the token, or with another host name (a page elsewhere whose name
was bound to 127.0.0.1), gets an empty answer. The server has no files: its only path is the page.
"""

import hashlib
import secrets
import socket
import threading
from collections.abc import Callable, Sequence

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn import Config, Server

from tunesmith.errors import UsageError
from tunesmith.reader.run_files import RunFiles

# With any port, because `ssh -L` may forward another one.
HOSTS = ("127.0.0.1", "localhost")
# The page itself permits only its own script, by a hash.
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """An application that only answers GET and HEAD requests with the token and this machine's
    name, and adds HEADERS to the answers."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app = app
        self.token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["method"] not in ("GET", "HEAD") or not self._is_permitted(scope):
            await Response(status_code=404)(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _is_permitted(self, scope: Scope) -> bool:
        """Return whether the host is this machine and the path begins with the token."""
        hosts = Headers(scope=scope).getlist("host")
        if len(hosts) != 1:
            return False
        host = hosts[0].rpartition(":")[0] or hosts[0]  # without the port
        token = scope["path"][1:].partition("/")[0].encode()
        return host in HOSTS and secrets.compare_digest(token, self.token)


class LivePage:
    """The page of some runs, rendered again when their files have changed."""

    def __init__(self, runs: Sequence[RunFiles]) -> None:
        self._runs = runs
        self._version = ""
        self._html = ""
        # Requests are answered in threads.
        self._lock = threading.Lock()

    def answer(self, request: Request) -> Response:
        """Return the page, or 304 if the browser has its newest version."""
        with self._lock:
            signature = repr([run.signature() for run in self._runs])
            version = f'"{hashlib.sha256(signature.encode()).hexdigest()}"'
            headers = {"etag": version}
            if request.headers.get("if-none-match") == version:
                return Response(status_code=304, headers=headers)
            if version != self._version:
                self._html = self._render()
                self._version = version
            return HTMLResponse(self._html, headers=headers)

    def _render(self) -> str:
        # The comparison loads numpy, which a server without a browser does not need.
        from tunesmith.reader.page import render_page

        for run in self._runs:
            run.refresh()
        return render_page(self._runs, live=True)


def make_app(runs: Sequence[RunFiles], token: str) -> Guard:
    """Return the application that serves the page at `/TOKEN/`."""
    page = LivePage(runs)
    return Guard(Starlette(routes=[Route(f"/{token}/", page.answer)]), token)


def serve_page(
    runs: Sequence[RunFiles], on_ready: Callable[[str], object], *, port: int = 0
) -> None:
    """Serve the page of runs until SIGINT or SIGTERM.

    Args:
        on_ready: called with the URL when it can be opened.
        port: 0 lets the kernel pick a free one.

    Raises:
        UsageError: the port cannot be used.
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
            make_app(runs, token),
            ws="none",
            proxy_headers=False,
            log_level="critical",
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=2,
        )
        Server(config).run(sockets=[listener])
