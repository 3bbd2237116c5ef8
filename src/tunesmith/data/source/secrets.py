"""Well-known forms of secrets in texts: access tokens, private keys, passwords in addresses."""

import re
from collections.abc import Iterator

# What a secret is -> a text that each of its kind has, which is found much faster than the
# pattern, and the pattern.
_SECRET_KINDS = {
    "an OpenAI or Anthropic key": ("sk-", r"(?<![\w-])sk-(?=[\w-]*\d)[\w-]{20,}"),
    "a GitHub token": ("gh", r"(?<!\w)gh[pousr]_[A-Za-z0-9]{36,}"),
    "a GitHub access token": ("github_pat_", r"(?<!\w)github_pat_\w{50,}"),
    "a GitLab token": ("glpat-", r"(?<!\w)glpat-[\w-]{20,}"),
    "a Hugging Face token": ("hf_", r"(?<!\w)hf_[A-Za-z0-9]{30,}"),
    "an AWS key": ("IA", r"(?<!\w)A[KS]IA[A-Z0-9]{16}(?!\w)"),
    "a Slack token": ("xox", r"(?<!\w)xox[abeprs]-[\w-]{10,}"),
    "a Google key": ("AIza", r"(?<!\w)AIza[\w-]{35}"),
    "an npm token": ("npm_", r"(?<!\w)npm_[A-Za-z0-9]{36}"),
    "a Stripe key": ("k_live_", r"(?<!\w)[rs]k_live_[A-Za-z0-9]{20,}"),
    "a private key": ("PRIVATE KEY", r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----"),
    "a JSON web token": ("eyJ", r"(?<!\w)eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
    # Not a placeholder such as user:password@host or $USER:$PASSWORD@host.
    "a password in an address": (
        "://",
        r"\w://[^\s:/@\"'<>]+:(?!(?i:pass(word|wd)?|pwd|secret|token|x+|\*+)@)"
        r"[^\s:/@\"'<>{}$*]{4,}@\w",
    ),
}
_PATTERNS = [(kind, text, re.compile(pattern)) for kind, (text, pattern) in _SECRET_KINDS.items()]


def secrets_in(value: object) -> Iterator[str]:
    """Yield what each secret in the texts of a JSON value is, without the secret itself."""
    if isinstance(value, str):
        for kind, text, pattern in _PATTERNS:
            if text in value:
                yield from (kind for _ in pattern.finditer(value))
    elif isinstance(value, list | dict):
        for item in value if isinstance(value, list) else value.values():
            yield from secrets_in(item)
