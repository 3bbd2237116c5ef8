"""The files in llama.cpp itself: ids of the tokenizer, logits of Transformers and PEFT, and faults."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from errors import refuses
from export.tiny_gguf import (
    HARD,
    VARIANTS,
    byte_level,
    random_model,
    sentencepiece,
    structure_of,
    tensor_rows,
    write_model,
)
from tunesmith.config.schema import Adapter, Model
from tunesmith.errors import CheckpointError
from tunesmith.hub.gguf import convert_gguf
from tunesmith.hub.gguf_tokenizer import PRE_TOKENIZER_TABLE, read_file_tokenizer
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.tools.export.gguf import llama_cpp as room
from tunesmith.tools.export.gguf import tokenizer as header_room
from tunesmith.tools.export.gguf.adapter import AdapterTarget, plan_adapter
from tunesmith.tools.export.gguf.llama_cpp import UNREPORTED, LlamaCpp
from tunesmith.tools.export.gguf.tokenizer import read_gguf_tokenizer
from tunesmith.tools.export.gguf.write import write_gguf

pytest.importorskip("xllamacpp")

pytestmark = pytest.mark.slow


def largest_difference(server: LlamaCpp, model: PreTrainedModel, first: int = 4) -> float:
    """Of log-probabilities, over three prompts of at least `first` tokens."""
    torch.manual_seed(1)
    vocab = model.config.get_text_config().vocab_size
    differences = []
    for length in range(first, first + 60, 3):
        ids = [1, *torch.randint(4, 440, (length,)).tolist()]
        actual = server.log_probabilities(ids, vocab)
        if actual is None:
            continue
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        assert actual.min() > UNREPORTED
        differences.append((actual - expected).abs().max().item())
        if len(differences) == 3:
            return max(differences)
    raise AssertionError("too few answers")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_level(structure_of("gpt-2"))


# llama.cpp keeps keys and values in fp16. Measured on these models: at most 3e-3 where all is right;
# with one mistake, a lost bias, a norm without its 1, rows in wrong places, factors of 1: 0.056 to 5.5.
NOISE = 0.02


# The other families are in the nightly lane.
TIER_1 = ("llama", "llama-3", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "phi3-long")


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=() if v in TIER_1 else pytest.mark.nightly) for v in VARIANTS]
)
def test_logits_are_those_of_transformers(variant: str, tokenizer, tmp_path: Path) -> None:
    model = random_model(variant)
    with LlamaCpp(write_model(tmp_path / "tiny.gguf", model, tokenizer)) as server:
        # Of longrope llama.cpp takes the long factors, as its context is larger than the original one;
        # Transformers takes them for a long text.
        first = 70 if variant == "phi3-long" else 4
        assert largest_difference(server, model, first) < NOISE


def test_a_small_type_is_near(tokenizer, tmp_path: Path) -> None:
    model = random_model("llama", hidden_size=256)
    with LlamaCpp(write_model(tmp_path / "tiny.gguf", model, tokenizer, "q8_0")) as server:
        assert largest_difference(server, model) < 0.3


def other_ids(
    tokenizer, server: LlamaCpp, texts: list[str] = HARD
) -> dict[str, tuple[list[int], list[int]]]:
    """Those of the texts that llama.cpp splits in another way."""
    differences = {}
    for text in texts:
        pair = (tokenizer.encode(text), server.ids(text))
        if pair[0] != pair[1]:
            differences[text] = pair
    return differences


def header_of_file(file: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in GGUFReader(file).fields.items()}


# A letter and its mark as two code points, digits of other scripts.
MORE_TEXTS = ["a\u0300b\u0300 \u01c5", "\u2177 \u0661\u0662\u0663\u0664 12345 x  7"]
WITH_ADDED = ["a<order>b <order> c", "hi<|im_end|>\nyou"]
# Each name that stands for the expressions of a row. The others are in the nightly lane.
NAMES = [
    (row, name)
    for row in PRE_TOKENIZER_TABLE["structures"]
    for name in (row["pre"], *row.get("also", ()))
]
OF_TIER_1 = ("gpt-2", "llama-bpe", "qwen2", "tekken")


@pytest.mark.parametrize(
    ("row", "name"),
    [
        pytest.param(*pair, id=pair[1], marks=() if pair[1] in OF_TIER_1 else pytest.mark.nightly)
        for pair in NAMES
    ],
)
def test_ids_are_those_of_the_tokenizer_and_of_the_file(row, name, tmp_path, monkeypatch):
    """Of a vocabulary that llama.cpp's own key does not know."""
    tokenizer = byte_level(row)
    added = [AddedToken("<order>", special=False), AddedToken("<|im_end|>", special=True)]
    tokenizer.add_tokens(added)
    model = random_model("llama", num_hidden_layers=1)
    monkeypatch.setattr(header_room, "pre_tokenizer_name", lambda *_: name)
    file = write_model(tmp_path / "tiny.gguf", model, tokenizer)
    monkeypatch.undo()
    own = read_file_tokenizer(header_of_file(file), str(file))
    with LlamaCpp(file) as server:
        assert other_ids(own, server, [*HARD, *MORE_TEXTS, *WITH_ADDED]) == {}
        # Letters with combining marks, as the note says.
        is_noted = row["pre"] in PRE_TOKENIZER_TABLE["notes"]
        others = {"नमस्ते दुनिया"} if is_noted else set()
        assert {*other_ids(tokenizer, server, [*HARD, *WITH_ADDED])} == others
    again = read_gguf_tokenizer(own, 600, {})
    assert (again.keys["tokenizer_pre"], again.notes) == (row["pre"], ())


@pytest.mark.nightly
def test_the_demo_is_tokenized_as_llama_cpp_does(smollm2, tmp_path, monkeypatch):
    """Its expressions split digits, which Transformers' conversion does not read."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    tokenizer = load_tokenizer(convert_gguf(smollm2, None), Model(name=str(smollm2)))
    with LlamaCpp(smollm2) as server:
        assert other_ids(tokenizer, server, [*HARD, *MORE_TEXTS]) == {}


@pytest.mark.parametrize("prepend", [True, False])
def test_ids_of_sentencepiece_are_those_of_the_tokenizer_and_of_the_file(prepend, tmp_path):
    tokenizer = sentencepiece(prepend)
    tokenizer.add_tokens([AddedToken("<order>", special=False)])
    file = write_model(tmp_path / "t.gguf", random_model("llama", num_hidden_layers=1), tokenizer)
    own = read_file_tokenizer(header_of_file(file), str(file))
    with LlamaCpp(file) as server:
        assert other_ids(tokenizer, server) == {}
        assert other_ids(own, server, [*HARD, *MORE_TEXTS, WITH_ADDED[0], "</s> a</s>b"]) == {}
    for text in HARD:
        assert own.decode(own.encode(text), skip_special_tokens=True) == text


def test_space_after_special_tokens_is_dropped_as_phi_3_does(tmp_path: Path) -> None:
    """llama.cpp knows by `general.name` alone; the name that the caller gives says nothing."""
    tokenizer = sentencepiece()
    tokenizer.add_tokens([AddedToken("<|endoftext|>", special=True)])
    turns = [AddedToken(text, rstrip=True, special=True) for text in ("<|user|>", "<|end|>")]
    tokenizer.add_tokens(turns)
    model = random_model("phi3", num_hidden_layers=1)
    with LlamaCpp(write_model(tmp_path / "tiny.gguf", model, tokenizer)) as server:
        own = read_file_tokenizer(header_of_file(tmp_path / "tiny.gguf"), "tiny.gguf")
        for text in ("<|user|>\nhello<|end|>\n", "<|user|> \n hello <|end|>x", "<|endoftext|> hi"):
            assert server.ids(text) == tokenizer.encode(text) == own.encode(text), text


@pytest.mark.parametrize(("variant", "rslora"), [("llama", True), ("phi3", False)])
def test_an_adapter_gives_the_logits_of_peft(variant, rslora, tokenizer, tmp_path: Path) -> None:
    model = random_model(variant)
    base = write_model(tmp_path / "base.gguf", model, tokenizer)
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules="all-linear")
    tuned = get_peft_model(model, config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    rows = {
        name: tensor_rows(t.contiguous()) for name, t in get_peft_model_state_dict(tuned).items()
    }
    adapter = Adapter(rank=config.r, alpha=config.lora_alpha, rslora=rslora)
    plan = plan_adapter(model.config.to_dict(), rows, AdapterTarget("tiny", adapter))
    write_gguf(plan, tmp_path / "adapter.gguf")
    with LlamaCpp(base, tmp_path / "adapter.gguf") as server:
        assert largest_difference(server, tuned) < NOISE
    with LlamaCpp(base) as server:
        assert largest_difference(server, tuned) > 10 * NOISE, "the adapter shows"


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    return write_model(
        tmp_path_factory.mktemp("gguf") / "tiny.gguf", random_model("llama"), tokenizer
    )


@pytest.mark.nightly
def test_no_end_of_a_server_waits_for_ever(whole_file: Path) -> None:
    """The destructor of xllamacpp's server did, once in a few times on a busy machine."""
    began = monotonic()
    for _ in range(20):
        with LlamaCpp(whole_file) as server:
            assert server.ids("hello")
    assert monotonic() - began < 240


@pytest.mark.nightly
def test_a_server_ends_with_its_parent(whole_file: Path) -> None:
    source = f"""
import time
from pathlib import Path
from tunesmith.tools.export.gguf.llama_cpp import LlamaCpp
server = LlamaCpp(Path({str(whole_file)!r}))
print(server._process.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    child.wait(60)


def test_a_request_that_is_refused_and_a_killed_server_say_why(whole_file: Path) -> None:
    with LlamaCpp(whole_file) as server:
        with refuses(CheckpointError, where=str(whole_file)) as caught:
            server.post("/completion", {"prompt": [10**6], "n_predict": 1})
        assert "invalid" in caught.value.why.lower()
        assert server.ids("a")  # it serves on
    with LlamaCpp(whole_file) as server:
        os.kill(server._process.pid, signal.SIGKILL)
        with refuses(CheckpointError, names=["SIGKILL", "memory"]):
            server.ids("a")


# Another number in the header, and a value of llama.cpp's message.
DAMAGED = [
    ("llama.attention.head_count", 3, "blk.0.attn_q.weight"),
    ("llama.block_count", 1, "21"),
    # An assertion of ggml fails, which aborts.
    ("llama.attention.layer_norm_rms_epsilon", -1.0, "GGML_ASSERT"),
]


@pytest.mark.parametrize(("key", "value", "cause"), DAMAGED)
def test_the_cause_is_that_of_llama_cpp(key, value, cause, whole_file, tmp_path):
    file = Path(shutil.copy(whole_file, tmp_path))
    reader = GGUFReader(file, "r+")
    field = reader.get_field(key)
    assert field is not None
    field.parts[field.data[0]][0] = value
    reader.data.flush()
    with refuses(CheckpointError, where=str(file)) as caught, LlamaCpp(file) as server:
        server.ids("a")
    assert cause in caught.value.why


# A debugger prints such lines where a process aborts.
JUNK = "echo '[New LWP 18166]'; echo 'see http://www.gnu.org/software/gdb/'"


def test_junk_that_a_process_prints_is_no_address_and_no_message(tmp_path, monkeypatch):
    script, real = tmp_path / "python", subprocess.Popen

    def start(text: str) -> None:
        """Run a shell script in the place of the server's process."""
        script.write_text(f"#!/bin/sh\n{JUNK}; {text}\n")
        script.chmod(0o755)
        monkeypatch.setattr(
            room.subprocess,
            "Popen",
            lambda words, **given: real([str(script), *words[1:]], **given),
        )

    start("echo http://127.0.0.1:9; cat")
    with LlamaCpp(tmp_path / "any.gguf") as server:
        assert server._address == "http://127.0.0.1:9"
    for end, why in (("echo ENOSPC >&2; exit 3", "ENOSPC"), ("exit 3", "3")):
        start(end)
        with refuses(CheckpointError, names=[why]), LlamaCpp(tmp_path / "any.gguf"):
            pass
