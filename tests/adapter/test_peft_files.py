"""PEFT's files both ways: ours open in PEFT, PEFT's open here, and the logits are the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from errors import holds, refuses
from tunesmith.adapter import lora, peft_files
from tunesmith.checkpoint.start_adapter import find_adapter
from tunesmith.config.schema import Adapter
from tunesmith.errors import ModelError
from tunesmith.model import tiny_model
from tunesmith.presentation.start import misread_warnings

CASES = {
    "all-linear": Adapter(rank=4, alpha=12),
    "names and rslora": Adapter(
        rank=3, alpha=6.5, rslora=True, target=("q_proj", "down_proj"), dropout=0.1
    ),
    "head": Adapter(rank=4, target=("v_proj", "lm_head")),
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
    # What PEFT would write
    ours = json.loads((tmp_path / "adapter_config.json").read_text())
    built = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path="someone/tiny-llama",
        revision="v1",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        target_modules=ours["target_modules"],
        modules_to_save=ours["modules_to_save"],
        inference_mode=True,
    ).to_dict()
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == built
    as_json = json.loads(json.dumps(built, default=sorted))
    assert ours == {name: as_json[name] for name in ours}
    # Read back bit by bit
    back = peft_files.read_adapter(tmp_path)
    for key in ("rank", "alpha", "rslora", "dropout"):
        assert getattr(back, key) == getattr(adapter, key), key
    assert {*back.modules_to_save} >= {*adapter.modules_to_save}
    lora.attach_lora(again, back, seed=99)
    peft_files.load_adapter(again, tmp_path)
    first, second = dict(model.named_parameters()), dict(again.named_parameters())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_an_adapter_that_peft_takes_for_another_is_named(tmp_path):
    """The shared experts of DeepSeek-V3: PEFT leaves their adapters out, and does not open a file
    with those of the experts beside them.
    """
    small = tiny_model.shrink(AutoConfig.for_model("deepseek_v3"))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path / "base")
    differences = []
    shared = ("gate_proj", "up_proj", "down_proj")
    for target in ("all-linear", shared, ("q_a_proj", "o_proj"), ("q_a_proj", "experts")):
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
            assert holds(warning, "PEFT", "tunesmith merge", "adapter.target")
        else:
            difference = (logits(theirs) - logits(model)).abs().max()
            is_misread = bool(difference > 1e-3 * logits(model).abs().max())
        differences.append(is_misread)
        assert bool(warning) == is_misread
        if is_misread:
            assert "down_proj, gate_proj, up_proj of a deepseek_v3" in warning
    assert differences == [True, True, False, False]


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "all-linear", "lora_alpha": 12},
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "lora_dropout": 0.1},
        {"target_modules": ["v_proj", "lm_head"]},
        {"target_modules": "all-linear", "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
        {"target_modules": r".*\.layers\.1\..*(q|v)_proj"},
        {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 0},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.v_proj"]},
    ],
    ids=[
        "all-linear", "names and rslora", "head", "embedding and head", "norms",
        "regular expression", "all of one layer", "one layer", "excluded",
    ],
)  # fmt: skip
@pytest.mark.slow
def test_pefts_opens_here(changes, build, tmp_path):
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **changes)
    theirs = get_peft_model(build(), config)
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = build()
    lora.attach_lora(ours, peft_files.read_adapter(tmp_path), seed=3)
    peft_files.load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=TOLERANCE)


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
        ({"alpha_pattern": {"q_proj": 4}}, False),
        ({"bias": "all"}, False),
        ({"peft_type": "LOHA"}, False),
        ({"init_lora_weights": "pissa"}, False),
        ({"init_lora_weights": "lora_ga"}, False),
        ({"velora_config": {"num_groups": 32}}, False),
        ({"ensure_weight_tying": True}, False),
        ({"task_type": "SEQ_CLS"}, False),
        ({"a_key_of_a_later_version": 1}, False),
        ({"a_key_of_a_later_version": None}, True),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}, True),
        ({"init_lora_weights": "mica"}, True),
        ({"auto_mapping": {"base_model_class": "x", "unsloth_fixed": True}}, True),
    ],
    ids=lambda c: "-".join(map(str, next(iter(c.items())))) if isinstance(c, dict) else str(c),
)
def test_what_is_not_computed_is_refused_by_name(written, change, is_read):
    _, folder = written
    change_config(folder, change)
    if is_read:
        assert peft_files.read_adapter(folder).rank == Adapter().rank
        return
    with refuses(ModelError, names=[next(iter(change))]):
        peft_files.read_adapter(folder)


def test_an_update_of_the_embedding_is_refused(build, tmp_path):
    config = LoraConfig(target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    get_peft_model(build(), config).save_pretrained(tmp_path)
    with refuses(ModelError, names=["model.embed_tokens.lora_embedding_A"], fix=["PEFT"]):
        peft_files.read_adapter(tmp_path)


def rename(tensors):
    return {k.replace("q_proj", "query"): v for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (
            lambda t: {k: v for k, v in t.items() if "layers.1.mlp.up_proj.lora_B" not in k},
            "model.layers.1.mlp.up_proj.lora_B",
        ),
        (rename, "model.layers.0.self_attn.q_proj.lora_A"),
        (lambda t: {**t, "base_model.model.other.lora_A.weight": torch.zeros(8, 4)}, "other"),
        (lambda t: {**t, "base_model.model.model.norm.weight": torch.tensor(1.0)}, "model.norm"),
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
    tower = "model.visual.blocks.0.attn.qkv.lora_A.weight"
    save_file(load_file(file) | {f"base_model.model.{tower}": torch.zeros(2, 4)}, file)
    with refuses(ModelError, where="adapter_model.safetensors", names=[tower], fix=["PEFT"]):
        peft_files.read_adapter(folder)
    file.rename(folder / "adapter_model.bin")
    with refuses(ModelError, where="adapter_model.bin", fix=["save_pretrained"]):
        peft_files.read_adapter(folder)
    (folder / "adapter_model.bin").unlink()
    change_config(folder, {"target_modules": ".*q_proj"})  # the weights say which they are
    with refuses(ModelError, where="adapter_model.safetensors"):
        peft_files.read_adapter(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{garbage")
    with refuses(ModelError, where="adapter_model.safetensors"):
        peft_files.load_adapter(model, folder)
    (folder / "adapter_config.json").write_text("{")
    with refuses(ModelError, where="adapter_config.json:1"):
        peft_files.read_adapter(folder)
    with refuses(ModelError) as caught:
        peft_files.read_adapter(folder / "nowhere")
    assert "adapter_config.json" in caught.value.text()


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
    runs = Path("runs")
    runs.mkdir()

    def fix_for(name):
        with pytest.raises(ModelError) as caught:
            find_adapter(name)
        return caught.value.fix

    no_run = "use the output_dir of a run"
    assert fix_for("runs/zzz") == no_run
    (runs / "notes.txt").touch()
    (runs / "first").mkdir()
    assert fix_for("runs/note.txt") == no_run, "a file is no adapter"
    assert fix_for("runs/frist") == "did you mean runs/first?"
