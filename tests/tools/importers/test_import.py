"""`tunesmith import`: each key of a real file is in the recipe or named, and the recipe trains."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from errors import check_shown, refuses
from invoke import invoke
from recipes import write_feedback, write_pairs, write_rows
from tunesmith.config.check import METHOD_FORMATS
from tunesmith.config.load import load_recipe
from tunesmith.config.shipped import shipped
from tunesmith.errors import UsageError
from tunesmith.tools.importers.source_config import read_config
from tunesmith.tools.importers.translate import translate

from .translations import BASES

FOLDER = Path(__file__).parent / "files"
FILES = sorted(path.name for path in FOLDER.iterdir() if path.is_file())
# One of each tool, method and kind of rows.
TIER_1 = ("axolotl-mixed.yml", "llamafactory-kto.yaml", "torchtune-70b-lora.yaml", "trl-dpo.yaml")
WRITERS = {"prompt-completion": write_rows, "preference": write_pairs, "feedback": write_feedback}


def their_keys(path: Path) -> Iterator[str]:
    """Every leaf of the file, as another reader of YAML finds them."""

    def leaves(value: Any, key: str) -> Iterator[str]:
        items: Any = ()
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            items = enumerate(value)
        if not items:
            yield key
        for name, item in items:
            yield from leaves(item, f"{key}.{name}".lstrip("."))

    return leaves(yaml.safe_load(path.read_text()), "")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in TIER_1 else pytest.mark.slow) for n in FILES]
)
def test_each_key_is_carried_or_named_with_its_line(name: str, tmp_path: Path) -> None:
    path, recipe = FOLDER / name, tmp_path / "recipe.yaml"
    done = invoke("import", path, "--world", 2, "--output", recipe)
    assert done.code == 0, done.err
    load_recipe(recipe)
    # Comments are wrapped, also at hyphens.
    lines = re.findall(r"^ *# (.*)$", recipe.read_text(), re.M)
    comments = " ".join(lines).replace("- ", "-")
    keys = [*their_keys(path)]
    assert len(keys) > 5
    told = comments + done.out
    assert not [key for key in keys if not re.search(rf"(?<![\w.]){re.escape(key)}: ", told)]
    places = {one.key: one.where for one in read_config(path, None).keys.values()}
    for place, key in re.findall(r"(\S+:\d+) ([\w.]+): ", comments):
        # The entries of dataset_info.json have places of their own.
        assert place.startswith("dataset_info.json:") or places[key] == place
    reasons = re.findall(r"^  \S+: .*\(.*\)\n      .+$", done.out, re.M)
    assert len(reasons) == len(re.findall(r"^  \S+: ", done.out, re.M))


ALPACA = {"source": "yahma/alpaca-cleaned", "format": "alpaca"}
ULTRA = {"source": "trl-lib/ultrafeedback_binarized", "format": "preference"}
# Some values of the recipe. 4 packed rows of 1024 on each of 2 replicas of 8 ranks: 8192 tokens.
EXPECTED: dict[str, dict[str, Any]] = {
    "torchtune-70b-full.yaml": {
        "model.name": "meta-llama/Llama-3.3-70B-Instruct", "adapter.kind": "none", "train.schedule": "constant",
        "train.warmup": "0 steps", "train.clip_norm": None, "train.weight_decay": 0.01, "train.learning_rate": 2e-5,
        "train.global_batch": "8192 tokens", "parallel.tensor": 8, "parallel.shard": 2, "parallel.replicate": 1,
        "data.train_on": "all", "data.seq_len": 1024, "data.pack": True, "validate.every": "50 steps",
        "train.compile": "on", "train.master_weights": "stochastic",
        "data.train": {**ALPACA, "split": "train[:95%]"}, "data.validation": {**ALPACA, "split": "train[95%:]"},
    },
    "torchtune-70b-lora.yaml": {
        "adapter.target": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "adapter.rank": 16,
        "adapter.alpha": 32, "adapter.dropout": 0.0, "train.schedule": "cosine", "train.warmup": "100 steps",
        "train.learning_rate": 3e-4, "data.pack": False, "train.global_batch": "4 examples", "log.wandb": True,
    },
    "axolotl-mixed.yml": {
        "data.seq_len": 512, "data.pack": True, "adapter.target": ["q_proj", "v_proj"],
        "data.train": [
            {"source": "data/talks.jsonl", "split": "train", "format": "sharegpt"},
            {"source": "data/plain.jsonl", "split": "train", "format": "text", "columns": {"text": "body"}},
        ],
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
    "axolotl-kto.yml": {
        "method.name": "kto", "method.beta": 0.5, "method.desirable_weight": 0.2, "method.undesirable_weight": 1.0,
        "data.train": {"source": "argilla/ultrafeedback-binarized-preferences-cleaned-kto", "split": "train",
                       "format": "feedback"},
    },
    "llamafactory-bare.yaml": {
        "adapter.rank": 8, "adapter.alpha": 16, "adapter.target": "all-linear", "train.learning_rate": 5e-5,
        "train.schedule": "linear", "train.warmup": "0 %", "train.global_batch": "16 examples", "data.seq_len": 2048,
        "train.duration": "3 epochs", "data.template": "alpaca", "checkpoint.every": "500 steps",
        "data.train": {"source": "data/questions.jsonl", "split": "train", "format": "alpaca",
                       "columns": {"instruction": "question", "output": "answer"}},
    },
    "llamafactory-dpo.yaml": {
        "method.name": "simpo", "method.beta": 2.0, "method.simpo_gamma": 1.0,
        "data.train": [
            {"source": "data/ranked.json", "split": "train", "max_examples": 1000, "format": "preference",
             "columns": {"prompt": "instruction", "chosen": "better", "rejected": "worse"}},
            {"source": "data/talks_ranked.json", "split": "train", "max_examples": 1000, "format": "preference",
             "columns": {"conversations": "talk"}},
        ],
    },
    "llamafactory-kto.yaml": {
        "method.name": "kto", "method.beta": 0.3, "method.undesirable_weight": 1.5,
        "adapter.from": "saves/llama3-8b/lora/sft",
        "data.train": {"source": "data/tagged.json", "split": "train", "format": "feedback"},
    },
    "trl-dpo.yaml": {
        "method.name": "dpo", "method.loss_type": "robust", "method.beta": 0.2, "method.label_smoothing": 0.1,
        "method.sft_weight": 0.25, "data.train_on": "response", "train.learning_rate": 5e-6,
        "data.train": {**ULTRA, "split": "train"}, "data.validation": {**ULTRA, "split": "test"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_values_of_a_file(name: str) -> None:
    values = translate(read_config(FOLDER / name, None), {}, 2).values
    assert {key: values[key] for key in EXPECTED[name]} == EXPECTED[name]


@pytest.mark.slow
@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in TIER_1 else pytest.mark.nightly) for name in FILES],
)
def test_the_recipe_trains(name, tiny, tmp_path, monkeypatch):
    """Without what this machine lacks: other ranks, rows of the Hub, and nf4."""
    from tunesmith.training.run import train

    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    recipe = tmp_path / "recipe.yaml"
    assert invoke("import", FOLDER / name, "--world", 2, "--output", recipe).code == 0
    imported = load_recipe(recipe)
    overrides: dict[str, Any] = {
        "model.name": str(tiny), "model.dtype": "fp32", "model.quantize": "none", "model.pad_token": None,
        "train.master_weights": "fp32", "train.optimizer": "adamw", "train.duration": "2 steps", "train.warmup": "0 steps",
        "train.compile": "off", "train.cpu_offload": [], "parallel": {"tensor": 1, "shard": 1, "replicate": 1},
        "data.seq_len": 256, "log.wandb": False, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    if imported.train.global_batch.unit == "tokens":
        overrides["train.global_batch"] = "512 tokens"
    for part in ("train", "validation"):
        rows: tuple[Any, ...] = vars(imported.data)[part]
        if rows and not all(Path(one.source).is_file() for one in rows):
            row_format = METHOD_FORMATS.get(imported.method.name, "prompt-completion")
            file = WRITERS[row_format](tmp_path / f"{part}.jsonl", 16)
            overrides[f"data.{part}"] = {"source": str(file), "format": row_format}
    if imported.adapter.from_ is not None:
        overrides["adapter.from"] = None
    result = train(load_recipe(recipe, overrides))
    assert (result.steps, (tmp_path / "run" / "final").is_dir()) == (2, True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    assert losses
    assert all(0 < loss < 10 for loss in losses)


ROWS = "datasets: [{path: d, type: alpaca}]\n"
PYTHON_OF_NEMO = "_target_: nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained"
# Text of a file, the place of the error, and values that it has.
BAD: dict[str, tuple[str, str, list[str]]] = {
    "variable": ("output_dir: ${base}/out\nbatch_size: 1\nclip_grad_norm: null\n", "file.yaml:1", ["${base}"]),
    "round": ("output_dir: ${log_dir}\nlog_dir: ${output_dir}\nclip_grad_norm: 1\n", "file.yaml:2", ["${output_dir}"]),
    "twice": ("base_model: a\nbase_model: b\n", "file.yaml:2", ["base_model"]),
    "tag": ("base_model: !!python/object a\n", "file.yaml:1", ["tag"]),
    "unknown": ("colour: red\nsize: 3\n", "file.yaml", []),
    "list": ("- a\n- b\n", "file.yaml:1", []),
    "text": ("once upon a time\n", "file.yaml:1", []),
    "method": ("model_name_or_path: m\nstage: ppo\ntemplate: qwen\ndataset: d\n", "file.yaml:2", ["ppo"]),
    "listed": ("model_name_or_path: m\nfinetuning_type: lora\ntemplate: qwen\ndataset: nowhere\n", "file.yaml:4", ["dataset_info.json"]),
    "length": ("model: {_component_: lora_llama}\ncheckpointer: {checkpoint_dir: Llama-3}\noptimizer: {lr: 1e-4}\nbatch_size: 1\n"
               "dataset: {_component_: alpaca_dataset, packed: true}\n", "", ["tokenizer.max_seq_len"]),
    "value": (f"base_model: m\n{ROWS}learning_rate: -1\n", "file.yaml:3", ["train.learning_rate"]),
    "kind": (f"base_model: m\n{ROWS}learning_rate: fast\n", "file.yaml:3", ["train.learning_rate"]),
    "column": ("model_name_or_path: m\ndataset_name: d\ndataset_text_field: [a, b]\n", "file.yaml:2: columns.text", ["data.train.columns.text"]),
    "llamafactory v1": ("model: m\nmodel_class: llm\ntemplate: qwen3\npeft_config: {name: lora}\ntrain_dataset: d.yaml\ncutoff_len: 9\n",
                        "file.yaml", ["LLaMA-Factory v1"]),
    "ms-swift": ("model: m\ntuner_type: lora\ndataset: [d.jsonl]\nlora_rank: 8\nmax_length: 2048\n", "file.yaml", ["ms-swift"]),
    "nemo automodel": (f"recipe: any\nmodel:\n  {PYTHON_OF_NEMO}\n  template: a\ndataset: {{dataset_name: d}}\n",
                       "file.yaml", ["NeMo AutoModel"]),
    "nemo automodel by its sections": ("recipe: finetune\nmodel: {pretrained_model_name_or_path: m}\nstep_scheduler: {max_steps: 3}\n",
                                       "file.yaml", ["NeMo AutoModel"]),
    "nemo 2": ("_target_: nemo.collections.llm.api.finetune\n_partial_: true\ntrainer: {max_steps: 9}\n", "file.yaml", ["NeMo"]),
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
    assert invoke(*words, "--world", 0).code == 2
    assert invoke(*words, "train.global_batch=16 examples").code == 0
    assert str(load_recipe(recipe).train.global_batch) == "16 examples"
    check_shown(invoke(*words, "--world", 2).err, where=str(recipe), fix=["--force"])
    assert invoke(*words, "--world", 3, "--force").code == 0
    assert str(load_recipe(recipe).train.global_batch) == "24 examples"
    recipe = tmp_path / "my recipes" / "r.yaml"
    refused = invoke("import", file, "--world", 2, "--output", recipe)
    check_shown(refused.err, where="--output", fix=[f"mkdir -p '{recipe.parent}'"])


@pytest.mark.parametrize("words", [["sft.py"], ["sft.py", "--from", "trl"]])
def test_a_script_is_refused(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sft.py").write_text("trainer = SFTTrainer(args=SFTConfig())\ntrainer.train()\n")
    refused = invoke("import", "--world", 1, "--output", "r.yaml", *words)
    assert refused.code == 2
    fix = ["trainer.args.to_dict()", "tunesmith import trl.yaml"]
    check_shown(refused.err, names=["sft.py"], fix=fix)


def test_a_file_name_with_a_typo_gets_the_near_one(tmp_path: Path) -> None:
    near = tmp_path / "axolotl-lora.yml"
    near.write_text(json.dumps(BASES["axolotl"]))
    with refuses(UsageError, where="axolotl-lor.yml", fix=[near]):
        read_config(tmp_path / "axolotl-lor.yml", None)


def test_a_file_of_another_tool_than_the_named_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(json.dumps(BASES["axolotl"]))
    with refuses(UsageError, where="file.yaml", names=["base_model"], fix=["--from axolotl"]):
        read_config(path, "torchtune")
    path.write_text(json.dumps({"batch_size": 2}))
    assert read_config(path, "torchtune").tool == "torchtune"


def test_a_recipe_is_not_imported() -> None:
    path = next(iter(shipped().values()))
    with refuses(UsageError, where=path.name, fix=["tunesmith train"]):
        read_config(path, None)


def test_a_file_name_adds_nothing_to_the_recipe(tmp_path: Path) -> None:
    odd, recipe = tmp_path / "odd\u2028\x85extends: evil.yaml", tmp_path / "recipe.yaml"
    odd.write_text((FOLDER / "axolotl-fft-8b.yml").read_text())
    assert invoke("import", odd, "--world", 1, "--output", recipe).code == 0
    assert load_recipe(recipe).model.name == "NousResearch/Meta-Llama-3.1-8B"


SECRETS = {
    "env": {"MY_TOKEN": "canary1", "HF_TOKEN": "canary2", "DB_PASSWORD": "canary3", "COLOUR": "red"},
    "hubToken": "canary4", "variables": ["AWS_SECRET_ACCESS_KEY=canary5", "SIZE=3"],
    "wandb_api_key": "canary6", "special_tokens": {"pad_token": "<pad>"}, "max_new_tokens": 128,
}  # fmt: skip


def test_a_secret_is_masked_by_the_name_of_its_key(tmp_path: Path) -> None:
    file, recipe = tmp_path / "file.yaml", tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(BASES["axolotl"] | SECRETS))
    done = invoke("import", file, "--world", 2, "--output", recipe)
    everything = done.out + done.err + recipe.read_text()
    assert "canary" not in everything
    for plain in ('env.COLOUR: "red"', '=***", "SIZE=3"]', "<pad>", "max_new_tokens: 128"):
        assert plain in everything
    differs, _, nothing = done.out.rpartition("\n\n")
    assert "env.COLOUR" in differs
    assert "wandb_api_key" in nothing
