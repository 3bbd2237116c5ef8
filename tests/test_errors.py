"""What of an error, a command or a configuration is a secret."""

from __future__ import annotations

import pytest

from tunesmith.errors import is_secret_name, mask_words

SECRET = (
    "HF_TOKEN", "MY_TOKEN", "hub_token", "hubToken", "token", "use_auth_token", "WANDB_API_KEY", "api_key", "apiKey", "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID", "DB_PASSWORD", "client_secret", "credentials", "SOME_KEY", "hftoken",
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


def test_words_of_a_command() -> None:
    words = [
        "env",
        "HF_TOKEN=abc",
        "trl",
        "--hub_token",
        "abc",
        "--api-key=abc",
        "--seed",
        "7",
        "--use_auth_token",
        "--bf16",
    ]
    masked = [
        "env",
        "HF_TOKEN=***",
        "trl",
        "--hub_token",
        "***",
        "--api-key=***",
        "--seed",
        "7",
        "--use_auth_token",
        "--bf16",
    ]
    assert mask_words(words) == masked
