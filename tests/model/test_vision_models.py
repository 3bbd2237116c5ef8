"""The text model inside a vision-language checkpoint, against Transformers' class of the whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

import vision_models
from errors import refuses
from ranks import run_ranks
from recipes import built_model, make_run
from tunesmith.adapter import lora
from tunesmith.checkpoint.contents import weights_of, write_model_files
from tunesmith.cli.main import main
from tunesmith.config.dump import dump
from tunesmith.config.schema import Model
from tunesmith.errors import ModelError, RecipeError
from tunesmith.inference.load_run import load_run
from tunesmith.model import load
from tunesmith.model.safetensors_files import Entry
from tunesmith.model.stored_form import in_stored_form, write_model_config
from tunesmith.model.weights import load_weights
from tunesmith.planning.resolve import checkpoint_bytes
from tunesmith.training.run import train

pytestmark = pytest.mark.slow

IDS = torch.randint(3, 100, (1, 24), generator=torch.Generator().manual_seed(1))


def read(folder: Path) -> PreTrainedModel:
    spec = Model(name=str(folder), dtype="fp32")
    config, entire = load.load_configs(folder, spec)
    model = load.build_on_meta(config, spec, full_config=entire)
    load.materialize(model, torch.device("cpu"))
    load_weights(model, folder)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def whole(folder: Path) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def stored(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= load_file(file)
    return tensors


def is_text(name: str) -> bool:
    return "language_model." in name or name.startswith("lm_head")


def check_rest_is_untouched(written: Path, base: Path) -> None:
    """The same names, and equal bytes of what is not of the text model, which has changed."""
    after = stored(written)
    before = stored(base)
    assert after.keys() == before.keys()
    assert any(not is_text(name) for name in before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) != is_text(name), name


@pytest.fixture(scope="module", params=sorted(vision_models.FAMILIES))
def folder(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return vision_models.build(request.param, tmp_path_factory.mktemp(request.param), tiny)


def test_logits_are_those_of_the_whole_model(folder: Path) -> None:
    text = read(folder)
    assert "ForCausalLM" in type(text).__name__
    assert torch.equal(logits(text), logits(whole(folder)))
    tied = text.get_input_embeddings().weight is text.get_output_embeddings().weight
    assert tied == text.config.tie_word_embeddings


def test_an_adapter_is_peft_s_on_the_whole_model(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    run = make_run(folder, tmp_path)
    model = built_model(run, folder)
    with torch.no_grad():
        for _, layer in lora.loras(model.model):
            nn.init.normal_(layer.lora_B, std=0.1)
    model.eval().use_inference_attention()
    write_model_files(tmp_path, run, model, {})
    expected = logits(model.model)
    theirs = PeftModel.from_pretrained(whole(folder), tmp_path)
    # The update is added in another order.
    torch.testing.assert_close(logits(theirs), expected, atol=2e-6, rtol=0)
    assert (expected - logits(whole(folder))).abs().max() > 1e-3
    again = load_run(tmp_path, device="cpu")
    assert torch.equal(logits(again.model), expected)


def test_a_model_trained_in_full_is_the_whole_model_again(folder: Path, tmp_path: Path) -> None:
    run = make_run(folder, tmp_path, adapter={"kind": "none"})
    model = built_model(run, folder)
    with torch.no_grad():
        for tensor in model.model.state_dict().values():
            tensor.add_(0.01)
    model.eval().use_inference_attention()
    written = tmp_path / "written"
    written.mkdir()
    write_model_files(written, run, model, {})
    check_rest_is_untouched(written, folder)
    assert torch.equal(logits(whole(written)), logits(model.model))
    assert torch.equal(logits(read(written)), logits(model.model))
    config = json.loads((written / "config.json").read_text())
    assert (
        config["vision_config"] == json.loads((folder / "config.json").read_text())["vision_config"]
    )
    assert (written / "preprocessor_config.json").is_file()


def test_a_checkpoint_counts_what_is_copied_into_it(folder: Path, tmp_path: Path) -> None:
    """As much as is written: of a model trained in full, and nothing of an adapter."""
    run = make_run(folder, tmp_path, adapter={"kind": "none"})
    model = built_model(run, folder).model
    written = in_stored_form(model, weights_of(model))
    copied = sum(source.size for source in written.values() if isinstance(source, Entry))
    assert copied > 0
    trained = sum(parameter.numel() for parameter in model.parameters())
    of_text, _ = checkpoint_bytes(run, trained, None)
    whole_model, _ = checkpoint_bytes(run, trained, folder)
    # Buffers of Gemma 4's layers, of 4 bytes each, are counted as copied.
    assert copied <= whole_model - of_text <= copied + 8
    lora_run = make_run(folder, tmp_path)
    assert checkpoint_bytes(lora_run, 10, folder) == checkpoint_bytes(lora_run, 10, None)


def test_a_plan_counts_them_where_the_weights_are_at_hand(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = vision_models.build("qwen3_5", tmp_path / "base", tiny)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(make_run(base, tmp_path, adapter={"kind": "none"})), encoding="utf-8")

    def planned() -> int:
        assert main(["plan", str(recipe), "--on", "h200", "--length", "64", "--json"]) == 0
        return int(json.loads(capsys.readouterr().out)["checkpoint_bytes"])

    with_tower = planned()
    rest = sum(t.numel() * t.element_size() for n, t in stored(base).items() if not is_text(n))
    for file in base.glob("*.safetensors"):
        file.unlink()
    assert with_tower - planned() == rest > 0


@pytest.mark.parametrize(
    ("model_type", "adapter"),
    [("qwen3_5_moe", {}), ("gemma3", {"modules_to_save": ["embed_tokens"]})],
    ids=["Qwen 3.5 MoE", "Gemma 3, whose head is not tied any more"],
)
def test_train_and_merge(
    model_type: str, adapter: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    merge = pytest.importorskip("tunesmith.tools.export.merge").merge
    base = vision_models.build(model_type, tmp_path / "base", tiny)
    changes = {"train": {"duration": "2 steps"}, "adapter": adapter}
    result = train(make_run(base, tmp_path, held=False, **changes), quiet=True)
    assert result.steps == 2
    done = merge(result.output_dir, tmp_path / "merged", device="cpu")
    assert done.merge_check.passed
    before, after = stored(base), stored(tmp_path / "merged")
    heads = {"language_model.lm_head.weight"} if adapter else set()
    assert after.keys() == before.keys() | heads
    for name, tensor in before.items():
        assert is_text(name) or torch.equal(after[name], tensor), name


def test_the_base_is_needed_to_write(tiny: Path, tmp_path: Path) -> None:
    base = vision_models.build("gemma3", tmp_path / "base", tiny)
    model = read(base)
    shutil.rmtree(base)
    with refuses(ModelError, where=str(base)):
        in_stored_form(model, weights_of(model))


def test_a_head_of_its_own_is_not_tied_by_default(tiny: Path, tmp_path: Path) -> None:
    """As in Mistral Small 3.1, whose config.json says nothing of it."""
    base = vision_models.build(
        "mistral3", tmp_path / "base", tiny, whole={"tie_word_embeddings": False}
    )
    config = json.loads((base / "config.json").read_text())
    del config["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(config))
    model = read(base)
    assert torch.equal(logits(model), logits(whole(base)))
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    write_model_config(model, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == {**config, "tie_word_embeddings": False}


def test_keys_of_layers_that_share_them_are_not_read(tiny: Path, tmp_path: Path) -> None:
    """Gemma 4's checkpoints hold them all the same; what is written does too."""
    types = ["sliding_attention", "full_attention"] * 2
    layers = {"num_hidden_layers": 4, "layer_types": types, "num_kv_shared_layers": 2}
    base = vision_models.build("gemma4", tmp_path, tiny, **layers)
    file = max(base.glob("model-*.safetensors"))
    name = "model.language_model.layers.3.self_attn.k_proj.weight"
    index = json.loads((base / "model.safetensors.index.json").read_text())
    assert name not in index["weight_map"]
    unread = torch.ones(32, 64)
    tensors = load_file(file) | {name: unread}
    file.unlink()
    save_file(tensors, file, {"format": "pt"})
    model = read(base)
    assert torch.equal(logits(model), logits(whole(base)))
    entry = in_stored_form(model, weights_of(model))[name]
    assert isinstance(entry, Entry)


def train_on_ranks(base: Path, folder: Path) -> list[float]:
    run = make_run(
        base, folder, held=False, adapter={"kind": "none"}, parallel={"shard": 2},
        train={"duration": "3 steps"}, checkpoint={"every": "2 steps"},
    )  # fmt: skip
    return [record.loss for record in train(run, quiet=True).records]


def test_two_ranks_write_experts_and_vision_tower(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each holds half of a stack of experts; `final/` and an export of their checkpoint are alike."""
    base = vision_models.build("qwen3_5_moe", tmp_path / "base", tiny)
    losses = run_ranks(2, train_on_ranks, base, tmp_path)
    assert losses[0] == losses[1]
    run = tmp_path / "run"
    check_rest_is_untouched(run / "final", base)
    assert main(["export", str(run / "checkpoint-3"), "--output", str(tmp_path / "out")]) == 0
    final = stored(run / "final")
    exported = stored(tmp_path / "out")
    assert exported.keys() == final.keys()
    assert all(torch.equal(exported[name], final[name]) for name in final)
    assert torch.equal(
        logits(whole(tmp_path / "out")), logits(load_run(run / "checkpoint-3").model)
    )

    one = train(make_run(base, tmp_path, held=False, adapter={"kind": "none"},
                         output_dir=str(tmp_path / "one"), train={"duration": "3 steps"}), quiet=True)  # fmt: skip
    assert [record.loss for record in one.records] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    ("model_type", "text", "words"),
    [
        ("qwen3_5", {}, "recurrent layers of this qwen3_5_text"),
        # Every fourth layer scales its queries by the position in the row.
        ("llama4", {"num_hidden_layers": 4}, "layers of this llama4_text"),
    ],
)
def test_eager_attention_is_refused_where_documents_would_leak(
    model_type: str, text: dict, words: str, tiny: Path, tmp_path: Path
) -> None:
    base = vision_models.build(model_type, tmp_path / "base", tiny, **text)
    run = make_run(base, tmp_path, model={"attention": "eager"})
    with refuses(RecipeError, where="model.attention", names=[words]):
        built_model(run, base)
