"""What `import tunesmith` gives, as httpx holds it: the members that are there are those of `__all__`, and no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tunesmith


def printed(code: str) -> list[str]:
    """The words that a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_every_public_member_is_a_function_of_its_name() -> None:
    functions = {name: getattr(tunesmith, name) for name in tunesmith.__all__ if name != "__version__"}
    assert {name: function.__name__ for name, function in functions.items()} == {name: name for name in functions}


def test_exported_members_are_those_of_all() -> None:
    code = "import tunesmith; print(*(n for n in vars(tunesmith) if not n.startswith('_')))"
    assert set(printed(code)) - set(tunesmith.__all__) == {"TYPE_CHECKING", "Any", "import_module"}  # its own helpers
    assert dir(tunesmith) == tunesmith.__all__
    assert sorted(tunesmith.__all__) == tunesmith.__all__
    with pytest.raises(AttributeError, match="no attribute 'opening'"):
        tunesmith.opening  # noqa: B018


def test_the_import_is_light() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'rich'}"
    assert printed(f"import sys, tunesmith; print(*{heavy}.intersection(sys.modules))") == []
