"""Merged folders against PEFT's merge_and_unload; and that the check can fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

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

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> Path:
    make_run(tmp_path / "run", tiny, peft_model(tiny))
    return tmp_path / "run"


def leftovers(folder: Path) -> list[str]:
    return [
        p.name
        for p in folder.iterdir()
        if p.name.startswith(".") or p.name.endswith((".part", ".old"))
    ]


def test_merged_weights_are_those_of_peft(run: Path, tiny: Path, tmp_path: Path) -> None:
    done = merge(run, tmp_path / "out", device="cpu")
    expected = peft_model(tiny).merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():  # one fp32 rounding of a weight below 1
        torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=0)
    assert done.merge_check.passed
    assert done.merge_check.merged.max_logit <= 1e-4
    assert done.merge_check.base.max_logit > 0.01
    assert holds(done.merge_check.probes, 6)
    assert (done.dtype, done.merge_check.exact) == ("fp32", None)
    assert leftovers(tmp_path) == []


def test_the_folder_stands_alone(run: Path, tiny: Path, tmp_path: Path) -> None:
    """Tokenizer, template, end tokens and a card lie in it, and Transformers generates from it."""
    merge(run, tmp_path / "out", device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny).chat_template
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [tokenizer.eos_token_id]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license" in card
    assert str(tiny.parent) not in card
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = tokenizer("hello", return_tensors="pt")
    assert (
        model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1]
        > ids["input_ids"].shape[1]
    )
    assert load_run(tmp_path / "out", device="cpu").location.holds == "base"


def test_the_keys_that_older_readers_need(tiny: Path, tmp_path: Path) -> None:
    """Without `rope_theta` at the top Transformers 4.57 takes 10000; it has no class
    TokenizersBackend.
    """
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    del config["rope_parameters"]
    (base / "config.json").write_text(json.dumps(config | {"rope_theta": 100000.0}))
    make_run(tmp_path / "run", base, peft_model(base))
    merge(tmp_path / "run", tmp_path / "out", device="cpu")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["rope_theta"], values["rope_scaling"], values["torch_dtype"]) == (
        100000.0,
        None,
        "float32",
    )
    assert values["rope_parameters"]["rope_theta"] == 100000.0
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gemma_2_whose_attention_scores_are_capped(dtype: Any, tiny: Path, tmp_path: Path) -> None:
    """sdpa computes no softcap: Transformers refuses it for this family, which answers and merges
    with eager attention.
    """
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    sizes = json.loads((base / "config.json").read_text())
    values = {
        name: sizes[name]
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    }
    heads = {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
    }
    ids = {name: sizes[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Gemma2Config(**values, **heads, **ids)).save_pretrained(base)
    make_run(tmp_path / "run", base, peft_model(base))
    assert merge(tmp_path / "run", tmp_path / "out", dtype=dtype, device="cpu").merge_check.passed


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bits_are_proven_in_fp32_too(run: Path, tmp_path: Path, dtype: Any) -> None:
    done = merge(run, tmp_path / "out", dtype=dtype, device="cpu")
    exact = done.merge_check.exact
    assert exact is not None
    assert exact.difference.max_logit <= 1e-4
    assert (exact.off, exact.values) == (
        0,
        sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters()),
    )
    assert len(done.merge_check.rules) == 3
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert saved.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    # The files too: config.json alone says what Transformers loads.
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {saved.dtype}


def test_no_weight_is_in_memory_whole(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A band holds two rows here, so that each matrix is read, changed and multiplied in many."""
    width = 64 * 4
    monkeypatch.setattr(tuned_weights, "BAND", 2 * width)
    largest = []
    read = StoredTensor.__getitem__

    def measured(self: StoredTensor, slices: tuple[slice, ...]) -> torch.Tensor:
        part = read(self, slices)
        largest.append(part.numel() * 4)
        return part

    monkeypatch.setattr(StoredTensor, "__getitem__", measured)
    assert merge(run, tmp_path / "out", dtype="bf16", device="cpu").merge_check.passed
    # A of rank 8 beside a layer of 128 inputs
    assert max(largest) <= 8 * 128 * 4


@pytest.mark.parametrize(
    ("options", "adapter"),
    [
        ({"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]}, {"modules_to_save": ["embed_tokens"], "target": ["q_proj"]}),
        ({"target_modules": ["q_proj", "lm_head"]}, {"target": ["q_proj", "lm_head"]}),
    ],
    ids=["an embedding trained in full", "an adapted head"],
)  # fmt: skip
def test_what_unties_the_head_is_merged_as_peft_does(
    tiny: Path, tmp_path: Path, options: dict[str, Any], adapter: dict[str, Any]
) -> None:
    """Embedding and head are no longer one matrix: both are written."""
    make_run(tmp_path / "run", tiny, peft_model(tiny, **options), adapter=adapter)
    ids = torch.tensor([[1, 2, 3, 99]])
    done = merge(tmp_path / "run", tmp_path / "out", device="cpu")
    with torch.no_grad():
        expected = peft_model(tiny, **options)(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert done.merge_check.passed


def test_a_4_bit_base_is_merged_dequantised(tiny: Path, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    make_run(tmp_path / "run", tiny, peft_model(tiny), model={"quantize": "nf4", "dtype": "bf16"})
    done = merge(tmp_path / "run", tmp_path / "out", device="cpu")
    assert "dequantized bf16" in done.note
    assert done.merge_check.exact is not None
    assert done.merge_check.passed
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    update = {
        n: m.get_delta_weight("default")
        for n, m in peft_model(tiny).base_model.model.named_modules()
        if "proj" in n.split(".")[-1]
    }
    stored = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).state_dict()
    for name, weight in stored.items():
        expected = weight
        if name.removesuffix(".weight") in update:
            packed, state = functional.quantize_4bit(
                weight, quant_type="nf4", compress_statistics=True
            )
            dense = functional.dequantize_4bit(packed, state).float()
            expected = dense + update[name.removesuffix(".weight")]
        # One unit in the last place of bf16: PEFT may sum B A in another order before the rounding.
        torch.testing.assert_close(
            found[name].float(), expected.detach().float(), rtol=2**-8, atol=1e-6
        )


def _left_out(update: LoraUpdate, first: int, last: int) -> torch.Tensor:
    return torch.zeros(last - first, update.lora_A.shape[1])


def _twice(update: LoraUpdate, first: int, last: int) -> torch.Tensor:
    return 2 * update.scaling * (update.lora_B.read() @ update.lora_A.read())[first:last]


@pytest.mark.parametrize("wrong", [_left_out, _twice])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_merge_is_rejected(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: Any,
    wrong: Callable[..., torch.Tensor],
) -> None:
    monkeypatch.setattr(LoraUpdate, "rows", wrong)
    with refuses(CheckpointError, where="out.rejected") as caught:
        merge(run, tmp_path / "out", dtype=dtype, device="cpu")
    assert caught.value.exit_code == EXIT_FAILED
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.rejected" / "config.json").is_file()
    assert leftovers(tmp_path) == []


def test_a_weak_adapter_left_out_is_rejected_in_bf16(
    run: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it taught drowns in the noise of bf16, so that only the comparison in fp32 can tell."""
    weak = peft_model(tiny)
    for name, weight in weak.named_parameters():
        if "lora_B" in name:
            weight.data *= 0.02
    make_run(tmp_path / "weak", tiny, weak)
    monkeypatch.setattr(LoraUpdate, "rows", _left_out)
    with refuses(CheckpointError, where="out.rejected") as caught:
        merge(tmp_path / "weak", tmp_path / "out", dtype="bf16", device="cpu")
    assert "in bf16" not in caught.value.why
    assert "in fp32" in caught.value.why


def test_a_failed_write_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "write_merged", full)
    with refuses(CheckpointError, cause="disk") as caught:
        merge(run, tmp_path / "out", device="cpu")
    assert caught.value.where == f"--output {tmp_path / 'out'}"
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == []


def test_what_a_killed_merge_left_is_removed(run: Path, tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = [f".out.{ended.pid}.part", f".out.{os.getppid()}.part", ".out.mine.part"]
    for name in names:
        (tmp_path / name).mkdir()
    merge(run, tmp_path / "out", device="cpu")
    assert [(tmp_path / name).exists() for name in names] == [False, True, True]


def test_force_replaces_an_earlier_merge_once_the_check_is_passed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, link = tmp_path / "out", tmp_path / "link"
    link.symlink_to(out)
    merge(run, out, device="cpu")
    before = (out / "model.safetensors").stat().st_ino
    # As a kill leaves it between the renames of a merge that replaces it
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


def _other_run(run: Path) -> Path:
    shutil.copytree(run, run.parent / "other")
    return run.parent / "other" / "final"


def _own_file(run: Path) -> Path:
    merge(run, run.parent / "out", device="cpu")
    (run.parent / "out" / "scores.txt").write_text("precious")
    return run.parent / "out"


def _edited_card(run: Path) -> Path:
    merge(run, run.parent / "out", device="cpu")
    (run.parent / "out" / "README.md").write_text("# My own words")
    return run.parent / "out"


def _not_rejected_by_us(run: Path) -> Path:
    (run.parent / "out.rejected").mkdir()
    (run.parent / "out.rejected" / "mine").write_text("precious")
    return run.parent / "out"


@pytest.mark.parametrize("make", [_other_run, _own_file, _edited_card, _not_rejected_by_us])
def test_force_replaces_nothing_that_no_merge_wrote(
    run: Path, make: Callable[[Path], Path]
) -> None:
    """A checkpoint, somebody's file in a merged folder or in place of a rejected one, and an edited
    card.
    """
    output = make(run)
    before = {p: p.read_bytes() for p in run.parent.rglob("*") if p.is_file()}
    with refuses(UsageError, where="--output", names=["--force"]):
        merge(run, output, force=True, device="cpu")
    assert {p: p.read_bytes() for p in run.parent.rglob("*") if p.is_file()} == before


def test_the_working_directory_is_not_replaced(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with refuses(UsageError, where="--output", names=[tmp_path / "here"]):
        merge(run, ".", device="cpu")


def _not_empty(run: Path) -> tuple[Path, Path]:
    (run.parent / "out").mkdir()
    (run.parent / "out" / "x").write_text("x")
    return run, run.parent / "out"


def _a_file(run: Path) -> tuple[Path, Path]:
    (run.parent / "out").write_text("x")
    return run, run.parent / "out"


def _onto_the_adapter(run: Path) -> tuple[Path, Path]:
    return run, run / "final"


def _over_the_run(run: Path) -> tuple[Path, Path]:
    return run, run


def _plain_model(run: Path) -> tuple[Path, Path]:
    base = json.loads((run / "final" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]
    return Path(base), run.parent / "out"


def _lost_base(run: Path) -> tuple[Path, Path]:
    config = (run / "config.yaml").read_text()
    base = json.loads((run / "final" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]
    (run / "config.yaml").write_text(config.replace(base, "/nowhere/model"))
    return run, run.parent / "out"


def _other_rank(run: Path) -> tuple[Path, Path]:
    shutil.copytree(
        run / "final", run.parent / "ad", ignore=shutil.ignore_patterns("manifest.json")
    )
    file = run.parent / "ad" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 5}))
    return run.parent / "ad", run.parent / "out"


def _dora(run: Path) -> tuple[Path, Path]:
    shutil.copytree(
        run / "final", run.parent / "ad", ignore=shutil.ignore_patterns("manifest.json")
    )
    file = run.parent / "ad" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    return run.parent / "ad", run.parent / "out"


def _cut_weights(run: Path) -> tuple[Path, Path]:
    shutil.copytree(
        run / "final", run.parent / "ad", ignore=shutil.ignore_patterns("manifest.json")
    )
    file = run.parent / "ad" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return run.parent / "ad", run.parent / "out"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_not_empty, "--force"),
        (_a_file, "is a file"),
        (_onto_the_adapter, "contains the adapter or its base model"),
        (_over_the_run, "contains the adapter or its base model"),
        (_plain_model, "no adapter to merge"),
        (_lost_base, "/nowhere/model"),
        (_other_rank, "rank"),
        (_dora, "use_dora"),
        (_cut_weights, "adapter's weights cannot be read"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    run: Path, make: Callable[[Path], tuple[Path, Path]], words: str
) -> None:
    source, output = make(run)
    before = sorted(p for p in run.parent.rglob("*") if p.is_file())
    with pytest.raises(TunesmithError) as caught:
        merge(source, output, device="cpu")
    assert caught.value.exit_code == EXIT_USAGE
    assert words in caught.value.text()
    assert sorted(p for p in run.parent.rglob("*") if p.is_file()) == before


def test_a_full_fine_tune_is_already_whole(tiny: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "full", tiny, AutoModelForCausalLM.from_pretrained(tiny))
    with refuses(UsageError, where=str(tmp_path / "full" / "final")) as caught:
        merge(tmp_path / "full", tmp_path / "out")
    assert str(tmp_path / "full" / "final") in caught.value.fix
    assert caught.value.exit_code == EXIT_USAGE


def test_no_room_on_the_disk_is_found_before_writing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000)
    )
    monkeypatch.setattr(room, "save_sharded", lambda *a, **k: pytest.fail("written"))
    with refuses(MachineError, cause="disk") as caught:
        merge(run, tmp_path / "out", device="cpu")
    assert caught.value.exit_code == EXIT_USAGE


SMALL, LARGE = Difference(0.01, 1e-6, 1.0, 1e-6), Difference(5.0, 0.5, 0.3, 0.5)
GOOD, BAD = (
    ExactCheck(Difference(5e-5, 0.0, 1.0, 0.0), 10.0, 3, 100, 0),
    ExactCheck(Difference(5e-5, 0.0, 1.0, 0.0), 10.0, 3, 100, 1),
)


@pytest.mark.parametrize(
    ("dtype", "merged", "base", "noise", "largest", "exact", "passed"),
    [
        ("fp32", Difference(9e-5, 0.0, 1.0, 0.0), LARGE, SMALL, 5.0, None, True),
        ("fp32", Difference(1.1e-4, 0.0, 1.0, 0.0), LARGE, SMALL, 5.0, None, False),
        # Logits twice as large
        (
            "fp32",
            Difference(1.9e-4, 0.0, 1.0, 0.0),
            LARGE,
            SMALL,
            20.0,
            None,
            True,
        ),
        # Below a tenth of what was taught
        (
            "bf16",
            Difference(2.0, 0.04, 0.9, 0.04),
            LARGE,
            SMALL,
            20.0,
            GOOD,
            True,
        ),
        ("bf16", Difference(2.0, 0.06, 0.9, 0.06), LARGE, SMALL, 20.0, GOOD, False),
        # One weight is not what it should be
        (
            "bf16",
            Difference(2.0, 0.04, 0.9, 0.04),
            LARGE,
            SMALL,
            20.0,
            BAD,
            False,
        ),
        (
            "bf16",
            Difference(0.1, 9e-5, 1.0, 9e-5),
            SMALL,
            SMALL,
            20.0,
            GOOD,
            True,
        ),  # below the floor
        ("bf16", LARGE, LARGE, SMALL, 20.0, GOOD, False),  # the base's answers
    ],
)
def test_rules(
    dtype: str,
    merged: Difference,
    base: Difference,
    noise: Difference,
    largest: float,
    exact: ExactCheck | None,
    passed: bool,
) -> None:
    check = MergeCheck(dtype, merged, base, noise, largest, 48, "6 rows", exact)
    assert replace(check, rules=merge_check.merge_rules(check)).passed is passed


def test_differences_against_the_formula() -> None:
    p, q = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.5]])
    found = merge_check.compare_logits([p[:1], p[1:]], [q[:1], q[1:]])
    kl = torch.nn.functional.kl_div(
        q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert found.max_logit == 1.0
    assert found.mean_kl == pytest.approx(kl.item(), rel=1e-6)
    assert found.agreement == 0.5
    with pytest.raises(TunesmithError, match="finite"):
        merge_check.compare_logits([p], [p * float("nan")])
