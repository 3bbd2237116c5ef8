"""`tunesmith plan`: the sentence, JSON, exit codes, and where lengths are from."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
from huggingface_hub import constants

from errors import check_shown, holds, is_internal, lines_with, refuses, warnings_with
from recipes import recipe
from tunesmith.cli.main import main
from tunesmith.config.dump import to_yaml
from tunesmith.errors import UsageError
from tunesmith.host import chips
from tunesmith.host.chips import CHIPS, Chip
from tunesmith.host.memory import MemoryFigures
from tunesmith.model.gguf_writers import describe_gguf_export
from tunesmith.model.shapes import SHAPES, config_of_model
from tunesmith.model.spec import read_spec
from tunesmith.planning import machines
from tunesmith.planning.forecast import Planner
from tunesmith.planning.machines import Cluster, read_cluster
from tunesmith.planning.run_plan import RunPlan, Saving
from tunesmith.units import format_seconds
from warm import run_warm

ROOT = Path(__file__).resolve().parents[3]
GIB = 2**30
NAMES = {
    "2x8xh100": (2, 8, "h100"), "8xh100": (1, 8, "h100"), "1x-h200": (1, 1, "h200"), "H200": (1, 1, "h200"),
    "4xa100-80gb": (1, 4, "a100-80gb"), "2x-dgx-spark": (2, 1, "dgx-spark"), "dgx-spark": (1, 1, "dgx-spark"),
    "2xrtx-4090": (1, 2, "rtx-4090"), "16x8xh200": (16, 8, "h200"),
    "spark": (1, 1, "dgx-spark"), "2x-spark": (2, 1, "dgx-spark"), "2 x Spark": (2, 1, "dgx-spark"), "GB10": (1, 1, "dgx-spark"),
    "DGX Spark": (1, 1, "dgx-spark"), "rtx4090": (1, 1, "rtx-4090"), "2x4090": (1, 2, "rtx-4090"),
    "2 x 8 x NVIDIA H200": (2, 8, "h200"), "a100_40gb": (1, 1, "a100-40gb"),
}  # fmt: skip
REFUSED = {
    "8xh10": ("'8xh10' does not name a machine", "did you mean h100?"),
    "a100": ("'a100' does not name a machine", "a100-80gb"),
    "2xsprak": ("'2xsprak' does not name a machine", "dgx-spark"),
    # Another card than the RTX PRO 6000.
    "rtx-6000": ("'rtx-6000' does not name a machine", "rtx-a6000"),
    "0xh100": ("'0xh100' does not name a machine", ""),
    "large": ("'large' does not name a machine", "as in 8xh100 or 2x8xh100, or use `here`"),
    "mine": ("'mine' does not name a machine", "as in 8xh100 or 2x8xh100, or use `here`"),
}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A recipe of 70B, of whose model only config.json is there."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SHAPES["llama3-70b"].config))
    values = {
        "model": {"name": "model"},
        "data": {"train": {"source": "rows.jsonl"}},
        "train": {"duration": "100 steps"},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(values | {"output_dir": "runs/none"}))
    return file


def test_a_warmup_that_fills_the_run_is_told(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In epochs: of a duration in steps it is refused."""
    command = ["plan", str(llama), "--on", "2x8xh100", "--rows", "960", "--length", "400"]
    command += ["train.global_batch=32 examples", "train.duration=1 epochs"]
    assert main([*command, "train.warmup=29 steps"]) == 0
    assert "train.warmup" not in capsys.readouterr().out
    assert main([*command, "train.warmup=30 steps"]) == 0
    assert holds(capsys.readouterr().out, "train.warmup is 30 steps", "30 steps", "'3 %'")


FALCON = {
    "model_type": "falcon", "architectures": ["FalconForCausalLM"], "hidden_size": 64, "num_attention_heads": 4,
    "num_hidden_layers": 2, "vocab_size": 272, "new_decoder_architecture": False,
}  # fmt: skip


def test_a_type_that_packs_nothing_is_planned_unpacked(
    llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`train` lays its rows out so, whatever the recipe says."""
    (llama.parent / "model" / "config.json").write_text(json.dumps(FALCON))
    words = ["plan", str(llama), "--on", "h100", "--length", "64", "--json", "data.seq_len=128"]
    plans = []
    for keys in ([], ["data.pack=false", "model.attention=eager"]):
        assert main([*words, "train.global_batch=8 examples", *keys]) == 0
        plans.append(json.loads(capfd.readouterr().out))
    assert plans[0] == plans[1]


def test_a_batch_of_tokens_is_refused_for_it(
    llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (llama.parent / "model" / "config.json").write_text(json.dumps(FALCON))
    words = ["plan", str(llama), "--on", "h100", "data.seq_len=128"]
    assert main([*words, "train.global_batch=1024 tokens"]) == 2
    check_shown(capfd.readouterr().err, where="train.global_batch", names=["falcon"])


@pytest.mark.parametrize("text", NAMES)
def test_machines_by_name(text: str) -> None:
    nodes, per_node, chip = NAMES[text]
    assert read_cluster(text) == Cluster(CHIPS[chip], nodes, per_node)


@pytest.mark.parametrize("text", REFUSED)
def test_machines_that_are_not_known(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        read_cluster(text)
    assert REFUSED[text][0] in str(refused.value)
    assert REFUSED[text][1] in refused.value.fix


def test_every_figure_has_a_source() -> None:
    for chip in CHIPS.values():
        assert all(figure in chip.sources for figure in ("gib", "bandwidth"))
        assert chip.source.startswith(("measured", "assumed"))
        assert all(
            figure in chip.sources for figure in ("link", "network") if getattr(chip, figure)
        )


def test_the_h100_follows_from_the_h200() -> None:
    """Products (75 % of a step) and attention (11 %) are as fast; the rest waits for memory."""
    h100, h200 = CHIPS["h100"], CHIPS["h200"]
    slower = 0.75 + 0.11 + 0.14 * h200.bandwidth / h100.bandwidth
    assert h100.tflops == round(h200.tflops / slower)


@pytest.mark.parametrize("text", ["2x4xl40s", "2x2x-dgx-spark"])
def test_a_link_that_is_not_known_leaves_the_speed_out(text: str) -> None:
    assert read_cluster(text).chip.tflops is None
    assert read_cluster(text).chip.gib > 0


REMOVED = {
    ("--price", "2.5"): "hours",
    ("--assume", "gib=24"): "--on",
    ("--all",): "parallel.tensor",
}


@pytest.mark.parametrize("words", REMOVED)
def test_an_option_that_went_names_its_replacement(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "qwen3-8b-lora", "--on", "h100", *words]) == 2
    check_shown(capsys.readouterr().err, fix=[REMOVED[words]])


def test_here_is_what_nvidia_smi_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = "0, NVIDIA H200, 143771\n1, NVIDIA H200, 143771\n"
    smi = SimpleNamespace(
        check_output=lambda *_, **__: shown,
        DEVNULL=None,
        SubprocessError=subprocess.SubprocessError,
    )
    monkeypatch.setattr(chips, "subprocess", smi)
    assert read_cluster("here") == Cluster(CHIPS["h200"], 1, 2)
    shown = "0, NVIDIA T4, 15360\n"
    assert read_cluster("here") == Cluster(Chip("NVIDIA T4", 14.4), 1, 1)
    shown = "0, NVIDIA T4, [Insufficient Permissions]\n"
    with refuses(UsageError, where="--on here", names=["NVIDIA T4"]) as refused:
        read_cluster("here")
    assert "h100" in refused.value.fix

    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError("nvidia-smi")

    smi.check_output = missing
    cpu = read_cluster("here")
    assert (cpu.chip.name, cpu.world, cpu.chip.tflops) == ("cpu", 1, None)
    assert cpu.describe() == "cpu"
    assert Cluster(CHIPS["h200"], 11, 8).describe() == "11 x 8 x NVIDIA H200"


# What nvidia-smi prints, and the GPUs with GiB of one that a plan names. 116 GiB are
# available, of 121.7.
SMI_OUTPUTS = {
    "a Spark": ("0, NVIDIA GB10, [N/A]\n", "machines: NVIDIA GB10, 106 GiB, 55 TFLOP/s"),
    "a Spark of another driver": (
        "0, NVIDIA GB10, [Not Supported]\n",
        "machines: NVIDIA GB10, 106 GiB, ",
    ),
    "a Spark that tells nobody": (
        "0, NVIDIA GB10, [Insufficient Permissions]\n",
        "machines: NVIDIA GB10, 106 GiB, ",
    ),
    "no memory of its own": (
        "0, NVIDIA Jetson Thor, [N/A]\n",
        "machines: NVIDIA Jetson Thor, 106 GiB",
    ),
    "an H100 in slices": (
        "0, NVIDIA H100 80GB HBM3, [Insufficient Permissions]\n",
        "machines: NVIDIA H100 80GB HBM3, 79 GiB, ",
    ),
    "empty lines": ("\n0, NVIDIA H200, 143771\n\n", "machines: NVIDIA H200, 139 GiB, "),
    "several": (
        "0, NVIDIA H200, 143771\n1, NVIDIA H200, [N/A]\n",
        "machines: 2 x NVIDIA H200, 139 GiB, ",
    ),
    "no device": ("No devices were found\n", "machines: cpu, "),
    "nothing": ("", "machines: cpu, "),
}


@pytest.mark.parametrize("case", SMI_OUTPUTS)
def test_a_plan_for_this_machine_whatever_nvidia_smi_prints(
    case: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, named = SMI_OUTPUTS[case]
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(f"#!/bin/sh\ncat <<'END'\n{output}END\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(smi.parent), prepend=os.pathsep)
    figures = MemoryFigures(int(121.7 * GIB), 116 * GIB, free=110 * GIB, cached=GIB, shared=0)
    monkeypatch.setattr(machines, "read_memory", lambda: figures)
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe(tiny, tmp_path, held=False)))
    assert main(["plan", str(file)]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[1].startswith(named)
    assert not is_internal(shown.err)


def test_one_sentence_comes_first_and_then_the_details(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(llama), "--on", "2x8xh100", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["meshes"][0]
    assert main(["plan", str(llama), "--on", "2x8xh100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    needed, room = (round(size / GIB) for size in (best["phases"]["step"], best["room"]))
    duration = format_seconds(3600 * best["hours"])
    speed = f"{best['tokens_per_second']:,.0f} tokens/s"
    assert lines[0] == f"fits: {needed} of {room} GiB, about {duration} at {speed}"
    assert lines[1].startswith("machines: 2 x 8 x NVIDIA H100 80GB HBM3, 79 GiB, 520 TFLOP/s")
    said = "\n".join(lines)
    assert "(assumed: the H200's" in said
    assert lines_with(said, "examples:", "2,048 tokens")
    mesh = best["plan"]["mesh"]
    for part in (
        f"mesh: replicate {mesh['replicate']} x shard {mesh['shard']} x tensor {mesh['tensor']}; ",
        "memory of a GPU: weights ",
        " seconds: products ",
        "disk: ",
        f"GGUF: {describe_gguf_export('llama')}",
    ):
        assert part in said


def test_a_second_machine_is_refused(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(llama), "--on", "h100", "--on", "h200"]) == 2
    check_shown(capsys.readouterr().err, where="command line: --on", names=[2])


@pytest.mark.slow
def test_a_plan_starts_no_gpu(llama: Path) -> None:
    """Where there is one; without any, a look at it would raise."""
    code = f"""import sys, torch
from tunesmith.cli.main import main
assert main(["plan", {str(llama)!r}, "--on", "2x8xh100"]) == 0
print(torch.cuda.is_initialized())"""
    assert run_warm([], program=code).stdout.splitlines()[-1] == "False"


def test_without_tokens_the_hours_of_an_epoch_are_not_known(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(llama), "--on", "2x8xh100", "train.duration=1 epochs"]) == 0
    assert holds(capsys.readouterr().out, "--rows N", "train.duration='500 steps'")


def test_rows_that_are_here_are_counted(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a tokenizer: a quarter of the characters of each, and the whole run has its hours."""
    rows = [{"messages": [{"role": "user", "content": "x" * 4000}]}] * 1000
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (llama.parent / "rows.jsonl").write_text(text)
    words = ["plan", str(llama), "--on", "2x8xh100", "train.duration=2 epochs", "--json"]
    assert main([*words, "train.global_batch=50 examples"]) == 0
    work = json.loads(capsys.readouterr().out)["work"]
    assert (work["longest"], work["steps"]) == (1001, 40)


def test_rows_are_counted_where_one_cannot_be_read(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = json.dumps({"messages": [{"role": "user", "content": "x" * 4000}]})
    (llama.parent / "rows.jsonl").write_text("{broken\n" + f"{row}\n" * 999)
    words = ["plan", str(llama), "--on", "2x8xh100", "train.duration=2 epochs", "--json"]
    assert main([*words, "train.global_batch=50 examples"]) == 0
    work = json.loads(capsys.readouterr().out)["work"]
    assert (work["longest"], work["steps"]) == (1001, 40)


def test_rows_that_a_split_names_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """The whole run has its hours before a row is downloaded."""
    words = ["plan", "llama3.1-8b-lora", "--on", "h100", "--json"]
    for split, steps in (("train[:512]", 64), ("train[100:180]", 10), ("train[:95%]", None)):
        assert main([*words, f"data.train.split={split}"]) == 0
        assert json.loads(capsys.readouterr().out)["work"]["steps"] == steps
    assert main([*words[:-1], "data.train.max_examples=16"]) == 0
    assert lines_with(capsys.readouterr().out, "16 rows", "2,048 tokens", "2 steps")


@pytest.mark.slow
def test_the_sentence_and_the_error_name_the_same_gib(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gemma-4-31b-lora", "--on", "rtx-4090"]) == 2
    shown = capsys.readouterr()
    sentence = re.match(r"does not fit: (\d+) of (\d+) GiB$", shown.out, re.MULTILINE)
    assert sentence is not None
    figures = re.search(r"needs about ([\d.]+) GiB, and ([\d.]+) GiB can be used", shown.err)
    assert figures is not None
    assert [round(float(each)) for each in figures.groups()] == [int(n) for n in sentence.groups()]


def test_each_choice_of_a_long_fix_has_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["plan", "llama3.2-3b-full", "--on", "rtx-4090"]) == 2
    first, second = [line.split() for line in capsys.readouterr().err.splitlines()[-2:]]
    assert first[:3] == ["fix:", "set", "train.optimizer=adamw-8bit"]
    assert second[:2] == ["or", "adapter.kind=lora"]


def test_a_checkpoint_without_room_is_said_to_wait(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "qwen3-30b-a3b-qlora", "--on", "rtx-4090"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("fits: ")
    assert lines_with(shown, "checkpoint", "waits")


def test_lengths_from_characters_count_the_prompt_of_a_pair_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """160, 40 and 40 characters: 100 tokens in two sequences, without a template's."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "What? " * 26 + "Why?", "chosen": "Yes." * 10, "rejected": "No. " * 10}
    Path("pairs.jsonl").write_text(f"{json.dumps(row)}\n" * 20)
    new = ["--model", "HuggingFaceTB/SmolLM2-135M-Instruct", "--data", "pairs.jsonl"]
    shipped = ["smollm2-135m-dpo", "data.train.source=pairs.jsonl", "data.train.format=preference"]
    for words in (new, shipped):
        assert main(["plan", *words, "--on", "h100"]) == 0
        assert lines_with(capsys.readouterr().out, "100", "estimated", "template")


def test_the_parts_of_a_short_step_are_its_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "smollm2-135m-lora", "--on", "2x8xh100"]) == 0
    (line,) = lines_with(capsys.readouterr().out, "products")
    step, *parts = [float(value) for value in re.findall(r"[\d.]+", line)]
    assert 0 < step < 0.1
    assert sum(parts) == pytest.approx(step, abs=5e-4)


def test_a_file_that_is_missing_is_named_and_its_rows_can_be_given(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", str(llama), "--on", "2x8xh100", "train.duration=2 epochs"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert warnings_with(shown.err, "data.train", llama.parent / "rows.jsonl", "--rows N")
    assert holds(shown.out, "--rows N")
    words += ["train.global_batch=50 examples", "--rows", "1000"]
    assert main([*words, "--length", "500"]) == 0
    shown = capsys.readouterr()
    assert not warnings_with(shown.err)
    assert lines_with(shown.out, "examples:", "1,000 rows (--rows)", "500 tokens", "40 steps")
    assert re.match(r"fits: .* GiB, about .* at [\d,]+ tokens/s$", shown.out, re.MULTILINE)
    assert main([*words, "--length", "500", "data.hold_out=10 %"]) == 0
    assert lines_with(capsys.readouterr().out, "1,000 rows (--rows)", 100)
    assert main([*words, "data.hold_out=10 %", "--json"]) == 0
    work = json.loads(capsys.readouterr().out)["work"]
    assert (work["longest"], work["steps"]) == (2048, 36)
    assert main([*words, "data.hold_out=1000 examples"]) == 2
    check_shown(capsys.readouterr().err, where="data.hold_out", names=["1,000"])


def test_rows_here_tell_the_length_of_those_elsewhere(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (llama.parent / "rows.jsonl").write_text(json.dumps({"text": "x" * 400}) + "\n")
    assert main(["plan", str(llama), "--on", "2x8xh100", "--rows", "6400"]) == 0
    shown = capsys.readouterr()
    assert lines_with(shown.out, "6,400 rows (--rows)", "100 tokens")


def test_a_model_and_rows_are_planned_without_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a well-known model as for a recipe that ships: also the tokenizer is not needed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no cache"))
    row = {"question": "x" * 300, "answer": "y" * 100}
    (tmp_path / "faq.jsonl").write_text((json.dumps(row) + "\n") * 1000)
    name = "meta-llama/Llama-3.1-70B-Instruct"
    words = ["plan", "--model", name, "--data", "faq.jsonl", "--on", "2x8xh100"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert lines_with(shown.err, "adapter.rank=16", "data.seq_len=256", "'3 epochs'")
    assert lines_with(shown.out, "examples:", "950 rows", "100 tokens")
    assert [path.name for path in tmp_path.iterdir()] == ["faq.jsonl"]
    # What is chosen is chosen for the rows that there will be.
    assert main([*words, "--rows", "12000"]) == 0
    shown = capsys.readouterr()
    assert lines_with(shown.err, "data.hold_out='500 examples'", "'2 epochs'", "'64 examples'")
    assert lines_with(shown.out, "examples:", "12,000 rows (--rows)", 500, "100 tokens")
    assert main(["plan", "--on", "h100", "--model", name]) == 2
    check_shown(capsys.readouterr().err, where="command line", names=["--data"])


def test_a_card_without_bf16_is_refused_as_train_does(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "smollm2-135m-lora", "--on", "t4"]
    assert main([*words, "model.dtype=bf16"]) == 2
    check_shown(capsys.readouterr().err, where="model.dtype", names=["T4"], fix=["fp16"])
    assert main([*words, "model.dtype=fp16"]) == 0
    assert main(words) == 0, "auto is what it has units for"


def test_a_plan_takes_the_dtype_of_the_machine_that_it_is_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machines, "list_gpus", list)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    for on, dtype in (("here", "fp32"), ("dgx-spark", "bf16")):
        assert main(["plan", "smollm2-135m-lora", "--on", on, "--json"]) == 0
        shown = capsys.readouterr()
        assert json.loads(shown.out)["meshes"][0]["plan"]["base"] == dtype
        assert lines_with(shown.err, "model.dtype", dtype)


def test_json_has_everything(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(llama), "--on", "2x-dgx-spark", "--json", "--length", "300"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["meshes"][0]
    assert best["plan"]["mesh"] == {"replicate": 1, "shard": 2, "tensor": 1}
    assert (best["fits"], len(found["meshes"])) == (True, 1)
    assert best["step_seconds"] == pytest.approx(sum(best["seconds"].values()))
    assert best["phases"]["step"] <= best["room"]
    assert found["work"]["longest"] == 300
    assert found["machines"]["chip"]["network"] == 20
    assert found["gguf"] == {"writer": "own", "needs": describe_gguf_export("llama")}


def test_a_base_in_fp8_on_a_gpu_without_fp8_is_planned_in_bf16(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An A100 had a base in int8 alone."""
    command = ["plan", "llama3.1-8b-lora", "--on", "a100-80gb"]
    shown = []
    for quantize in ("none", "fp8"):
        assert main([*command, f"model.quantize={quantize}"]) == 0
        shown.append(capsys.readouterr().out.splitlines())
    warnings = [line for line in shown[1] if line.startswith("warning: the base stays in bf16")]
    assert len(warnings) == 1
    assert "A100" in warnings[0]
    assert "model.quantize=nf4" in warnings[0]
    assert shown[1][:2] == shown[0][:2]


def test_experts_that_fp8_leaves_dense_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """A base that ships them in codes would take three times the memory."""
    words = ["plan", "gpt-oss-20b-lora", "--on", "h100"]
    assert main([*words, "model.quantize=fp8"]) == 0
    assert lines_with(capsys.readouterr().out, "warning", "MXFP4", "as-shipped")
    assert main(words) == 0
    assert not lines_with(capsys.readouterr().out, "warning")


def test_what_does_not_fit_ends_with_2_and_what_to_change(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(llama), "--on", "dgx-spark"]) == 2
    shown = capsys.readouterr()
    check_shown(shown.err, names=["GiB", "weights", "recompute"])
    assert "fix: set model.quantize=nf4 (" in shown.err


def test_what_makes_a_run_fit_is_searched_for_once(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[RunPlan] = []
    search = Planner._savings

    def counted(planner: Planner, plan: RunPlan) -> Sequence[Saving]:
        searched.append(plan)
        return search(planner, plan)

    monkeypatch.setattr(Planner, "_savings", counted)
    assert main(["plan", str(llama), "--on", "dgx-spark"]) == 2
    assert len(searched) == 1


# One of the table, one that is measured; planning/test_golden_plans.py plans all of them.
@pytest.mark.parametrize("name", ["llama3.1-70b-lora", "gpt-oss-20b-lora"])
def test_a_recipe_that_ships_is_planned_without_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no cache"))
    assert main(["plan", name, "--on", "2x8xh100"]) == 0
    assert "2 x 8 x NVIDIA H100" in capsys.readouterr().out


def test_a_4_bit_repository_is_planned_as_one() -> None:
    stored = config_of_model("unsloth/Meta-Llama-3.1-70B-bnb-4bit")
    plain = config_of_model("meta-llama/Llama-3.1-70B-Instruct")
    assert stored is not None
    assert plain == SHAPES["llama3-70b"].config
    assert read_spec(stored, where="test") != read_spec(plain, where="test")
    assert config_of_model("someone/model") is None


def test_on_a_cpu_memory_alone_is_told(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machines, "list_gpus", list)
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe(tiny, tmp_path, held=False)))
    assert main(["plan", str(file)]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("fits: ")
    assert "tokens/s" not in first
    assert not lines_with("\n".join(others), "seconds")


def test_lengths_come_from_the_token_cache_if_it_has_them(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe(tiny, tmp_path, held=False)))
    for _ in range(2):
        assert main(["plan", str(file), "--on", "h100"]) == 0
        assert lines_with(capsys.readouterr().out, "examples:", "48 rows")
        assert not list((tmp_path / "cache").glob("tokens/*")), "a plan tokenises nothing"
        (tmp_path / "cache" / "tokens").mkdir(parents=True, exist_ok=True)
    assert main(["data", str(file)]) == 0
    capsys.readouterr()
    assert main(["plan", str(file), "--on", "h100"]) == 0
    assert lines_with(capsys.readouterr().out, "examples:", 48, "cache")
    assert main(["plan", str(file), "data.seq_len=64", "--on", "h100"]) == 0
    assert not lines_with(capsys.readouterr().out, "examples:", 48, "cache")
