"""Detection of secrets in texts: access tokens, private keys and passwords."""

import json
import re
from collections.abc import Iterator

# Value after a name such as `password=`: letters with a digit, which no placeholder, variable or
# call has, such as $PASSWORD, <password>, your_key_1 and make_key2(). Quotes can be escaped.
_NAMED_VALUE = (
    r"""\\?["']?\s*[:=]\s*\\?["']?(?!your|my|example|changeme|test|dummy|fake|xxx)"""
    r"""(?=[^\s\d"']*\d)(?=[^\sa-z"']*[a-z])[^\s"'`,;&$<>{}()\[\]\\]{%d,}+(?![(\[{<$])"""
)
# Kind of secret -> (text that each secret of this kind contains, pattern of the secret). The text
# is searched first, because this is much faster than searching for the pattern.
_SECRET_KINDS = {
    "an OpenAI or Anthropic key": ("sk-", r"(?<!-)sk-(?=[\w-]*\d)[\w-]{20,}"),
    "a GitHub token": ("gh", r"gh[pousr]_[A-Za-z0-9]{36,}"),
    "a GitHub access token": ("github_pat_", r"github_pat_\w{50,}"),
    "a GitLab token": ("glpat-", r"glpat-[\w-]{20,}"),
    "a Hugging Face token": ("hf_", r"hf_[A-Za-z0-9]{30,}"),
    "an AWS key": ("IA", r"A[KS]IA[A-Z0-9]{16}(?!\w)"),
    "a Slack token": ("xox", r"xox[abeprs]-[\w-]{10,}"),
    "a Google key": ("AIza", r"AIza[\w-]{35}"),
    "a Groq key": ("gsk_", r"gsk_[A-Za-z0-9]{40,}"),
    "an npm token": ("npm_", r"npm_[A-Za-z0-9]{36}"),
    "a PyPI token": ("pypi-", r"pypi-AgE[\w-]{50,}"),
    "a Stripe key": ("k_live_", r"[rs]k_live_[A-Za-z0-9]{20,}"),
    "a private key": ("PRIVATE KEY", r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----"),
    "a JSON web token": ("eyJ", r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
    # The pattern does not match placeholders such as user:password@host and $USER:$PASSWORD@host.
    "a password in an address": (
        "://",
        r"\w+://[^\s:/@\"'<>]*:(?!(?i:pass(word|wd)?|pwd|secret|token|x+|\*+)@)"
        r"(?!\$)[^\s:/@\"'<>{}*]{4,}@\w",
    ),
    "a Weights & Biases key": ("wandb", r"wandb\s+login\s+(?:-\S+\s+)*[A-Za-z0-9_-]{40,}"),
    "an authorization header": (
        "uthorization",
        r"(?i:authorization\\?[\"']?\s*[:=]\s*\\?[\"']?(?:basic|token))\s+"
        r"(?=\S*(?:\d|[a-z][A-Z]))[\w.~+/-]{8,}",
    ),
}
# Kinds of secrets that are any value after a name, in the same form. They are searched in the text
# in lower case. A value that is also of a kind above is yielded only once.
_NAMED_KINDS = {
    "a bearer token": ("bearer", r"bearer\s+(?=[^\s\d]*\d)[\w.~+/-]{16,}"),
    "a key": ("key", r"(?:api|access|secret|auth|account)[_-]?key" + _NAMED_VALUE % 12),
    "a secret": ("secret", r"secret" + _NAMED_VALUE % 12),
    "an access token": (
        "token",
        r"(?:access|auth|api|bot|refresh|hf|gh|hub|lab|npm|slack|secret)[_-]?token"
        + _NAMED_VALUE % 12,
    ),
    "a password": ("passw", r"passw(?:or)?d" + _NAMED_VALUE % 6),
}
# A secret starts at the beginning of a word. In JSON text, such as the arguments of a call, an
# escaped line break (\n) can precede the word.
_START = r"(?:(?<!\w)|(?<=\\[nrt]))"
_PATTERNS = {
    kind: (text, re.compile(_START + form)) for kind, (text, form) in _SECRET_KINDS.items()
}
_NAMED_PATTERNS = {kind: (text, re.compile(form)) for kind, (text, form) in _NAMED_KINDS.items()}


def secrets_in(value: object) -> Iterator[str]:
    """Yield the kind of each secret in the texts of a JSON value.

    The secret itself is not yielded.
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    ends = set()
    for patterns, searched in ((_PATTERNS, text), (_NAMED_PATTERNS, text.lower())):
        for kind, (part, pattern) in patterns.items():
            if part in searched:
                for match in pattern.finditer(searched):
                    if match.end() not in ends:
                        ends.add(match.end())
                        yield kind
