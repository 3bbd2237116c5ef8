"""HTTP server of the command `watch`. It serves one page, only on this machine.

The server listens on 127.0.0.1, and the URL contains a secret token. A request without the token
gets an empty answer. A request with another host name also gets an empty answer, because a
malicious web page could bind its own host name to 127.0.0.1 (DNS rebinding). The runs are read only
when the page requests them, so the server does nothing while no page is open. The server has no
other path than the page, and serves no files.
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
from tunesmith.tools.report.run_files import RunFiles

# Host names that a request may have. Any port is accepted, because `ssh -L` may forward another
# port.
HOSTS = ("127.0.0.1", "localhost")
# Headers of all answers. The page itself restricts 'unsafe-inline' further: it permits only the
# script with a given hash.
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
    """An ASGI application that serves the page about some runs.

    The page is rendered again if files of the runs have changed. Only GET and HEAD requests with
    the token and a permitted host name are answered.
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
        """Return whether the method, the host name and the token of a request are permitted."""
        hosts = Headers(scope=scope).getlist("host")
        if scope["method"] not in ("GET", "HEAD") or len(hosts) != 1:
            return False
        host = hosts[0].rpartition(":")[0] or hosts[0]  # without the port
        token = scope["path"][1:].partition("/")[0].encode()
        return host in HOSTS and secrets.compare_digest(token, self.token)

    def _answer(self, request: Request) -> Response:
        """Return the page, or status 304 if the browser already has the newest version."""
        # Import at the first request: the import loads numpy, which is not needed before.
        from tunesmith.tools.report.page import render_page

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
    """Serve the page about runs until SIGINT or SIGTERM.

    Args:
        on_ready: a function that is called with the URL when the page can be opened.
        port: the port of the server. 0 means any free port.

    Raises:
        UsageError: if the port cannot be used.
    """
    token = secrets.token_urlsafe(24)
    with socket.socket() as listener:
        # Allow the port of a server that has just ended. Otherwise its old connections would block
        # the port for a minute.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen()
        except OSError as error:
            raise UsageError(
                f"port {port} cannot be used",
                where="--port",
                why=str(error.strerror),
                fix="use another port, or omit --port to use a free one",
            ) from error
        on_ready(f"http://127.0.0.1:{listener.getsockname()[1]}/{token}/")
        # Disable web sockets, forwarded addresses and the log of requests, which would contain the
        # token.
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
