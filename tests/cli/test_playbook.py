"""The four playbook scripts: every flag has an effect; rows, text and closing lines are theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import playbook
from conftest import byte_tokenizer
from errors import check_shown, error_in, warnings_with
from playbook import SCRIPTS, batches_a_step, default_folder, make_recipe, parser
from tunesmith.config.dump import to_mapping
from tunesmith.config.schema import Data, Run, Source
from tunesmith.rows.formats import convert_row
from tunesmith.tokens.text.select_template import select_template

pytestmark = pytest.mark.slow

FULL, LORA, BIG, QLORA = SCRIPTS


def values(run: Run) -> dict[str, Any]:
    sections = {name: keys for name, keys in to_mapping(run).items() if isinstance(keys, dict)}
    flat = {f"{name}.{key}": sections[name][key] for name in sections for key in sections[name]}
    return flat | {f"source.{key}": value for key, value in flat["data.train"].items()}


def run_of(script: str, *flags: str, sharing: int = 1) -> dict[str, Any]:
    args = parser(script).parse_args(flags)
    options = {"folder": Path("out"), "batches": batches_a_step(args), "sharing": sharing}
    return values(make_recipe(script, args, **options))


SHARED_DEFAULTS = {
    "model.dtype": "auto", "model.trust_remote_code": False, "data.seq_len": 2048, "data.pack": False, "data.train_on": "all",
    "source.format": "alpaca", "train.duration": "1 epochs", "train.schedule": "linear", "train.warmup": "0 steps",
    "train.min_learning_rate": 0.0, "train.weight_decay": 0.0, "train.clip_norm": 1.0, "train.betas": [0.9, 0.999],
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
    (["--dtype", "float16"], {"model.dtype": "fp16"}),
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
    assert default_folder(LORA, parser(LORA).parse_args([])) != folder, "it is another run"


@pytest.mark.parametrize(
    "flags",
    [["--batch_size", "0"], ["--learning_rate", "nan"], ["--dtype", "int8"], ["--no_such_flag"],
     ["--model_name", "none"], ["--data", "none.jsonl"], ["--output_dir", "taken"]],
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
    """Every token carries loss; with `--train_on response` the answer and its end token alone."""
    tokenizer = byte_tokenizer(**({"bos_token": "<s>"} if bos else {}))
    source = Source(source="rows.jsonl", format="alpaca")
    text = ("<s>" if bos else "") + THEIRS.format(row["instruction"], row["input"], row["output"])
    for train_on, supervised in (("all", None), ("response", f" {row['output']}<|im_end|>")):
        data = Data(train=(source,), template=str(playbook.TEMPLATE), train_on=train_on)
        template = select_template(data, tokenizer, [tokenizer.eos_token_id])
        [sample] = convert_row(row, source, where="row").samples
        example = template.encode(sample, train_on, where="row")
        assert tokenizer.decode(example.ids) == text + "<|im_end|>"
        if supervised is None:
            assert example.trained.tolist() == [False] + [True] * (len(example.ids) - 1)
        else:
            assert tokenizer.decode(example.ids[example.trained]) == supervised
        prompt = tokenizer.decode(template.prompt(sample))
        assert prompt == text.partition(" " + row["output"])[0]


def test_warnings_and_errors_name_the_flags() -> None:
    text = 'train.duration="3 epochs" or train.micro_batch="4 examples", at /my/output_dir/x'
    flags = "--num_epochs 3 or --batch_size 4, at /my/output_dir/x"
    assert playbook.in_flags(text, 2, playbook.flags_of(LORA)) == flags


@pytest.mark.parametrize("script", [FULL, LORA, pytest.param(BIG, marks=pytest.mark.nightly)])
def test_a_script_trains_saves_and_says_so(
    script: str, tiny: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = {"--model_name": tiny, "--data": data, "--dtype": "float32", "--seq_length": 512, "--ranks": 1,
             "--log_dir": tmp_path / "logs", "--output_dir": tmp_path / "run", "--dataset_size": 32}  # fmt: skip
    words = [str(word) for pair in fixed.items() for word in pair]
    assert playbook.main(script, words) == 0
    shown, told = capsys.readouterr()
    steps = {FULL: 4, LORA: 4, BIG: 8}[script]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
    rates = [json.loads(line)["learning_rate"] for line in lines]
    peak = SCRIPTS[script].learning_rate
    assert rates == pytest.approx([peak * (1 - i / steps) for i in range(steps)], rel=1e-12)
    assert "TRAINING COMPLETED" in shown
    assert f"Final loss: {json.loads(lines[-1])['loss']:.4f}" in shown
    assert list((tmp_path / "logs").glob("events.out.tfevents.*"))
    folder = tmp_path / "run"
    assert "### Instruction:" in AutoTokenizer.from_pretrained(folder).chat_template
    model = AutoModelForCausalLM.from_pretrained(folder if script == FULL else tiny)
    if script != FULL:
        model = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"\nTrainable parameters = {count:,}\n" in shown, "the line of theirs, by their sum"
    assert warnings_with(told, steps, 50, "--num_epochs")
    assert not any(f" {key}" in told for key in playbook.FLAGS if "." in key)
    # the same command again finds it finished, and --fresh does not
    before = (folder / "metrics.jsonl").read_bytes()
    assert playbook.main(script, words) == 0
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert playbook.main(script, [*words, "--fresh"]) == 0
    assert (tmp_path / "run.previous-1" / "metrics.jsonl").read_bytes() == before
