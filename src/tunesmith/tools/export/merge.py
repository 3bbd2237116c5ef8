"""Merge an adapter into its base, write a plain Transformers folder, and check that it answers
alike.

    add B A to each weight -> write beside OUTPUT -> Transformers finds every weight
    -> logits of adapter, base and what was written -> check (merge_check.py) -> rename into place

A merge that fails the check is kept as `OUTPUT.rejected`. Weights are read, written and multiplied
in bands: the memory that this takes does not grow with the model.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig
from transformers.utils import logging as hf_logging

from tunesmith.checkpoint.contents import weights_of
from tunesmith.checkpoint.manifest import CARD
from tunesmith.checkpoint.model_card import CardFile, weights_file, with_files
from tunesmith.errors import CheckpointError
from tunesmith.host.files import follow_umask, require_disk_space
from tunesmith.host.logger import lines_by_default
from tunesmith.host.shell import shell_path
from tunesmith.hub.fetch import fetch
from tunesmith.inference.load_run import (
    Dtype,
    RunLocation,
    check_dtype,
    locate_run,
    read_run_files,
    select_device,
    undeleted,
)
from tunesmith.metrics.result_table import ResultTable, Tabular
from tunesmith.model.dtypes import DTYPES
from tunesmith.model.load import auto_class_of
from tunesmith.model.older_readers import write_for_older_readers
from tunesmith.model.save_tensors import save_sharded, written_bytes
from tunesmith.model.shipped import form_of_folder
from tunesmith.model.stored_form import in_stored_form, write_model_config
from tunesmith.model.tokenizer import GENERATION_CONFIG, generation_config_text
from tunesmith.quant.schemes import NF4, scheme_of
from tunesmith.tools.export import merge_check
from tunesmith.tools.export.merge_check import ExactCheck, MergeCheck, compare_logits, largest_logit
from tunesmith.tools.export.output import (
    MERGE_FILE,
    NOTICES,
    OTHER_DISK,
    file_sizes,
    merge_place,
    move_into_place,
    part_folder,
)
from tunesmith.tools.export.record import card_of
from tunesmith.tools.export.streamed_model import Values, streamed_logits
from tunesmith.tools.export.tuned_weights import TunedModel, open_tuned_model, row_bands

ROOM = 1.1  # of the weights: the rest of the folder
# Some converters read the vocabulary from it; it says nothing of added tokens.
SENTENCEPIECE = "tokenizer.model"


@dataclass(frozen=True)
class Merged(Tabular):
    """A finished merge: the folder, its sources, a note about it, and the check."""

    output: str
    base: str
    adapter: str
    dtype: str
    bytes: int
    note: str
    merge_check: MergeCheck

    def table(self) -> ResultTable:
        """Show what was written, how far its answers are from the adapter's, and the rules."""
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
    """Merge the adapter at `path` into its base, write it to `output`, and check that it answers
    alike.

    >>> tunesmith.merge("runs/my-run", "merged")

    Args:
        path: a run directory, or its `Result`; a checkpoint, final/, or an adapter's folder.
        output: a folder that is new or empty; with `force` also one that an earlier merge wrote,
            and nothing else is in: it is replaced at the very end.
        dtype: of the written weights; None keeps the base's.
        trust_remote_code: as for `load_run`.

    Raises:
        UsageError: there is no adapter, or the output cannot be used.
        MachineError: no room on the disk.
        CheckpointError: the merged model answers differently; it is kept as `<output>.rejected`.
    """
    check_dtype(dtype)
    path = os.fspath(path)
    location = locate_run(path, trust_remote_code=trust_remote_code)
    goal = merge_place(path, output, location, force=force)
    dtype = dtype or location.dtype
    had_bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        with part_folder(goal) as part, undeleted(location):
            check = _merge_and_check(location, part, dtype, device)
            measured = check.merged.mean_kl, check.merged.agreement
            add_files_to_card(part, weights_file(part, f"Transformers, {dtype}", *measured))
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
        note = f"the base ships in {form.describe()}: what is written is dense in {dtype}, as "
        note += "quantizing again would round the update"
    if scheme_of(location.base) is NF4:
        note = f"the base is in nf4: the adapter was merged into its dequantized {dtype} weights"
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
    """Write the merged model to `folder` and compare its logits with the adapter's."""
    place = torch.device(select_device(device))
    read = read_run_files(location)
    tuned = open_tuned_model(read)
    write_merged(tuned, folder, dtype)
    _check_readable(folder)
    place_of_merged = locate_run(folder)
    # With the parts that the run has built: a folder without a recipe does not say it.
    model = replace(place_of_merged.base, vision=location.base.vision)
    written = open_tuned_model(read_run_files(replace(place_of_merged, base=model)))
    prompts, probes = merge_check.probe_prompts(read)

    def logits(
        model: TunedModel, values: Values, dtype: str, attention: str | None = None
    ) -> list[torch.Tensor]:
        return streamed_logits(
            model,
            prompts,
            values=values,
            dtype=DTYPES[dtype],
            device=place,
            attention=attention,
        )

    # The adapter computes in the type that it was trained in, or in fp32 beside an fp32 merge.
    trained_dtype = "fp32" if dtype == "fp32" else location.dtype
    adapted = logits(tuned, "adapter", trained_dtype)
    base = compare_logits(adapted, logits(tuned, "base", trained_dtype))
    written_logits = logits(written, "merged", dtype)
    # The same formula as sdpa, its sums in another order.
    noise = compare_logits(written_logits, logits(written, "merged", dtype, "eager"))
    merged = compare_logits(adapted, written_logits)
    largest = largest_logit(adapted)
    exact = None
    # In fp32 there is no rounding: what differs is a fault of the merge.
    if dtype != "fp32":
        adapted = logits(tuned, "adapter", "fp32")
        difference = compare_logits(adapted, logits(tuned, "merged", "fp32"))
        counts = merge_check.count_off(written, tuned, DTYPES[dtype])
        exact = ExactCheck(difference, largest_logit(adapted), *counts)
    return MergeCheck(
        dtype=dtype,
        merged=merged,
        base=base,
        noise=noise,
        largest=largest,
        positions=sum(map(len, prompts)),
        probes=probes,
        exact=exact,
        rules=merge_check.merge_rules(dtype, merged, base, noise, largest, exact),
    )


def _check_readable(folder: Path) -> None:
    """CheckpointError unless Transformers finds every weight in the files, and all of them."""
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
            "Transformers loads weights that differ from those written",
            where=str(folder),
            why=str(wrong_keys),
        )


def _publish(temporary: Path, goal: Path, check: MergeCheck) -> None:
    """Give the written folder its name: the goal, or `<goal>.rejected` if the check failed."""
    if not check.passed:
        rejected = Path(f"{goal}.rejected")
        move_into_place(temporary, rejected)
        raise CheckpointError(
            "the merged model gives different outputs: "
            f"logits up to {check.merged.max_logit:.3g} apart, "
            f"mean KL {check.merged.mean_kl:.3g} nats "
            f"(base against adapter: {check.base.mean_kl:.3g})",
            where=str(rejected),
            why="; ".join(text for text, holds in check.rules if not holds),
            fix="merge with --dtype fp32, or serve the adapter with its base",
        )
    move_into_place(temporary, goal)


def write_merged(tuned: TunedModel, folder: Path, dtype: str) -> None:
    """Write the merged model as Transformers files: weights in shards, tokenizer with its template,
    settings, a card.
    """
    model = tuned.model
    files = tuned.files
    tensors = {}
    # `save_sharded` asks for rows of a tensor: the tensor itself identifies the weight.
    weights = {}
    parameters = dict(model.named_parameters())
    for name, tensor in weights_of(model).items():
        written = DTYPES[dtype] if name in parameters else tensor.dtype
        tensors[name] = tensor.to("meta", written)
        weights[id(tensors[name])] = tuned.weights[name]

    def read(tensor: torch.Tensor, rows: slice) -> Iterator[torch.Tensor]:
        weight = weights[id(tensor)]
        for band in row_bands(tensor.shape, rows):
            yield weight.rows(band.start, band.stop)

    stored = in_stored_form(model, tensors)
    needed = round(written_bytes(stored.values()) * ROOM)
    require_disk_space(folder, needed, what=f"the model in {dtype}", fix=OTHER_DISK)
    save_sharded(folder, stored, read=read)
    model.config.dtype = DTYPES[dtype]
    write_model_config(model, folder)
    files.tokenizer.save_pretrained(folder)
    write_for_older_readers(folder)
    write_generation_config(tuned, folder)
    copy_notices(files.folder, folder)
    # A `tokenizer.model` knows no added tokens.
    pieces = files.folder / SENTENCEPIECE
    if pieces.is_file() and not files.model.added_tokens:
        shutil.copyfile(pieces, folder / SENTENCEPIECE)
    card = card_of(tuned.location, merged=dtype)
    (folder / CARD).write_text(card, encoding="utf-8")


def write_generation_config(tuned: TunedModel, folder: Path) -> None:
    """Write the base's generation_config.json with the run's end tokens."""
    files = tuned.files
    text = generation_config_text(files.folder, files.tokenizer, tuned.template.end_ids)
    (folder / GENERATION_CONFIG).write_text(text, encoding="utf-8")


def add_files_to_card(folder: Path, *files: CardFile) -> None:
    """Add the table of files to the card of a folder."""
    card = folder / CARD
    card.write_text(with_files(card.read_text(encoding="utf-8"), files), encoding="utf-8")


def copy_notices(base: Path, folder: Path) -> None:
    """Copy the base's license, and what else has to go along with its weights."""
    for file in sorted(base.iterdir()):
        if file.is_file() and file.name.upper().startswith(NOTICES):
            shutil.copyfile(file, folder / file.name)
