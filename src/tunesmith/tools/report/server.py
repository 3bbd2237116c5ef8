"""The server of `watch`: one page, which only this machine reaches, with the token of its URL.

It listens on 127.0.0.1 and reads the runs when the page asks, so that a watch without an open page
does nothing. A request without the token, or with another host name (a page elsewhere whose name
was bound to 127.0.0.1), gets an empty answer. The server has no files: its only path is the page.
"""

import hashlib
import secrets
import socket
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import Receive, Scope, Send
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


class LivePage:
    """The application: the page of some runs, rendered again when their files have changed.

    It only answers GET and HEAD requests with the token and this machine's name.
    """

    def __init__(self, runs: Sequence[RunFiles], token: str) -> None:
        self.runs = runs
        self.token = token.encode()
        self._version = ""
        self._html = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = Response(status_code=404)
        if self._is_permitted(scope):
            response = self._answer(Request(scope))
            response.headers.update(HEADERS)
        await response(scope, receive, send)

    def _is_permitted(self, scope: Scope) -> bool:
        """Return whether the host is this machine and the path begins with the token."""
        hosts = Headers(scope=scope).getlist("host")
        if scope["method"] not in ("GET", "HEAD") or len(hosts) != 1:
            return False
        host = hosts[0].rpartition(":")[0] or hosts[0]  # without the port
        token = scope["path"][1:].partition("/")[0].encode()
        return host in HOSTS and secrets.compare_digest(token, self.token)

    def _answer(self, request: Request) -> Response:
        """Return the page, or 304 if the browser has its newest version."""
        # The comparison loads numpy, which a server without a browser does not need.
        from tunesmith.reader.page import render_page

        if request.scope["path"] != f"/{self.token.decode()}/":
            return Response(status_code=404)
        signature = repr([run.signature() for run in self.runs])
        version = f'"{hashlib.sha256(signature.encode()).hexdigest()}"'
        headers = {"etag": version}
        if request.headers.get("if-none-match") == version:
            return Response(status_code=304, headers=headers)
        if version != self._version:
            for run in self.runs:
                run.refresh()
            self._html = render_page(self.runs, live=True)
            self._version = version
        return HTMLResponse(self._html, headers=headers)


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
            LivePage(runs, token),
            lifespan="off",
            ws="none",
            proxy_headers=False,
            log_level="critical",
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=2,
        )
        Server(config).run(sockets=[listener])
