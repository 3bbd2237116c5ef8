"""`tunesmith push` as a user types it, against a stand-in that speaks the Hub's upload protocol."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoConfig

from recipes import make_run
from tunesmith.checkpoint.manifest import flush_files, prune, write_manifest
from tunesmith.config.load import load_recipe
from tunesmith.export.merge import merge
from tunesmith.hub import hub_calls
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
    run = make_run(tiny, folder, held=False, train={"duration": "4 steps"}, **changes)
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


# A call that fails is tried five times; the pauses between them are short here.
def prepare() -> None:
    read_hub_settings()
    hub_calls.PAUSE = 0.01


def push(*words: object, hub: UploadHub | None = None, token: str | None = TOKEN, **env: str):
    base = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("HF_") and not k.lower().endswith("_proxy")
    }
    base |= {"HF_HOME": "/nonexistent", "HF_HUB_DISABLE_XET": "1", "NO_COLOR": "1"}
    base |= {"HF_ENDPOINT": hub.url} if hub else {}
    base |= {"HF_TOKEN": token} if token else {}
    done = run_warm(["push", *words], env=base | env, prepare=prepare)
    assert "Traceback" not in done.stderr, done.stderr
    assert token is None or token not in done.stderr + done.stdout
    return done.returncode, done.stdout, done.stderr


def test_what_arrives_is_what_lies_there(full: Path) -> None:
    with UploadHub() as hub:
        code, out, err = push(full, hub=hub)
        assert (code, out) == (0, f"{hub.url}/{MINE}\n"), err
        assert "to ada/my-run, private" in err
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
        assert "nothing new" in err
        assert len(hub.commits) == 1

        card = full / "final" / "README.md"
        card.write_text(card.read_text() + "\nMy own words.\n")
        assert push(full, hub=hub)[0] == 0
        assert hub.commits[1][3] == ["README.md"], "only what has changed is sent"
        assert hub.stored[MINE]["main"]["README.md"] == card.read_bytes()


def test_a_model_of_an_earlier_version_gets_the_keys_that_older_readers_need(
    full: Path, tmp_path: Path
) -> None:
    final = Path(shutil.copytree(full / "final", tmp_path / "my-run"))
    AutoConfig.from_pretrained(final).save_pretrained(final)  # `rope_parameters` alone
    (final / "manifest.json").unlink()
    before = (final / "config.json").read_bytes()
    assert b"rope_theta" in before
    assert "rope_theta" not in json.loads(before)
    with UploadHub() as hub:
        code, _, err = push(final, hub=hub)
        assert code == 0, err
        assert json.loads(hub.stored[MINE]["main"]["config.json"])["rope_theta"] == 10000.0
    assert (final / "config.json").read_bytes() == before, "the user's file stays"


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
    assert "checkpoint-4 was deleted while it was read" in err
    assert f"give the run directory: {run}" in err


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
        assert "the adapter's base is a folder of this machine" in err
        assert f"tunesmith merge {lora}" in err
        assert hub.seen == []
        merge(lora, tmp_path / "merged", device="cpu")
        assert push(tmp_path / "merged", hub=hub)[0] == 0
        assert hub.commits[-1][2] == "Push merged"
        sent = hub.stored["ada/merged"]["main"]
        assert sent["model.safetensors"] == (tmp_path / "merged" / "model.safetensors").read_bytes()
        assert not [name for name, data in sent.items() if str(lora.parent).encode() in data]


def test_a_public_repository_is_not_filled_by_a_private_push(full: Path) -> None:
    with UploadHub() as hub:
        hub.stored[MINE], hub.private[MINE] = {"main": {}}, False
        code, _, err = push(full, hub=hub)
        assert code == 2
        assert "ada/my-run is public, and a push is private" in err
        assert hub.commits == []
        assert push(full, "--public", hub=hub)[0] == 0


@pytest.mark.parametrize(
    ("refuse", "words"),
    [
        (("whoami", 401), "the Hub does not accept the token"),
        (("repos/create", 403), "the token may not write to"),
        (("preupload", 403), "the token may not write to"),
        (("commit", 409), "was changed by somebody else meanwhile"),
        (("commit", 418), "the Hub answers 418"),
        (("commit", 400), "correct what it names"),
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
    assert "the Hub asks to wait" in err


def test_before_anything_is_sent(full: Path, tmp_path: Path) -> None:
    with UploadHub() as hub:
        code, _, err = push(full, hub=hub, token=None)
        assert (code, "there is no token" in err, "hf auth login" in err) == (2, True, True)
        code, _, err = push(full, hub=hub, token="hf_somebodyelses")
        assert (code, "does not accept the token" in err) == (2, True)
        code, _, err = push(full, "--to", "a b/c", hub=hub)
        assert (code, "is no name of a repository" in err) == (2, True)
        code, _, err = push("someone/model", hub=hub)
        assert (code, "holds no files to push" in err) == (2, True)
        code, _, err = push(tmp_path, hub=hub)
        assert (code, "holds no model" in err) == (2, True)
        assert hub.commits == []
    code, _, err = push(full, HF_HUB_OFFLINE="1")
    assert (code, "HF_HUB_OFFLINE forbids uploads" in err) == (2, True)
    code, _, err = push(full, hub=hub)
    assert (code, "cannot be reached" in err) == (2, True), "the stand-in has gone"
