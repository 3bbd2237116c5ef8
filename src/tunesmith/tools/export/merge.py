"""Merge of an adapter into its base model. A check compares the outputs before and after the merge.

    add B A to each weight -> write to a hidden folder next to OUTPUT
    -> check that Transformers finds every weight
    -> compute the logits of adapter, base model and merged model -> check (merge_check.py)
    -> rename the folder to OUTPUT

A merge that fails the check is kept as `OUTPUT.rejected`. Weights are read, written and multiplied
in bands of rows, so memory use does not grow with the model.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig
from transformers.utils import logging as hf_logging

from tunesmith.answers.load_run import (
    Dtype,
    RunLocation,
    check_dtype,
    locate_run,
    raise_if_deleted,
    read_run_files,
    select_device,
)
from tunesmith.checkpoint.manifest import CARD
from tunesmith.errors import CheckpointError
from tunesmith.host.files import follow_umask, require_disk_space
from tunesmith.host.logger import lines_by_default
from tunesmith.host.shell import shell_path
from tunesmith.hub.fetch import fetch
from tunesmith.metrics.result_table import ResultTable, Tabular
from tunesmith.model.arch.load import auto_class_of
from tunesmith.model.arch.tokenizer import GENERATION_CONFIG, generation_config_text
from tunesmith.model.known.dtypes import DTYPES
from tunesmith.model.weights.older_readers import write_for_older_readers
from tunesmith.model.weights.save_tensors import save_sharded, written_bytes
from tunesmith.model.weights.shipped import form_of_folder
from tunesmith.model.weights.stored_form import write_model_config
from tunesmith.quant.schemes import NF4, scheme_of
from tunesmith.tools.export import merge_check
from tunesmith.tools.export.merge_check import ExactCheck, MergeCheck, compare_logits, largest_logit
from tunesmith.tools.export.output import (
    MERGE_FILE,
    NOTICES,
    OTHER_DISK,
    check_merge_output,
    file_sizes,
    move_into_place,
    part_folder,
)
from tunesmith.tools.export.record import make_card
from tunesmith.tools.export.streamed_model import streamed_logits
from tunesmith.tools.export.tuned_weights import TunedModel, open_tuned_model, stored_sources

# Required disk space as a multiple of the size of the weights. 10 % is for the other files.
DISK_FACTOR = 1.1
# Vocabulary file of SentencePiece, which some converters read. It does not contain added tokens.
SENTENCEPIECE = "tokenizer.model"


@dataclass(frozen=True)
class Merged(Tabular):
    """Result of a merge: the written folder, base, adapter, a note, and the result of the check."""

    output: str
    base: str
    adapter: str
    dtype: str
    bytes: int
    note: str
    merge_check: MergeCheck

    def table(self) -> ResultTable:
        """Return a table with the folder, its difference to the adapter, and the checked rules."""
        check = self.merge_check
        rows = [
            ("folder", self.output),
            ("size", f"{self.bytes / 2**20:.0f} MiB in {self.dtype}; load it with Transformers"),
            ("compared", f"with the adapter, at {check.positions} positions of {check.probes}"),
            (
                "answers",
                f"mean KL {check.merged.mean_kl:.2g} nats (base: {check.base.mean_kl:.2g})",
            ),
            ("next tokens", f"the same at {check.merged.agreement:.2%} of the positions"),
        ]
        notes = []
        for text, is_met in check.rules:
            notes.append(f"{'passed' if is_met else 'failed'}: {text}")
        if self.note:
            notes.append(self.note)
        notes.append(f"next: tunesmith chat {shell_path(self.output)}")
        return ResultTable(rows, notes=notes)


@lines_by_default()
def merge(
    path: str | os.PathLike[str],
    output: str | Path,
    *,
    dtype: Dtype | None = None,
    force: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Merged:
    """Merge an adapter into its base model, write the merged model, and check its answers.

    >>> tunesmith.merge("runs/my-run", "merged")

    Args:
        path: a run directory, or its `Result`; a checkpoint, final/, or an adapter folder.
        output: a new or empty folder. With `force` it can also be an unchanged earlier merge, which
            is replaced after the new merge has passed the check.
        dtype: dtype of the written weights; None: the dtype of the base model.
        force: replace an earlier merge.
        device: device of the check, such as "cuda" or "cpu"; None: the default device.
        trust_remote_code: as for `load_run`.

    Raises:
        UsageError: there is no adapter, or the output cannot be used.
        MachineError: the disk has too little free space.
        CheckpointError: the merged model answers differently. It is kept as `<output>.rejected`.
    """
    check_dtype(dtype)
    path = os.fspath(path)
    location = locate_run(path, trust_remote_code=trust_remote_code)
    goal = check_merge_output(path, output, location, force=force)
    dtype = dtype or location.dtype
    had_bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        with part_folder(goal) as part, raise_if_deleted(location):
            check = _merge_and_check(location, part, dtype, device)
            sizes = file_sizes(part)
            text = json.dumps({**asdict(check), "files": sizes}, indent=2)
            (part / MERGE_FILE).write_text(text + "\n", encoding="utf-8")
            follow_umask(part)
            _publish(part, goal, check)
    finally:
        if had_bars:
            hf_logging.enable_progress_bar()
    note = ""
    form = form_of_folder(fetch(location.base))
    if form is not None:
        note = f"the base is stored in {form.describe()}; the merged weights are in {dtype}, "
        note += "because quantizing them again would round the update"
    if scheme_of(location.base) is NF4:
        note = (
            "the run trained on an nf4 base, so the adapter was merged into the base's "
            f"dequantized {dtype} weights"
        )
    return Merged(
        output=str(output),
        base=location.base.name,
        adapter=str(location.folder),
        dtype=dtype,
        bytes=sum(sizes.values()),
        note=note,
        merge_check=check,
    )


def _merge_and_check(
    location: RunLocation, folder: Path, dtype: Dtype, device: str | None
) -> MergeCheck:
    """Write the merged model to `folder`, and compare its logits with those of the adapter."""
    torch_device = torch.device(select_device(device))
    tuned = open_tuned_model(read_run_files(location))
    write_merged(tuned, folder, dtype)
    _check_readable(folder)
    merged_location = locate_run(folder)
    # Use the run's setting of `vision`: the merged folder has no recipe, so it does not record
    # whether the vision encoder is loaded.
    base = replace(merged_location.base, vision=location.base.vision)
    written = open_tuned_model(read_run_files(replace(merged_location, base=base)))
    return _compare(tuned, written, dtype, torch_device)


def _compare(
    tuned: TunedModel, written: TunedModel, dtype: Dtype, device: torch.device
) -> MergeCheck:
    """Compare the logits of the adapter with those of the written model."""
    prompts, probes = merge_check.probe_prompts(tuned)
    logits = partial(streamed_logits, prompts=prompts, device=device)
    # Compute the adapter's logits in the dtype of training, or in fp32 if the merge is in fp32.
    trained_dtype = torch.float32 if dtype == "fp32" else DTYPES[tuned.location.dtype]
    adapted = logits(tuned, values="adapter", dtype=trained_dtype)
    base = compare_logits(adapted, logits(tuned, values="base", dtype=trained_dtype))
    merged = logits(written, values="merged", dtype=DTYPES[dtype])
    # Measure the noise of the dtype as the difference between eager and sdpa attention. Both
    # compute the same formula, but add in a different order.
    noise = compare_logits(
        merged, logits(written, values="merged", dtype=DTYPES[dtype], attention="eager")
    )
    merged_divergence = compare_logits(adapted, merged)
    largest = largest_logit(adapted)
    del adapted, merged  # free the logits of the entire vocabulary
    exact = None
    # Also compare in fp32. There, rounding cannot explain a large difference, so it would be an
    # error of the merge.
    if dtype != "fp32":
        adapted_fp32 = logits(tuned, values="adapter", dtype=torch.float32)
        merged_fp32 = logits(tuned, values="merged", dtype=torch.float32)
        exact = ExactCheck(
            compare_logits(adapted_fp32, merged_fp32),
            largest_logit(adapted_fp32),
            *merge_check.count_misrounded(written, tuned, DTYPES[dtype]),
        )
    check = MergeCheck(
        dtype=dtype,
        merged=merged_divergence,
        base=base,
        noise=noise,
        largest=largest,
        positions=sum(map(len, prompts)),
        probes=probes,
        exact=exact,
    )
    return replace(check, rules=merge_check.merge_rules(check))


def _check_readable(folder: Path) -> None:
    """Raise CheckpointError unless the files hold exactly the weights that Transformers expects."""
    auto_class = auto_class_of(AutoConfig.from_pretrained(folder))
    _, info = auto_class.from_pretrained(
        folder, dtype="auto", device_map="meta", output_loading_info=True
    )
    wrong_keys = {}
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            wrong_keys[kind] = sorted(map(str, info[kind]))
    if wrong_keys:
        raise CheckpointError(
            "the merged weights do not match the weights that Transformers expects",
            where=folder,
            why=f"Transformers reports {wrong_keys}",
            fix="serve the adapter with its base model instead of a merged model",
        )


def _publish(temporary: Path, goal: Path, check: MergeCheck) -> None:
    """Rename the written folder to `goal`, or to `<goal>.rejected` if the check failed.

    Raise CheckpointError if the check failed.
    """
    if not check.passed:
        rejected = Path(f"{goal}.rejected")
        move_into_place(temporary, rejected)
        raise CheckpointError(
            "the outputs of the merged model differ from those of the base model with the adapter: "
            f"the logits differ by up to {check.merged.max_logit:.3g}, and the mean KL divergence "
            f"is {check.merged.mean_kl:.3g} nats (base model without the adapter: "
            f"{check.base.mean_kl:.3g} nats)",
            where=rejected,
            why="; ".join(text for text, holds in check.rules if not holds),
            fix="serve the adapter with its base model, or use --dtype fp32 if another dtype was "
            "used",
        )
    move_into_place(temporary, goal)


def write_merged(tuned: TunedModel, folder: Path, dtype: str) -> None:
    """Write the merged model as Transformers files.

    The folder holds the weights in shards, the tokenizer with its chat template, the configuration
    files and a model card.
    """
    model = tuned.model
    files = tuned.files
    stored, read = stored_sources(tuned, DTYPES[dtype])
    needed = round(written_bytes(stored.values()) * DISK_FACTOR)
    require_disk_space(folder, needed, what=f"the model in {dtype}", fix=OTHER_DISK)
    save_sharded(folder, stored, read=read)
    model.config.dtype = DTYPES[dtype]
    write_model_config(model, folder)
    files.tokenizer.save_pretrained(folder)
    write_for_older_readers(folder)
    write_generation_config(tuned, folder)
    copy_notices(files.folder, folder)
    copy_sentencepiece(tuned, folder)
    card = make_card(tuned.location, merged=dtype)
    (folder / CARD).write_text(card, encoding="utf-8")


def copy_sentencepiece(tuned: TunedModel, folder: Path) -> None:
    """Copy `tokenizer.model`, unless the run added tokens, which this file does not contain."""
    pieces = tuned.files.folder / SENTENCEPIECE
    if pieces.is_file() and not tuned.files.model.added_tokens:
        shutil.copyfile(pieces, folder / SENTENCEPIECE)


def write_generation_config(tuned: TunedModel, folder: Path) -> None:
    """Write the base's generation_config.json with the run's end tokens."""
    files = tuned.files
    text = generation_config_text(files.folder, files.tokenizer, tuned.template.end_ids)
    (folder / GENERATION_CONFIG).write_text(text, encoding="utf-8")


def copy_notices(base: Path, folder: Path) -> None:
    """Copy the license files of the base model, which must be distributed with its weights."""
    for file in sorted(base.iterdir()):
        if file.is_file() and file.name.upper().startswith(NOTICES):
            shutil.copyfile(file, folder / file.name)
