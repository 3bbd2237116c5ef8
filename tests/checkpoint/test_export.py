"""What is written for others: a trained model as Transformers and PEFT load it."""

from __future__ import annotations

import ctypes
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
)

from ranks import run_ranks
from recipes import built_model, make_run
from tunesmith.checkpoint.contents import tokenizer_files, write_checkpoint, write_model_files
from tunesmith.checkpoint.resume import Progress
from tunesmith.config.schema import MethodConfig, Run
from tunesmith.methods import make_method
from tunesmith.model.arch.tokenizer import eos_ids
from tunesmith.model.weights.save_tensors import MAX_PIECE_BYTES
from tunesmith.tokens.text.select_template import select_template
from tunesmith.train_model import TrainModel

pytestmark = pytest.mark.slow

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="the tensors lie on a CUDA GPU"),
]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def written_by(run: Run, base: Path, model: TrainModel, folder: Path) -> Path:
    """The folder with the model's files, and the template that ends its answers."""
    folder.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(base)
    template = select_template(run.data, tokenizer, eos_ids(base, tokenizer))
    write_model_files(folder, run, model, tokenizer_files(tokenizer, template, base))
    return folder


@pytest.mark.parametrize("stored", [EMBEDDING, HEAD])
def test_a_tied_model_is_written_under_the_name_of_its_embedding(stored, tiny, tmp_path):
    """Transformers 4.57 leaves the embedding of a tied model on meta when the files hold the head
    alone, and takes a `rope_theta` of 10000 without that at the top of config.json.
    """
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    original = load_file(base / "model.safetensors")
    tensors = {stored if name == EMBEDDING else name: value for name, value in original.items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    rope = config.pop("rope_parameters") | {"rope_theta": 100000.0}
    of_hub = {"rope_theta": 100000.0, "rope_scaling": None}
    config |= of_hub if stored == HEAD else {"rope_parameters": rope}
    (base / "config.json").write_text(json.dumps(config))
    run = make_run(base, tmp_path, adapter={"kind": "none"})
    model = built_model(run, base)
    with torch.no_grad():
        model.model.get_input_embeddings().weight.add_(1.0)
    written = written_by(run, base, model, tmp_path / "written")

    found = load_file(written / "model.safetensors")
    assert found.keys() == original.keys(), "the names of save_pretrained, which wrote the base"
    assert torch.equal(found[EMBEDDING], original[EMBEDDING] + 1.0)
    loaded, told = AutoModelForCausalLM.from_pretrained(
        written, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = torch.arange(20)[None]
    with torch.no_grad():
        model.model.set_attn_implementation("sdpa")
        expected = model.model.eval()(ids).logits
        assert torch.allclose(loaded(ids).logits, expected, atol=1e-5)

    values = json.loads((written / "config.json").read_text())
    assert {name: values[name] for name in of_hub} == of_hub
    assert values["torch_dtype"] == "float32"
    assert AutoConfig.from_pretrained(written).rope_parameters == model.model.config.rope_parameters


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_what_is_written_stops_at_each_end_of_an_answer(kind, tiny, tmp_path):
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    other_end = tokenizer.eos_token_id + 1
    stated = {"eos_token_id": [other_end], "temperature": 0.6, "do_sample": True}
    (base / "generation_config.json").write_text(json.dumps(stated))
    run = make_run(base, tmp_path, adapter={"kind": kind})
    written = written_by(run, base, built_model(run, base), tmp_path / "written")
    settings = GenerationConfig.from_pretrained(written)
    ends = select_template(run.data, tokenizer, eos_ids(base, tokenizer)).end_ids
    assert set(settings.eos_token_id) == set(ends) >= {other_end, tokenizer.eos_token_id}
    assert (settings.temperature, settings.do_sample) == (0.6, True)
    assert settings.pad_token_id == tokenizer.pad_token_id


def test_a_large_model_is_written_in_several_files(tiny, tmp_path, monkeypatch):
    from huggingface_hub import save_torch_state_dict

    monkeypatch.setattr("tunesmith.model.weights.save_tensors.MAX_FILE_SIZE", "50KB")
    monkeypatch.setattr("tunesmith.model.weights.save_tensors.MAX_PIECE_BYTES", 1000)
    run = make_run(tiny, tmp_path, adapter={"kind": "none"})
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    model = built_model(run, tiny)
    for folder in (ours, theirs):
        folder.mkdir()
    write_model_files(ours, run, model, {})
    state = model.model.state_dict()
    save_torch_state_dict(state, theirs, max_shard_size="50KB", shared_tensors_to_discard=[HEAD])
    assert len(list(ours.glob("*.safetensors"))) > 3
    for file in theirs.glob("*.safetensors"):
        assert (ours / file.name).read_bytes() == file.read_bytes()
    index = "model.safetensors.index.json"
    known, found = (json.loads((folder / index).read_text()) for folder in (theirs, ours))
    assert found["weight_map"] == known["weight_map"]
    loaded = AutoModelForCausalLM.from_pretrained(ours, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in state.items())


def status(key: str) -> int:
    return next(
        int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key)
    )


def write_large(folder: Path, device: str) -> tuple[int, int, int, int]:
    """Bytes that a full checkpoint took of memory, of the model, its largest tensor, and written."""

    def elsewhere(meta: torch.Tensor) -> torch.Tensor:
        # On a CPU nothing is in memory until somebody makes the tensor contiguous.
        if device == "cpu":
            return torch.full((1,) * meta.dim(), 0.5).expand(meta.shape)
        return torch.randn(meta.shape, device=device)

    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 5}
    config = LlamaConfig(**shape, vocab_size=8000, num_attention_heads=8)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for name, meta in list(model.named_parameters()):
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, torch.nn.Parameter(elsewhere(meta)))
    sizes = [p.nbytes for p in model.parameters()]
    state = ("exp_avg", "exp_avg_sq", "master")
    optimizer = {f"{n}.{k}": elsewhere(p) for n, p in model.named_parameters() for k in state}
    run = make_run(folder, folder, adapter={"kind": "none"})
    root = TrainModel(model, make_method(MethodConfig()), attention_backend="batched_matmul")
    out = folder / "checkpoint"
    out.mkdir()
    ctypes.CDLL(None).malloc_trim(0)  # free blocks would hide as much of what is taken next
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    write_checkpoint(run, root, {}, optimizer, Progress(), out)
    written = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    return status("VmHWM") - before, sum(sizes), max(sizes), written


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from /proc"
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_the_host_holds_one_tensor_of_a_full_checkpoint(device: str, tmp_path: Path) -> None:
    """A full checkpoint of 3B has 48 GiB, which the host of a GPU may not have free."""
    on_gpu = device == "cuda"
    ((peak, size, largest, written),) = run_ranks(1, write_large, tmp_path, device, spawns=on_gpu)
    assert size > 100 << 20
    assert written > 4 * size
    # One tensor made contiguous, or one piece that came from the GPU; the rest is code that is
    # imported meanwhile.
    assert peak < max(largest, MAX_PIECE_BYTES) + (24 << 20)
