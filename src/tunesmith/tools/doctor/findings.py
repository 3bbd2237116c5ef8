"""Findings of `doctor`: their texts are in findings.json."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

WARNING = "warning"
FAULT = "fault"
# Texts of all findings: key `check/case` -> [level, what, why, fix]. `Finding` explains the fields.
TEXTS: dict[str, list[str]] = json.loads(
    Path(__file__).with_name("findings.json").read_text(encoding="utf-8")
)


@dataclass(frozen=True)
class Finding:
    """One finding of the report.

    Attributes:
        check, case: the two parts of the finding's key in findings.json.
        level: ok, warning or fault.
        what: the sentence that describes the finding.
        why: the consequence or cause of the finding.
        fix: the command that fixes the problem.
        host: the host that the finding is about. "" is this machine.
    """

    check: str
    level: str
    what: str
    why: str = ""
    fix: str = ""
    host: str = ""
    case: str = ""


def finding(key: str, host: str = "", **values: object) -> Finding:
    """Return the finding for `key`. Its texts are formatted with `host` and `values`.

    The fix is a shell command, so each value in the fix is quoted for the shell.
    """
    level, what, why, fix = TEXTS[key]
    values["host"] = host
    words = {name: shlex.quote(str(value)) for name, value in values.items()}
    check, _, case = key.partition("/")
    texts = (what.format(**values), why.format(**values), fix.format(**words))
    return Finding(check, level, *texts, host=host, case=case)
