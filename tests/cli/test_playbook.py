"""The four playbook scripts: every flag has an effect; rows, text and closing lines are theirs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

import playbook
from conftest import byte_tokenizer
from errors import check_shown, error_in, warnings_with
from playbook import SCRIPTS, batches_a_step, default_folder, make_recipe, parser
from tunesmith.config.schema import Data, Run, Source
from tunesmith.errors import UsageError
from tunesmith.metrics.record import StepRecord

pytestmark = pytest.mark.slow

SCRIPT_FOLDER = Path(__file__).parents[2] / "scripts"
FULL, LORA, BIG, QLORA = SCRIPTS


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if is_dataclass(value):
        for field in fields(value):
            yield from leaves(getattr(value, field.name), f"{name}.{field.name}".lstrip("."))
    else:
        yield name, value


def values(run: Run) -> dict[str, str]:
    flat = dict(leaves(run)) | {f"source.{key}": item for key, item in leaves(run.data.train[0])}
    units = "train.duration train.global_batch train.micro_batch train.warmup checkpoint.every log.every".split()
    for name in units:
        amount, unit = flat.pop(f"{name}.amount"), flat.pop(f"{name}.unit")
        flat[name] = f"{amount:g} {unit}"
    return flat


def run_of(
    script: str, *flags: str, folder: Path = Path("out"), sharing: int = 1
) -> dict[str, Any]:
    args = parser(script).parse_args(flags)
    return values(
        make_recipe(script, args, folder=folder, batches=batches_a_step(args), sharing=sharing)
    )


SHARED_DEFAULTS = {
    "model.dtype": "auto", "model.trust_remote_code": False, "data.seq_len": 2048, "data.pack": False, "data.train_on": "all",
    "source.format": "alpaca", "train.duration": "1 epochs", "train.schedule": "linear", "train.warmup": "0 steps",
    "train.min_learning_rate": 0.0, "train.weight_decay": 0.0, "train.clip_norm": 1.0, "train.betas": (0.9, 0.999),
    "train.eps": 1e-8, "train.seed": 42, "train.compile": "off", "log.every": "1 steps",
}  # fmt: skip
LORA_DEFAULTS = {"adapter.kind": "lora", "adapter.rank": 8, "adapter.alpha": 16.0, "adapter.dropout": 0.0}  # fmt: skip
DEFAULTS = {
    FULL: {"model.name": "meta-llama/Llama-3.2-3B-Instruct", "adapter.kind": "none", "train.learning_rate": 5e-5,
           "train.global_batch": "8 examples", "train.micro_batch": "8 examples", "train.recompute": "none",
           "model.quantize": "none"},
    LORA: LORA_DEFAULTS | {"model.name": "meta-llama/Llama-3.1-8B-Instruct", "train.learning_rate": 1e-4,
           "train.global_batch": "8 examples", "train.recompute": "none", "model.quantize": "none"},
    BIG: LORA_DEFAULTS | {"model.name": "meta-llama/Llama-3.1-70B-Instruct", "train.learning_rate": 1e-4,
          "train.global_batch": "4 examples", "train.recompute": "full", "model.quantize": "none"},
    QLORA: LORA_DEFAULTS | {"model.name": "unsloth/Meta-Llama-3.1-70B-bnb-4bit", "train.learning_rate": 1e-4,
            "train.global_batch": "8 examples", "train.recompute": "none", "model.quantize": "nf4"},
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults_are_theirs(script: str) -> None:
    got = run_of(script)
    wanted = SHARED_DEFAULTS | DEFAULTS[script]
    assert {name: got[name] for name in wanted} == wanted
    size = parser(script).parse_args([]).dataset_size
    assert size == {FULL: 512, LORA: 512, BIG: 500, QLORA: 512}[script]


EFFECTS: list[tuple[list[str], dict[str, Any]]] = [
    (["--model_name", "org/other"], {"model.name": "org/other"}),
    (["--dtype", "float32"], {"model.dtype": "fp32"}),
    (["--dtype", "bfloat16"], {"model.dtype": "bf16"}),
    (["--dtype", "float16"], {"model.dtype": "fp16"}),
    (["--batch_size", "2"], {"train.global_batch": "2 examples", "train.micro_batch": "2 examples"}),
    (["--seq_length", "333"], {"data.seq_len": 333}),
    (["--num_epochs", "3"], {"train.duration": "3 epochs"}),
    (["--batch_size", "4", "--gradient_accumulation_steps", "5"],
     {"train.global_batch": "20 examples", "train.micro_batch": "4 examples"}),
    (["--learning_rate", "3e-4"], {"train.learning_rate": 3e-4}),
    (["--gradient_checkpointing"], {"train.recompute": "full"}),
    (["--no-gradient_checkpointing"], {"train.recompute": "none"}),
    (["--logging_steps", "7"], {"log.every": "7 steps"}),
    (["--log_dir", "/somewhere/events"], {"log.tensorboard_dir": "/somewhere/events"}),
    (["--use_torch_compile"], {"train.compile": "on"}),
    (["--train_on", "response"], {"data.train_on": "response"}),
    (["--trust_remote_code"], {"model.trust_remote_code": True}),
]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_flag_changes_its_key_and_no_other(script: str) -> None:
    before = run_of(script)
    for flags, wanted in EFFECTS:
        after = run_of(script, *flags)
        assert {name: after[name] for name in wanted} == wanted
        assert {name for name in after if after[name] != before[name]} <= set(wanted), flags


def test_the_rank_is_a_flag_of_the_lora_scripts() -> None:
    for script in (LORA, BIG, QLORA):
        assert run_of(script, "--lora_rank", "32")["adapter.rank"] == 32
    with pytest.raises(UsageError, match="--lora_rank"):
        parser(FULL).parse_args(["--lora_rank", "32"])


def test_each_process_of_a_launcher_takes_a_batch_and_those_of_a_script_share_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"RANK": 1, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    got = run_of(LORA, "--gradient_accumulation_steps", "2")
    assert (got["train.global_batch"], got["train.micro_batch"]) == ("64 examples", "8 examples")
    folder = default_folder(LORA, parser(LORA).parse_args([]))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", playbook.SHARED)
    got = run_of(LORA, "--gradient_accumulation_steps", "2", sharing=3)
    assert (got["train.global_batch"], got["train.micro_batch"]) == ("16 examples", "3 examples")
    assert default_folder(LORA, parser(LORA).parse_args([])) != folder, (
        "another batch is another run"
    )


@pytest.mark.parametrize(
    "flags",
    [["--batch_size", "0"], ["--seq_length", "x"], ["--learning_rate", "0"], ["--learning_rate", "nan"], ["--num_epochs", "-1"],
     ["--dtype", "int8"], ["--train_on", "prompt"], ["--no_such_flag"], ["--dataset_size", "0"], ["--dtype", "float16"],
     ["--model_name", "none"], ["--data", "none.jsonl"], ["--output_dir", "taken"], ["--log_dir", "taken"]],
)  # fmt: skip
def test_a_wrong_value_ends_with_2_and_names_the_flag(
    flags: list[str], tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("mine")
    given = ["--model_name", str(tiny), "--data", str(data), "--dtype", "float32", "--ranks", "1"]
    assert playbook.main(LORA, [*given, "--output_dir", "out", *flags]) == 2
    shown = capsys.readouterr().err
    check_shown(shown)
    assert flags[0] in shown or flags[1] in error_in(shown).where
    assert Path("taken").read_text() == "mine"


# --- rows, text

ROWS = [
    {"instruction": f"say {i}", "input": "loudly" if i % 3 else "", "output": f"{i}!"}
    for i in range(40)
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(ROWS))
    return path


THEIRS = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n"
    "### Instruction: {}\n\n### Input: {}\n\n### Response: {}"
)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("row", ROWS[:2])
def test_text_and_mask_are_theirs(row: dict[str, str], bos: bool) -> None:
    """Every token carries loss as in theirs; with `--train_on response` the answer and its end
    token alone.
    """
    from tunesmith.data.rows.formats import convert_row
    from tunesmith.data.text.select_template import select_template

    tokenizer = byte_tokenizer(**({"bos_token": "<s>"} if bos else {}))
    source = Source(source="rows.jsonl", format="alpaca")
    text = ("<s>" if bos else "") + THEIRS.format(row["instruction"], row["input"], row["output"])
    for train_on, supervised in (("all", None), ("response", f" {row['output']}<|im_end|>")):
        template = select_template(
            Data(train=(source,), template=str(playbook.TEMPLATE), train_on=train_on),
            tokenizer,
            [tokenizer.eos_token_id],
        )
        [sample] = convert_row(row, source, where="row").samples
        example = template.encode(sample, train_on, where="row")
        assert tokenizer.decode(example.ids) == text + "<|im_end|>"
        if supervised is None:
            assert example.trained.tolist() == [False] + [True] * (len(example.ids) - 1)
        else:
            assert tokenizer.decode(example.ids[example.trained]) == supervised
        prompt = tokenizer.decode(template.prompt(sample))
        assert text.startswith(prompt)
        assert prompt.endswith("### Response:")


# --- where it goes, what is said


def test_without_output_dir_each_set_of_training_flags_has_its_folder() -> None:
    def folder(*flags: str) -> Path:
        return default_folder(LORA, parser(LORA).parse_args(flags))

    assert (
        folder()
        == folder()
        == folder("--logging_steps", "9", "--log_dir", "x", "--use_torch_compile", "--fresh")
    )
    assert folder().parent == Path("runs")
    assert folder().name.startswith(LORA)
    others = [
        folder(*flags)
        for flags in (["--lora_rank", "9"], ["--learning_rate", "1"], ["--train_on", "response"])
    ]
    assert len({folder(), *others}) == 4


def test_closing_lines_have_their_form() -> None:
    records = [
        StepRecord(step=s, epoch=s / 4, loss=4.0 / s, learning_rate=1e-4, grad_norm=1.0, tokens=10, supervised_tokens=10,
                   examples=8, step_seconds=0.5, data_seconds=0.0, tokens_per_second=20.0, mfu=None, memory_gib=1.0)
        for s in (1, 2, 4)
    ]  # fmt: skip
    rule = "=" * 60
    assert playbook.closing(records, 2.0).splitlines() == [
        "", rule, "TRAINING COMPLETED", rule, "Training runtime: 2.00 seconds", "Samples per second: 12.00",
        "Steps per second: 1.50", "Train loss: 2.3333", "Final loss: 1.0000", rule,
    ]  # fmt: skip
    assert "Training runtime: 1.50 seconds" in playbook.closing(records, 0.0)


def test_final_files_lie_in_the_folder_too(tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "manifest.json"):
        (final / name).write_text(name)
    for _ in range(2):
        playbook.link_final(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "final",
        ]
    assert (tmp_path / "adapter_config.json").read_text() == "adapter_config.json"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('train.duration="3 epochs" or train.global_batch="6 examples"', "--num_epochs 3 or --batch_size 3"),
        ("model.dtype=bf16, or model.dtype: fp32", "--dtype bfloat16, or --dtype float32"),
        ("train.micro_batch='4 examples' or train.recompute=full; again", "--batch_size 4 or --gradient_checkpointing; again"),
        ("lower train.learning_rate or lengthen train.warmup", "lower --learning_rate or lengthen train.warmup"),
        ("elsewhere: output_dir=runs/my-run", "elsewhere: --output_dir runs/my-run"),
        ("at /my/output_dir/x, my.output_dir and output_dirs", "at /my/output_dir/x, my.output_dir and output_dirs"),
        ("data.train: nothing", "data.train: nothing"),
    ],
)  # fmt: skip
def test_warnings_and_errors_name_the_flags(text: str, shown: str) -> None:
    assert playbook.in_flags(text, 2, playbook.flags_of(LORA)) == shown


def test_a_fix_names_no_flag_that_a_script_lacks() -> None:
    full, lora = playbook.flags_of(FULL), playbook.flags_of(LORA)
    assert playbook.in_flags("adapter.rank=4", 1, lora) == "--lora_rank 4"
    assert playbook.in_flags("adapter.rank=4", 1, full) == "adapter.rank=4"
    assert playbook.not_here("--batch_size 4, or --seq_length 512", full) == ""
    for fix, absent in (
        ("adapter.rank=4", "adapter.rank"),
        ("--batch_size 4, or model.quantize=nf4", "model.quantize"),
        ("add --columns prompt=a,completion=b", "--columns"),
    ):
        assert f"({absent}: " in playbook.not_here(fix, full)
    assert playbook.not_here("tunesmith fetch --list", full) == ""


@pytest.mark.parametrize("script", [FULL, LORA])
def test_each_file_is_its_own_script_and_shows_its_help_without_torch(script: str) -> None:
    command = [sys.executable, "-X", "importtime", str(SCRIPT_FOLDER / f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {script}.py ")
    assert ("--lora_rank" in done.stdout) == (script != FULL)
    for part in ("--train_on", *playbook.DIFFERENCES[:2]):
        assert part in done.stdout
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines()}
    assert "playbook" in imported
    assert "torch" not in imported


# --- end to end


def run_script(script: str, tiny: Path, data: Path, out: Path, *flags: str) -> int:
    fixed = {"--model_name": tiny, "--data": data, "--dtype": "float32", "--seq_length": 512, "--ranks": 1,
             "--log_dir": out / "logs", "--output_dir": out / "run", "--dataset_size": 32}  # fmt: skip
    words = [str(word) for pair in fixed.items() for word in pair]
    return playbook.main(script, [*words, *flags])


@pytest.mark.parametrize("script", [FULL, LORA, pytest.param(BIG, marks=pytest.mark.nightly)])
def test_a_script_trains_saves_and_says_so(
    script: str, tiny: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert run_script(script, tiny, data, tmp_path) == 0
    shown, told = capsys.readouterr()
    steps = {FULL: 4, LORA: 4, BIG: 8}[script]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
    rates = [json.loads(line)["learning_rate"] for line in lines]
    peak = SCRIPTS[script].learning_rate
    assert rates == pytest.approx([peak * (1 - i / steps) for i in range(steps)], rel=1e-12), (
        "linear, no warm-up"
    )
    assert "TRAINING COMPLETED" in shown
    assert f"Final loss: {json.loads(lines[-1])['loss']:.4f}" in shown
    assert list((tmp_path / "logs").glob("events.out.tfevents.*")), (
        "the events lie straight in --log_dir"
    )
    folder = tmp_path / "run"
    assert "### Instruction:" in AutoTokenizer.from_pretrained(folder).chat_template
    if script == FULL:
        model = AutoModelForCausalLM.from_pretrained(folder)
    else:
        from peft import PeftModel

        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny), str(folder), is_trainable=True
        )
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"\nTrainable parameters = {count:,}\n" in shown, "the line of theirs, by their sum"
    assert warnings_with(told, steps, 50, "--num_epochs")
    assert not any(f" {key}" in told for key in playbook.FLAGS if "." in key)
    # the same command again finds it finished, and --fresh does not
    before = (folder / "metrics.jsonl").read_bytes()
    assert run_script(script, tiny, data, tmp_path) == 0
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert run_script(script, tiny, data, tmp_path, "--fresh") == 0
    assert (folder / "metrics.jsonl").read_text().count("\n") == steps
    assert (tmp_path / "run.previous-1" / "metrics.jsonl").exists()
