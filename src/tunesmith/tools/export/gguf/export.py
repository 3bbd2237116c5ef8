"""Export of a run as a GGUF file for llama.cpp, or as a folder with a GGUF file for Ollama.

    plan the file -> write it in bands to a hidden folder next to OUTPUT
    -> check it in llama.cpp (check.py) -> rename it to OUTPUT

A file that fails the check is kept as `OUTPUT.rejected`. The result of the check is stored next to
the exported file (record.py).
"""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tunesmith.adapter.peft_files import PREFIX, read_adapter
from tunesmith.answers.load_run import (
    locate_run,
    raise_if_deleted,
    read_run_files,
    select_device,
)
from tunesmith.errors import (
    CheckpointError,
    MachineError,
    TunesmithError,
    UsageError,
)
from tunesmith.host.cores import available_cores
from tunesmith.host.files import require_disk_space
from tunesmith.host.logger import lines_by_default
from tunesmith.host.packages import pip_install
from tunesmith.host.shell import shell_command
from tunesmith.model.known.decoder import find_text_model, is_in_text
from tunesmith.model.known.gguf_writers import gguf_writer
from tunesmith.model.weights.names import is_vision_language, name_in_text
from tunesmith.model.weights.safetensors_files import ADAPTER_WEIGHTS, read_json
from tunesmith.model.weights.stored_form import MODEL_CONFIG
from tunesmith.model.weights.stored_tensors import stored_tensors
from tunesmith.tools.export.gguf.adapter import AdapterTarget, plan_adapter
from tunesmith.tools.export.gguf.check import check_file, require_same_model
from tunesmith.tools.export.gguf.convert_with_llama_cpp import Conversion, convert
from tunesmith.tools.export.gguf.converted_adapter import plan_converted_adapter
from tunesmith.tools.export.gguf.converter import Converter, require_converter
from tunesmith.tools.export.gguf.llama_cpp import has_llama_cpp
from tunesmith.tools.export.gguf.ollama import MODELFILE, guard_template, modelfile_text
from tunesmith.tools.export.gguf.plan import GgufPlan, plan_gguf
from tunesmith.tools.export.gguf.tokenizer import other_end_id
from tunesmith.tools.export.gguf.write import Progress, write_gguf
from tunesmith.tools.export.merge import copy_notices
from tunesmith.tools.export.output import (
    OTHER_DISK,
    check_gguf_output,
    move_into_place,
    part_folder,
    record_path,
)
from tunesmith.tools.export.record import ADAPTER_KIND, ExportedFile, write_record
from tunesmith.tools.export.tuned_weights import (
    StoredRows,
    TunedModel,
    open_tuned_model,
)

DEFAULT_QUANT = "q4_k_m"
PICTURES_NOTE = (
    "the file holds only the text model; for pictures, give llama.cpp the mmproj file of the base "
    "model, whose vision encoder was not trained"
)
TRAINED_PROJECTOR_NOTE = (
    "the file holds only the text model, and the projector was trained: for pictures, create an "
    "mmproj file from the merged model, not from the base model: run `tunesmith merge RUN --output "
    "FOLDER`, then llama.cpp's `python convert_hf_to_gguf.py --mmproj FOLDER`"
)
NO_CHECK = "--no-check"  # value of `ExportedFile.unchecked` if the user gave this option


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
    progress: Progress = lambda written, size: None,
    checking: Progress = lambda done, total: None,
) -> ExportedFile:
    """Write the trained model of a run as one GGUF file, or as a folder for Ollama.

    >>> tunesmith.export_gguf("runs/my-run", "my-model.gguf")

    Args:
        path: as for `load_run`.
        output: a new file; for Ollama a new folder.
        quant: `f32`, `f16`, `bf16`, `q8_0`, `q6_k`, `q5_k_m` or `q4_k_m`.
        for_ollama: write a folder with the GGUF file and a Modelfile.
        force: replace an earlier export at `output`.
        threads: number of threads that quantize; None: all cores.
        check: compare the file with the tuned model in llama.cpp, if xllamacpp is installed.
        device: device of the tuned model in the check; None: the default device.
        trust_remote_code: as for `load_run`.
        converter: path of llama.cpp's converter, see `find_converter`. Required for model types
            that tunesmith cannot convert itself. For other model types the converter is used only
            if this path is given.
        progress: function that is called with the number of written bytes and the file size.
        checking: function that is called during the check, with the number of finished steps and
            the number of all steps.

    Raises:
        UsageError: the output cannot be used.
        ModelError: llama.cpp cannot compute this model.
        MachineError: the disk has too little free space, or a package is missing.
        CheckpointError: llama.cpp tokenizes prompts differently, or it computes a converted model
            differently. The file is kept as `<output>.rejected`.
    """
    location = locate_run(path, trust_remote_code=trust_remote_code)
    goal = check_gguf_output(output, location, is_folder=for_ollama, force=force)
    file = Path(output)
    if for_ollama:
        file /= f"{goal.name}-{quant}.gguf"
    unchecked = _why_unchecked(check)
    threads = threads or available_cores()
    with raise_if_deleted(location):
        tuned = open_tuned_model(read_run_files(location))
        model_type = tuned.model.config.get_text_config().model_type
        found = None
        if converter is not None or gguf_writer(model_type) != "own":
            target = "ollama" if for_ollama else "gguf"
            command = ["tunesmith", "export", path, "--to", target, "--quant", quant]
            command += ["--output", output]
            found = require_converter(converter, model_type, shell_command(command))
        if for_ollama:
            # Change the template before the file is planned, because the plan includes the
            # template.
            guard_template(tuned.tokenizer)
        if found:
            _require_check(unchecked, model_type)
            job = Conversion(location, quant, goal.stem, threads, for_ollama)
            write = partial(convert, job, found, progress)
        else:
            plan = _plan_model(tuned, quant, goal.stem)
            write = partial(_write_plan, plan, threads, progress=progress)
        exported = ExportedFile(str(output), str(file), quant, 0, (), None, unchecked)
        # The file contains only the text part of a vision-language model.
        if is_vision_language(tuned.model):
            is_trained = tuned.recipe.model.train_projector
            note = TRAINED_PROJECTOR_NOTE if is_trained else PICTURES_NOTE
            exported = replace(exported, notes=(note,))
        return _write_checked(
            write,
            exported,
            goal,
            tuned,
            f"GGUF, {quant}",
            device=device,
            threads=threads,
            checking=checking,
            modelfile=modelfile_text(file.name, tuned) if for_ollama else None,
            converter=found,
        )


@lines_by_default()
def export_adapter(
    path: str | Path,
    output: str | Path,
    *,
    force: bool = False,
    threads: int | None = None,
    trust_remote_code: bool = False,
    converter: str | os.PathLike[str] | None = None,
) -> ExportedFile:
    """Write only the LoRA of a run as a GGUF file. llama.cpp loads it together with the base model.

    The file is not checked, because the GGUF file of the base model is not known. The arguments are
    those of `export_gguf`.

    Raises: as `export_gguf`, and:
        UsageError: the run has no adapter.
    """
    location = locate_run(path, trust_remote_code=trust_remote_code)
    goal = check_gguf_output(output, location, is_folder=False, force=force)
    folder = location.folder
    if location.holds != "adapter" or folder is None:
        raise UsageError(
            f"{path} has no adapter",
            where="--adapter",
            fix="export the entire model, without --adapter",
        )
    with raise_if_deleted(location):
        tuned = open_tuned_model(read_run_files(location))  # checks that base and adapter match
        command = ["tunesmith", "export", path, "--to", "gguf", "--adapter", "--output", output]
        plan = _plan_adapter(tuned, folder, goal.stem, converter, shell_command(command))
        unchecked = "the GGUF file of the base model is not known"
        threads = threads or available_cores()
        return _write_checked(
            partial(_write_plan, plan, threads),
            ExportedFile(str(output), str(output), "f16", 0, (), None, unchecked),
            goal,
            tuned,
            ADAPTER_KIND,
            threads=threads,
        )


def _why_unchecked(check: bool) -> str:
    """Return why the file is not compared with the tuned model, or "" if it is compared."""
    if not check:
        return NO_CHECK
    return "" if has_llama_cpp() else "pip install xllamacpp, then export again"


def _require_check(unchecked: str, model_type: str) -> None:
    """Raise MachineError if llama.cpp's converter is used but the file cannot be checked.

    The check is required, because for some models the converter writes a file that llama.cpp
    computes wrongly without an error.
    """
    if unchecked and unchecked != NO_CHECK:
        raise MachineError(
            f"the GGUF file of a {model_type} model must be checked with llama.cpp",
            where="the Python environment",
            why="the package xllamacpp, which runs llama.cpp, is not installed",
            fix=f"run `{pip_install('xllamacpp')}`, or skip the check with --no-check",
        )


def _write_plan(
    plan: GgufPlan, threads: int, file: Path, progress: Progress = lambda written, size: None
) -> list[str]:
    require_disk_space(file, plan.size, what=file.name, fix=OTHER_DISK)
    write_gguf(plan, file, threads=threads, progress=progress)
    return list(plan.notes)


def _write_checked(
    write: Callable[[Path], list[str]],
    exported: ExportedFile,
    goal: Path,
    tuned: TunedModel,
    kind: str,
    *,
    threads: int,
    device: str | None = None,
    checking: Progress = lambda done, total: None,
    modelfile: str | None = None,
    converter: Converter | None = None,
) -> ExportedFile:
    """Write a GGUF file to a hidden folder, compare it with the tuned model, and rename it.

    Return `exported` with the size of the file, the result of the check, and the notes of the
    writer in addition to its own notes. A file that fails the check is kept as `<goal>.rejected`,
    so that the user can examine it.

    Args:
        write: function that writes the GGUF file to a path, and returns notes for the user.
        exported: the result of the export, as far as it is known.
        goal: the final path of the file, or of the folder if there is a `modelfile`.
        kind: description of the weights' type, for the export record.
        modelfile: text of Ollama's Modelfile.
    """
    torch_device = torch.device(select_device(device))
    with part_folder(goal) as part:
        file = part / Path(exported.file).name
        moved = file
        notes = write(file)
        size = file.stat().st_size
        if modelfile is not None:
            moved = part
            (part / MODELFILE).write_text(modelfile, encoding="utf-8")
            copy_notices(tuned.files.folder, part)
        result = None
        if not exported.unchecked:
            rejected = goal.with_name(f"{goal.name}.rejected")
            try:
                result = check_file(
                    file,
                    tuned,
                    _find_base(tuned),
                    beyond_window=converter is not None,
                    device=torch_device,
                    threads=threads,
                    progress=checking,
                )
                if converter is not None:
                    is_routed = any(layer.experts for layer in tuned.files.spec.layers)
                    require_same_model(result, exported.quant, rejected, is_routed=is_routed)
            except CheckpointError:
                move_into_place(moved, rejected)
                raise
        exported = replace(exported, bytes=size, notes=(*notes, *exported.notes), check=result)
        write_record(file, exported, kind, converter)
        if modelfile is None:
            # Delete the earlier file's record before the rename, so that no record describes a file
            # that is missing or replaced.
            record_path(goal).unlink(missing_ok=True)
        move_into_place(moved, goal)
        if modelfile is None:
            move_into_place(record_path(file), record_path(goal))
    return exported


def _plan_model(tuned: TunedModel, quant: str, name: str) -> GgufPlan:
    settings = tuned.files.folder / "generation_config.json"
    prefix, _ = find_text_model(tuned.model)
    is_text = is_in_text(tuned.model)
    weights = {}
    for weight_name, weight in tuned.weights.items():
        # Leave out the vision weights of a vision-language model.
        if is_text(weight_name):
            weights[_text_only_name(weight_name, prefix)] = weight
    return plan_gguf(
        tuned.model.config.get_text_config().to_dict(),
        weights,
        tuned.tokenizer,
        quant=quant,
        name=name,
        generation=read_json(settings) if settings.is_file() else {},
        turn_end=other_end_id(tuned),
    )


def _text_only_name(name: str, prefix: str) -> str:
    """Return the name that a parameter has in a text-only model.

    `prefix` is the name of the text model in the vision-language model, such as
    `model.language_model`; "" for a text-only model.
    """
    return re.sub(f"^{re.escape(prefix)}[.]", "model.", name)


def _plan_adapter(
    tuned: TunedModel,
    folder: Path,
    name: str,
    converter: str | os.PathLike[str] | None,
    command: str,
) -> GgufPlan:
    """Plan the GGUF file of the adapter in `folder`.

    Args:
        command: the user's command line, for the fix in an error message.
    """
    prefix, _ = find_text_model(tuned.model)
    weights = {}
    with stored_tensors(folder / ADAPTER_WEIGHTS) as stored:
        for stored_name, tensor in stored.items():
            in_text = name_in_text(tuned.model, stored_name.removeprefix(PREFIX))
            in_text = PREFIX + _text_only_name(in_text, prefix)
            weights[in_text] = StoredRows(tensor, torch.float32, tensor.shape)
    target = AdapterTarget(name, read_adapter(folder), len(tuned.recipe.model.added_tokens))
    config = tuned.model.config.get_text_config()
    if gguf_writer(config.model_type) == "own":
        return plan_adapter(config.to_dict(), weights, target)
    found = require_converter(converter, config.model_type, command)
    stated = read_json(tuned.files.folder / MODEL_CONFIG)
    return plan_converted_adapter(stated, config, weights, target, found)


def _find_base(tuned: TunedModel) -> TunedModel | None:
    """Return the model before training.

    Return None if the model was not trained, or if it was fully fine-tuned and its base model is
    not on this machine.
    """
    if tuned.location.holds == "base":
        return None
    if tuned.location.holds == "adapter":
        return tuned
    try:
        # The recipe of a full fine-tune names the base model, but its files may have been deleted.
        return open_tuned_model(read_run_files(replace(tuned.location, holds="base")))
    except TunesmithError:
        return None
