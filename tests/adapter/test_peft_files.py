"""PEFT's files both ways: ours open in PEFT, PEFT's open here, and the logits are the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from errors import holds, refuses
from tunesmith.adapter import lora, peft_files
from tunesmith.checkpoint.start_adapter import find_adapter
from tunesmith.config.schema import Adapter
from tunesmith.errors import ModelError
from tunesmith.model.measuring.tiny_model import build_tiny_model
from tunesmith.start.lines import misread_warnings

CASES = {
    "all-linear": Adapter(rank=4, alpha=12),
    "names and rslora": Adapter(
        rank=3, alpha=6.5, rslora=True, target=("q_proj", "down_proj"), dropout=0.1
    ),
    "embedding and head": Adapter(rank=4, modules_to_save=("embed_tokens", "lm_head")),
    "norms": Adapter(rank=2, modules_to_save=("norm", "input_layernorm")),
    "one layer": Adapter(rank=2, target=("model.layers.1.mlp.up_proj",)),
}
# fp32 products in another order, through two layers; logits are of order 1.
TOLERANCE = 1e-5


def logits(model) -> torch.Tensor:
    ids = torch.arange(5, 35).view(2, 15)
    with torch.no_grad():
        return model.eval()(ids).logits


def randomise(model, fraction: float = 0.1) -> None:
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * fraction)


@pytest.fixture
def build(tiny):
    return lambda: AutoModelForCausalLM.from_pretrained(tiny)


@pytest.mark.parametrize("adapter", CASES.values(), ids=CASES.keys())
@pytest.mark.slow
def test_ours_opens_in_peft_and_here(adapter, build, tmp_path, monkeypatch):
    model, again = build(), build()
    plain = logits(model)
    lora.attach_lora(model, adapter, seed=3)
    randomise(model)
    with monkeypatch.context() as patch:
        # Importing it while training runs stops the training for a second
        patch.setitem(sys.modules, "peft", None)
        peft_files.write_adapter(
            tmp_path, *peft_files.adapter_files(model, adapter, "someone/tiny-llama", "v1")
        )
    expected = logits(model)
    assert (expected - plain).abs().max() > 0.05, "the adapter must matter"
    theirs = PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=TOLERANCE)
    ours = json.loads((tmp_path / "adapter_config.json").read_text())
    built = LoraConfig(
        task_type="CAUSAL_LM", base_model_name_or_path="someone/tiny-llama", revision="v1",
        r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora, target_modules=ours["target_modules"],
        modules_to_save=ours["modules_to_save"], inference_mode=True,
    ).to_dict()  # fmt: skip
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == built
    as_json = json.loads(json.dumps(built, default=sorted))
    assert ours == {name: as_json[name] for name in ours}
    lora.attach_lora(again, peft_files.read_adapter(tmp_path), seed=99)
    peft_files.load_adapter(again, tmp_path)
    first, second = dict(model.named_parameters()), dict(again.named_parameters())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_an_adapter_that_peft_takes_for_another_is_named(tmp_path):
    """The shared experts of DeepSeek-V3: PEFT leaves their adapters out, or does not open the file."""
    build_tiny_model(AutoConfig.for_model("deepseek_v3")).save_pretrained(tmp_path / "base")
    differences = []
    for target in ("all-linear", ("gate_proj", "up_proj", "down_proj"), ("q_a_proj", "experts")):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        adapter = Adapter(rank=2, target=target)
        lora.attach_lora(model, adapter, seed=0)
        randomise(model)
        peft_files.write_adapter(tmp_path, *peft_files.adapter_files(model, adapter, "x", None))
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        warning = "".join(misread_warnings(peft_files.find_misread(model)))
        try:
            theirs = PeftModel.from_pretrained(base, tmp_path)
        except RuntimeError:
            is_misread = True
        else:
            difference = (logits(theirs) - logits(model)).abs().max()
            is_misread = bool(difference > 1e-3 * logits(model).abs().max())
        differences.append(is_misread)
        assert bool(warning) == is_misread
        if is_misread:
            assert holds(warning, "deepseek_v3", "tunesmith merge", "adapter.target")
    assert differences == [True, True, False]


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "all-linear", "lora_alpha": 12},
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "lora_dropout": 0.1},
        {"target_modules": "all-linear", "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
        {"target_modules": r".*\.layers\.1\..*(q|v)_proj"},
        {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 0},
    ],
    ids=[
        "all-linear", "names and rslora", "embedding and head", "norms", "regular expression",
        "all of one layer", "one layer",
    ],
)  # fmt: skip
@pytest.mark.slow
def test_pefts_opens_here(changes, build, tmp_path):
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **changes)
    theirs = get_peft_model(build(), config)
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours, adapter = build(), peft_files.read_adapter(tmp_path)
    assert adapter.dropout == changes.get("lora_dropout", 0)
    lora.attach_lora(ours, adapter, seed=3)
    peft_files.load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours.eval()), logits(theirs.eval()), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], None])
@pytest.mark.slow
def test_an_adapter_with_added_tokens(saved, tiny, tmp_path):
    """PEFT stores a resized embedding, and three times if it is trained."""
    base = AutoModelForCausalLM.from_pretrained(tiny)
    base.resize_token_embeddings(base.config.vocab_size + 2)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=saved, task_type="CAUSAL_LM")
    theirs = get_peft_model(base, config)
    theirs.base_model.name_or_path = str(tiny)
    theirs.peft_config["default"].base_model_name_or_path = str(tiny)
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    adapter = peft_files.read_adapter(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tiny)
    lora.attach_lora(ours, adapter, seed=3)
    fix = ["resize_token_embeddings(274)", *["model.added_tokens"] * bool(saved)]
    with refuses(ModelError, where="adapter_model.safetensors", names=[274, 272], fix=fix):
        peft_files.load_adapter(ours, tmp_path)
    if saved:
        ours = AutoModelForCausalLM.from_pretrained(tiny)
        ours.resize_token_embeddings(274)
        lora.attach_lora(ours, adapter, seed=3)
        peft_files.load_adapter(ours, tmp_path)
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=TOLERANCE)


@pytest.fixture
def written(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    lora.attach_lora(model, Adapter(), seed=3)
    peft_files.write_adapter(tmp_path, *peft_files.adapter_files(model, Adapter(), "x", None))
    return model, tmp_path


def change_config(folder, change):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


@pytest.mark.parametrize(
    ("change", "is_read"),
    [
        ({"use_dora": True}, False),
        ({"rank_pattern": {"q_proj": 4}}, False),
        ({"bias": "all"}, False),
        ({"init_lora_weights": "pissa"}, False),
        ({"task_type": "SEQ_CLS"}, False),
        ({"a_key_of_a_later_version": 1}, False),
        ({"a_key_of_a_later_version": None}, True),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}, True),
        ({"auto_mapping": {"base_model_class": "x", "unsloth_fixed": True}}, True),
    ],
)
def test_what_is_not_computed_is_refused_by_name(written, change, is_read):
    _, folder = written
    change_config(folder, change)
    if is_read:
        assert peft_files.read_adapter(folder).rank == Adapter().rank
        return
    with refuses(ModelError, names=[next(iter(change))]):
        peft_files.read_adapter(folder)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (
            lambda t: {k: v for k, v in t.items() if "layers.1.mlp.up_proj.lora_B" not in k},
            "model.layers.1.mlp.up_proj.lora_B",
        ),
        (lambda t: {**t, "base_model.model.other.lora_A.weight": torch.zeros(8, 4)}, "other"),
        (lambda t: {k: v[:4] if "lora_A" in k else v for k, v in t.items()}, "lora_A"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(written, damage, named):
    model, folder = written
    file = folder / "adapter_model.safetensors"
    save_file({k: v.contiguous() for k, v in damage(load_file(file)).items()}, file)
    with refuses(ModelError) as caught:
        peft_files.load_adapter(model, folder)
    assert named in caught.value.text()


def test_broken_files_are_named(written):
    model, folder = written
    file = folder / "adapter_model.safetensors"
    file.rename(folder / "adapter_model.bin")
    with refuses(ModelError, where="adapter_model.bin", fix=["save_pretrained"]):
        peft_files.read_adapter(folder)
    (folder / "adapter_model.bin").unlink()
    (folder / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{garbage")
    with refuses(ModelError, where="adapter_model.safetensors"):
        peft_files.load_adapter(model, folder)
    (folder / "adapter_config.json").write_text("{")
    with refuses(ModelError, where="adapter_config.json:1"):
        peft_files.read_adapter(folder)


def test_another_scaling_is_refused(written, tiny):
    _, folder = written
    model = AutoModelForCausalLM.from_pretrained(tiny)
    lora.attach_lora(model, Adapter(alpha=32), seed=3)
    with refuses(ModelError, names=[2, 4], fix=["adapter.rank: 8", "adapter.alpha: 16"]):
        peft_files.load_adapter(model, folder)


def test_an_adapter_that_is_meant_is_proposed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with refuses(ModelError, where="adapter.from", names=["nobody/nothing"], fix=["HF_TOKEN"]):
        find_adapter("nobody/nothing")
    monkeypatch.chdir(tmp_path)
    Path("runs/first").mkdir(parents=True)
    with refuses(ModelError, fix=["runs/first"]):
        find_adapter("runs/frist")


# Stacks [experts, out, in] and [experts, in, out], with biases, and without a gate.
MIXTURES = dict.fromkeys(["qwen3_moe", "gpt_oss"], pytest.mark.slow)
MIXTURES |= dict.fromkeys(["mixtral", "nemotron_h", "granitemoe"], pytest.mark.nightly)


@pytest.fixture(params=[pytest.param(name, marks=lane) for name, lane in MIXTURES.items()])
def mixture(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    build_tiny_model(AutoConfig.for_model(request.param)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def attached(mixture: Path, adapter: Adapter) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(mixture)
    lora.attach_lora(model, adapter, seed=0)
    return model.eval()


def test_adapters_of_experts_open_in_peft_and_pefts_here(mixture: Path, tmp_path: Path) -> None:
    adapter = Adapter(rank=3, alpha=6, target=("q_proj", "experts"), rslora=True)
    model = attached(mixture, adapter)
    randomise(model)
    _, config = files = peft_files.adapter_files(model, adapter, "x", None)
    peft_files.write_adapter(tmp_path, *files)
    plain = AutoModelForCausalLM.from_pretrained(mixture).eval()
    before = logits(plain)
    opened = logits(PeftModel.from_pretrained(plain, tmp_path).eval())
    ours = logits(model)
    assert (opened - ours).abs().max() < 2e-6 * ours.abs().max()
    assert (before - ours).abs().max() > 0.05 * ours.abs().max()

    settings = LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj"],
        target_parameters=config["target_parameters"], task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(mixture), settings).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = attached(mixture, peft_files.read_adapter(tmp_path / "theirs"))
    peft_files.load_adapter(model, tmp_path / "theirs")
    expected = logits(theirs)
    assert (logits(model) - expected).abs().max() < 2e-6 * expected.abs().max()


def test_one_stack_alone_is_refused(tmp_path: Path) -> None:
    settings = {"r": 2, "lora_alpha": 4, "target_modules": []}
    settings["target_parameters"] = ["experts.down_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with refuses(ModelError, names=["target_parameters"]):
        peft_files.read_adapter(tmp_path)


@pytest.mark.slow
def test_peft_opens_experts_trained_in_full_beside_an_adapter(tmp_path: Path) -> None:
    mixture = tmp_path / "base"
    build_tiny_model(AutoConfig.for_model("qwen3_moe")).save_pretrained(mixture)
    adapter = Adapter(rank=3, alpha=6, target=("q_proj",), modules_to_save=("experts",))
    model = attached(mixture, adapter)
    randomise(model)
    peft_files.write_adapter(tmp_path, *peft_files.adapter_files(model, adapter, "x", None))
    plain = AutoModelForCausalLM.from_pretrained(mixture).eval()
    theirs = logits(PeftModel.from_pretrained(plain, tmp_path).eval())
    ours = logits(model)
    assert (theirs - ours).abs().max() < 2e-6 * ours.abs().max()
