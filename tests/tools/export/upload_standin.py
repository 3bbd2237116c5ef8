"""The part of the Hub's protocol that an upload uses, over real HTTP: what arrives is kept in
`repos`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

from hub.standin import StandIn, git_hash, sha256

USER, TOKEN = "ada", "hf_abcdefghijklmnop"


class UploadHub(StandIn):
    """`with UploadHub() as hub: hub.url`.

    Attributes:
        stored: repository -> branch -> path -> contents.
        private: repository -> whether it is.
        commits: (repository, branch, message, paths of the files in it).
        refuse: (part of a path, status): such requests are answered so.
    """

    def __init__(self, refuse: tuple[str, int] | None = None) -> None:
        super().__init__({})
        self.stored: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[tuple[str, str, str, list[str]]] = []
        self.large: dict[str, bytes] = {}  # sha256 -> contents, of LFS
        self.refuse = refuse
        for method in ("POST", "PUT"):
            setattr(
                self.server.RequestHandlerClass,
                f"do_{method}",
                lambda http: self.answer(http, body=True),
            )

    def answer(self, http: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlsplit(http.path).path)
        sent = http.rfile.read(int(http.headers.get("Content-Length") or 0))
        token = (http.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.refuse and self.refuse[0] in path:
            return self.error(http, self.refuse[1], "", f"refused, said the Hub to {token}")
        if path.startswith("/storage/"):
            self.large[path.rpartition("/")[2]] = sent
            return self.reply(http, {})
        if token != TOKEN:
            return self.error(http, 401, "", "Invalid user token.")
        if path == "/api/whoami-v2":
            return self.reply(http, {"type": "user", "name": USER, "orgs": []})
        if path == "/api/repos/create":
            return self.create(http, json.loads(sent))
        if path == "/api/validate-yaml":
            return self.reply(http, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(http, json.loads(sent))
        found = re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(?:/(branch|preupload|commit|revision)/(.+))?", path
        )
        if not found or found[1] not in self.stored:
            return self.error(http, 404, "RepoNotFound", "Repository not found")
        repo, what, branch = found[1], found[2], found[3] or "main"
        if what == "branch":
            exists = branch in self.stored[repo]
            self.stored[repo].setdefault(branch, dict(self.stored[repo]["main"]))
            return (
                self.error(http, 409, "", "Reference already exists")
                if exists
                else self.reply(http, {})
            )
        if branch not in self.stored[repo]:
            return self.error(http, 404, "RevisionNotFound", "Invalid rev id")
        if what == "preupload":
            return self.preupload(http, repo, branch, json.loads(sent))
        if what == "commit":
            return self.commit(http, repo, branch, sent)
        return self.reply(http, {"_id": "1", "id": repo, "modelId": repo, "private": self.private[repo],
                                 "sha": self.sha(repo, branch), "tags": [], "siblings": []})  # fmt: skip

    def reply(self, http: BaseHTTPRequestHandler, value: object, *, status: int = 200) -> None:
        http.send_response(status)
        http.send_header("Content-Type", "application/json")
        self.end(http, json.dumps(value).encode(), body=True)

    def sha(self, repo: str, branch: str) -> str:
        count = sum(commit[:2] == (repo, branch) for commit in self.commits)
        return hashlib.sha1(f"{repo} {count}".encode()).hexdigest()

    def create(self, http: BaseHTTPRequestHandler, asked: dict) -> None:
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        exists = repo in self.stored
        if not exists:  # huggingface_hub 1.x says `private`, 2.x `visibility`
            private = asked.get("private", asked.get("visibility") == "private")
            self.stored[repo], self.private[repo] = {"main": {}}, private
        self.reply(http, {"url": f"{self.url}/{repo}", "name": repo}, status=409 if exists else 200)

    def preupload(self, http: BaseHTTPRequestHandler, repo: str, branch: str, asked: dict) -> None:
        there = self.stored[repo][branch]
        files = []
        for file in asked["files"]:
            name = file["path"]
            large = name.endswith(".safetensors")
            data = there.get(name)
            oid = None if data is None else sha256(data) if large else git_hash(data)
            files.append(
                {
                    "path": name,
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": oid,
                }
            )
        self.reply(http, {"files": files})

    def batch(self, http: BaseHTTPRequestHandler, asked: dict) -> None:
        objects = [
            {
                **item,
                "actions": {"upload": {"href": f"{self.url}/storage/{item['oid']}", "header": {}}},
            }
            for item in asked["objects"]
        ]
        self.reply(http, {"transfer": "basic", "objects": objects})

    def commit(self, http: BaseHTTPRequestHandler, repo: str, branch: str, sent: bytes) -> None:
        lines = [json.loads(line) for line in sent.splitlines()]
        names = []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.stored[repo][branch][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.stored[repo][branch][value["path"]] = self.large[value["oid"]]
            names += [value["path"]] if "path" in value else []
        message = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        self.commits.append((repo, branch, message, sorted(names)))
        oid = self.sha(repo, branch)
        self.reply(
            http,
            {"success": True, "commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid},
        )
