"""`tunesmith push`: what arrives at the Hub, a stand-in that speaks its upload protocol, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError

from errors import check_error, check_shown, lines_with
from hub.standin import StandIn, environment, git_hash
from recipes import make_run, write_rows
from tunesmith.checkpoint.manifest import flush_files, write_manifest
from tunesmith.config.load import load_recipe
from tunesmith.start.run import train
from tunesmith.tools.export.gguf.export import export_adapter, export_gguf
from tunesmith.tools.export.merge import merge
from tunesmith.tools.export.push import _push_error
from warm import read_hub_settings, run_warm

pytestmark = pytest.mark.slow

MINE = "ada/my-run"
USER, TOKEN = "ada", "hf_abcdefghijklmnop"
REPO = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(branch|preupload|commit|revision)/(.+))?")


class UploadHub(StandIn):
    """`with UploadHub() as hub: hub.url`.

    Attributes:
        stored: repository -> branch -> path -> contents.
        private: repository -> whether it is.
        commits: (repository, branch, message, paths of the files in it).
    """

    def __init__(self) -> None:
        super().__init__({})
        self.stored: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[tuple[str, str, str, list[str]]] = []
        handler = self.server.RequestHandlerClass
        handler.do_POST = lambda http: self.answer(http, body=True)

    def answer(self, http: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlsplit(http.path).path)
        sent = http.rfile.read(int(http.headers.get("Content-Length") or 0))
        token = (http.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token != TOKEN:
            return self.error(http, 401, "", "Invalid user token.")
        if path == "/api/whoami-v2":
            return self.reply(http, {"type": "user", "name": USER, "orgs": []})
        if path == "/api/repos/create":
            return self.create(http, json.loads(sent))
        if path == "/api/validate-yaml":
            return self.reply(http, {"errors": [], "warnings": []})
        found = REPO.fullmatch(path)
        if not found or found[1] not in self.stored:
            return self.error(http, 404, "RepoNotFound", "Repository not found")
        repo, what, branch = found[1], found[2], found[3] or "main"
        if what == "branch":
            self.stored[repo].setdefault(branch, dict(self.stored[repo]["main"]))
            return self.reply(http, {})
        if branch not in self.stored[repo]:
            return self.error(http, 404, "RevisionNotFound", "Invalid rev id")
        if what == "preupload":
            there = self.stored[repo][branch]
            return self.reply(http, {"files": [
                {"path": name, "uploadMode": "regular", "shouldIgnore": False,
                 "oid": git_hash(there[name]) if name in there else None}
                for name in (file["path"] for file in json.loads(sent)["files"])
            ]})  # fmt: skip
        if what == "commit":
            return self.commit(http, repo, branch, [json.loads(line) for line in sent.splitlines()])
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

    def commit(
        self, http: BaseHTTPRequestHandler, repo: str, branch: str, lines: list[dict]
    ) -> None:
        files = [line["value"] for line in lines if line["key"] == "file"]
        for file in files:
            self.stored[repo][branch][file["path"]] = base64.b64decode(file["content"])
        message = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        self.commits.append((repo, branch, message, sorted(file["path"] for file in files)))
        oid, url = self.sha(repo, branch), f"{self.url}/{repo}/commit"
        self.reply(http, {"success": True, "commitUrl": f"{url}/{oid}", "commitOid": oid})


@pytest.fixture(scope="module")
def full(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of full fine-tuning."""
    folder = tmp_path_factory.mktemp("full")
    changes: dict[str, Any] = {"train": {"duration": "4 steps"}, "adapter": {"kind": "none"}}
    train(make_run(tiny, folder, held=False, **changes), quiet=True)
    return (folder / "run").rename(folder / "my-run")


def push(*words: object, hub: UploadHub | None = None, token: str | None = TOKEN, **env: str):
    base = environment(Path("/nonexistent"), hub) | {"NO_COLOR": "1"}
    base |= {"HF_TOKEN": token} if token else {}
    done = run_warm(["push", *words], env=base | env, prepare=read_hub_settings)
    assert "Traceback" not in done.stderr, done.stderr
    assert token is None or token not in done.stderr + done.stdout
    return done.returncode, done.stdout, done.stderr


def with_a_path(files: dict[str, bytes], folder: Path) -> list[str]:
    """The files that tell a path of this machine."""
    return [name for name, content in files.items() if str(folder).encode() in content]


def test_what_the_hub_refuses_is_told() -> None:
    for status, names, fix in (
        (401, ["token"], ["hf auth login"]),
        (403, [MINE], ["settings/tokens"]),
        (412, [MINE], []),
        (418, [418], []),
    ):
        response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
        error = _push_error(HfHubHTTPError("refused", response=response), MINE)
        check_error(error, names=[*names, "refused"], fix=fix)


def test_what_arrives_is_what_lies_there(full: Path) -> None:
    final = full / "final"
    with UploadHub() as hub:
        code, out, err = push(full, hub=hub)
        assert (code, out) == (0, f"{hub.url}/{MINE}\n"), err
        assert lines_with(err, "ada/my-run", "private")
        files = {str(p.relative_to(final)): p.read_bytes() for p in final.rglob("*")}
        del files["manifest.json"]
        assert hub.stored[MINE]["main"] == files
        assert hub.private == {MINE: True}
        assert hub.commits[0][2] == "Push my-run/final"
        assert ModelCard(files["README.md"].decode()).data.library_name == "transformers"
        assert not with_a_path(files, full.parent)

        assert push(full, hub=hub)[:2] == (0, f"{hub.url}/{MINE}\n")
        assert len(hub.commits) == 1
        card = final / "README.md"
        card.write_text(card.read_text() + "\nMy own words.\n")
        assert push(full, hub=hub)[0] == 0
        assert hub.commits[1][3] == ["README.md"], "only what has changed is sent"
        assert hub.stored[MINE]["main"]["README.md"] == card.read_bytes()


def test_a_checkpoint_is_pushed_without_its_state_and_with_a_card(full: Path) -> None:
    words = [full / "checkpoint-4", "--to", "team/bot", "--public", "--revision", "step-4"]
    with UploadHub() as hub:
        code, _, err = push(*words, hub=hub)
        assert code == 0, err
        assert hub.private == {"team/bot": False}
        files = hub.stored["team/bot"]["step-4"]
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
        assert not [name for name in files if "state" in name or "manifest" in name]
        assert "4 (0.67 epochs" in files["README.md"].decode()
        assert hub.stored["team/bot"]["main"] == {}


def test_an_adapter_whose_base_is_on_the_hub(trained: Path, tmp_path: Path) -> None:
    final = Path(shutil.copytree(trained, tmp_path / "my-run")) / "final"
    for file in (final.parent / "config.yaml", final / "adapter_config.json"):
        base = load_recipe(trained / "config.yaml").model.name
        file.write_text(file.read_text().replace(base, "someone/tiny"))
    write_manifest(final, 8, flush_files(final))
    (final / "README.md").unlink()
    with UploadHub() as hub:
        code, _, err = push(final.parent, hub=hub)
        assert code == 0, err
        files = hub.stored[MINE]["main"]
        weights = "adapter_model.safetensors"
        assert files[weights] == (final / weights).read_bytes()
        assert ModelCard(files["README.md"].decode()).data.base_model == "someone/tiny"


def test_an_adapter_on_a_folder_is_refused_and_its_merge_is_not(trained, tmp_path):
    with UploadHub() as hub:
        code, _, err = push(trained, hub=hub)
        assert (code, hub.stored) == (2, {})
        check_shown(err, fix=[f"tunesmith merge {trained}"])
        merge(trained, tmp_path / "merged", device="cpu")
        assert push(tmp_path / "merged", hub=hub)[0] == 0
        sent = hub.stored["ada/merged"]["main"]
    weights = (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert sent["model.safetensors"] == weights
    (row,) = card_rows(sent["README.md"])
    size = f"{len(weights) / 1e6:,.1f}"
    assert row.startswith(f"| `model.safetensors` | Transformers, fp32 | {size} | ")
    assert not with_a_path(sent, trained.parent)


def card_rows(card: bytes) -> list[str]:
    """The rows of the table of files."""
    return [line for line in card.decode().splitlines() if line.startswith("| `")]


def test_an_exported_folder_for_ollama(run: Path, tmp_path: Path) -> None:
    """The card has the figures that the export printed; the rows that it compared stay here."""
    options = {"quant": "q8_0", "for_ollama": True, "threads": 1, "device": "cpu"}
    done = export_gguf(run, tmp_path / "orders", **options)
    with UploadHub() as hub:
        code, out, err = push(tmp_path / "orders", hub=hub)
        assert (code, out) == (0, f"{hub.url}/ada/orders\n"), err
        sent = hub.stored["ada/orders"]["main"]
    assert sorted(sent) == ["LICENSE", "Modelfile", "README.md", "orders-q8_0.gguf"]
    assert sent["orders-q8_0.gguf"] == Path(done.file).read_bytes()
    data = ModelCard(sent["README.md"].decode()).data
    assert (data.library_name, data.license) == ("gguf", "apache-2.0")
    assert not with_a_path(sent, run.parent)
    measured = "not measured | "
    if done.check is not None:
        measured = f"{done.check.tuned.mean_kl:.2g} | {done.check.tuned.agreement:.0%}"
    row = f"| `orders-q8_0.gguf` | GGUF, q8_0 | {done.bytes / 1e6:,.1f} | {measured} |"
    assert card_rows(sent["README.md"]) == [row]
    assert b"Count to" not in sent["README.md"]


def test_exported_files_in_a_folder_and_one_alone(run: Path, tmp_path: Path) -> None:
    export_gguf(run, tmp_path / "orders-f16.gguf", quant="f16", check=False)
    export_adapter(run, tmp_path / "orders-lora.gguf")
    with UploadHub() as hub:
        assert push(tmp_path, "--to", "ada/all", hub=hub)[0] == 0
        rows = card_rows(hub.stored["ada/all"]["main"]["README.md"])
        kinds = [row.split("|")[2].strip() for row in rows]
        assert kinds == ["GGUF, f16", "GGUF, LoRA only, f16"]
        assert push(tmp_path / "orders-lora.gguf", hub=hub)[0] == 0
        assert sorted(hub.stored["ada/orders-lora"]["main"]) == ["README.md", "orders-lora.gguf"]

        stored = json.loads((tmp_path / "orders-f16.gguf.json").read_text())["bytes"]
        (tmp_path / "orders-f16.gguf").write_bytes(b"GGUF")
        code, _, err = push(tmp_path, hub=hub)
        assert (code, len(hub.commits)) == (2, 2)
        check_shown(err, where="orders-f16.gguf", names=[stored, 4])


def test_before_anything_is_sent(full: Path, tmp_path: Path) -> None:
    with UploadHub() as hub:
        for words, options, shown in (
            ([full], {"token": None}, {"names": ["token"], "fix": ["hf auth login"]}),
            ([full], {"token": "hf_others"}, {"names": ["token"], "fix": ["hf auth login"]}),
            ([full, "--to", "a b/c"], {}, {"names": ["'a b/c'"], "fix": ["--to owner/name"]}),
            ([tmp_path], {}, {"names": [tmp_path, "config.yaml"]}),
            ([full], {"HF_HUB_OFFLINE": "1"}, {"fix": ["HF_HUB_OFFLINE=0 tunesmith push"]}),
        ):
            code, _, err = push(*words, hub=hub, **options)
            assert (code, hub.commits) == (2, [])
            check_shown(err, **shown)
        hub.stored[MINE], hub.private[MINE] = {"main": {}}, False
        code, _, err = push(full, hub=hub)
        assert (code, hub.commits) == (2, []), "a private push into a public repository"
        check_shown(err, names=[MINE], fix=["--public"])
    code, _, err = push(full, hub=hub)
    assert code == 2, "the stand-in has gone"
    check_shown(err, fix=["HTTPS_PROXY", "HF_ENDPOINT"])


def test_a_job_trains_and_pushes(tiny: Path, tmp_path: Path) -> None:
    """With a token that may not write, it ends before it trains: a job's time is paid for."""
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    words = ["--model", tiny, "--data", rows, "--to", MINE, "adapter.kind=none"]
    words += ["train.duration=2 steps", "log.samples=0"]
    program = Path(__file__).parents[3] / "scripts" / "hf_job.py"
    options: dict[str, Any] = {"program": program, "cwd": tmp_path, "prepare": read_hub_settings}
    with UploadHub() as hub:
        # As in a job with the secret HF_TOKEN
        env = environment(tmp_path, hub) | {"NO_COLOR": "1"}
        refused = run_warm(words, env=env | {"HF_TOKEN": "hf_another"}, **options)
        assert (refused.returncode, hub.private) == (2, {}), refused.stderr
        assert not (tmp_path / "runs").exists()
        done = run_warm(words, env=env | {"HF_TOKEN": TOKEN}, **options)
        assert done.returncode == 0, done.stderr
        assert hub.private == {MINE: True}
        final = tmp_path / "runs" / "job" / "final" / "model.safetensors"
        assert hub.stored[MINE]["main"]["model.safetensors"] == final.read_bytes()
