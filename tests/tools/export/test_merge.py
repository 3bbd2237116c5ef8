"""Merged folders are PEFT's merge_and_unload; a merge that is wrong is rejected."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import recipes
import tunesmith
from errors import refuses
from export.tiny_gguf import word_tokenizer
from runs import make_run, peft_model
from tunesmith.answers.load_run import load_run, locate_run, read_run_files
from tunesmith.errors import EXIT_FAILED, EXIT_USAGE, CheckpointError, TunesmithError, UsageError
from tunesmith.formats.stored import StoredTensor
from tunesmith.model.measuring.tiny_model import build_tiny_model
from tunesmith.rows.samples import Completion
from tunesmith.tools.export import merge_check, tuned_weights
from tunesmith.tools.export.merge import merge
from tunesmith.tools.export.merge_check import Difference, ExactCheck, MergeCheck
from tunesmith.tools.export.streamed_model import streamed_logits
from tunesmith.tools.export.tuned_weights import LoraUpdate, open_tuned_model


@pytest.fixture(scope="module")
def base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with `rope_theta` at the top of its config, as on the Hub."""
    base = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("merge") / "base"))
    config = json.loads((base / "config.json").read_text())
    del config["rope_parameters"]
    (base / "config.json").write_text(json.dumps(config | {"rope_theta": 100000.0}))
    return base


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    make_run(tmp_path / "run", base, peft_model(base))
    return tmp_path / "run"


def leftovers(folder: Path) -> list[str]:
    names = [path.name for path in folder.iterdir()]
    return [name for name in names if name.startswith(".") or name.endswith((".part", ".old"))]


@pytest.mark.slow
def test_the_merged_folder_has_the_weights_of_peft_and_stands_alone(run, base, tmp_path):
    """Transformers 4.57 takes a theta of 10000 without `rope_theta`, and has no TokenizersBackend."""
    out = tmp_path / "out"
    done = merge(run, out, device="cpu")
    expected = peft_model(base).merge_and_unload().state_dict()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.state_dict().keys() == expected.keys()
    for name, weight in expected.items():  # one fp32 rounding of a weight below 1
        torch.testing.assert_close(model.state_dict()[name], weight, atol=1e-6, rtol=0)
    check = done.merge_check
    assert check.passed
    assert check.merged.max_logit <= 1e-4 < 0.01 < check.base.max_logit
    assert (done.dtype, check.exact) == ("fp32", None)
    assert leftovers(tmp_path) == []

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert load_run(out, device="cpu").location.holds == "base"
    config, generation, of_tokenizer = (
        json.loads((out / f"{name}.json").read_text())
        for name in ("config", "generation_config", "tokenizer_config")
    )
    assert generation["eos_token_id"] == [tokenizer.eos_token_id]
    assert of_tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (config["rope_theta"], config["rope_scaling"]) == (100000.0, None)
    assert (config["torch_dtype"], config["rope_parameters"]["rope_theta"]) == ("float32", 100000.0)
    assert str(base.parent) not in (out / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.nightly)])
def test_sixteen_bits_are_proven_in_fp32_too_and_no_weight_is_in_memory_whole(
    dtype, run, tmp_path, monkeypatch
):
    """A band holds a few rows here, so that each matrix is read, changed and multiplied in many."""
    monkeypatch.setattr(tuned_weights, "BAND", 4 * 64 * 4)
    largest, read = [], StoredTensor.__getitem__

    def measured(self: StoredTensor, slices: tuple[slice, ...]) -> torch.Tensor:
        part = read(self, slices)
        largest.append(part.numel() * 4)
        return part

    monkeypatch.setattr(StoredTensor, "__getitem__", measured)
    check = merge(run, tmp_path / "out", dtype=dtype, device="cpu").merge_check
    # A of rank 8 beside a layer of 128 inputs.
    assert max(largest) <= 8 * 128 * 4
    assert check.passed
    assert (check.exact.off, check.exact.difference.max_logit <= 1e-4) == (0, True)
    # The files too: config.json alone says what Transformers loads.
    stored = load_file(tmp_path / "out" / "model.safetensors")
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {tensor.dtype for tensor in stored.values()} == {expected}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "in_full"), [(["q_proj"], ["embed_tokens"]), (["q_proj", "lm_head"], [])]
)
def test_what_unties_the_head_is_merged_as_peft_does(target, in_full, tiny, tmp_path):
    """Embedding and head are no longer one matrix: both are written."""
    options = {"target_modules": target, "modules_to_save": in_full or None}
    adapter = {"target": target, "modules_to_save": in_full}
    make_run(tmp_path / "run", tiny, peft_model(tiny, **options), adapter=adapter)
    ids = torch.tensor([[1, 2, 3, 99]])
    assert merge(tmp_path / "run", tmp_path / "out", device="cpu").merge_check.passed
    with torch.no_grad():
        expected = peft_model(tiny, **options)(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_4_bit_base_is_merged_dequantized(tiny: Path, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    tuned = peft_model(tiny)
    make_run(tmp_path / "run", tiny, tuned, model={"quantize": "nf4", "dtype": "bf16"})
    done = merge(tmp_path / "run", tmp_path / "out", device="cpu")
    assert done.merge_check.passed
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    layers = dict(tuned.base_model.model.named_modules())
    stored = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).state_dict()
    for name, weight in stored.items():
        expected = weight.float()
        if "_proj" in name:
            options = {"quant_type": "nf4", "compress_statistics": True}
            packed, state = functional.quantize_4bit(weight, **options)
            update = layers[name.removesuffix(".weight")].get_delta_weight("default").detach()
            expected = functional.dequantize_4bit(packed, state).float() + update
        # One unit in the last place of bf16: PEFT may sum B A in another order before the rounding.
        torch.testing.assert_close(found[name].float(), expected, rtol=2**-8, atol=1e-6)


def _left_out(update: LoraUpdate, first: int, last: int) -> torch.Tensor:
    return torch.zeros(last - first, update.lora_A.shape[1])


@pytest.mark.slow
def test_a_weak_adapter_left_out_is_rejected_in_bf16(tiny, tmp_path, monkeypatch):
    """What it taught drowns in the noise of bf16, so that only the comparison in fp32 can tell."""
    make_run(tmp_path / "weak", tiny, peft_model(tiny, std=0.002))
    monkeypatch.setattr(LoraUpdate, "rows", _left_out)
    with refuses(CheckpointError, where="out.rejected", names=["fp32"]) as caught:
        merge(tmp_path / "weak", tmp_path / "out", dtype="bf16", device="cpu")
    assert caught.value.exit_code == EXIT_FAILED
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.rejected" / "config.json").is_file()
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_force_replaces_an_earlier_merge_once_the_check_is_passed(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    merge(run, out, device="cpu")
    before = (out / "model.safetensors").stat().st_ino
    # As a kill leaves it between the renames of a merge that replaces it.
    out.rename(tmp_path / ".out.old")
    with refuses(UsageError, names=[out], fix=["--force"]):
        merge(run, out, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(LoraUpdate, "rows", _left_out)
        for _ in range(2):  # the second one replaces what the first one rejected
            with refuses(CheckpointError, where="out.rejected"):
                merge(run, out, force=True, device="cpu")
    assert (out / "model.safetensors").stat().st_ino == before
    merge(run, out, force=True, device="cpu")
    assert (out / "model.safetensors").stat().st_ino != before
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_force_replaces_nothing_that_no_merge_wrote(run, tmp_path):
    merge(run, tmp_path / "merged", device="cpu")
    (tmp_path / "merged" / "scores.txt").write_text("precious")
    (tmp_path / "new.rejected").mkdir()
    (tmp_path / "new.rejected" / "mine").write_text("precious")
    other = Path(shutil.copytree(run, tmp_path / "other"))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for output in (other / "final", tmp_path / "merged", tmp_path / "new"):
        with refuses(UsageError, where="--output", names=["--force"]):
            merge(run, output, force=True, device="cpu")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_what_cannot_be_merged_is_refused(run, base, tmp_path):
    full, dora = tmp_path / "full", tmp_path / "dora"
    make_run(full, base, AutoModelForCausalLM.from_pretrained(base))
    shutil.copytree(run / "final", dora, ignore=shutil.ignore_patterns("manifest.json"))
    file = dora / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(base), "/nowhere/model"))
    sources = ((base, "base"), (full, "full/final"), (run, "/nowhere/model"), (dora, "use_dora"))
    for source, value in sources:
        with pytest.raises(TunesmithError) as caught:
            merge(source, tmp_path / "out", device="cpu")
        assert caught.value.exit_code == EXIT_USAGE
        assert value in caught.value.text()
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == []


def difference(max_logit: float, kl: float, agreement: float = 1.0) -> Difference:
    return Difference(max_logit, kl, agreement, kl)


SMALL, LARGE = difference(0.01, 1e-6), difference(5.0, 0.5, 0.3)
GOOD = ExactCheck(difference(5e-5, 0.0), 10.0, 3, 100, 0)


@pytest.mark.parametrize(
    ("dtype", "merged", "base", "largest", "exact", "passed"),
    [
        ("fp32", difference(9e-5, 0.0), LARGE, 5.0, None, True),
        ("fp32", difference(1.1e-4, 0.0), LARGE, 5.0, None, False),
        ("fp32", difference(1.9e-4, 0.0), LARGE, 20.0, None, True),  # logits twice as large
        ("bf16", difference(2.0, 0.04, 0.9), LARGE, 20.0, GOOD, True),  # a tenth of what was taught
        ("bf16", difference(2.0, 0.06, 0.9), LARGE, 20.0, GOOD, False),
        ("bf16", difference(2.0, 0.04, 0.9), LARGE, 20.0, replace(GOOD, off=1), False),
        ("bf16", difference(0.1, 9e-5), SMALL, 20.0, GOOD, True),  # below the floor
    ],
)
def test_the_rules_of_the_check(dtype, merged, base, largest, exact, passed):
    check = MergeCheck(dtype, merged, base, SMALL, largest, 48, "6 rows", exact)
    assert replace(check, rules=merge_check.merge_rules(check)).passed is passed


def test_differences_against_the_formula() -> None:
    p, q = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.5]])
    found = merge_check.compare_logits([p[:1], p[1:]], [q[:1], q[1:]])
    logs = q.log_softmax(-1), p.log_softmax(-1)
    kl = torch.nn.functional.kl_div(*logs, log_target=True, reduction="batchmean")
    assert (found.max_logit, found.agreement) == (1.0, 0.5)
    assert found.mean_kl == pytest.approx(kl.item(), rel=1e-6)
    with refuses(CheckpointError, names=["NaN"]):
        merge_check.compare_logits([p], [p * float("nan")])


# Of the largest logit: sums in another order.
TOLERANCE = 1e-5


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits


@pytest.mark.slow
def test_the_adapter_in_peft_and_the_merge_in_transformers_are_the_run(trained, tiny, tmp_path):
    pairs = recipes.write_pairs(tmp_path / "pairs.jsonl", 16)
    run = recipes.make_run(
        tiny,
        tmp_path,
        held=False,
        method="dpo",
        adapter={"from": str(trained / "final")},
        data={"train": {"source": str(pairs), "format": "preference"}},
        train={"learning_rate": 1e-2, "warmup": "0 steps", "duration": "4 steps"},
    )
    tunesmith.train(run)
    loaded = tunesmith.load_run(tmp_path / "run")
    tunesmith.merge(tmp_path / "run", tmp_path / "merged")

    def in_peft(final: Path) -> Any:
        base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        return PeftModel.from_pretrained(base, final).eval()

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    others = {"PEFT": in_peft(tmp_path / "run" / "final"), "merged": merged}
    after_sft = in_peft(trained / "final")
    for word in ("amber", "fjord"):
        ids = list(loaded.template.prompt(Completion(f"Say {word}: ", "?")))
        ours = logits(loaded.model, ids)
        largest = float(ours.abs().max())
        # What DPO changed is far above the tolerance.
        assert (ours - logits(after_sft, ids)).abs().max() > 1e3 * TOLERANCE * largest
        for name, model in others.items():
            assert (logits(model, ids) - ours).abs().max() < TOLERANCE * largest, name


PROMPTS = [[7, 3, 50, 12, 12, 9, 41, 2, 30], [11, 5, 28]]


# An embedding of positions, no linear layers, a norm outside of the layers, parameters of a layer
# that has linear ones inside
OTHERS = ("opt", "gpt2", "bloom", "mamba2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type",
    [
        "gemma3_text",  # an embedding with a scale
        "mixtral",  # experts in stacks
        "deepseek_v3",  # a buffer that is stored
        *(pytest.param(name, marks=pytest.mark.nightly) for name in OTHERS),
    ],
)
def test_every_kind_of_module_reads_its_weights(model_type, tmp_path, monkeypatch):
    from transformers import CONFIG_MAPPING

    build_tiny_model(CONFIG_MAPPING[model_type]()).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(tuned_weights, "BAND", 1000)
    tuned = open_tuned_model(read_run_files(locate_run(tmp_path)))
    given = {"values": "merged", "dtype": torch.float32, "device": torch.device("cpu")}
    streamed = streamed_logits(tuned, PROMPTS, **given)
    positions = [[8, 2], [1]]
    some = streamed_logits(tuned, PROMPTS, **given, positions=positions)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for prompt, places, found, there in zip(PROMPTS, positions, streamed, some, strict=True):
        expected = logits(model, prompt)[0]
        # Sums in another order: a row that is filled up, and bands of a matrix.
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (there - found[places]).abs().max() <= 1e-5 * found[places].abs().max()
