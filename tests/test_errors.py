"""What of an error, a command or a configuration is a secret."""

from __future__ import annotations

import pytest

from tunesmith.errors import is_secret_name, mask_words

SECRET = (
    "HF_TOKEN", "MY_TOKEN", "hub_token", "hubToken", "token", "use_auth_token", "WANDB_API_KEY", "api_key", "apiKey", "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID", "DB_PASSWORD", "client_secret", "credentials", "SOME_KEY", "hftoken", "DBPASSWORD", "mysecret",
)  # fmt: skip
PLAIN = (
    "pad_token", "eos_token", "model.pad_token", "added_tokens", "max_new_tokens", "tokenizer", "NCCL_IB_PKEY", "key", "field_key",
    "keys", "author", "monkey", "UCX_TLS", "special_tokens", "PATH", "train_on_eos",
)  # fmt: skip


@pytest.mark.parametrize("name", SECRET)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", PLAIN)
def test_names_of_other_values(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (
            ["env", "HF_TOKEN=abc", "trl", "--seed", "7"],
            ["env", "HF_TOKEN=***", "trl", "--seed", "7"],
        ),
        (["--hub_token", "abc", "--api-key=abc"], ["--hub_token", "***", "--api-key=***"]),
        (["--use_auth_token", "--bf16"], ["--use_auth_token", "--bf16"]),
        (["--token", "abc", "x"], ["--token", "***", "x"]),
        (["--hf-token=abc"], ["--hf-token=***"]),
        (["WANDB_API_KEY=abc"], ["WANDB_API_KEY=***"]),
        (["hf_abcdefghijklmnop"], ["***"]),
        (["https://user:pw@host/x"], ["https://***@host/x"]),
        (
            ["model.tokenizer=org/tok", "model.pad_token=<pad>"],
            ["model.tokenizer=org/tok", "model.pad_token=<pad>"],
        ),
        (["train.global_batch=32768 tokens"], ["train.global_batch=32768 tokens"]),
        (["model.revision=0123456789abcdef0123456789abcdef01234567"],) * 2,
        (["--token", "--json"], ["--token", "--json"]),
    ],
)
def test_secrets_of_a_command_are_masked(argv: list[str], shown: list[str]) -> None:
    assert mask_words(argv) == shown
