"""Configurations of other tools that learn from preferences: methods, numbers, rows and what has no
counterpart.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.cli.main import main
from tunesmith.config.load import load_recipe
from tunesmith.config.schema import Run
from tunesmith.errors import UsageError
from tunesmith.tools.importers.source_config import read_config, table
from tunesmith.tools.importers.translate import translate
from tunesmith.tools.importers.translation import Note, Translation

from .translations import knows

FILES = Path(__file__).parent / "files"
MODEL = {"model_name_or_path": "m/m"}
BASES: dict[str, dict[str, Any]] = {
    "axolotl": {
        "base_model": "m/m",
        "datasets": [{"path": "d/d", "type": "chat_template.argilla_chat"}],
        "adapter": "lora",
        "lora_dropout": 0.1,
        "learning_rate": 1e-5,
    },
    "llamafactory": {**MODEL, "template": "qwen", "stage": "dpo", "lora_dropout": 0.1},
    "trl": {**MODEL, "dataset_name": "d/d", "use_peft": True},
}


def imported(name: str, folder: Path) -> Run:
    recipe = folder / "recipe.yaml"
    assert main(["import", str(FILES / name), "--world", "1", "--output", str(recipe)]) == 0
    return load_recipe(recipe)


def translated(tool: str, folder: Path, overrides: Any = (), **values: Any) -> Translation:
    """What is made of a file with these keys beside those that each needs."""
    path = folder / "file.yaml"
    path.write_text(json.dumps(BASES[tool] | values))
    given = {"train.global_batch": "8 examples", **dict(overrides)}
    return translate(read_config(path, tool), given, None)


def method_of(draft: Translation) -> dict[str, Any]:
    """The keys below `method`."""
    prefix = "method."
    return {k.removeprefix(prefix): v for k, v in draft.values.items() if k.startswith(prefix)}


def note(draft: Translation, key: str) -> Note:
    return draft.notes[key]


def test_axolotls_ipo_is_dpo_with_its_loss(tmp_path: Path) -> None:
    run = imported("axolotl-dpo.yml", tmp_path)
    assert (run.method.name, run.method.loss_type, run.method.beta) == ("dpo", "ipo", 0.2)
    assert [source.format for source in run.data.train] == ["preference"] * 2
    own, intel = (source.columns for source in run.data.train)
    assert own == {"prompt": "conversation", "rejected": "bad"}
    assert intel == {"prompt": "question"}
    # TRL takes dropout out of a model with a reference.
    assert run.adapter.dropout == 0.0


def test_axolotls_kto(tmp_path: Path) -> None:
    run = imported("axolotl-kto.yml", tmp_path)
    assert (run.method.name, run.method.beta) == ("kto", 0.5)
    assert (run.method.desirable_weight, run.method.undesirable_weight) == (0.2, 1.0)
    assert (run.data.train[0].format, run.data.train[0].columns) == ("feedback", {})


def test_llamafactorys_simpo_and_its_two_forms_of_pairs(tmp_path: Path) -> None:
    run = imported("llamafactory-dpo.yaml", tmp_path)
    assert (run.method.name, run.method.beta, run.method.simpo_gamma) == ("simpo", 2.0, 1.0)
    one, talk = (source.columns for source in run.data.train)
    assert one == {"prompt": "instruction", "chosen": "better", "rejected": "worse"}
    assert talk == {"conversations": "talk"}


def test_llamafactorys_kto_on_an_adapter(tmp_path: Path) -> None:
    run = imported("llamafactory-kto.yaml", tmp_path)
    assert (run.method.name, run.method.beta, run.method.undesirable_weight) == ("kto", 0.3, 1.5)
    assert run.adapter.from_ is not None
    assert (run.data.train[0].format, run.data.train[0].columns) == ("feedback", {})


def test_trls_file_for_dpo(tmp_path: Path) -> None:
    run = imported("trl-dpo.yaml", tmp_path)
    method = run.method
    assert (method.name, method.loss_type, method.beta) == ("dpo", "robust", 0.2)
    assert (method.label_smoothing, method.sft_weight) == (0.1, 0.25)
    assert {source.format for source in (*run.data.train, *run.data.validation)} == {"preference"}
    assert (run.data.train_on, run.train.learning_rate) == ("response", 5e-6)


@pytest.mark.parametrize(
    ("tool", "values", "method"),
    [
        ("axolotl", {"rl": "dpo"}, {"name": "dpo", "beta": 0.1, "loss_type": "sigmoid"}),
        ("axolotl", {"rl": "orpo", "orpo_alpha": 0.3}, {"name": "orpo", "beta": 0.3}),
        (
            "axolotl",
            {"rl": "dpo", "trl": {"beta": 0.4}, "rpo_alpha": 0.5},
            {"name": "dpo", "beta": 0.4, "loss_type": "sigmoid", "sft_weight": 0.5},
        ),
        (
            "axolotl",
            {"rl": "simpo", "simpo_gamma": 0.9, "cpo_alpha": 0},
            {"name": "simpo", "beta": 0.1, "simpo_gamma": 0.9},
        ),
        ("llamafactory", {}, {"name": "dpo", "beta": 0.1, "loss_type": "sigmoid"}),
        ("llamafactory", {"pref_loss": "orpo"}, {"name": "orpo", "beta": 0.1}),
        (
            "llamafactory",
            {"pref_loss": "hinge", "pref_ftx": 0.2, "pref_beta": 0.3},
            {"name": "dpo", "beta": 0.3, "loss_type": "hinge", "sft_weight": 0.2},
        ),
        ("trl", {"beta": 0.1}, {"name": "dpo", "beta": 0.1, "loss_type": "sigmoid"}),
        (
            "trl",
            {"desirable_weight": 0.5},
            {"name": "kto", "beta": 0.1, "desirable_weight": 0.5, "undesirable_weight": 1.0},
        ),
        (
            "trl",
            {"loss_type": "simpo", "simpo_gamma": 0.7, "beta": 2.0, "cpo_alpha": 0.0},
            {"name": "simpo", "beta": 2.0, "simpo_gamma": 0.7},
        ),
    ],
)
def test_methods_and_their_numbers(
    tool: str, values: dict[str, Any], method: dict[str, Any], tmp_path: Path
) -> None:
    draft = translated(tool, tmp_path, **values)
    assert method_of(draft) == method
    assert draft.values["adapter.dropout"] == 0.0


def test_the_command_line_says_which_trainer_reads_a_file(tmp_path: Path) -> None:
    values = {"beta": 0.2}
    draft = translated("trl", tmp_path, {"method": "orpo"}, **values)
    assert method_of(draft) == {"name": "orpo", "beta": 0.2}
    assert note(draft, "beta").differs
    recipe = tmp_path / "orpo.yaml"
    words = ["import", "--from", "trl", str(tmp_path / "file.yaml"), "--world", "1"]
    assert main([*words, "method=orpo", "--output", str(recipe)]) == 0
    assert load_recipe(recipe).method.beta == 0.2
    assert "method.name" not in translated("trl", tmp_path).values


@pytest.mark.parametrize(
    ("tool", "values", "key"),
    [
        ("axolotl", {"rl": "grpo"}, "rl"),
        ("axolotl", {"rl": "dpo", "datasets": [{"path": "d", "type": "zephyr.nectar"}]}, "type"),
        ("llamafactory", {"pref_loss": "kto_pair"}, "pref_loss"),
        ("llamafactory", {"stage": "ppo"}, "stage"),
        ("trl", {"beta": 0.1, "loss_type": "bco_pair"}, "loss_type"),
        ("trl", {"beta": 0.1, "loss_type": ["sigmoid", "hinge"]}, "loss_type"),
        ("trl", {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 1.0]}, "loss_weights"),
        ("trl", {"cpo_alpha": 1.0}, "loss_type"),
        ("trl", {"desirable_weight": 1.0, "loss_type": "apo_zero_unpaired"}, "loss_type"),
    ],
)
def test_what_has_no_counterpart_is_refused(
    tool: str, values: dict[str, Any], key: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as error:
        translated(tool, tmp_path, **values)
    assert key in error.value.what


@pytest.mark.parametrize(
    ("tool", "values", "key"),
    [
        ("axolotl", {"rl": "simpo"}, "cpo_alpha"),
        ("axolotl", {"rl": "orpo"}, "rl"),
        ("axolotl", {"rl": "dpo", "lora_model_dir": "sft"}, "lora_model_dir"),
        ("axolotl", {"rl": "dpo", "dpo_use_weighting": True}, "dpo_use_weighting"),
        ("llamafactory", {"pref_loss": "simpo", "pref_ftx": 0.5}, "pref_ftx"),
        ("llamafactory", {"dpo_label_smoothing": 0.1}, "dpo_label_smoothing"),
        ("llamafactory", {"ref_model": "m/other"}, "ref_model"),
        ("trl", {"beta": 0.1, "f_divergence_type": "js_divergence"}, "f_divergence_type"),
        ("trl", {"beta": 0.1, "sync_ref_model": True}, "sync_ref_model"),
        ("trl", {"beta": 0.1, "ld_alpha": 0.5}, "ld_alpha"),
    ],
)
def test_what_would_be_learned_otherwise_is_said(
    tool: str, values: dict[str, Any], key: str, tmp_path: Path
) -> None:
    assert note(translated(tool, tmp_path, **values), key).differs


def test_numbers_of_trl_are_those_of_the_installed_trainers() -> None:
    trl = pytest.importorskip("trl")
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    configs = {"dpo": trl.DPOConfig, "kto": trl.KTOConfig, "orpo": ORPOConfig, "cpo": CPOConfig}
    methods = {"dpo": "dpo", "kto": "kto", "orpo": "orpo", "cpo": "simpo"}
    for trainer, config in configs.items():
        fields = {field.name: field for field in dataclasses.fields(config)}
        condition = {"method.name": methods[trainer]}
        sections = table("trl")["when"]
        defaults = next(
            s["implied"] for s in sections if s.get("if") == condition and "implied" in s
        )
        for name, value in defaults.items():
            field = fields[name]
            real = field.default
            if real is dataclasses.MISSING:
                real = field.default_factory()
            assert value == real, (trainer, name)
        missing = [name for name in fields if not knows("trl", name)]
        assert not missing, (trainer, missing)
        assert len(fields) > 100
