"""A stand-in for the Hub on 127.0.0.1: the protocol of fetching a model, and its ways to fail.

Large files are answered with a redirect to another origin, as the Hub sends them to its content
network; that origin notes whether a token reached it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repo:
    """A model repository, and how it misbehaves."""

    files: dict[str, bytes]
    card: dict = field(default_factory=lambda: {"license": "apache-2.0"})
    large: set[str] = field(default_factory=lambda: {"model.safetensors"})
    gated: bool = False  # resolve answers 401 without a token, 403 with one
    granted: str = ""  # the token that a gated repository lets in
    failing: int = 0  # so many answers 503 come first
    # The next downloads of a large file break off after so many bytes
    cut: list[int] = field(default_factory=list)


@dataclass
class Seen:
    method: str
    path: str
    token: str | None


class StandIn:
    """`with StandIn({"owner/name": Repo(...)}) as hub: hub.url, hub.seen`."""

    def __init__(self, repos: dict[str, Repo]) -> None:
        self.repos, self.seen = repos, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self, body=True)

            def do_HEAD(self) -> None:
                outer.answer(self, body=False)

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:
                pass  # clients that are killed break their connections

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.url, self.network = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def __enter__(self) -> StandIn:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def downloads(self, name: str) -> list[Seen]:
        return [s for s in self.seen if s.method == "GET" and s.path.endswith(name)]

    def answer(self, http: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlsplit(http.path).path)
        token = (http.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.seen.append(Seen(http.command, path, token))
        api = re.fullmatch(
            r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)/?(.*))?", path
        )
        file = re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        network = re.fullmatch(r"/network/([^/]+/[^/]+)/(.+)", path)
        found = api or file or network
        repo = self.repos.get(found[1]) if found else None
        if repo is None:
            return self.error(http, 401, "RepoNotFound", "Repository not found")
        if repo.failing:
            repo.failing -= 1
            return self.error(http, 503, "", "busy")
        revision = (api[3] if api else file[2]) if not network else None
        if revision not in (None, "main", "v2", COMMIT):
            return self.error(http, 404, "RevisionNotFound", "Invalid rev id")
        if api:
            if api[2] == "tree" and "recursive=true" not in http.path.lower():
                return self.list_folder(http, repo, api[4])
            return self.describe(http, api[1], repo, tree=api[2] == "tree")
        name = found[found.lastindex]
        if name not in repo.files:
            return self.error(http, 404, "EntryNotFound", "Entry not found")
        if not network and repo.gated and token != repo.granted:
            return self.error(
                http, 403 if token else 401, "GatedRepo", "Access to this model is restricted"
            )
        if network:
            return self.send_large(http, repo, repo.files[name])
        return self.resolve(http, found[1], repo, name, body=body)

    def error(self, http: BaseHTTPRequestHandler, status: int, code: str, message: str) -> None:
        text = json.dumps({"error": message}).encode()
        http.send_response(status)
        if code:
            http.send_header("X-Error-Code", code)
        http.send_header("X-Error-Message", message)
        self.end(http, text, body=http.command != "HEAD")

    def end(self, http: BaseHTTPRequestHandler, data: bytes, *, body: bool) -> None:
        http.send_header("Content-Length", str(len(data)))
        http.end_headers()
        if body:
            http.wfile.write(data)

    def describe(self, http: BaseHTTPRequestHandler, name: str, repo: Repo, *, tree: bool) -> None:
        listed = [file_entry(n, data, repo) for n, data in repo.files.items()]
        answer: object = listed
        if not tree:
            answer = {
                "_id": "1", "id": name, "modelId": name, "sha": COMMIT, "private": False, "disabled": False,
                "gated": "manual" if repo.gated else False, "tags": [], "downloads": 0, "likes": 0,
                "cardData": repo.card, "siblings": listed,
            }  # fmt: skip
        http.send_response(200)
        http.send_header("Content-Type", "application/json")
        self.end(http, json.dumps(answer).encode(), body=True)

    def list_folder(self, http: BaseHTTPRequestHandler, repo: Repo, folder: str) -> None:
        """Answer with the files and folders in a folder, as `datasets` asks for them."""
        start = f"{folder}/" if folder else ""
        inside = {name: data for name, data in repo.files.items() if name.startswith(start)}
        if not inside:
            return self.error(http, 404, "EntryNotFound", "Entry not found")
        entries: dict[str, dict[str, object]] = {}
        for name, data in inside.items():
            first, _, rest = name.removeprefix(start).partition("/")
            path = f"{start}{first}"
            own = file_entry(name, data, repo)
            entries[path] = {"type": "directory", "path": path, "oid": "0"} if rest else own
        http.send_response(200)
        http.send_header("Content-Type", "application/json")
        return self.end(http, json.dumps([*entries.values()]).encode(), body=True)

    def resolve(
        self, http: BaseHTTPRequestHandler, owner: str, repo: Repo, name: str, *, body: bool
    ) -> None:
        data = repo.files[name]
        if name in repo.large:
            http.send_response(302)
            http.send_header("Location", f"{self.network}/network/{owner}/{name}?signature=s3cr3t")
            http.send_header("X-Linked-Etag", f'"{sha256(data)}"')
            http.send_header("X-Linked-Size", str(len(data)))
        else:
            http.send_response(200)
            http.send_header("ETag", f'"{git_hash(data)}"')
        http.send_header("X-Repo-Commit", COMMIT)
        if name in repo.large:
            return self.end(http, b"", body=False)
        return self.end(http, data, body=body)

    def send_large(self, http: BaseHTTPRequestHandler, repo: Repo, data: bytes) -> None:
        http.send_response(200)
        http.send_header("Content-Length", str(len(data)))
        http.end_headers()
        if repo.cut:
            data = data[: repo.cut.pop(0)]
            http.close_connection = True
        http.wfile.write(data)
        http.wfile.flush()


def file_entry(name: str, data: bytes, repo: Repo) -> dict[str, object]:
    size, git, lfs = len(data), git_hash(data), sha256(data)
    entry = {"type": "file", "path": name, "rfilename": name, "size": size}
    entry |= {"oid": git, "blobId": git}
    large = {"lfs": {"oid": lfs, "sha256": lfs, "size": size, "pointerSize": 134}}
    return entry | (large if name in repo.large else {})


def environment(folder: Path, hub: StandIn | None) -> dict[str, str]:
    """Without the settings of this machine, with caches in `folder`, and this Hub or none."""
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("HF_") and not key.lower().endswith("_proxy")
    }
    return clean | {
        "HF_HOME": str(folder / "home"),
        "TUNESMITH_CACHE": str(folder / "own"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9",
    }


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
