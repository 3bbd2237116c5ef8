"""`tunesmith plan`: the sentence, JSON, exit codes, and where lengths are from."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from errors import check_shown, holds, lines_with, refuses, warnings_with
from invoke import Output, invoke
from recipes import recipe, write_rows
from tunesmith.cli.main import main
from tunesmith.config.dump import to_yaml
from tunesmith.errors import UsageError
from tunesmith.host.chips import CHIPS
from tunesmith.host.memory import MemoryFigures
from tunesmith.model.arch.shapes import SHAPES, config_of_model
from tunesmith.model.arch.spec import read_spec
from tunesmith.model.known.gguf_writers import describe_gguf_export
from tunesmith.planning import machines
from tunesmith.planning.machines import Cluster, read_cluster
from tunesmith.units import format_seconds

GIB = 2**30


def plan(*words: object, code: int = 0) -> Output:
    """What `tunesmith plan` prints; it must end with this code."""
    shown = invoke("plan", *words)
    assert shown.code == code, shown.err
    return shown


def plan_json(*words: object) -> dict[str, Any]:
    return json.loads(plan(*words, "--json").out)


def refused(*words: object, **fields: Any) -> None:
    check_shown(plan(*words, code=2).err, **fields)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A recipe of 70B, of whose model only config.json is there."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SHAPES["llama3-70b"].config))
    data = {"train": {"source": "rows.jsonl"}}
    values = {"model": {"name": "model"}, "data": data, "train": {"duration": "100 steps"}}
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(values | {"output_dir": "runs/none"}))
    return file


@pytest.fixture
def small(tiny: Path, tmp_path: Path) -> Path:
    """A recipe of the tiny Llama whose rows are here."""
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe(tiny, tmp_path, held=False)))
    return file


FALCON = {
    "model_type": "falcon", "architectures": ["FalconForCausalLM"], "hidden_size": 64, "num_attention_heads": 4,
    "num_hidden_layers": 2, "vocab_size": 272, "new_decoder_architecture": False,
}  # fmt: skip


def test_the_answer_comes_before_what_the_rows_and_the_recipe_say(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "rows.jsonl", 60)
    both = io.StringIO()
    monkeypatch.setattr(sys, "stdout", both)
    monkeypatch.setattr(sys, "stderr", both)
    words = ["--model", tiny, "--data", tmp_path / "rows.jsonl"]
    assert main(["plan", *map(str, words)]) == 0
    first, *others = both.getvalue().splitlines()
    assert " GiB" in first
    assert any("rows.jsonl: 60" in line for line in others)


def test_a_type_that_packs_nothing_is_planned_unpacked(llama: Path) -> None:
    """`train` lays its rows out so, whatever the recipe says; a batch of tokens is refused."""
    (llama.parent / "model" / "config.json").write_text(json.dumps(FALCON))
    words = [llama, "--on", "h100", "data.seq_len=128"]
    examples = [*words, "--length", "64", "train.global_batch=8 examples"]
    unpacked = ["data.pack=false", "model.attention=eager"]
    assert plan_json(*examples) == plan_json(*examples, *unpacked)
    tokens = "train.global_batch=1024 tokens"
    refused(*words, tokens, where="train.global_batch", names=["falcon"])


@pytest.mark.parametrize(
    ("text", "nodes", "per_node", "chip"),
    [
        ("2x8xh100", 2, 8, "h100"), ("1x-h200", 1, 1, "h200"), ("4xa100-80gb", 1, 4, "a100-80gb"),
        ("2x-dgx-spark", 2, 1, "dgx-spark"), ("2 x Spark", 2, 1, "dgx-spark"), ("GB10", 1, 1, "dgx-spark"),
        ("2x4090", 1, 2, "rtx-4090"), ("2 x 8 x NVIDIA H200", 2, 8, "h200"), ("a100_40gb", 1, 1, "a100-40gb"),
    ],
)  # fmt: skip
def test_machines_by_name(text: str, nodes: int, per_node: int, chip: str) -> None:
    assert read_cluster(text) == Cluster(CHIPS[chip], nodes, per_node)


@pytest.mark.parametrize(
    ("text", "fix"),
    [("8xh10", "h100?"), ("a100", "a100-80gb"), ("rtx-6000", "rtx-a6000"), ("0xh100", "")],
)
def test_machines_that_are_not_known(text: str, fix: str) -> None:
    with refuses(UsageError, names=[repr(text)]) as caught:
        read_cluster(text)
    assert fix in caught.value.fix


# 116 GiB are available, of 121.7.
@pytest.mark.parametrize(
    ("printed", "named"),
    [
        ("0, NVIDIA GB10, [N/A]\n", "NVIDIA GB10, 106 GiB, 55 TFLOP/s"),
        (
            "0, NVIDIA H100 80GB HBM3, [Insufficient Permissions]\n",
            "NVIDIA H100 80GB HBM3, 79 GiB, ",
        ),
        ("\n0, NVIDIA H200, 143771\n\n", "NVIDIA H200, 139 GiB, "),
        ("0, NVIDIA H200, 143771\n1, NVIDIA H200, [N/A]\n", "2 x NVIDIA H200, 139 GiB, "),
        ("0, NVIDIA T4, [Insufficient Permissions]\n", ""),
        ("No devices were found\n", "cpu, "),
        ("", "cpu, "),
    ],
)
def test_a_plan_for_this_machine_whatever_nvidia_smi_prints(
    printed: str, named: str, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = small.parent / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(f"#!/bin/sh\ncat <<'END'\n{printed}END\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(smi.parent), prepend=os.pathsep)
    figures = MemoryFigures(int(121.7 * GIB), 116 * GIB, free=110 * GIB, cached=GIB, shared=0)
    monkeypatch.setattr(machines, "read_memory", lambda: figures)
    if not named:  # its memory is not known
        refused(small, where="--on here", names=["NVIDIA T4"], fix=["h100"])
        return
    first, second, *_ = plan(small).out.splitlines()
    assert second.startswith(f"machines: {named}")
    if named == "cpu, ":  # memory alone is told
        assert first.startswith("fits: ")
        assert "tokens/s" not in first


def test_one_sentence_comes_first_and_then_the_details(llama: Path) -> None:
    best = plan_json(llama, "--on", "2x8xh100")["meshes"][0]
    said = plan(llama, "--on", "2x8xh100").out
    lines = said.splitlines()
    needed, room = (round(size / GIB) for size in (best["phases"]["step"], best["room"]))
    duration = format_seconds(3600 * best["hours"])
    speed = f"{best['tokens_per_second']:,.0f} tokens/s"
    assert lines[0] == f"fits: {needed} of {room} GiB, about {duration} at {speed}"
    assert lines[1].startswith("machines: 2 x 8 x NVIDIA H100 80GB HBM3, 79 GiB, 520 TFLOP/s")
    assert lines_with(said, "examples:", "2,048 tokens")


def test_rows_that_are_here_or_that_a_split_names_are_counted(llama: Path) -> None:
    """Without a tokenizer: a quarter of the characters of each, and the whole run has its hours."""
    row = json.dumps({"messages": [{"role": "user", "content": "x" * 4000}]})
    (llama.parent / "rows.jsonl").write_text("{broken\n" + f"{row}\n" * 999)
    words = [llama, "--on", "2x8xh100", "train.duration=2 epochs", "train.global_batch=50 examples"]
    work = plan_json(*words)["work"]
    assert (work["longest"], work["steps"]) == (1001, 40)
    words = ["llama3.1-8b-lora", "--on", "h100"]  # no row is downloaded
    for split, steps in (("train[:512]", 64), ("train[100:180]", 10), ("train[:95%]", None)):
        assert plan_json(*words, f"data.train.split={split}")["work"]["steps"] == steps


def test_a_dtype_that_the_machine_lacks_is_refused_or_planned_as_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["smollm2-135m-lora", "--on", "t4"]
    refused(*words, "model.dtype=bf16", where="model.dtype", names=["T4"], fix=["fp16"])
    plan(*words)  # auto is what it has units for
    monkeypatch.setattr(machines, "list_gpus", list)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    for on, dtype in (("here", "fp32"), ("dgx-spark", "bf16")):
        assert plan_json(*words[:1], "--on", on)["meshes"][0]["plan"]["base"] == dtype
    words = ["llama3.1-8b-lora", "--on", "a100-80gb"]
    plain, eight = (plan(*words, f"model.quantize={q}").out for q in ("none", "fp8"))
    assert warnings_with(eight, "bf16", "model.quantize=nf4")
    assert eight.splitlines()[:2] == plain.splitlines()[:2]
    # Experts in codes that become dense would take three times the memory.
    experts = plan("gpt-oss-20b-lora", "--on", "h100", "model.quantize=fp8").out
    assert warnings_with(experts, "MXFP4", "as-shipped")


def test_a_plan_that_does_not_fit_ends_with_2_and_names_what_to_change(llama: Path) -> None:
    names = ["GiB", "weights", "recompute"]
    refused(llama, "--on", "dgx-spark", names=names, fix=["model.quantize=nf4"])
    shown = plan("llama3.2-3b-full", "--on", "rtx-4090", code=2)
    sentence = re.match(r"does not fit: (\d+) of (\d+) GiB$", shown.out, re.MULTILINE)
    figures = re.search(r"needs about ([\d.]+) GiB, and ([\d.]+) GiB can be used", shown.err)
    assert sentence is not None
    assert figures is not None
    assert [round(float(each)) for each in figures.groups()] == [int(n) for n in sentence.groups()]


def test_lengths_from_characters_count_the_prompt_of_a_pair_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """160, 40 and 40 characters: 100 tokens in two sequences, without a template's."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "What? " * 26 + "Why?", "chosen": "Yes." * 10, "rejected": "No. " * 10}
    Path("pairs.jsonl").write_text(f"{json.dumps(row)}\n" * 20)
    new = ["--model", "HuggingFaceTB/SmolLM2-135M-Instruct", "--data", "pairs.jsonl"]
    shipped = ["smollm2-135m-dpo", "data.train.source=pairs.jsonl", "data.train.format=preference"]
    for words in (new, shipped):
        assert lines_with(plan(*words, "--on", "h100").out, "100", "estimated", "template")


def test_a_file_that_is_missing_is_named_and_its_rows_can_be_given(llama: Path) -> None:
    words = [llama, "--on", "2x8xh100", "train.duration=2 epochs"]
    shown = plan(*words)
    assert warnings_with(shown.err, "data.train", llama.parent / "rows.jsonl", "--rows N")
    assert holds(shown.out, "--rows N", "train.duration='500 steps'")
    words += ["train.global_batch=50 examples", "--rows", "1000"]
    shown = plan(*words, "--length", "500")
    assert not warnings_with(shown.err)
    assert lines_with(shown.out, "examples:", "1,000 rows (--rows)", "500 tokens", "40 steps")
    work = plan_json(*words, "data.hold_out=10 %")["work"]
    assert (work["longest"], work["steps"]) == (2048, 36)
    refused(*words, "data.hold_out=1000 examples", where="data.hold_out", names=["1,000"])
    # Rows here tell the length of those elsewhere.
    (llama.parent / "rows.jsonl").write_text(json.dumps({"text": "x" * 400}) + "\n")
    assert lines_with(plan(*words).out, "1,000 rows (--rows)", "100 tokens")


@pytest.mark.slow
def test_a_model_and_rows_are_planned_without_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no cache"))
    row = {"question": "x" * 300, "answer": "y" * 100}
    (tmp_path / "faq.jsonl").write_text((json.dumps(row) + "\n") * 1000)
    name = "meta-llama/Llama-3.1-70B-Instruct"
    words = ["--model", name, "--data", "faq.jsonl", "--on", "2x8xh100"]
    shown = plan(*words)
    assert lines_with(shown.err, "adapter.rank=16", "data.seq_len=256", "'3 epochs'")
    assert lines_with(shown.out, "examples:", "950 rows", "100 tokens")
    # What is chosen is chosen for the rows that there will be.
    shown = plan(*words, "--rows", "12000")
    assert lines_with(shown.err, "data.hold_out='500 examples'", "'2 epochs'", "'64 examples'")
    assert lines_with(shown.out, "examples:", "12,000 rows (--rows)", 500, "100 tokens")
    refused("--on", "h100", "--model", name, where="command line", names=["--data"])


def test_json_has_everything(llama: Path) -> None:
    found = plan_json(llama, "--on", "2x-dgx-spark", "--length", "300")
    best = found["meshes"][0]
    assert best["plan"]["mesh"] == {"replicate": 1, "shard": 2, "tensor": 1}
    assert (best["fits"], len(found["meshes"])) == (True, 1)
    assert best["step_seconds"] == pytest.approx(sum(best["seconds"].values()))
    assert best["phases"]["step"] <= best["room"]
    assert found["work"]["longest"] == 300
    assert found["machines"]["chip"]["network"] == 20
    assert found["gguf"] == {"writer": "own", "needs": describe_gguf_export("llama")}


def test_a_4_bit_repository_is_planned_as_one() -> None:
    stored = config_of_model("unsloth/Meta-Llama-3.1-70B-bnb-4bit")
    plain = config_of_model("meta-llama/Llama-3.1-70B-Instruct")
    assert stored is not None
    assert plain == SHAPES["llama3-70b"].config
    assert read_spec(stored, where="test") != read_spec(plain, where="test")
    assert config_of_model("someone/model") is None


@pytest.mark.slow
def test_lengths_come_from_the_token_cache_if_it_has_them(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = small.parent / "cache"
    monkeypatch.setenv("TUNESMITH_CACHE", str(cache))
    for _ in range(2):
        assert lines_with(plan(small, "--on", "h100").out, "examples:", "48 rows")
        assert not list(cache.glob("tokens/*")), "a plan tokenises nothing"
        (cache / "tokens").mkdir(parents=True, exist_ok=True)
    assert invoke("data", small).code == 0
    assert lines_with(plan(small, "--on", "h100").out, "examples:", 48, "cache")
    shorter = plan(small, "data.seq_len=64", "--on", "h100").out
    assert not lines_with(shorter, "examples:", 48, "cache")
