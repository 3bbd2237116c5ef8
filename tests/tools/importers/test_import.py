"""`tunesmith import`: each key of a real file is in the recipe or named, and the recipe trains."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from errors import check_shown, refuses
from invoke import invoke
from tunesmith.config.load import load_recipe
from tunesmith.config.shipped import shipped
from tunesmith.errors import UsageError
from tunesmith.tools.importers.source_config import read_config
from tunesmith.tools.importers.translate import translate

from .test_keys import BASES

FOLDER = Path(__file__).parent / "files"
FILES = sorted(path.name for path in FOLDER.iterdir() if path.is_file())
WITH_ROWS = [
    "axolotl-mixed.yml",
    *(f"llamafactory-{n}.yaml" for n in ("bare", "dpo", "kto", "tools")),
]


def named_rows(file: str, row_format: str, part: str = "train", **columns: str) -> dict[str, Any]:
    named = {"source": str(FOLDER / "data" / file), "format": row_format}
    named |= {"columns": json.dumps(columns)} if columns else {}
    return {f"data.{part}.{key}": value for key, value in named.items()}


IDENTITY = named_rows("identity.json", "alpaca")
# Rows of the files of LLaMA-Factory, which the command line names.
GIVEN: dict[str, dict[str, Any]] = {
    "llamafactory-bare.yaml": named_rows("questions.jsonl", "alpaca", instruction="question", output="answer"),
    "llamafactory-dpo.yaml": named_rows("ranked.json", "preference", prompt="instruction", chosen="better", rejected="worse"),
    "llamafactory-kto.yaml": named_rows("tagged.json", "feedback"),
    "llamafactory-tools.yaml": named_rows("talks.jsonl", "sharegpt") | named_rows("identity.json", "alpaca", "validation"),
    **{f"llamafactory-{name}.yaml": IDENTITY for name in ("lora", "qlora", "full-ds3")},
}  # fmt: skip
TIER_1 = ("axolotl-mixed.yml", "llamafactory-kto.yaml", "torchtune-70b-lora.yaml", "trl-dpo.yaml")


def nightly(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.nightly)


def their_keys(value: Any, key: str = "") -> list[str]:
    """Every leaf of a file."""
    items: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    leaves = [leaf for name, item in items for leaf in their_keys(item, f"{key}.{name}")]
    return leaves or [key.lstrip(".")]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in TIER_1 else pytest.mark.slow) for n in FILES]
)
def test_each_key_is_carried_or_named_with_its_line(name: str, tmp_path: Path) -> None:
    path, recipe = FOLDER / name, tmp_path / "recipe.yaml"
    given = [f"{key}={value}" for key, value in GIVEN.get(name, {}).items()]
    done = invoke("import", path, *given, "--world", 2, "--output", recipe)
    assert done.code == 0, done.err
    load_recipe(recipe)
    # Comments are wrapped, also at hyphens.
    lines = re.findall(r"^ *# (.*)$", recipe.read_text(), re.M)
    comments = " ".join(lines).replace("- ", "-")
    keys = their_keys(yaml.safe_load(path.read_text()))
    told = comments + done.out
    assert not [key for key in keys if not re.search(rf"(?<![\w.]){re.escape(key)}: ", told)]
    places = {one.key: one.where for one in read_config(path, None).keys.values()}
    for place, key in re.findall(r"(\S+:\d+) ([\w.]+): ", comments):
        assert places[key] == place


ALPACA = {"source": "yahma/alpaca-cleaned", "format": "alpaca"}
# Some values of the recipe. 4 packed rows of 1024 on each of 2 replicas of 8 ranks: 8192 tokens.
EXPECTED: dict[str, dict[str, Any]] = {
    "torchtune-70b-full.yaml": {
        "model.name": "meta-llama/Llama-3.3-70B-Instruct", "adapter.kind": "none", "train.schedule": "constant",
        "train.warmup": "0 steps", "train.clip_norm": None, "train.weight_decay": 0.01, "train.learning_rate": 2e-5,
        "train.global_batch": "8192 tokens", "parallel.tensor": 8, "parallel.shard": 2, "parallel.replicate": 1,
        "data.train_on": "all", "data.seq_len": 1024, "data.pack": True, "train.master_weights": "stochastic",
        "data.train": {**ALPACA, "split": "train[:95%]"}, "data.validation": {**ALPACA, "split": "train[95%:]"},
    },
    "axolotl-fft-8b.yml": {
        "data.train_on": "all", "data.template": "alpaca", "data.hold_out": "5 %", "train.optimizer": "adamw-8bit",
        "train.global_batch": "131072 tokens", "validate.every": "0.5 epochs", "model.pad_token": "<|end_of_text|>",
    },
    "axolotl-qlora-70b.yml": {
        "model.quantize": "nf4", "adapter.target": "all-linear", "train.cpu_offload": ["parameters"],
    },
    "axolotl-dpo.yml": {
        "method.name": "dpo", "method.loss_type": "ipo", "method.beta": 0.2, "adapter.dropout": 0.0,
        "data.train": [
            {"source": "fozziethebeat/alpaca_messages_2k_dpo_test", "split": "train", "format": "preference",
             "columns": {"prompt": "conversation", "rejected": "bad"}},
            {"source": "Intel/orca_dpo_pairs", "split": "train", "format": "preference", "columns": {"prompt": "question"}},
        ],
    },
    "llamafactory-bare.yaml": {
        "adapter.rank": 8, "adapter.alpha": 16, "adapter.target": "all-linear", "train.learning_rate": 5e-5,
        "train.schedule": "linear", "train.warmup": "0 %", "train.global_batch": "16 examples", "data.seq_len": 2048,
        "train.duration": "3 epochs", "data.template": "alpaca", "checkpoint.every": "500 steps",
    },
    "trl-dpo.yaml": {
        "method.name": "dpo", "method.loss_type": "robust", "method.label_smoothing": 0.1, "data.train_on": "response",
        "data.validation.source": "trl-lib/ultrafeedback_binarized", "data.validation.format": "preference",
        "data.validation.split": "test",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_values_of_a_file(name: str) -> None:
    values = translate(read_config(FOLDER / name, None), GIVEN.get(name, {}), 2).values
    assert {key: values[key] for key in EXPECTED[name]} == EXPECTED[name]


@pytest.mark.slow
@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize("name", [n if n in TIER_1 else nightly(n) for n in WITH_ROWS])
def test_the_recipe_trains(name, tiny, tmp_path):
    """On the rows beside the file, without what this machine lacks."""
    from tunesmith.start.run import train

    recipe = tmp_path / "recipe.yaml"
    given = [f"{key}={value}" for key, value in GIVEN.get(name, {}).items()]
    assert invoke("import", FOLDER / name, *given, "--world", 2, "--output", recipe).code == 0
    overrides: dict[str, Any] = {
        "model.name": str(tiny), "model.dtype": "fp32", "model.quantize": "none", "model.pad_token": None,
        "train.duration": "2 steps", "train.warmup": "0 steps", "train.compile": "off", "train.optimizer": "adamw",
        "data.seq_len": 256, "log.wandb": False, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    imported = load_recipe(recipe)
    if imported.train.global_batch.unit == "tokens":
        overrides["train.global_batch"] = "512 tokens"
    if imported.adapter.from_ is not None:
        overrides["adapter.from"] = None
    assert train(load_recipe(recipe, overrides)).steps == 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    assert losses
    assert all(0 < loss < 10 for loss in losses)


# Text of a file, the place of the error, and values that it has.
BAD: dict[str, tuple[str, str, list[str]]] = {
    "variable": ("output_dir: ${base}/out\nbatch_size: 1\nclip_grad_norm: null\n", "file.yaml:1", ["${base}"]),
    "twice": ("base_model: a\nbase_model: b\n", "file.yaml:2", ["base_model"]),
    "tag": ("base_model: !!python/object a\n", "file.yaml:1", ["tag"]),
    "unknown": ("colour: red\nsize: 3\n", "file.yaml", []),
    "text": ("once upon a time\n", "file.yaml:1", []),
    "value": ("base_model: m\ndatasets: [{path: d, type: alpaca}]\nlearning_rate: fast\n", "file.yaml:3", ["train.learning_rate"]),
    "column": ("model_name_or_path: m\ndataset_name: d\ndataset_text_field: [a, b]\n", "file.yaml:3", ["data.train.columns.text"]),
    "llamafactory v1": ("model: m\nmodel_class: llm\ntemplate: qwen3\npeft_config: {name: lora}\ntrain_dataset: d.yaml\ncutoff_len: 9\n",
                        "file.yaml", ["LLaMA-Factory v1"]),
    "verl": ("actor_rollout_ref: {model: {path: m}, rollout: {n: 8}}\ndata: {train_files: a.parquet, max_response_length: 9}\ntrainer: {total_epochs: 1}\n", "file.yaml", ["verl"]),
    "ms-swift": ("rlhf_type: grpo\nmodel: m\ntrain_type: lora\nreward_funcs: [accuracy]\nnum_generations: 8\nmax_completion_length: 9\ndataset: d\n", "file.yaml", ["ms-swift"]),
    "NeMo RL": ("grpo: {num_prompts_per_step: 8, num_generations_per_prompt: 4}\npolicy: {model_name: m}\nloss_fn: {ratio_clip_min: 0.2}\n", "file.yaml", ["NeMo RL"]),
    "an integer that cannot be printed": ("base_model: m\ndatasets: [{path: d, type: alpaca}]\nseed: 0x" + "f" * 4000 + "\n", "file.yaml:3", ["train.seed"]),
    "accelerate": ("compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\n", "file.yaml", ["accelerate"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_imported_is_refused(name: str, tmp_path: Path) -> None:
    text, where, names = BAD[name]
    (tmp_path / "file.yaml").write_text(text)
    recipe = tmp_path / "recipe.yaml"
    done = invoke("import", tmp_path / "file.yaml", "--world", 1, "--output", recipe)
    assert (done.code, recipe.exists()) == (2, False)
    check_shown(done.err, where=where or None, names=names)
    assert "  fix: " in done.err


@pytest.mark.slow
def test_the_world_is_asked_for_and_no_file_is_overwritten(tmp_path: Path) -> None:
    file, recipe = FOLDER / "axolotl-chat-8b.yml", tmp_path / "r.yaml"
    words = ["import", file, "--output", recipe]
    refused = invoke(*words)
    assert refused.code == 2
    check_shown(refused.err, fix=["--world N"])
    assert invoke(*words, "train.global_batch=16 examples").code == 0
    assert str(load_recipe(recipe).train.global_batch) == "16 examples"
    check_shown(invoke(*words, "--world", 2).err, where=str(recipe), fix=["--force"])
    assert invoke(*words, "--world", 3, "--force").code == 0
    assert str(load_recipe(recipe).train.global_batch) == "24 examples"


def test_a_script_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sft.py").write_text("trainer = SFTTrainer(args=SFTConfig())\ntrainer.train()\n")
    refused = invoke("import", "--world", 1, "--output", tmp_path / "r.yaml", tmp_path / "sft.py")
    assert refused.code == 2
    check_shown(refused.err, fix=["trainer.args.to_dict()", "tunesmith import trl.yaml"])


def test_a_file_of_another_tool_than_the_named_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(json.dumps(BASES["axolotl"]))
    with refuses(UsageError, where="file.yaml", names=["base_model"], fix=["--from axolotl"]):
        read_config(path, "torchtune")
    recipe = next(iter(shipped().values()))
    with refuses(UsageError, where=recipe.name, fix=["tunesmith train"]):
        read_config(recipe, None)


def test_a_secret_is_masked_by_the_name_of_its_key(tmp_path: Path) -> None:
    secrets = {
        "env": {"MY_TOKEN": "canary1", "DB_PASSWORD": "canary2", "COLOUR": "red"},
        "variables": ["AWS_SECRET_ACCESS_KEY=canary3", "SIZE=3"],
        "hubToken": "canary4", "wandb_api_key": "canary5", "max_new_tokens": 128,
    }  # fmt: skip
    file, recipe = tmp_path / "file.yaml", tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(BASES["axolotl"] | secrets))
    done = invoke("import", file, "--world", 2, "--output", recipe)
    everything = done.out + done.err + recipe.read_text()
    assert "canary" not in everything
    for plain in ('env.COLOUR: "red"', '=***", "SIZE=3"]', "max_new_tokens: 128"):
        assert plain in everything
