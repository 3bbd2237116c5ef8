"""Merged folders are PEFT's merge_and_unload; a merge that is wrong is rejected."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config

from errors import holds, refuses
from runs import make_run, peft_model
from tunesmith.errors import (
    EXIT_FAILED,
    EXIT_USAGE,
    CheckpointError,
    MachineError,
    TunesmithError,
    UsageError,
)
from tunesmith.formats.stored import StoredTensor
from tunesmith.inference.load_run import load_run
from tunesmith.tools.export import merge as room
from tunesmith.tools.export import merge_check, tuned_weights
from tunesmith.tools.export.merge import merge
from tunesmith.tools.export.merge_check import Difference, ExactCheck, MergeCheck
from tunesmith.tools.export.tuned_weights import LoraUpdate


@pytest.fixture(scope="module")
def base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with `rope_theta` at the top of its config, as on the Hub."""
    base = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("merge") / "base"))
    config = json.loads((base / "config.json").read_text())
    del config["rope_parameters"]
    (base / "config.json").write_text(json.dumps(config | {"rope_theta": 100000.0}))
    return base


@pytest.fixture(scope="module")
def plain_run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    make_run(folder / "run", base, peft_model(base))
    return folder / "run"


@pytest.fixture
def run(plain_run: Path, tmp_path: Path) -> Path:
    """A copy of a run, which a test may change."""
    return Path(shutil.copytree(plain_run, tmp_path / "run"))


def leftovers(folder: Path) -> list[str]:
    return [
        p.name
        for p in folder.iterdir()
        if p.name.startswith(".") or p.name.endswith((".part", ".old"))
    ]


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
    assert holds(check.probes, 6)
    assert (done.dtype, check.exact) == ("fp32", None)
    assert leftovers(tmp_path) == []

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    ids = tokenizer("hello", return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > ids["input_ids"].shape[1]
    assert load_run(out, device="cpu").location.holds == "base"
    read = {name: json.loads((out / f"{name}.json").read_text()) for name in
            ("config", "generation_config", "tokenizer_config")}  # fmt: skip
    assert read["generation_config"]["eos_token_id"] == [tokenizer.eos_token_id]
    assert read["tokenizer_config"]["tokenizer_class"] == "PreTrainedTokenizerFast"
    config = read["config"]
    assert (config["rope_theta"], config["rope_scaling"]) == (100000.0, None)
    assert (config["torch_dtype"], config["rope_parameters"]["rope_theta"]) == ("float32", 100000.0)
    card = (out / "README.md").read_text()
    assert "license" in card
    assert str(base.parent) not in card


@pytest.mark.slow
def test_gemma_2_whose_attention_scores_are_capped(tiny: Path, tmp_path: Path) -> None:
    """sdpa computes no softcap: this family answers and merges with eager attention."""
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    sizes = json.loads((base / "config.json").read_text())
    kept = "vocab_size hidden_size intermediate_size bos_token_id eos_token_id pad_token_id"
    values = {name: sizes[name] for name in kept.split()}
    values |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    torch.manual_seed(0)
    config = Gemma2Config(**values, num_hidden_layers=2, query_pre_attn_scalar=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    make_run(tmp_path / "run", base, peft_model(base))
    assert merge(tmp_path / "run", tmp_path / "out", device="cpu").merge_check.passed


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.nightly)])
def test_sixteen_bits_are_proven_in_fp32_too_and_no_weight_is_in_memory_whole(
    dtype, run, tmp_path, monkeypatch
):
    """A band holds a few rows here, so that each matrix is read, changed and multiplied in many."""
    monkeypatch.setattr(tuned_weights, "BAND", 4 * 64 * 4)
    largest = []
    read = StoredTensor.__getitem__

    def measured(self: StoredTensor, slices: tuple[slice, ...]) -> torch.Tensor:
        part = read(self, slices)
        largest.append(part.numel() * 4)
        return part

    monkeypatch.setattr(StoredTensor, "__getitem__", measured)
    check = merge(run, tmp_path / "out", dtype=dtype, device="cpu").merge_check
    # A of rank 8 beside a layer of 128 inputs.
    assert max(largest) <= 8 * 128 * 4
    assert check.passed
    assert check.exact is not None
    assert check.exact.difference.max_logit <= 1e-4
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    count = sum(parameter.numel() for parameter in saved.parameters())
    assert (check.exact.off, check.exact.values, len(check.rules)) == (0, count, 3)
    assert saved.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    # The files too: config.json alone says what Transformers loads.
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {saved.dtype}


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter",
    [
        {"modules_to_save": ["embed_tokens"], "target": ["q_proj"]},
        {"target": ["q_proj", "lm_head"]},
    ],
    ids=["an embedding trained in full", "an adapted head"],
)
def test_what_unties_the_head_is_merged_as_peft_does(adapter, tiny, tmp_path):
    """Embedding and head are no longer one matrix: both are written."""
    options = {"target_modules" if k == "target" else k: v for k, v in adapter.items()}
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
    assert holds(done.note, "bf16")
    assert done.merge_check.exact is not None
    assert done.merge_check.passed
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    modules = tuned.base_model.model.named_modules()
    update = {
        n: m.get_delta_weight("default") for n, m in modules if "proj" in n.rpartition(".")[2]
    }
    stored = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).state_dict()
    for name, weight in stored.items():
        layer, expected = name.removesuffix(".weight"), weight
        if layer in update:
            options = {"quant_type": "nf4", "compress_statistics": True}
            packed, state = functional.quantize_4bit(weight, **options)
            expected = functional.dequantize_4bit(packed, state).float() + update[layer]
        # One unit in the last place of bf16: PEFT may sum B A in another order before the rounding.
        torch.testing.assert_close(
            found[name].float(), expected.detach().float(), rtol=2**-8, atol=1e-6
        )


def _left_out(update: LoraUpdate, first: int, last: int) -> torch.Tensor:
    return torch.zeros(last - first, update.lora_A.shape[1])


@pytest.mark.slow
def test_a_weak_adapter_left_out_is_rejected_in_bf16(tiny, tmp_path, monkeypatch):
    """What it taught drowns in the noise of bf16, so that only the comparison in fp32 can tell."""
    make_run(tmp_path / "weak", tiny, peft_model(tiny, std=0.002))
    monkeypatch.setattr(LoraUpdate, "rows", _left_out)
    with refuses(CheckpointError, where="out.rejected", names=["fp32"]) as caught:
        merge(tmp_path / "weak", tmp_path / "out", dtype="bf16", device="cpu")
    assert not holds(caught.value.why, "bf16")
    assert caught.value.exit_code == EXIT_FAILED
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.rejected" / "config.json").is_file()
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_force_replaces_an_earlier_merge_once_the_check_is_passed(run, tmp_path, monkeypatch):
    out, link = tmp_path / "out", tmp_path / "link"
    link.symlink_to(out)
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
    merge(run, link, force=True, device="cpu")
    assert (out / "model.safetensors").stat().st_ino != before
    assert link.is_symlink()
    assert leftovers(tmp_path) == []


def _a_run(run: Path, merged: Path) -> Path:
    return Path(shutil.copytree(run, run.parent / "other")) / "final"


def _own_file(run: Path, merged: Path) -> Path:
    (merged / "scores.txt").write_text("precious")
    return merged


def _not_rejected_by_us(run: Path, merged: Path) -> Path:
    (run.parent / "new.rejected").mkdir()
    (run.parent / "new.rejected" / "mine").write_text("precious")
    return run.parent / "new"


@pytest.fixture(scope="module")
def merged_folder(plain_run: Path) -> Path:
    merge(plain_run, plain_run.parent / "out", device="cpu")
    return plain_run.parent / "out"


@pytest.mark.slow
@pytest.mark.parametrize("make", [_a_run, _own_file, _not_rejected_by_us])
def test_force_replaces_nothing_that_no_merge_wrote(run, merged_folder, make):
    output = make(run, Path(shutil.copytree(merged_folder, run.parent / "out")))
    before = {p: p.read_bytes() for p in run.parent.rglob("*") if p.is_file()}
    with refuses(UsageError, where="--output", names=["--force"]):
        merge(run, output, force=True, device="cpu")
    assert {p: p.read_bytes() for p in run.parent.rglob("*") if p.is_file()} == before


def _plain_model(run: Path, base: Path) -> Path:
    return base


def _full_fine_tune(run: Path, base: Path) -> Path:
    make_run(run.parent / "full", base, AutoModelForCausalLM.from_pretrained(base))
    return run.parent / "full"


def _lost_base(run: Path, base: Path) -> Path:
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(base), "/nowhere/model"))
    return run


def _dora(run: Path, base: Path) -> Path:
    ignored = shutil.ignore_patterns("manifest.json")
    adapter = Path(shutil.copytree(run / "final", run.parent / "adapter", ignore=ignored))
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    return adapter


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (_plain_model, "base"),
        (_full_fine_tune, "full/final"),
        (_lost_base, "/nowhere/model"),
        (_dora, "use_dora"),
    ],
)
def test_what_cannot_be_merged_is_refused(run, base, make, value):
    source = make(run, base)
    before = sorted(p for p in run.parent.rglob("*") if p.is_file())
    with pytest.raises(TunesmithError) as caught:
        merge(source, run.parent / "out", device="cpu")
    assert caught.value.exit_code == EXIT_USAGE
    assert value in caught.value.text()
    assert sorted(p for p in run.parent.rglob("*") if p.is_file()) == before


def test_no_room_on_the_disk_is_found_before_writing(run, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(room, "save_sharded", lambda *a, **k: pytest.fail("written"))
    with refuses(MachineError, cause="disk") as caught:
        merge(run, tmp_path / "out", device="cpu")
    assert caught.value.exit_code == EXIT_USAGE


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
        ("bf16", LARGE, LARGE, 20.0, GOOD, False),  # the base's answers
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
