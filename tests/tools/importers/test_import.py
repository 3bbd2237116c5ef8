"""`tunesmith import`: each key of a file of another tool is in the recipe or in the list of what is
not, and it trains.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import check_shown, holds, refuses
from recipes import write_feedback, write_pairs, write_rows
from tunesmith.cli.main import main
from tunesmith.config.check import METHOD_FORMATS
from tunesmith.config.load import load_recipe
from tunesmith.config.names import keys
from tunesmith.config.schema import Run
from tunesmith.config.shipped import shipped
from tunesmith.errors import UsageError
from tunesmith.tools.importers.source_config import read_config, table
from tunesmith.tools.importers.translate import translate

from .translations import BASES, notes_by_key, translated

FOLDER = Path(__file__).parent / "files"
FILES = sorted(path for path in FOLDER.iterdir() if path.is_file())
DATA = ("data.train.source", "data.train.format")
WRITERS = {"prompt-completion": write_rows, "preference": write_pairs, "feedback": write_feedback}


def why_unknown(folder: Path) -> str:
    """What is said of a key of theirs that no table has."""
    path = folder / "unknown.yaml"
    path.write_text(json.dumps(BASES["torchtune"] | {"no_such_key": 7}))
    given = {"data.train.source": "rows.jsonl", "train.global_batch": "1 examples"}
    draft = translate(read_config(path, "torchtune"), given, None)
    return next(remark.why for remark in draft.notes.values() if remark.key == "no_such_key")


def import_file(path: Path, folder: Path, *more: str) -> tuple[Run, str]:
    """The recipe that is written, loaded again, and its text."""
    recipe = folder / f"{path.stem}.yaml"
    assert main(["import", str(path), "--world", "2", "--output", str(recipe), *more]) == 0
    return load_recipe(recipe), recipe.read_text(encoding="utf-8")


def their_keys(path: Path) -> list[str]:
    """Every leaf of the file, as another reader of YAML finds them."""

    def leaves(value: Any, key: str) -> Iterator[str]:
        inside = (
            value.items()
            if isinstance(value, dict)
            else enumerate(value)
            if isinstance(value, list)
            else ()
        )
        if not inside or (
            isinstance(value, list) and not any(isinstance(item, dict) for item in value)
        ):
            yield key
        else:
            for name, item in inside:
                yield from leaves(item, f"{key}.{name}".lstrip("."))

    return list(leaves(yaml.safe_load(path.read_text()), ""))


def comments(text: str) -> str:
    """The comments of a recipe on one line: they are wrapped."""
    # Also broken at hyphens
    return " ".join(re.findall(r"^ *# (.*)$", text, re.M)).replace("- ", "-")


def named(key: str, told: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(key)}: ", told) is not None


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_key_is_carried_or_named(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, text = import_file(path, tmp_path)
    told = capsys.readouterr().out
    missing = [
        key for key in their_keys(path) if not (named(key, comments(text)) or named(key, told))
    ]
    assert not missing
    assert len(their_keys(path)) > 5
    told = told.replace("  none\n", "")
    reasons = re.findall(r"^  \S+: .*\((.*)\)\n      (.+)$", told, re.M)
    assert len(reasons) == len(re.findall(r"^  \S", told, re.M))
    assert why_unknown(tmp_path).partition(":")[0] not in told


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_value_says_where_it_came_from(path: Path, tmp_path: Path) -> None:
    _, text = import_file(path, tmp_path)
    names = {one.key: one.where for one in read_config(path, None).keys.values()}
    tool = read_config(path, None).tool
    for place, key in re.findall(r"(\S+:\d+) ([\w.]+): ", comments(text)):
        # The entries of dataset_info.json have places of their own.
        assert place.startswith("dataset_info.json:") or names[key] == place
    values = [
        line
        for line in text.splitlines()
        if re.match(r" *[a-z_]+: \S", line) and not line.startswith("      ")
    ]
    assert len(values) >= 5
    assert f"{tool}'s default " in comments(text)


@pytest.mark.parametrize(
    ("tool", "key", "value"),
    [("axolotl", "load_in_8bit", True), ("llamafactory", "quantization_bit", 8)],
)
def test_a_base_in_int8_gets_an_answer(tool: str, key: str, value: Any, tmp_path: Path) -> None:
    draft = translated(tool, BASES[tool] | {"adapter": "lora", key: value}, tmp_path)
    assert "model.quantize" not in draft.values
    remark = next(remark for remark in draft.notes.values() if remark.key == key)
    assert remark.differs
    for word in ("bf16", "model.quantize=fp8", "Hopper", "nf4", "A100"):
        assert word in remark.why


def test_the_full_configuration_of_70b(tmp_path: Path) -> None:
    run, text = import_file(FOLDER / "torchtune-70b-full.yaml", tmp_path)
    assert run.model.name == "meta-llama/Llama-3.3-70B-Instruct"
    assert run.adapter.kind == "none"
    assert (run.train.schedule, str(run.train.warmup), run.train.clip_norm) == (
        "constant",
        "0 steps",
        None,
    )
    assert (run.train.weight_decay, run.train.learning_rate, run.train.seed) == (0.01, 2e-5, 42)
    # 4 packed rows of 1024 on each of 2 replicas of 8 ranks
    assert str(run.train.global_batch) == "8192 tokens"
    assert (run.parallel.tensor, run.parallel.shard, run.parallel.replicate) == (8, 2, 1)
    assert (run.data.train_on, run.data.seq_len, run.data.pack) == ("all", 1024, True)
    assert [s.split for s in (*run.data.train, *run.data.validation)] == [
        "train[:95%]",
        "train[95%:]",
    ]
    assert {s.source for s in (*run.data.train, *run.data.validation)} == {"yahma/alpaca-cleaned"}
    assert (str(run.validate.every), run.train.compile, run.train.master_weights) == (
        "50 steps",
        "on",
        "stochastic",
    )
    assert "torchtune's default dataset.train_on_input: true" in comments(text)


def test_the_lora_configuration_of_70b(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = import_file(FOLDER / "torchtune-70b-lora.yaml", tmp_path)
    assert run.adapter.target == ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert (run.adapter.rank, run.adapter.alpha, run.adapter.dropout) == (16, 32, 0.0)
    assert (run.train.schedule, str(run.train.warmup), run.train.learning_rate) == (
        "cosine",
        "100 steps",
        3e-4,
    )
    assert (run.data.pack, str(run.train.global_batch), run.log.wandb) == (
        False,
        "4 examples",
        True,
    )
    told = capsys.readouterr().out
    for key in ("seed: null", "tokenizer.max_seq_len: null", "dataset._component_:"):
        # Below it is what needs nothing.
        assert key in told.rpartition("\n\n")[0]


def test_defaults_of_axolotl_and_llamafactory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed, _ = import_file(FOLDER / "axolotl-mixed.yml", tmp_path)
    assert (mixed.data.seq_len, mixed.data.pack, mixed.adapter.target) == (
        512,
        True,
        ("q_proj", "v_proj"),
    )
    assert [(s.format, s.columns) for s in mixed.data.train] == [
        ("sharegpt", {}),
        ("text", {"text": "body"}),
    ]
    assert [Path(s.source).is_file() for s in mixed.data.train] == [True, True]
    assert "hf_0123456789" not in capsys.readouterr().out
    bare, _ = import_file(FOLDER / "llamafactory-bare.yaml", tmp_path)
    assert (bare.adapter.rank, bare.adapter.alpha, bare.adapter.target) == (8, 16, "all-linear")
    assert (bare.train.learning_rate, bare.train.schedule, str(bare.train.warmup)) == (
        5e-5,
        "linear",
        "0 %",
    )
    assert (str(bare.train.global_batch), str(bare.train.duration), bare.data.seq_len) == (
        "16 examples",
        "3 epochs",
        2048,
    )
    assert bare.data.train[0].columns == {"instruction": "question", "output": "answer"}
    assert (bare.data.template, str(bare.checkpoint.every)) == ("alpaca", "500 steps")
    full, _ = import_file(FOLDER / "axolotl-fft-8b.yml", tmp_path)
    assert (full.data.train_on, full.data.template, str(full.data.hold_out)) == (
        "all",
        "alpaca",
        "5 %",
    )
    assert (full.train.optimizer, str(full.train.global_batch), str(full.validate.every)) == (
        "adamw-8bit",
        "131072 tokens",
        "0.5 epochs",
    )
    qlora, _ = import_file(FOLDER / "axolotl-qlora-70b.yml", tmp_path)
    assert (qlora.model.quantize, qlora.adapter.target, qlora.train.cpu_offload) == (
        "nf4",
        "all-linear",
        ("parameters",),
    )


@pytest.mark.slow
@pytest.mark.usefixtures("short_answers")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_recipe_trains(
    path: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps on a tiny model, with what this machine lacks taken away: other ranks, rows of the
    Hub, and nf4.
    """
    from tunesmith.training.run import train

    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    imported, _ = import_file(path, tmp_path)
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
    recipe = tmp_path / f"{path.stem}.yaml"
    result = train(load_recipe(recipe, overrides))
    assert result.steps == 2
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(0 < record["loss"] < 10 for record in records if "loss" in record)
    assert (tmp_path / "run" / "final").is_dir()


NAMES = st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyz_.-"), min_size=1, max_size=12)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 99),
    st.floats(0, 1),
    st.text(max_size=20),
    st.lists(st.integers(0, 9), max_size=3),
)


@pytest.mark.parametrize("nothing", [False, 0, "", []])
def test_a_data_set_for_validation_that_is_switched_off(nothing: Any, tmp_path: Path) -> None:
    draft = translated("llamafactory", BASES["llamafactory"] | {"eval_dataset": nothing}, tmp_path)
    assert "data.validation" not in draft.values
    remark = next(remark for remark in draft.notes.values() if remark.key == "eval_dataset")
    assert not remark.differs


@pytest.mark.slow
@pytest.mark.parametrize("tool", sorted(BASES))
@settings(max_examples=25)
@given(data=st.data())
def test_no_key_is_dropped(
    tool: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any keys, of the tool's table or none, with any values: refused in our form, or each one
    named.
    """
    own = [
        name
        for part in ("nothing", "differs")
        for names in table(tool)[part].values()
        for name in names
        if "*" not in name
    ]
    theirs = sorted({*table(tool)["defaults"], *own} - {"dataset", "datasets"})
    more = data.draw(st.dictionaries(st.sampled_from(theirs), VALUES, max_size=6)) | data.draw(
        st.dictionaries(NAMES, VALUES, max_size=2)
    )
    values = more | BASES[tool]
    folder = tmp_path_factory.mktemp("any")
    try:
        draft = translated(tool, values, folder)
        source, written = draft.source, draft.text(draft.tree(), "# head", folder)
    except UsageError as error:
        refused = error
    else:
        refused = None
    if refused:
        assert refused.where
        assert refused.fix
        return
    assert set(source.keys) == draft.mentioned & set(source.keys)
    told = " ".join(draft.comments.values()) + "".join(
        f" {one.key}: {one.value}" for one in draft.notes.values()
    )
    for key in source.keys:
        assert f"{key}: " in told
    assert set(yaml.safe_load(written)) <= {"extends", *(key.partition(".")[0] for key in keys())}


BAD = {
    "variable": ("output_dir: ${base}/out\nbatch_size: 1\nclip_grad_norm: null\n", ["${base} is not defined in this file", "file.yaml:1"]),
    "round": ("output_dir: ${log_dir}\nlog_dir: ${output_dir}\nclip_grad_norm: 1\n", ["is not defined in this file", "file.yaml:"]),
    "twice": ("base_model: a\nbase_model: b\n", ["'base_model' is given twice", "file.yaml:2"]),
    "tag": ("base_model: !!python/object a\n", ["tag", "file.yaml:1"]),
    "unknown": ("colour: red\nsize: 3\n", ["cannot detect which tool", "--from"]),
    "list": ("- a\n- b\n", ["file is not a mapping", "the configuration file of another tool"]),
    "text": ("once upon a time\n", ["mapping"]),
    "method": ("model_name_or_path: m\nstage: ppo\ntemplate: qwen\ndataset: d\n", ["stage: \"ppo\" cannot be imported", "file.yaml:2"]),
    "rl": ("base_model: m\nrl: grpo\ndatasets: [{path: d, type: alpaca}]\nlearning_rate: 1e-4\n", ["rl: \"grpo\" cannot be imported", "file.yaml:2"]),
    "rows": ("base_model: m\ndatasets: [{path: d, type: oasst}]\nlearning_rate: 1e-4\n", ["oasst", "data.train.source=rows.jsonl"]),
    "listed": ("model_name_or_path: m\nfinetuning_type: lora\ntemplate: qwen\ndataset: nowhere\n", ["dataset_info.json", "was not found"]),
    "length": ("model: {_component_: lora_llama}\ncheckpointer: {checkpoint_dir: Llama-3}\noptimizer: {lr: 1e-4}\nbatch_size: 1\n"
               "dataset: {_component_: alpaca_dataset, packed: true}\n", ["max_seq_len", "length"]),
    "value": ("base_model: m\ndatasets: [{path: d, type: alpaca}]\nlearning_rate: -1\n", ["train.learning_rate", "file.yaml:3"]),
    "kind": ("base_model: m\ndatasets: [{path: d, type: alpaca}]\nlearning_rate: fast\n", ["train.learning_rate", "file.yaml:3"]),
    "shape": ("base_model: m\ndatasets: [{path: d, type: alpaca}]\nmicro_batch_size: many\nlearning_rate: 1e-4\n", ["micro_batch_size", "file.yaml:3"]),
    "column": ("model_name_or_path: m\ndataset_name: d\ndataset_text_field: [a, b]\n", ["data.train.columns.text", "file.yaml:2"]),
    "llamafactory v1": ("model: m\nmodel_class: llm\ntemplate: qwen3\npeft_config: {name: lora}\ntrain_dataset: d.yaml\ncutoff_len: 9\n"
                        "micro_batch_size: 1\n", ["a file of LLaMA-Factory v1", "model_class"]),
    "llamafactory v1, short": ("model: m\ntemplate: qwen3\ntrain_dataset: d.yaml\ncutoff_len: 9\n", ["a file of LLaMA-Factory v1"]),
    "ms-swift": ("model: m\ntuner_type: lora\ndataset: [d.jsonl]\nlora_rank: 8\nmax_length: 2048\nlearning_rate: 1e-4\n", ["a file of ms-swift"]),
    "nemo automodel": ("step_scheduler: {global_batch_size: 8}\nmodel: {_target_: nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained}\n"
                       "dataset: {dataset_name: d, split: train}\n", ["a file of NeMo AutoModel", "step_scheduler"]),
    "nemo automodel, with an adapter": (
        "recipe: TrainFinetuneRecipeForNextTokenPrediction\nstep_scheduler: {global_batch_size: 64, local_batch_size: 8, num_epochs: 1}\n"
        "model: {pretrained_model_name_or_path: m/m}\ncheckpoint: {enabled: true, checkpoint_dir: out, model_save_format: safetensors}\n"
        "peft: {_target_: nemo_automodel.components._peft.lora.PeftConfig, dim: 8, alpha: 32}\n"
        "dataloader: {collate_fn: nemo_automodel.components.datasets.utils.default_collater}\n",
        ["a file of NeMo AutoModel", "step_scheduler.global_batch_size is train.global_batch", "peft.dim adapter.rank"]),
    "nemo automodel, a short file": (
        "recipe: TrainFinetuneRecipeForNextTokenPrediction\nmodel:\n  _target_: nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained\n"
        "  template: a\ndataset: {dataset_name: d, dataset_config: c}\n",
        ["a file of NeMo AutoModel", "nemo_automodel", "tunesmith train --model"]),
    "nemo automodel, by its sections": ("recipe: finetune\nmodel: {pretrained_model_name_or_path: m}\nstep_scheduler: {max_steps: 3}\n",
                                        ["a file of NeMo AutoModel"]),
    "nemo 2": ("_target_: nemo.collections.llm.api.finetune\n_partial_: true\ntrainer: {max_steps: 9}\n", ["a file of NeMo,", "--data"]),
    "accelerate": ("compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\n", ["a file of accelerate", "parallel.shard", "tunesmith launch"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_imported_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, said = BAD[name]
    (tmp_path / "file.yaml").write_text(textwrap.dedent(text))
    recipe = tmp_path / "recipe.yaml"
    assert (
        main(["import", str(tmp_path / "file.yaml"), "--world", "1", "--output", str(recipe)]) == 2
    )
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: .*\n(  where: .*\n)?(  why: .*\n)?  fix: .*\n", error), error
    for words in said:
        assert words in error
    assert not recipe.exists()


def test_the_world_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, recipe = str(FOLDER / "axolotl-chat-8b.yml"), str(tmp_path / "r.yaml")
    assert main(["import", file, "--output", recipe]) == 2
    check_shown(capsys.readouterr().err, fix=["--world N"])
    assert main(["import", file, "--output", recipe, "train.global_batch=16 examples"]) == 0
    assert str(load_recipe(recipe).train.global_batch) == "16 examples"
    assert main(["import", file, "--output", recipe, "--world", "2"]) == 2
    check_shown(capsys.readouterr().err, where=recipe, fix=["--force"])
    assert main(["import", file, "--output", recipe, "--world", "3", "--force"]) == 0
    assert str(load_recipe(recipe).train.global_batch) == "24 examples"


def test_a_missing_folder_of_the_recipe_is_made_by_the_fix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "my recipes" / "r.yaml"
    words = ["--world", "2", "--output", str(recipe)]
    assert main(["import", str(FOLDER / "axolotl-chat-8b.yml"), *words]) == 2
    fix = [f"mkdir -p '{recipe.parent}'"]
    check_shown(capsys.readouterr().err, where="--output", names=[recipe.parent], fix=fix)


def test_an_unknown_key_is_noted(tmp_path: Path) -> None:
    notes = notes_by_key(translated("axolotl", BASES["axolotl"] | {"lora_rnk": 4}, tmp_path))
    assert notes["lora_rnk"].differs


OWN_SCRIPT = "trainer = SFTTrainer(args=SFTConfig(learning_rate=2e-4))\ntrainer.train()\n"


@pytest.mark.parametrize("words", [["sft.py"], ["sft.py", "--from", "trl"]])
def test_a_script_of_the_users_own_is_refused(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sft.py").write_text(OWN_SCRIPT)
    assert main(["import", "--world", "1", "--output", "r.yaml", *words]) == 2
    fix = ["trainer.args.to_dict()", "tunesmith import trl.yaml"]
    check_shown(capsys.readouterr().err, names=["sft.py"], fix=fix)
    assert not Path("r.yaml").exists()


def test_a_file_name_with_a_typo_gets_the_near_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "axolotl-lora.yml").write_text(json.dumps(BASES["axolotl"]))
    assert main(["import", str(tmp_path / "axolotl-lor.yml")]) == 2
    near = tmp_path / "axolotl-lora.yml"
    check_shown(capsys.readouterr().err, where="axolotl-lor.yml", fix=[near])


def test_a_data_set_with_a_typo_gets_the_near_one(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    listed = {"tickets": {"file_name": "rows.jsonl"}, "broken": None}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(listed))
    path = tmp_path / "file.yaml"
    for name, fix in (("tickts", "tickets"), ("broken", "data.train.source=rows.jsonl")):
        path.write_text(json.dumps(BASES["llamafactory"] | {"dataset": name}))
        file = tmp_path / "data/dataset_info.json"
        with refuses(UsageError, where="file.yaml:1", names=[name, file], fix=[fix]):
            translate(read_config(path, "llamafactory"), {}, 1)


@pytest.mark.parametrize(
    ("tool", "key", "stranger"),
    [
        ("llamafactory", "per_device_eval_batch_size", "temperature"),
        ("axolotl", "strict", "float32"),
        ("trl", "run_name", "machine_rank"),
    ],
)
def test_reasons_are_of_their_keys(tool: str, key: str, stranger: str, tmp_path: Path) -> None:
    notes = notes_by_key(translated(tool, BASES[tool] | {key: 7, stranger: 7}, tmp_path))
    assert notes[key].why != notes[stranger].why
    assert not notes[key].differs


def test_a_file_of_another_tool_than_the_named_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(json.dumps(BASES["axolotl"]))
    with refuses(UsageError, where="file.yaml", names=["base_model"], fix=["--from axolotl"]):
        read_config(path, "torchtune")
    path.write_text(json.dumps({"batch_size": 2}))
    assert read_config(path, "torchtune").tool == "torchtune"


def test_the_template_of_the_tokenizer_needs_nothing(tmp_path: Path) -> None:
    for value, differs in (("tokenizer_default", False), ("chatml", True)):
        draft = translated("axolotl", AXOLOTL_CHAT | {"chat_template": value}, tmp_path)
        assert notes_by_key(draft)["chat_template"].differs == differs
        assert "data.template" not in draft.values


def test_a_recipe_is_not_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, path in shipped().items():
        output = tmp_path / f"{name}.yaml"
        assert main(["import", str(path), "--world", "1", "--output", str(output)]) == 2
        check_shown(capsys.readouterr().err, where=path.name, fix=["tunesmith train"])


def test_each_value_has_a_comment(tmp_path: Path) -> None:
    for tool, values in BASES.items():
        recipe = translated(tool, values | {"val_set_size": 0.05, "val_size": 0.05}, tmp_path)
        assert not [key for key in recipe.values if not recipe.comments[key]]


def test_a_file_name_adds_nothing_to_the_recipe(tmp_path: Path) -> None:
    odd = tmp_path / "odd\u2028\x85extends: evil.yaml"
    odd.write_text((FOLDER / "axolotl-fft-8b.yml").read_text())
    assert (
        main(["import", str(odd), "--world", "1", "--output", str(tmp_path / "recipe.yaml")]) == 0
    )
    assert load_recipe(tmp_path / "recipe.yaml").model.name == "NousResearch/Meta-Llama-3.1-8B"


AXOLOTL_CHAT = BASES["axolotl"] | {"datasets": [{"path": "d/d", "type": "chat_template"}]}


def test_template_arguments_of_axolotl_are_named(tmp_path: Path) -> None:
    given = {"enable_thinking": False}
    draft = translated("axolotl", AXOLOTL_CHAT | {"chat_template_kwargs": given}, tmp_path)
    note = draft.notes["chat_template_kwargs.enable_thinking"]
    assert note.differs
    assert "data.template_args" in note.why


@pytest.mark.parametrize(
    ("template", "value", "arguments", "differs"),
    [
        ("alpaca", False, None, False),
        ("qwen3", False, {"enable_thinking": False}, True),
        ("qwen3", True, None, True),
    ],
)
def test_thinking_of_llamafactory(
    template: str, value: bool, arguments: dict | None, differs: bool, tmp_path: Path
) -> None:
    given = {"template": template, "enable_thinking": value, "preserve_thinking": True}
    draft = translated("llamafactory", BASES["llamafactory"] | given, tmp_path)
    assert draft.values.get("data.template_args") == arguments
    assert draft.notes["enable_thinking"].differs is differs
    assert draft.notes["preserve_thinking"].differs


def test_what_has_no_template_arguments_says_so(tmp_path: Path) -> None:
    given = {"chat_template_kwargs": {"enable_thinking": False}}
    draft = translated("trl", BASES["trl"] | given, tmp_path)
    notes = {key: note.why for key, note in draft.notes.items()}
    for key in ("chat_template_kwargs.enable_thinking", "dataset_name"):
        assert holds(notes[key], "data.template_args")
    tokenizer = {"prompt_template": "torchtune.data.ChatMLTemplate"}
    draft = translated("torchtune", BASES["torchtune"] | {"tokenizer": tokenizer}, tmp_path)
    notes = {key: note.why for key, note in draft.notes.items()}
    assert holds(notes["tokenizer.prompt_template"], "data.template")


@pytest.mark.parametrize(
    ("tool", "values"),
    [
        ("axolotl", {"wandb_project": "chats", "wandb_name": "first"}),
        ("torchtune", {"metric_logger": {"_component_": "m.WandBLogger", "project": "chats"}}),
        ("trl", {"report_to": "wandb", "project": "chats"}),
        ("trl", {"report_to": "wandb", "wandb_project": "chats"}),
    ],
)
def test_the_project_of_wandb_is_kept(tool: str, values: dict[str, Any], tmp_path: Path) -> None:
    recipe = translated(tool, BASES[tool] | values, tmp_path)
    assert recipe.values["log.wandb"] is True
    assert recipe.values["log.project"] == "chats"


@pytest.mark.parametrize(
    ("tool", "values", "key", "expected"),
    [
        ("axolotl", {"use_comet": True, "comet_project_name": "chats"}, "log.trackers", ["comet_ml"]),
        ("axolotl", {"use_trackio": True, "trackio_project_name": "chats"}, "log.trackers", ["trackio"]),
        ("axolotl", {"use_mlflow": True, "mlflow_experiment_name": "chats"}, "log.trackers", ["mlflow"]),
        ("axolotl", {"use_tensorboard": True}, "log.tensorboard", True),
        ("trl", {"report_to": "tensorboard"}, "log.tensorboard", True),
        ("llamafactory", {"report_to": "none"}, "log.tensorboard", None),
    ],
)  # fmt: skip
def test_trackers_become_ours(
    tool: str, values: dict[str, Any], key: str, expected: Any, tmp_path: Path
) -> None:
    recipe = translated(tool, BASES[tool] | values, tmp_path)
    assert recipe.values.get(key) == expected
    assert recipe.values.get("log.project") == ("chats" if len(values) > 1 else None)


@pytest.mark.parametrize(
    ("tool", "key", "value", "stranger"),
    [
        ("axolotl", "ddp_timeout", 180000000, "local_rank"),
        ("llamafactory", "ddp_timeout", 180000000, "local_rank"),
        ("trl", "ddp_timeout", 180000000, "local_rank"),
        ("llamafactory", "report_to", "none", "hub_token"),
        ("trl", "report_to", "none", "hub_token"),
        ("axolotl", "tf32", True, "bf16"),
        ("trl", "tf32", True, "bf16"),
    ],
)
def test_limits_trackers_and_tf32_have_reasons_of_their_own(
    tool: str, key: str, value: Any, stranger: str, tmp_path: Path
) -> None:
    notes = notes_by_key(translated(tool, BASES[tool] | {key: value, stranger: 0}, tmp_path))
    assert not notes[key].differs
    assert notes[key].why != notes[stranger].why
    with_tracker = notes_by_key(translated(tool, BASES[tool] | {key: "azure_ml"}, tmp_path))
    assert key != "report_to" or notes[key].why != with_tracker[key].why
