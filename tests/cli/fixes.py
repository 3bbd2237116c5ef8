"""Every fix that a message proposes, collected from the sources: the texts of `fix` arguments,
variables and tables.

What a fix takes in at run time, such as the name of a file, stands in it as a hostile name: see
`collect`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (ROOT / "src" / "tunesmith", ROOT / "scripts")
FINDINGS = ROOT / "src" / "tunesmith" / "tools" / "doctor" / "findings.json"


class Fix(NamedTuple):
    """The text of a fix: `parts` are text as it stands, and expressions, whose source is in a tuple
    of one.
    """

    place: str
    parts: tuple[str | tuple[str], ...]

    @property
    def text(self) -> str:
        """The text, each expression as a word that names it."""
        return "".join(part if isinstance(part, str) else f"<{part[0]}>" for part in self.parts)


def expressions(node: ast.expr) -> Iterator[ast.expr]:
    """The alternatives of a conditional expression, or of an `or`; else the expression itself."""
    if isinstance(node, ast.IfExp):
        yield from expressions(node.body)
        yield from expressions(node.orelse)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from expressions(value)
    else:
        yield node


def parts_of(node: ast.expr) -> tuple[str | tuple[str], ...]:
    """The text and the expressions of a string, an f-string or a sum of them."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return (node.value,)
    if isinstance(node, ast.JoinedStr):
        return tuple(part for value in node.values for part in parts_of(value))
    if isinstance(node, ast.FormattedValue):
        return ((ast.unparse(node.value),),)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (*parts_of(node.left), *parts_of(node.right))
    return ((ast.unparse(node),),)


def values_of_fix(node: ast.AST) -> Iterator[ast.expr]:
    """What a call, an assignment or a function gives as a fix."""
    if isinstance(node, ast.Call):
        yield from (keyword.value for keyword in node.keywords if keyword.arg == "fix")
    if isinstance(node, ast.Assign):
        for target in node.targets:
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            several = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
            values = (
                node.value.elts if several and isinstance(node.value, ast.Tuple) else [node.value]
            )
            if len(names) == len(values):
                for name, value in zip(names, values, strict=True):
                    if isinstance(name, ast.Name) and name.id in ("fix", "fixes"):
                        yield value
    if isinstance(node, ast.AugAssign) and ast.unparse(node.target).rpartition(".")[2] == "fix":
        yield node.value


def collect() -> list[Fix]:
    """All fixes of the sources that are texts, then those of the doctor's table; a variable is met
    where it is set.
    """
    fixes = []
    for file in sorted(path for folder in SOURCES for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            for value in values_of_fix(node):
                for one in expressions(value):
                    if not isinstance(one, ast.Name | ast.Attribute):
                        fixes.append(Fix(f"{file.relative_to(ROOT)}:{one.lineno}", parts_of(one)))
    for case, (_, _, _, fix) in json.loads(FINDINGS.read_text()).items():
        if fix:
            fixes.append(Fix(f"findings.json: {case}", (fix,)))
    return fixes
