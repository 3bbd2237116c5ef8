"""What of an error, a command or a configuration is a secret; how tests read an error."""

from __future__ import annotations

import pytest

from errors import error_in, is_internal, refuses
from tunesmith.errors import CAUSES, RunError, TunesmithError, is_secret_name, mask_words

SECRET = (
    "HF_TOKEN", "MY_TOKEN", "hub_token", "hubToken", "token", "use_auth_token", "WANDB_API_KEY", "api_key", "apiKey", "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID", "DB_PASSWORD", "client_secret", "credentials", "SOME_KEY", "hftoken", "DBPASSWORD", "mysecret",
)  # fmt: skip
PLAIN = (
    "pad_token", "eos_token", "model.pad_token", "added_tokens", "max_new_tokens", "tokenizer", "NCCL_IB_PKEY", "key", "field_key",
    "keys", "author", "monkey", "UCX_TLS", "special_tokens", "PATH", "train_on_eos",
)  # fmt: skip


def test_names_of_secrets() -> None:
    assert [name for name in SECRET if not is_secret_name(name)] == []
    assert [name for name in PLAIN if is_secret_name(name)] == []


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("env HF_TOKEN=abc trl --seed 7", "env HF_TOKEN=*** trl --seed 7"),
        ("--hub_token abc --api-key=abc", "--hub_token *** --api-key=***"),
        ("--use_auth_token --bf16", "--use_auth_token --bf16"),
        ("--token abc x", "--token *** x"),
        ("hf_abcdefghijklmnop", "***"),
        ("https://user:pw@host/x", "https://***@host/x"),
        ("--token --json", "--token --json"),
        *[("model.tokenizer=org/tok model.pad_token=<pad> train.global_batch=32768",) * 2],
    ],
)
def test_secrets_of_a_command_are_masked(words: str, shown: str) -> None:
    assert mask_words(words.split()) == shown.split()


WORDS = {"where": "/tmp/a/r.yaml:3", "why": "12 MB", "fix": "rm x", "cause": "disk"}
ERROR = RunError("4 of checkpoint-5 is torn", **WORDS)


def test_a_block_is_read_back_as_it_was_rendered() -> None:
    """All rows, between lines of a log."""
    assert ERROR.text().splitlines() == [
        f"error: {ERROR.what}",
        "  where: /tmp/a/r.yaml:3",
        "  why: 12 MB",
        f"  cause: disk: {CAUSES['disk']}",
        "  fix: rm x",
    ]
    read = error_in(f"step 3\n{ERROR.text()}\nstep 4\n")
    assert read.text() == ERROR.text()
    assert is_internal(f"step 3\n{TunesmithError('internal error: KeyError: x').text()}")
    assert not is_internal(ERROR.text())


def test_another_error_is_no_substitute() -> None:
    right = {"where": "r.yaml:3", "names": [4, "checkpoint-5", "12 MB"], "fix": ["rm x"]}
    with refuses(RunError, **right, cause="disk"):
        raise ERROR
    # A base of the class, and a number in checkpoint-5
    for kind, fields in (
        (TunesmithError, {}),
        (RunError, {"where": "yaml:3"}),
        (RunError, {"names": [5]}),
    ):
        with pytest.raises((AssertionError, RunError)), refuses(kind, **fields):
            raise ERROR
