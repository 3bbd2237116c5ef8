"""`tunesmith push` as a user types it, against a stand-in that speaks the Hub's upload protocol."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError

from conftest import write_tiny_llama
from errors import check_shown, holds, lines_with
from export.tiny_gguf import chat_tokenizer
from recipes import make_run as write_run
from runs import make_run, peft_model
from tunesmith.checkpoint.manifest import flush_files, prune, write_manifest
from tunesmith.config.load import load_recipe
from tunesmith.tools.export.gguf.export import export_adapter, export_gguf
from tunesmith.tools.export.merge import merge
from tunesmith.tools.export.push import _push_error
from tunesmith.tools.export.vllm_adapter import export_peft
from tunesmith.training.run import train
from warm import read_hub_settings, run_warm

from .upload_standin import TOKEN, UploadHub

pytestmark = [pytest.mark.slow, pytest.mark.long]

MINE = "ada/my-run"


@pytest.fixture(scope="module")
def full(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of full fine-tuning."""
    return finished(tiny, tmp_path_factory.mktemp("full"), adapter={"kind": "none"})


@pytest.fixture(scope="module")
def lora(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of an adapter; its base is a folder."""
    return finished(tiny, tmp_path_factory.mktemp("lora"))


def finished(tiny: Path, folder: Path, **changes) -> Path:
    run = write_run(tiny, folder, held=False, train={"duration": "4 steps"}, **changes)
    train(run, quiet=True)
    return (folder / "run").rename(folder / "my-run")


def on_the_hub(run: Path, place: Path) -> Path:
    """The same run, as if its base had been a Hub id."""
    copy = Path(shutil.copytree(run, place / "my-run"))
    for file in (copy / "config.yaml", copy / "final" / "adapter_config.json"):
        base = load_recipe(run / "config.yaml").model.name
        file.write_text(file.read_text().replace(base, "someone/tiny"))
    final = copy / "final"
    write_manifest(final, 4, flush_files(final))
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
    ("status", "words"), [(412, ("someone else changed", MINE)), (429, ("few minutes",))]
)
def test_what_the_hub_refuses_is_told(status: int, words: tuple[str, ...]) -> None:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    assert holds(_push_error(HfHubHTTPError("refused", response=response), MINE).text(), *words)


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


def test_a_checkpoint_that_its_run_deletes_meanwhile(full: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(full, tmp_path / "my-run"))
    with UploadHub(meanwhile=lambda: prune(run, 1, latest=0, keep_step=None)) as hub:
        code, out, err = push(run / "checkpoint-4", hub=hub)
        assert (code, out, hub.commits) == (1, "", []), err
    check_shown(err, where="checkpoint-4", names=["checkpoint-4", "checkpoint.keep"], fix=[run])


def test_an_adapter(lora: Path, tmp_path: Path) -> None:
    run = on_the_hub(lora, tmp_path)
    with UploadHub() as hub:
        code, _, err = push(run, hub=hub)
        assert code == 0, err
        files = hub.stored[MINE]["main"]
        assert (
            files["adapter_model.safetensors"]
            == (run / "final" / "adapter_model.safetensors").read_bytes()
        )
        assert ModelCard(files["README.md"].decode()).data.base_model == "someone/tiny"


def test_an_adapter_on_a_folder_is_refused_and_its_merge_is_not(lora: Path, tmp_path: Path) -> None:
    with UploadHub() as hub:
        code, _, err = push(lora, hub=hub)
        assert code == 2
        check_shown(err, fix=[f"tunesmith merge {lora}"])
        assert hub.seen == []
        merge(lora, tmp_path / "merged", device="cpu")
        assert push(tmp_path / "merged", hub=hub)[0] == 0
        assert hub.commits[-1][2] == "Push merged"
        sent = hub.stored["ada/merged"]["main"]
        assert sent["model.safetensors"] == (tmp_path / "merged" / "model.safetensors").read_bytes()
        assert not [name for name, data in sent.items() if str(lora.parent).encode() in data]


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
    for quant in ("f16", "q4_k_m"):
        export_gguf(exported, tmp_path / f"orders-{quant}.gguf", quant=quant, check=False)
    export_adapter(exported, tmp_path / "orders-lora.gguf")
    with UploadHub() as hub:
        assert push(tmp_path, "--to", "ada/all", hub=hub)[0] == 0
        card = hub.stored["ada/all"]["main"]["README.md"]
        kinds = [row.split("|")[2].strip() for row in card_rows(card)]
        assert kinds == ["GGUF, f16", "GGUF, LoRA only, f16", "GGUF, q4_k_m"]
        assert card.count(b"not measured") == 3
        code, out, _ = push(tmp_path / "orders-lora.gguf", hub=hub)
        assert (code, out) == (0, f"{hub.url}/ada/orders-lora\n")
        assert sorted(hub.stored["ada/orders-lora"]["main"]) == ["README.md", "orders-lora.gguf"]

        stored = json.loads((tmp_path / "orders-f16.gguf.json").read_text())["bytes"]
        another = b"GGUF of another tool"
        (tmp_path / "orders-f16.gguf").write_bytes(another)
        code, _, err = push(tmp_path, hub=hub)
        assert code == 2
        check_shown(err, where="orders-f16.gguf", names=[stored, len(another)])
        (tmp_path / "orders-f16.gguf.json").unlink()
        code, _, err = push(tmp_path, hub=hub)
        assert code == 2
        check_shown(err, where="orders-f16.gguf", names=["orders-f16.gguf.json", "export"])
        assert len(hub.commits) == 2
        (tmp_path / "README.md").write_text("My own card.")
        assert push(tmp_path, "--to", "ada/own", hub=hub)[0] == 0
        assert hub.stored["ada/own"]["main"]["README.md"] == b"My own card."


def test_folders_for_vllm_and_transformers(exported: Path, tmp_path: Path) -> None:
    merged = merge(exported, tmp_path / "merged", device="cpu")
    run = on_the_hub(exported, tmp_path)
    export_peft(exported, tmp_path / "lora")
    check = merged.merge_check.merged
    with UploadHub() as hub:
        assert push(tmp_path / "merged", hub=hub)[0] == 0
        card = hub.stored["ada/merged"]["main"]["README.md"]
        size = (tmp_path / "merged" / "model.safetensors").stat().st_size / 1e6
        measured = f"{check.mean_kl:.2g} | {check.agreement:.0%}"
        row = f"| `model.safetensors` | Transformers, fp32 | {size:,.1f} | {measured} |"
        assert card_rows(card) == [row]
        assert "LICENSE" in hub.stored["ada/merged"]["main"]
        config = tmp_path / "lora" / "adapter_config.json"
        config.write_text((run / "final" / "adapter_config.json").read_text())
        assert push(tmp_path / "lora", hub=hub)[0] == 0
        rows = card_rows(hub.stored["ada/lora"]["main"]["README.md"])
        size = (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size / 1e6
        name = "adapter_model.safetensors"
        assert rows == [f"| `{name}` | PEFT, LoRA only | {size:,.1f} | not measured |  |"]


def test_a_public_repository_is_not_filled_by_a_private_push(full: Path) -> None:
    with UploadHub() as hub:
        hub.stored[MINE], hub.private[MINE] = {"main": {}}, False
        code, _, err = push(full, hub=hub)
        assert code == 2
        check_shown(err, names=["ada/my-run"], fix=["--public"])
        assert hub.commits == []
        assert push(full, "--public", hub=hub)[0] == 0


@pytest.mark.parametrize(
    ("refuse", "words"),
    [
        (("whoami", 401), "the Hub rejected the token"),
        (("repos/create", 403), "the token may not write to"),
        (("preupload", 403), "the token may not write to"),
        (("commit", 409), "during the push"),
        (("commit", 418), "the Hub answered with status 418"),
        (("commit", 400), "fix the reported problem"),
    ],
)
def test_what_the_hub_refuses(refuse: tuple[str, int], words: str, full: Path) -> None:
    with UploadHub(refuse) as hub:
        code, out, err = push(full, hub=hub)
    assert (code, out) == (2, "")
    assert any(
        line.startswith(("error: ", "  fix: ")) and words in line for line in err.splitlines()
    ), err
    assert "  fix: " in err


def test_too_many_requests(full: Path) -> None:
    with UploadHub(("whoami", 429)) as hub:
        code, _, err = push(full, hub=hub)
    assert code == 2
    check_shown(err, names=["Hub"])
    assert hub.commits == []


def test_before_anything_is_sent(full: Path, tmp_path: Path) -> None:
    with UploadHub() as hub:
        code, _, err = push(full, hub=hub, token=None)
        assert code == 2
        check_shown(err, names=["token"], fix=["hf auth login"])
        code, _, err = push(full, hub=hub, token="hf_somebodyelses")
        assert code == 2
        check_shown(err, names=["Hub", "token"], fix=["hf auth login"])
        code, _, err = push(full, "--to", "a b/c", hub=hub)
        assert code == 2
        check_shown(err, names=["'a b/c'"], fix=["--to owner/name"])
        code, _, err = push("someone/model", hub=hub)
        assert code == 2
        check_shown(err, where="someone/model")
        code, _, err = push(tmp_path, hub=hub)
        assert code == 2
        check_shown(err, names=[tmp_path, "config.yaml"])
        assert hub.commits == []
    code, _, err = push(full, HF_HUB_OFFLINE="1")
    assert code == 2
    check_shown(err, fix=["HF_HUB_OFFLINE=0 tunesmith push"])
    code, _, err = push(full, hub=hub)
    assert code == 2, "the stand-in has gone"
    check_shown(err, fix=["HTTPS_PROXY", "HF_ENDPOINT"])


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
