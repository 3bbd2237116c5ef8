"""A run as a GGUF file for llama.cpp, or as a folder with one for Ollama.

    plan -> bands onto the disk, beside OUTPUT -> llama.cpp opens it (check.py) -> rename into place

A file that fails the check is kept as `OUTPUT.rejected`; what was measured of another lies beside
it (record.py).
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from jinja2 import TemplateError

from tunesmith.adapter.peft_files import PREFIX, read_adapter
from tunesmith.checkpoint.manifest import digest_of_file
from tunesmith.errors import (
    CheckpointError,
    MachineError,
    ModelError,
    TunesmithError,
    UsageError,
)
from tunesmith.host.cores import available_cores
from tunesmith.host.files import require_disk_space
from tunesmith.host.logger import lines_by_default
from tunesmith.host.packages import pip_install
from tunesmith.host.shell import shell_command
from tunesmith.hub.fetch import local_model
from tunesmith.inference.load_run import (
    OpenedRun,
    locate_run,
    read_run_files,
    select_device,
    undeleted,
)
from tunesmith.metrics.result_table import ResultTable, Tabular
from tunesmith.model.decoder import find_text_part, is_in_text
from tunesmith.model.gguf_writers import gguf_writer
from tunesmith.model.names import is_in_whole, name_in_text
from tunesmith.model.safetensors_files import (
    ADAPTER_WEIGHTS,
    read_json,
    weights_digest,
)
from tunesmith.model.stored_form import MODEL_CONFIG
from tunesmith.model.weights import stored_tensors
from tunesmith.run_dir import read_env
from tunesmith.tools.export.gguf.adapter import AdapterTarget, GgufBase, plan_adapter
from tunesmith.tools.export.gguf.check import FileCheck, check_file, require_same_model
from tunesmith.tools.export.gguf.convert_with_llama_cpp import Conversion, WrittenFile, convert
from tunesmith.tools.export.gguf.converted_adapter import plan_converted_adapter
from tunesmith.tools.export.gguf.converter import Converter, find_converter, missing_converter
from tunesmith.tools.export.gguf.llama_cpp import has_llama_cpp
from tunesmith.tools.export.gguf.ollama import MODELFILE, guard_template, modelfile_text
from tunesmith.tools.export.gguf.plan import GgufPlan, plan_gguf
from tunesmith.tools.export.gguf.write import write_gguf
from tunesmith.tools.export.merge import copy_notices
from tunesmith.tools.export.output import (
    OTHER_DISK,
    gguf_place,
    move_into_place,
    part_folder,
    record_path,
)
from tunesmith.tools.export.record import ADAPTER_KIND, record_of, write_record
from tunesmith.tools.export.tuned_weights import (
    StoredRows,
    TunedModel,
    TunedWeight,
    open_tuned_model,
)

DEFAULT_QUANT = "q4_k_m"
OLLAMA_NOTE = (
    "Ollama renders chats by the base's template, without the run's form of tools, or by one of "
    "its own that is nearly the same; compare its answers with llama-server's"
)
PICTURES_NOTE = (
    "the file has the text model alone; for pictures llama.cpp takes the mmproj file of the base, "
    "whose vision part was not trained"
)
TRAINED_PROJECTOR_NOTE = (
    "the file has the text model alone, and the projector was trained: for pictures make an mmproj "
    "file of the merged model (tunesmith merge, then convert_hf_to_gguf.py --mmproj), not of the "
    "base"
)
NO_CHECK = "--no-check"  # why a file is not compared, in the words of the command line
CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class ExportedFile(Tabular):
    """A finished export.

    Attributes:
        file: the GGUF file; for Ollama it lies in the folder `output`.
        bytes: of the file.
        notes: what llama.cpp does otherwise.
        check: None where none ran, and `unchecked` says why.
        base: the one GGUF file that an adapter is for; None where the run's base is none.
        chat_template: the file of the run's template, where `base` has another one.
    """

    output: str
    file: str
    quant: str
    bytes: int
    notes: tuple[str, ...]
    check: FileCheck | None
    unchecked: str = ""
    base: str | None = None
    chat_template: str | None = None

    def table(self) -> ResultTable:
        """Show the file, and how far its next tokens are from the tuned model's."""
        rows = [("file", self.file), ("size", f"{self.bytes / 1e6:,.1f} MB in {self.quant}")]
        notes = [f"note: {note}" for note in self.notes]
        check = self.check
        if check is None:
            rows.append(("check", f"not compared with the tuned model ({self.unchecked})"))
            return ResultTable(rows, notes=notes)
        answers = f"mean KL {check.tuned.mean_kl:.2g} nats against the tuned model"
        if check.base:
            answers += f" (base: {check.base.mean_kl:.2g})"
        verdict = "not good: differs from the tuned model"
        if check.is_near:
            verdict = "good: near the tuned model"
        same = round(check.tuned.agreement * check.positions)
        rows += [
            ("prompts", f"{check.prompts} have identical token ids in llama.cpp"),
            ("answers", answers),
            ("next tokens", f"the same at {same} of {check.positions} positions"),
            ("verdict", verdict),
        ]
        return ResultTable(rows, notes=notes)


def _ignore(done: int, total: int) -> None:
    """Show no progress."""


@lines_by_default()
def export_gguf(
    path: str | os.PathLike[str],
    output: str | Path,
    *,
    quant: str = DEFAULT_QUANT,
    for_ollama: bool = False,
    force: bool = False,
    threads: int | None = None,
    check: bool = True,
    device: str | None = None,
    trust_remote_code: bool = False,
    converter: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    checking: Callable[[int, int], None] | None = None,
) -> ExportedFile:
    """Write what a run has trained as one GGUF file, or as a folder with it for Ollama.

    >>> tunesmith.export_gguf("runs/my-run", "my-model.gguf")

    Args:
        path: as for `load_run`.
        output: a new file; for Ollama a new folder. `force` replaces a file of that name.
        quant: `f32`, `f16`, `bf16`, `q8_0`, `q6_k`, `q5_k_m` or `q4_k_m`.
        check: compare it with the tuned model in llama.cpp, where xllamacpp is installed.
        trust_remote_code: as for `load_run`.
        converter: llama.cpp's own converter, as `find_converter` finds it. Model types that
            tunesmith does not write itself need it, others use it only if it is given.
        progress: gets the bytes written and those of the file.
        checking: gets the parts of the check that are done, and all of them.

    Raises:
        UsageError: the output cannot be used.
        ModelError: llama.cpp cannot compute this model.
        MachineError: no room on the disk, or a package is missing.
        CheckpointError: llama.cpp reads prompts otherwise, or computes another model than the
            one that its converter read; the file is kept as `.rejected`.
    """
    location = locate_run(path, trust_remote_code=trust_remote_code)
    goal = gguf_place(output, location, is_folder=for_ollama, force=force)
    file_name = f"{goal.name}-{quant}.gguf" if for_ollama else goal.name
    unchecked = _why_unchecked(check)
    threads = threads or available_cores()
    progress = progress or _ignore
    with undeleted(location):
        tuned = open_tuned_model(read_run_files(location))
        found = None if converter is None else find_converter(converter)
        model_type = tuned.model.config.get_text_config().model_type
        if not found and gguf_writer(model_type) != "own":
            found = find_converter()
            if found is None:
                target = "ollama" if for_ollama else "gguf"
                words = ["tunesmith", "export", path, "--to", target, "--quant", quant]
                raise missing_converter(model_type, shell_command([*words, "--output", output]))
        if for_ollama:
            # Before the plan: the header holds the template.
            guard_template(tuned.files.tokenizer)
        if found:
            _require_check(unchecked, model_type)
            job = Conversion(location, quant, goal.stem, threads, for_ollama)
            write = partial(convert, job, found, progress)
        else:
            plan = _plan_model(tuned, quant, goal.stem)
            write = partial(_write_plan, plan, threads, progress)
        written, result = _write_checked(
            write,
            goal,
            tuned,
            f"GGUF, {quant}",
            unchecked=unchecked,
            device=device,
            threads=threads,
            checking=checking or _ignore,
            file_name=file_name,
            modelfile=modelfile_text(file_name, tuned) if for_ollama else None,
            converter=found,
            quant=quant,
        )
    shown = str(Path(output) / file_name if for_ollama else output)
    notes = (*written.notes, *_notes_on_pictures(tuned))
    return ExportedFile(str(output), shown, quant, written.size, notes, result, unchecked)


@lines_by_default()
def export_adapter(
    path: str | Path,
    output: str | Path,
    *,
    for_ollama: bool = False,
    force: bool = False,
    threads: int | None = None,
    check: bool = True,
    device: str | None = None,
    trust_remote_code: bool = False,
    converter: str | os.PathLike[str] | None = None,
    checking: Callable[[int, int], None] = lambda done, total: None,
) -> ExportedFile:
    """Write the LoRA of a run alone as a GGUF file, to be served beside that of its base.

    Where the run's base is a GGUF file, the adapter is for that very file and no other, and the two
    together are compared with the tuned model.

    Args: as of `export_gguf`; `converter` as for `find_converter`; for Ollama a folder whose
        Modelfile names both files.

    Raises: as `export_gguf`; UsageError where the run has no adapter, or for Ollama no GGUF file as
        base; ModelError where the base is not the file that the run was trained on.
    """
    location = locate_run(path, trust_remote_code=trust_remote_code)
    goal = gguf_place(output, location, is_folder=for_ollama, force=force)
    folder = location.folder
    if location.holds != "adapter" or folder is None:
        raise UsageError(
            f"{path} has no adapter", where="--adapter", fix="export the model: without --adapter"
        )
    file_name = f"{goal.name}-lora.gguf" if for_ollama else goal.name
    with undeleted(location):
        read = read_run_files(location)
        base = _find_gguf_base(read)
        chat_template = _other_template(read) if base else None
        if for_ollama:
            _check_for_ollama(read, base)
        tuned = open_tuned_model(read)  # checks that base and adapter fit
        command = ["tunesmith", "export", path, "--to", "gguf", "--adapter", "--output", output]
        plan = _plan_adapter(tuned, folder, goal.stem, base, converter, shell_command(command))
        unchecked = _why_unchecked(check)
        if base is None:
            unchecked = "the GGUF file of its base is not known"

        modelfile = None
        if for_ollama and base is not None:
            modelfile = modelfile_text(str(base.file), read, file_name)
        threads = threads or available_cores()
        written, result = _write_checked(
            partial(_write_plan, plan, threads, _ignore),
            goal,
            tuned,
            ADAPTER_KIND,
            unchecked=unchecked,
            device=device,
            threads=threads,
            checking=checking,
            file_name=file_name,
            modelfile=modelfile,
            base=base,
        )
    return ExportedFile(
        str(output),
        str(Path(output) / file_name if for_ollama else output),
        "f16",
        written.size,
        (*written.notes, *([OLLAMA_NOTE] if for_ollama else [])),
        result,
        unchecked,
        base=str(base.file) if base else None,
        chat_template=chat_template,
    )


def _why_unchecked(check: bool) -> str:
    """Why a file is not compared with the tuned model; empty where it is."""
    if not check:
        return NO_CHECK
    return "" if has_llama_cpp() else "pip install xllamacpp, then export again"


def _require_check(unchecked: str, model_type: str) -> None:
    """MachineError if a file of llama.cpp's converter could not be compared with the tuned model.

    The converter writes models that llama.cpp then computes otherwise, without an error.
    """
    if unchecked and unchecked != NO_CHECK:
        raise MachineError(
            f"{model_type} is only exported with a check in llama.cpp",
            where="the Python environment",
            why="xllamacpp is not installed",
            fix=f"{pip_install('xllamacpp')}, or --no-check",
        )


def _write_plan(
    plan: GgufPlan, threads: int, progress: Callable[[int, int], None], file: Path
) -> WrittenFile:
    require_disk_space(file, plan.size, what=file.name, fix=OTHER_DISK)
    write_gguf(plan, file, threads=threads, progress=progress)
    return WrittenFile(plan.size, plan.notes)


def _write_checked(
    write: Callable[[Path], WrittenFile],
    goal: Path,
    tuned: TunedModel,
    kind: str,
    *,
    unchecked: str,
    device: str | None,
    threads: int,
    checking: Callable[[int, int], None],
    file_name: str,
    modelfile: str | None,
    base: GgufBase | None = None,
    converter: Converter | None = None,
    quant: str = "f16",
) -> tuple[WrittenFile, FileCheck | None]:
    """Write a file beside its place, compare it with the tuned model, and give it its name.

    What the check refuses is kept as `.rejected`: the user may want to know what differs. With a
    `modelfile` the goal is a folder with both.
    """
    place = torch.device(select_device(device))
    with part_folder(goal) as part:
        file = part / file_name
        moved = file
        written = write(file)
        if modelfile is not None:
            moved = part
            (part / MODELFILE).write_text(modelfile, encoding="utf-8")
            copy_notices(tuned.files.folder, part)
        result = None
        if not unchecked:
            rejected = goal.with_name(f"{goal.name}.rejected")
            try:
                result = check_file(
                    file,
                    tuned,
                    _find_base(tuned),
                    base_file=base.file if base else None,
                    beyond_window=converter is not None,
                    device=place,
                    threads=threads,
                    progress=checking,
                )
                if converter is not None:
                    is_routed = any(layer.experts for layer in tuned.files.spec.layers)
                    require_same_model(result, quant, rejected, is_routed=is_routed)
            except CheckpointError:
                move_into_place(moved, rejected)
                raise
        record = record_of(
            tuned.location, kind, written.size, unchecked, result, base=base, converter=converter
        )
        write_record(file, record)
        if modelfile is None:
            # A record is never of a file that is not there, nor of an earlier one.
            record_path(goal).unlink(missing_ok=True)
        move_into_place(moved, goal)
        if modelfile is None:
            move_into_place(record_path(file), record_path(goal))
    return written, result


def _find_gguf_base(read: OpenedRun) -> GgufBase | None:
    """The GGUF file that a run was trained on; None where its base is a folder or on the Hub.

    ModelError where the file has other weights by now.
    """
    file = local_model(read.location.base)
    if file is None or file.is_dir():
        return None
    folder = read.location.folder
    assert folder is not None  # an adapter has one
    trained_on = read_env(folder.parent).value.get("model_hash")
    digest = weights_digest(read.files.folder)
    if trained_on not in (None, digest):
        raise ModelError(
            f"{file.name} is not the file that this run was trained on",
            where=str(file),
            why=f"the hash of its weights is {digest[:12]}, the run's {trained_on[:12]}",
            fix="put back the file that was there; an adapter is for that one alone",
        )
    return GgufBase(file.resolve(), digest_of_file(file))


def _other_template(read: OpenedRun) -> str | None:
    """The file of a run's chat template, where that is not the one of its base."""
    folder = read.location.folder
    assert folder is not None  # an adapter has one
    saved = folder / CHAT_TEMPLATE
    base = read.files.folder / CHAT_TEMPLATE
    is_other = saved.is_file() and (not base.is_file() or saved.read_bytes() != base.read_bytes())
    return str(saved) if is_other else None


def _check_for_ollama(read: OpenedRun, base: GgufBase | None) -> None:
    """UsageError where Ollama, which takes the template of the base, would not render chats as in
    training."""
    why = ""
    template = read.files.tokenizer.chat_template or ""
    file = read.files.folder / CHAT_TEMPLATE
    base_template = file.read_text() if file.is_file() else ""
    if base is None:
        why = f"the base, {read.location.base.name}, is not a GGUF file, which Ollama needs"
    elif _renderings(read, template) != _renderings(read, base_template):
        why = f"{base.file.name} has another chat template than the run"
    if why:
        raise UsageError(
            "Ollama cannot serve this adapter",
            where="--to ollama --adapter",
            why=why,
            fix="--to gguf --adapter, or --to ollama without --adapter",
        )


def _renderings(read: OpenedRun, template: str) -> list[str | None]:
    """Render chats without tools; None for one that the template refuses, such as of a system
    message."""
    user = {"role": "user", "content": "Hi"}
    answer = {"role": "assistant", "content": "Yes?"}
    texts: list[str | None] = []
    for chat in ([user], [user, answer, user], [{"role": "system", "content": "Be brief"}, user]):
        try:
            text = read.files.tokenizer.apply_chat_template(
                chat, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except (ValueError, TemplateError):
            text = None
        texts.append(text)
    return texts


def _plan_model(tuned: TunedModel, quant: str, name: str) -> GgufPlan:
    settings = tuned.files.folder / "generation_config.json"
    # Any of them ends an answer; a GGUF file has room for one beside eos.
    ends = tuned.template.end_ids - {tuned.files.tokenizer.eos_token_id}
    return plan_gguf(
        tuned.model.config.get_text_config().to_dict(),
        _text_weights(tuned),
        tuned.files.tokenizer,
        quant=quant,
        name=name,
        generation=read_json(settings) if settings.is_file() else {},
        turn_end=min(ends, default=None),
    )


def _notes_on_pictures(tuned: TunedModel) -> tuple[str, ...]:
    """Return the notes for a file that contains only the text model."""
    if not is_in_whole(tuned.model):
        return ()
    return (TRAINED_PROJECTOR_NOTE if tuned.recipe.model.train_projector else PICTURES_NOTE,)


def _text_weights(tuned: TunedModel) -> Mapping[str, TunedWeight]:
    """Those of the text model, by its own names, of a vision-language model in whole too."""
    prefix, _ = find_text_part(tuned.model)
    if not prefix:
        return tuned.weights
    is_text = is_in_text(tuned.model)
    weights = {}
    for name, weight in tuned.weights.items():
        if is_text(name):
            weights[re.sub(f"^{re.escape(prefix)}[.]", "model.", name)] = weight
    return weights


def _plan_adapter(
    tuned: TunedModel,
    folder: Path,
    name: str,
    base: GgufBase | None,
    converter: str | os.PathLike[str] | None,
    command: str,
) -> GgufPlan:
    """Return the file of the adapter in `folder`; `command` is the user's, for an error."""
    with stored_tensors(folder / ADAPTER_WEIGHTS) as stored:
        weights = {}
        for stored_name, tensor in stored.items():
            in_text = _adapter_name_in_text(tuned, stored_name)
            weights[in_text] = StoredRows(tensor, torch.float32, tensor.shape)
    target = AdapterTarget(name, read_adapter(folder), len(tuned.recipe.model.added_tokens), base)
    config = tuned.model.config.get_text_config()
    if gguf_writer(config.model_type) == "own":
        return plan_adapter(config.to_dict(), weights, target)
    found = find_converter(converter)
    if found is None:
        raise missing_converter(config.model_type, command)
    stated = read_json(tuned.files.folder / MODEL_CONFIG)
    return plan_converted_adapter(stated, config, weights, target, found)


def _adapter_name_in_text(tuned: TunedModel, name: str) -> str:
    """Return the name that a stored tensor has in the adapter of a text model."""
    prefix, _ = find_text_part(tuned.model)
    name = name_in_text(tuned.model, name.removeprefix(PREFIX))
    if prefix:
        name = re.sub(f"^{re.escape(prefix)}[.]", "model.", name)
    return PREFIX + name


def _find_base(tuned: TunedModel) -> TunedModel | None:
    """The model before training; None where there was none, or a whole one was trained and its base
    is gone.
    """
    if tuned.location.holds == "base":
        return None
    if tuned.location.holds == "adapter":
        return tuned
    try:
        # A full fine-tune names its base in the recipe; it may be gone from the disk or the Hub's
        # cache.
        return open_tuned_model(read_run_files(replace(tuned.location, holds="base")))
    except TunesmithError:
        return None
