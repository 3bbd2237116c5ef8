"""`tunesmith push`: what arrives at the Hub, a stand-in that speaks its upload protocol, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError

from conftest import write_tiny_llama
from errors import check_error, check_shown, lines_with, refuses
from export.tiny_gguf import chat_tokenizer
from recipes import make_run as write_run
from runs import make_run, peft_model
from tunesmith.checkpoint.manifest import flush_files, write_manifest
from tunesmith.config.load import load_recipe
from tunesmith.errors import UsageError
from tunesmith.tools.export.gguf.export import export_adapter, export_gguf
from tunesmith.tools.export.merge import merge
from tunesmith.tools.export.push import _push_error
from tunesmith.tools.export.record import gguf_to_push
from tunesmith.training.run import train
from warm import read_hub_settings, run_warm

from .upload_standin import TOKEN, UploadHub

pytestmark = pytest.mark.slow

MINE = "ada/my-run"


@pytest.fixture(scope="module")
def full(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of full fine-tuning."""
    folder = tmp_path_factory.mktemp("full")
    changes: dict[str, Any] = {"train": {"duration": "4 steps"}, "adapter": {"kind": "none"}}
    train(write_run(tiny, folder, held=False, **changes), quiet=True)
    return (folder / "run").rename(folder / "my-run")


def on_the_hub(run: Path, place: Path) -> Path:
    """The same run, as if its base had been a Hub id."""
    copy = Path(shutil.copytree(run, place / "my-run"))
    for file in (copy / "config.yaml", copy / "final" / "adapter_config.json"):
        base = load_recipe(run / "config.yaml").model.name
        file.write_text(file.read_text().replace(base, "someone/tiny"))
    final = copy / "final"
    write_manifest(final, 8, flush_files(final))
    (copy / "final" / "README.md").unlink()
    return copy


def push(*words: object, hub: UploadHub | None = None, token: str | None = TOKEN, **env: str):
    base = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("HF_") and not k.lower().endswith("_proxy")
    }
    base |= {"HF_HOME": "/nonexistent", "HF_HUB_DISABLE_XET": "1", "NO_COLOR": "1"}
    base |= {"HF_ENDPOINT": hub.url} if hub else {}
    base |= {"HF_TOKEN": token} if token else {}
    done = run_warm(["push", *words], env=base | env, prepare=read_hub_settings)
    assert "Traceback" not in done.stderr, done.stderr
    assert token is None or token not in done.stderr + done.stdout
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("status", "names", "fix"),
    [
        (401, ["token"], ["hf auth login"]),
        (403, [MINE], ["settings/tokens"]),
        (409, [MINE], []),
        (412, [MINE], []),
        (418, [418], []),
        (429, [], []),
    ],
)
def test_what_the_hub_refuses_is_told(status: int, names: list[Any], fix: list[str]) -> None:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    error = _push_error(HfHubHTTPError("refused", response=response), MINE)
    check_error(error, names=[*names, "refused"], fix=fix)
    assert error.fix


@pytest.mark.parametrize("refuse", [("repos/create", 403), ("preupload", 403), ("commit", 409)])
def test_what_is_refused_at_any_point_ends_the_push(refuse: tuple[str, int], full: Path) -> None:
    with UploadHub(refuse) as hub:
        code, out, err = push(full, hub=hub)
    assert (code, out, hub.commits) == (2, "", [])
    check_shown(err, names=[MINE if refuse[1] == 409 else "token"])


def test_what_arrives_is_what_lies_there(full: Path) -> None:
    with UploadHub() as hub:
        code, out, err = push(full, hub=hub)
        assert (code, out) == (0, f"{hub.url}/{MINE}\n"), err
        assert lines_with(err, "ada/my-run", "private")
        files = {
            p.relative_to(full / "final").as_posix(): p.read_bytes()
            for p in (full / "final").rglob("*")
        }
        assert hub.stored[MINE]["main"] == {
            n: data for n, data in files.items() if n != "manifest.json"
        }
        assert hub.private == {MINE: True}
        assert hub.commits[0][2] == "Push my-run/final"
        assert (
            ModelCard(hub.stored[MINE]["main"]["README.md"].decode()).data.library_name
            == "transformers"
        )
        folder = str(full.parent).encode()
        assert not [name for name, data in hub.stored[MINE]["main"].items() if folder in data], (
            "a path of this machine"
        )

        code, out, err = push(full, hub=hub)
        assert (code, out) == (0, f"{hub.url}/{MINE}\n")
        assert len(hub.commits) == 1

        card = full / "final" / "README.md"
        card.write_text(card.read_text() + "\nMy own words.\n")
        assert push(full, hub=hub)[0] == 0
        assert hub.commits[1][3] == ["README.md"], "only what has changed is sent"
        assert hub.stored[MINE]["main"]["README.md"] == card.read_bytes()


def test_a_checkpoint_is_pushed_without_its_state_and_with_a_card(full: Path) -> None:
    with UploadHub() as hub:
        code, _, err = push(
            full / "checkpoint-4", "--to", "team/bot", "--public", "--revision", "step-4", hub=hub
        )
        assert code == 0, err
        assert hub.private == {"team/bot": False}
        files = hub.stored["team/bot"]["step-4"]
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
        assert not [name for name in files if "state" in name or "manifest" in name]
        assert "4 (0.67 epochs" in files["README.md"].decode()
        assert hub.stored["team/bot"]["main"] == {}


def test_an_adapter(trained: Path, tmp_path: Path) -> None:
    run = on_the_hub(trained, tmp_path)
    with UploadHub() as hub:
        code, _, err = push(run, hub=hub)
        assert code == 0, err
        files = hub.stored[MINE]["main"]
        assert (
            files["adapter_model.safetensors"]
            == (run / "final" / "adapter_model.safetensors").read_bytes()
        )
        assert ModelCard(files["README.md"].decode()).data.base_model == "someone/tiny"


def test_an_adapter_on_a_folder_is_refused_and_its_merge_is_not(trained, tmp_path):
    with UploadHub() as hub:
        code, _, err = push(trained, hub=hub)
        assert code == 2
        check_shown(err, fix=[f"tunesmith merge {trained}"])
        assert hub.seen == []
        merge(trained, tmp_path / "merged", device="cpu")
        assert push(tmp_path / "merged", hub=hub)[0] == 0
        assert hub.commits[-1][2] == "Push merged"
        sent = hub.stored["ada/merged"]["main"]
        weights = (tmp_path / "merged" / "model.safetensors").read_bytes()
        assert sent["model.safetensors"] == weights
        (row,) = card_rows(sent["README.md"])
        size = f"{len(weights) / 1e6:,.1f}"
        assert row.startswith(f"| `model.safetensors` | Transformers, fp32 | {size} | ")
        assert not [name for name, data in sent.items() if str(trained.parent).encode() in data]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an adapter in `run`, whose base has a tokenizer that llama.cpp reads."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = chat_tokenizer()
    base = folder / "base"
    write_tiny_llama(base, vocab_size=len(tokenizer), hidden_size=256, intermediate_size=256)
    tokenizer.save_pretrained(base)
    (base / "LICENSE").write_text("Free.")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\nTheirs.")
    make_run(folder / "run", base, peft_model(base))
    return folder / "run"


def card_rows(card: bytes) -> list[str]:
    """The rows of the table of files."""
    return [line for line in card.decode().splitlines() if line.startswith("| `")]


def test_an_exported_folder_for_ollama(exported: Path, tmp_path: Path) -> None:
    """The card has the figures that the export printed; the rows that it compared stay here."""
    options = {"quant": "q8_0", "for_ollama": True, "threads": 1, "device": "cpu"}
    done = export_gguf(exported, tmp_path / "orders", **options)
    with UploadHub() as hub:
        code, out, err = push(tmp_path / "orders", hub=hub)
        assert (code, out) == (0, f"{hub.url}/ada/orders\n"), err
        sent = hub.stored["ada/orders"]["main"]
    assert sorted(sent) == ["LICENSE", "Modelfile", "README.md", "orders-q8_0.gguf"]
    assert sent["orders-q8_0.gguf"] == Path(done.file).read_bytes()
    data = ModelCard(sent["README.md"].decode()).data
    assert (data.library_name, data.license) == ("gguf", "apache-2.0")
    assert not [name for name, content in sent.items() if str(exported.parent).encode() in content]
    size = f"{done.bytes / 1e6:,.1f}"
    measured = "not measured | "
    if done.check is not None:
        measured = f"{done.check.tuned.mean_kl:.2g} | {done.check.tuned.agreement:.0%}"
    rows = card_rows(sent["README.md"])
    assert rows == [f"| `orders-q8_0.gguf` | GGUF, q8_0 | {size} | {measured} |"]
    assert b"Count to" not in sent["README.md"]


def test_exported_files_in_a_folder_and_one_alone(exported: Path, tmp_path: Path) -> None:
    export_gguf(exported, tmp_path / "orders-f16.gguf", quant="f16", check=False)
    export_adapter(exported, tmp_path / "orders-lora.gguf")
    with UploadHub() as hub:
        assert push(tmp_path, "--to", "ada/all", hub=hub)[0] == 0
        card = hub.stored["ada/all"]["main"]["README.md"]
        kinds = [row.split("|")[2].strip() for row in card_rows(card)]
        assert kinds == ["GGUF, f16", "GGUF, LoRA only, f16"]
        code, out, _ = push(tmp_path / "orders-lora.gguf", hub=hub)
        assert (code, out) == (0, f"{hub.url}/ada/orders-lora\n")
        assert sorted(hub.stored["ada/orders-lora"]["main"]) == ["README.md", "orders-lora.gguf"]

        stored = json.loads((tmp_path / "orders-f16.gguf.json").read_text())["bytes"]
        (tmp_path / "orders-f16.gguf").write_bytes(b"GGUF")
        code, _, err = push(tmp_path, hub=hub)
        assert code == 2
        check_shown(err, where="orders-f16.gguf", names=[stored, 4])
        (tmp_path / "orders-f16.gguf.json").unlink()
        code, _, err = push(tmp_path, hub=hub)
        assert code == 2
        check_shown(err, where="orders-f16.gguf", names=["orders-f16.gguf.json", "export"])
        assert len(hub.commits) == 2
        (tmp_path / "README.md").write_text("My own card.")
        assert push(tmp_path, "--to", "ada/own", hub=hub)[0] == 0
        assert hub.stored["ada/own"]["main"]["README.md"] == b"My own card."


def test_a_public_repository_is_not_filled_by_a_private_push(full: Path) -> None:
    with UploadHub() as hub:
        hub.stored[MINE], hub.private[MINE] = {"main": {}}, False
        code, _, err = push(full, hub=hub)
        assert code == 2
        check_shown(err, names=["ada/my-run"], fix=["--public"])
        assert hub.commits == []
        assert push(full, "--public", hub=hub)[0] == 0


def test_before_anything_is_sent(full: Path, tmp_path: Path) -> None:
    with UploadHub() as hub:
        for words, options, shown in (
            ([full], {"token": None}, {"names": ["token"], "fix": ["hf auth login"]}),
            ([full], {"token": "hf_others"}, {"names": ["token"], "fix": ["hf auth login"]}),
            ([full, "--to", "a b/c"], {}, {"names": ["'a b/c'"], "fix": ["--to owner/name"]}),
            (["someone/model"], {}, {"where": "someone/model"}),
            ([tmp_path], {}, {"names": [tmp_path, "config.yaml"]}),
            ([full], {"HF_HUB_OFFLINE": "1"}, {"fix": ["HF_HUB_OFFLINE=0 tunesmith push"]}),
        ):
            code, _, err = push(*words, hub=hub, **options)
            assert code == 2
            check_shown(err, **shown)
        assert hub.commits == []
    code, _, err = push(full, hub=hub)
    assert code == 2, "the stand-in has gone"
    check_shown(err, fix=["HTTPS_PROXY", "HF_ENDPOINT"])


RECORD = {"kind": "GGUF, f16", "bytes": 4, "check": None, "card": "# m\n\nText.\n\nThe license."}


@pytest.mark.parametrize("record", [{key: RECORD[key] for key in ("kind", "bytes")}, [], 3])
def test_a_record_that_lacks_a_key_is_refused(record: Any, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    (tmp_path / "m.gguf.json").write_text(json.dumps(RECORD))
    sent: Any = gguf_to_push(file)
    assert b"| `m.gguf` | GGUF, f16 |" in sent["README.md"]
    (tmp_path / "m.gguf.json").write_text(json.dumps(record))
    with refuses(UsageError, where="m.gguf", names=["m.gguf"]) as error:
        gguf_to_push(file)
    assert not isinstance(record, dict) or "card" in error.value.text()


def run_job(*words: object, hub: UploadHub, token: str, folder: Path):
    """`scripts/hf_job.py` on the stand-in of the Hub, as in a job with the secret HF_TOKEN."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_HOME": "/nonexistent", "HF_HUB_DISABLE_XET": "1", "NO_COLOR": "1"}
    env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "TUNESMITH_CACHE": str(folder / "cache")}
    program = Path(__file__).parents[3] / "scripts" / "hf_job.py"
    return run_warm(words, program=program, env=env, cwd=folder, prepare=read_hub_settings)


def test_a_job_trains_and_pushes(tiny: Path, tmp_path: Path) -> None:
    """With a token that may not write, it ends before it trains: a job's time is paid for."""
    rows = [{"prompt": f"Say {n}", "completion": f"number {n}"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", tiny, "--data", "rows.jsonl", "--to", MINE, "adapter.kind=none"]
    words += ["train.duration=2 steps", "log.samples=0"]
    with UploadHub() as hub:
        refused = run_job(*words, hub=hub, token="hf_another", folder=tmp_path)
        assert (refused.returncode, hub.private) == (2, {}), refused.stderr
        assert not (tmp_path / "runs").exists()
        done = run_job(*words, hub=hub, token=TOKEN, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert hub.private == {MINE: True}
        final = tmp_path / "runs" / "job" / "final" / "model.safetensors"
        assert hub.stored[MINE]["main"]["model.safetensors"] == final.read_bytes()
