"""Keys of a data set that change what is learned from it: read, refused, or named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from errors import refuses
from tunesmith.errors import UsageError

from .translations import BASES, notes_by_key, translated_text

AXOLOTL = {"base_model": "m/m", "learning_rate": 1e-4, "micro_batch_size": 1}
CHAT = {"path": "d/d", "type": "chat_template"}


def axolotl(folder: Path, dataset: dict[str, Any], **more: Any) -> Any:
    values = {**AXOLOTL, "datasets": [dataset], **more}
    return translated_text("axolotl", json.dumps(values), folder)


@pytest.mark.parametrize(("rl", "field"), [(None, "field_instruction"), ("dpo", "field_prompt")])
def test_a_prompt_of_its_own_is_refused_by_its_key(
    rl: str | None, field: str, tmp_path: Path
) -> None:
    fix = ["data.train.format=alpaca", "data.train.format=preference", "data.template"]
    with refuses(UsageError, names=[f"datasets.0.type.{field}"], fix=fix):
        axolotl(tmp_path, {"path": "d/d", "type": {field: "question"}}, rl=rl)


def test_the_fix_of_a_prompt_of_its_own_imports(tmp_path: Path) -> None:
    own = {"field_instruction": "question", "field_output": "answer"}
    values = {**AXOLOTL, "datasets": [{"path": "d/d", "type": own}]}
    given = {
        "data.train.source": "d/d",
        "data.train.format": "alpaca",
        "data.train.columns": "{instruction: question, output: answer}",
    }
    recipe = translated_text("axolotl", json.dumps(values), tmp_path, **given)
    assert {*recipe.source.keys} <= recipe.mentioned


@pytest.mark.parametrize("type_", ["alpaca:phi", "sharegpt:chat", "sharegpt.load_role", "oasst"])
def test_a_type_with_a_text_or_reader_of_its_own_is_refused(type_: str, tmp_path: Path) -> None:
    with refuses(UsageError, names=[type_]):
        axolotl(tmp_path, {"path": "d/d", "type": type_})


@pytest.mark.parametrize(
    ("key", "usual", "other"),
    [
        ("roles_to_train", ["assistant"], ["assistant", "user"]),
        ("roles_to_train", ["gpt"], []),
        ("train_on_eos", "turn", "all"),
        ("train_on_eos", "turn", "none"),
        ("train_on_eot", "turn", False),
        ("field_thinking", "reasoning_content", "scratchpad"),
        ("field_thinking", "thinking", "why"),
        ("chat_template", "tokenizer_default", "chatml"),
    ],
)
def test_what_is_trained_of_a_turn(key: str, usual: Any, other: Any, tmp_path: Path) -> None:
    name = f"datasets.0.{key}"
    assert not notes_by_key(axolotl(tmp_path, {**CHAT, key: usual}))[name].differs
    assert notes_by_key(axolotl(tmp_path, {**CHAT, key: other}))[name].differs


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("message_field_training", "train"),
        ("message_field_training_detail", "detail"),
        ("shards", 10),
        ("drop_system_message", True),
        ("message_property_mappings", {"role": "speaker"}),
        ("message_property_mappings", {"content": "said"}),
    ],
)
def test_keys_that_leave_out_or_rename_parts_of_the_rows_differ(
    key: str, value: Any, tmp_path: Path
) -> None:
    notes = axolotl(tmp_path, {**CHAT, key: value}).notes.values()
    assert [note for note in notes if note.key.startswith(f"datasets.0.{key}") and note.differs]


def test_a_shard_of_all_data_sets_differs(tmp_path: Path) -> None:
    recipe = axolotl(tmp_path, CHAT, dataset_shard_num=4, dataset_shard_idx=1)
    assert notes_by_key(recipe)["dataset_shard_num"].differs


def test_the_older_name_of_a_split_is_read(tmp_path: Path) -> None:
    recipe = axolotl(tmp_path, {**CHAT, "train_on_split": "validation"})
    assert recipe.values["data.train"]["split"] == "validation"


@pytest.mark.parametrize(
    ("strategy", "too_long"), [(None, "drop"), ("truncate", "truncate"), ("raise", "error")]
)
def test_rows_that_are_too_long(strategy: str | None, too_long: str, tmp_path: Path) -> None:
    recipe = axolotl(tmp_path, CHAT, excess_length_strategy=strategy)
    assert recipe.values["data.too_long"] == too_long


def test_documents_are_not_left_out_by_their_length(tmp_path: Path) -> None:
    recipe = axolotl(tmp_path, {"path": "d/d", "type": "completion"})
    assert "data.too_long" not in recipe.values


def test_documents_that_are_held_out_leave_out_no_rows_by_their_length(tmp_path: Path) -> None:
    held_out = [{"path": "e/e", "type": "completion"}]
    recipe = axolotl(tmp_path, CHAT, test_datasets=held_out)
    assert recipe.values["data.too_long"] == "drop"


@pytest.mark.parametrize(
    "loss", ["torchtune.rlhf.loss.DPOLoss", "m.ForwardKLLoss", "my.loss.FocalLoss"]
)
def test_a_loss_of_torchtune_that_is_no_cross_entropy_differs(loss: str, tmp_path: Path) -> None:
    values = BASES["torchtune"] | {"loss": {"_component_": loss}}
    notes = notes_by_key(translated_text("torchtune", json.dumps(values), tmp_path))
    assert notes["loss._component_"].differs
    assert "supported" in notes["loss._component_"].why


@pytest.mark.parametrize("loss", ["LinearCrossEntropyLoss", "CEWithChunkedOutputLoss"])
def test_a_cross_entropy_of_torchtune_needs_nothing(loss: str, tmp_path: Path) -> None:
    given = {"_component_": f"torchtune.modules.loss.{loss}", "mask_ignored_tokens": True}
    values = BASES["torchtune"] | {"loss": given}
    notes = notes_by_key(translated_text("torchtune", json.dumps(values), tmp_path))
    assert not notes["loss._component_"].differs
    assert "supported" not in notes["loss._component_"].why
    assert not notes["loss.mask_ignored_tokens"].differs


def test_data_sets_of_torchtune_that_train_on_other_parts_differ(tmp_path: Path) -> None:
    chat = {"_component_": "torchtune.datasets.chat_dataset", "source": "d/d"}
    datasets = [
        {**chat, "train_on_input": False},
        {**chat, "train_on_input": True},
        {**chat, "train_on_input": False},
    ]
    values = BASES["torchtune"] | {"dataset": datasets}
    notes = notes_by_key(translated_text("torchtune", json.dumps(values), tmp_path))
    assert notes["dataset.1.train_on_input"].differs
    assert not notes["dataset.2.train_on_input"].differs


def test_betas_of_torchtune(tmp_path: Path) -> None:
    values = BASES["torchtune"] | {"optimizer": {"lr": 1e-4, "betas": [0.9, 0.95]}}
    recipe = translated_text("torchtune", json.dumps(values), tmp_path)
    assert recipe.values["train.betas"] == [0.9, 0.95]


def test_names_in_a_turn_of_llamafactory(tmp_path: Path) -> None:
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user"}
    entry = {"file_name": "d.json", "formatting": "sharegpt", "tags": tags}
    odd = {**entry, "tags": {**tags, "role_tag": "who", "user_tag": "customer"}}
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "dataset_info.json").write_text(json.dumps({"usual": entry, "odd": odd}))
    values = BASES["llamafactory"] | {"dataset": "usual,odd"}
    notes = notes_by_key(translated_text("llamafactory", json.dumps(values), tmp_path))
    assert not notes["dataset.0.tags.user_tag"].differs
    assert notes["dataset.1.tags.user_tag"].differs
    assert notes["dataset.1.tags.role_tag"].differs


def test_pictures_of_llamafactory(tmp_path: Path) -> None:
    entry = {"file_name": "d.json", "formatting": "sharegpt", "columns": {"images": "photos"}}
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "dataset_info.json").write_text(json.dumps({"seen": entry}))
    values = BASES["llamafactory"] | {"dataset": "seen", "freeze_vision_tower": False}
    recipe = translated_text("llamafactory", json.dumps(values), tmp_path)
    assert recipe.values["model.vision"] is True
    assert recipe.values["data.image_max_pixels"] == 768 * 768  # its default
    assert recipe.values["data.train"]["columns"]["images"] == "photos"
    assert notes_by_key(recipe)["freeze_vision_tower"].differs


@pytest.mark.parametrize("tool", ["trl", "llamafactory"])
def test_a_base_in_fp4_differs(tool: str, tmp_path: Path) -> None:
    key = {"trl": "bnb_4bit_quant_type", "llamafactory": "quantization_type"}[tool]
    given = {"data.train.source": "rows.jsonl"}
    text = json.dumps(BASES[tool] | {key: "fp4"})
    assert notes_by_key(translated_text(tool, text, tmp_path, **given))[key].differs
    text = json.dumps(BASES[tool] | {key: "nf4"})
    assert not notes_by_key(translated_text(tool, text, tmp_path, **given))[key].differs


def test_the_text_of_a_template_is_refused_by_its_key(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with refuses(UsageError, names=["chat_template_jinja"], fix=["data.template=template.jinja"]):
        axolotl(tmp_path, CHAT, chat_template_jinja=template)


@pytest.mark.parametrize(("plugin", "differs"), [("LigerPlugin", False), ("SpectrumPlugin", True)])
def test_plugins_that_do_more_than_choose_kernels_differ(
    plugin: str, differs: bool, tmp_path: Path
) -> None:
    recipe = axolotl(tmp_path, CHAT, plugins=[f"axolotl.integrations.any.{plugin}"])
    note = notes_by_key(recipe)["plugins"]
    assert note.differs is differs
    assert ("known" in note.why) is differs
    assert not notes_by_key(axolotl(tmp_path, CHAT, plugins=[]))["plugins"].differs


@pytest.mark.parametrize(
    ("key", "value", "ours", "expected"),
    [
        ("completion_only_loss", None, "data.train_on", "response"),
        ("completion_only_loss", True, "data.train_on", "response"),
        ("completion_only_loss", False, "data.train_on", "all"),
        ("train_sampling_strategy", "sequential", "data.shuffle", False),
    ],
)
def test_keys_of_trl_that_change_what_is_trained(
    key: str, value: Any, ours: str, expected: Any, tmp_path: Path
) -> None:
    given = {"data.train.format": "prompt-completion"}
    text = json.dumps(BASES["trl"] | {key: value})
    assert translated_text("trl", text, tmp_path, **given).values[ours] == expected


@pytest.mark.parametrize(
    ("tool", "key", "value"),
    [
        ("trl", "packing_strategy", "wrapped"),
        ("llamafactory", "quantization_method", "hqq"),
        ("axolotl", "embedding_lr_scale", 0.1),
    ],
)
def test_keys_that_were_said_to_need_nothing_differ(
    tool: str, key: str, value: Any, tmp_path: Path
) -> None:
    given = {"data.train.source": "rows.jsonl"}
    recipe = translated_text(tool, json.dumps(BASES[tool] | {key: value}), tmp_path, **given)
    assert notes_by_key(recipe)[key].differs


def test_the_system_message_of_llamafactory(tmp_path: Path) -> None:
    given = {"data.train.source": "rows.jsonl"}
    text = json.dumps(BASES["llamafactory"] | {"default_system": "Be short."})
    recipe = translated_text("llamafactory", text, tmp_path, **given)
    assert recipe.values["data.system"] == "Be short."


def test_a_quantized_base_of_torchtune(tmp_path: Path) -> None:
    model = {**BASES["torchtune"]["model"], "quantize_base": True}
    text = json.dumps(BASES["torchtune"] | {"model": model})
    assert translated_text("torchtune", text, tmp_path).values["model.quantize"] == "nf4"


@pytest.mark.parametrize("tool", ["axolotl", "trl"])
@pytest.mark.parametrize(
    ("pattern", "names"),
    [("q_proj, v_proj", ["q_proj", "v_proj"]), (r".*\.(q|v)_proj", None), ("(q_proj", None)],
)
def test_a_regular_expression_of_layers_is_refused(
    tool: str, pattern: str, names: list[str] | None, tmp_path: Path
) -> None:
    switch = {"axolotl": {"adapter": "lora", "lora_r": 8}, "trl": {"use_peft": True}}
    values = BASES[tool] | switch[tool]
    text = json.dumps(values | {"lora_target_modules": pattern})
    if names is not None:
        assert translated_text(tool, text, tmp_path).values["adapter.target"] == names
        return
    with refuses(UsageError, names=["lora_target_modules"], fix=["adapter.target="]):
        translated_text(tool, text, tmp_path)
    given = {"adapter.target": "[q_proj]"}
    assert translated_text(tool, text, tmp_path, **given).values["adapter.kind"] == "lora"


def test_a_processor_of_axolotl_means_pictures(tmp_path: Path) -> None:
    recipe = axolotl(tmp_path, CHAT, processor_type="AutoProcessor")
    assert recipe.values["model.vision"] is True
    assert "model.vision" not in axolotl(tmp_path, CHAT).values


@pytest.mark.parametrize(
    ("named", "source"),
    [
        ("org/books", {"source": "org/books"}),
        (
            [{"path": "org/books", "text_column": "body", "type": "pretrain"}],
            {"columns": {"text": "body"}},
        ),
        ([{"path": "org/books", "name": "en", "text_column": "text"}], {"name": "en"}),
    ],
)
def test_rows_of_pretraining_of_axolotl(named: Any, source: dict[str, Any], tmp_path: Path) -> None:
    values = AXOLOTL | {"pretraining_dataset": named, "max_steps": 9}
    recipe = translated_text("axolotl", json.dumps(values), tmp_path)
    expected = {"source": "org/books", "split": "train", "format": "text"} | source
    assert recipe.values["data.train"] == expected


def test_rows_of_pretraining_of_llamafactory(tmp_path: Path) -> None:
    entries = {
        "a": {"file_name": "a.json", "columns": {"prompt": "body"}},
        "b": {"hf_hub_url": "org/b", "columns": {"prompt": "text"}},
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(entries))
    values = BASES["llamafactory"] | {"stage": "pt", "dataset": "a, b", "cutoff_len": 512}
    recipe = translated_text("llamafactory", json.dumps(values), tmp_path)
    first, second = recipe.values["data.train"]
    assert (first["format"], first["columns"]) == ("text", {"text": "body"})
    assert (second["format"], "columns" in second) == ("text", False)
    assert recipe.values["method"] == "sft"
    assert recipe.values["data.pack"], "LLaMA-Factory packs documents unless packing is false"
