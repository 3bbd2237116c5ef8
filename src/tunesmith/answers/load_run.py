"""Loader of trained models, for chat, generation, evaluation and merging.

A path RUN can be:

    a run directory          loads final/, else the newest complete checkpoint
    checkpoint-N or final    loads this folder; the run's config.yaml is in the parent folder
    an adapter folder        PEFT files; adapter_config.json names the base model
    a model folder           Transformers files
    a Hub id                 loads the base model (only if the command accepts a base model)
    demo                     loads the demo's base model

`locate_run` reads only small files, so that a wrong path is reported before torch is imported.
`load_run` loads the model. It uses the saved chat template, so that prompts are the same as in
training.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from tunesmith.checkpoint import manifest
from tunesmith.checkpoint.saved_model import find_saved_model
from tunesmith.config.load import load_recipe
from tunesmith.config.paths import gguf_fix
from tunesmith.config.schema import Adapter, Data, Dtype, Model, Run, Source
from tunesmith.config.trust import untrusted_code
from tunesmith.errors import CheckpointError, MachineError, ModelError, UsageError
from tunesmith.host import demo_model
from tunesmith.host.logger import lines_by_default
from tunesmith.metrics.result_table import ResultTable, Tabular
from tunesmith.model.weights.safetensors_files import read_json
from tunesmith.quant.schemes import DENSE, scheme_of
from tunesmith.run_dir import RECIPE, held_out_hash, suggest_run
from tunesmith.tokens.text import builtin_templates

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tunesmith.answers.sampler import Prompt
    from tunesmith.hub.model_files import ModelFiles
    from tunesmith.rows.samples import Picture
    from tunesmith.tokens.text.placeholders import PictureProcessor
    from tunesmith.tokens.text.template import Template
    from tunesmith.train_model import TrainModel

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.\-]*/[\w.\-]+$")
_SAVED_FOLDER_NAME = re.compile(r"^(final|checkpoint-\d+)$")


@dataclass(frozen=True)
class RunLocation:
    """Location of the model that a path names. It is found by reading only small files.

    Attributes:
        holds: "adapter": PEFT files; "full": a complete model that a run wrote; "base": a base
            model.
        folder: folder with the tokenizer and the adapter or model; None if the model is not in a
            local Transformers or PEFT folder.
        base: the base model. For a "full" model this is the model before training.
        run: the resolved recipe of the run; None if there is no recipe.
        note: text that says which of several folders was chosen, and why.
        is_note_shown: whether the note is shown to the user. True if the path is a run directory
            and the chosen model is not the last step of a finished run.
    """

    holds: Literal["adapter", "full", "base"]
    folder: Path | None
    base: Model
    run: Run | None = field(default=None, repr=False)
    note: str = ""
    is_note_shown: bool = False

    @property
    def held_out_hash(self) -> str | None:
        """Hash of the rows that the run held out; None if unknown."""
        return held_out_hash(self.folder.parent) if self.folder else None

    @property
    def dtype(self) -> Dtype:
        """Dtype of the base model, or bf16 if `model.dtype` is `auto`.

        Use it only to read or convert the weights. It does not consider what the device supports.
        """
        return "bf16" if self.base.dtype == "auto" else self.base.dtype

    @property
    def sources(self) -> tuple[Source, ...]:
        """Data sources of the run.

        New rows with the same columns use the column mappings of these sources.
        """
        return (*self.run.data.validation, *self.run.data.train) if self.run else ()


@dataclass(frozen=True)
class OpenedRun:
    """A run or model. All its files have been read, except for the weights.

    Attributes:
        location: the location of the model.
        recipe: the recipe from which the model is built. For a base model, it has default values.
        files: the files of the base model, or of the fully fine-tuned model, with the saved
            tokenizer.
        template: the saved chat template.
    """

    location: RunLocation
    recipe: Run = field(repr=False)
    files: "ModelFiles" = field(repr=False)
    template: "Template" = field(repr=False)

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Saved tokenizer, with a padding token."""
        return self.files.tokenizer


@dataclass(frozen=True)
class LoadedModel(OpenedRun, Tabular):
    """Loaded model in eval mode, with an attention implementation that supports padding masks.

    Attributes:
        train_model: the root module that training uses. Losses and answers are computed by it.
    """

    train_model: "TrainModel" = field(repr=False)

    def table(self) -> ResultTable:
        """Return a table with the loaded model, its base, its device and an example call."""
        device, dtype = str(self.model.device), str(self.model.dtype).removeprefix("torch.")
        rows = [
            ("model", str(self.location.folder or self.location.base.name)),
            ("kind", self.location.holds),
            ("base", self.location.base.name),
            ("device", f"{device}, in {dtype}"),
            ("next", "list(tunesmith.generate(loaded, [{'prompt': 'Hello'}]))"),
        ]
        if self.location.is_note_shown:
            rows.insert(1, ("", self.location.note))
        return ResultTable(rows)

    @property
    def model(self) -> "PreTrainedModel":
        """Causal LM of Transformers. Its linear layers contain the adapter, if there is one."""
        return self.train_model.model

    @property
    def run(self) -> Run | None:
        return self.location.run

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @property
    def context(self) -> int | None:
        """Maximum number of tokens of the model's context; None if it is unlimited, as in Mamba."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        return None if positions is None else int(positions)

    @property
    def system(self) -> str | None:
        """System message that the run added to rows without a system message."""
        return self.run.data.system if self.run else None

    def prompt(
        self, ids: Sequence[int], pictures: "tuple[Picture, ...]", where: str = "", row: int = 0
    ) -> "Prompt":
        """Return a prompt for the sampler.

        Args:
            where: file and line of the row, for the error message of a picture.
            row: index of the row, on which the draws depend.
        """
        from tunesmith.answers.sampler import Prompt
        from tunesmith.batches.pixels import PicturesOfPrompt, PixelTask

        processor = self.template.pictures
        if not pictures or processor is None:
            return Prompt(ids, row)
        return Prompt(ids, row, PicturesOfPrompt(processor, PixelTask(pictures, where=where)))


def check_dtype(dtype: str | None) -> None:
    """Raise UsageError if `dtype` is not one of the dtypes of a recipe. None is allowed."""
    names = get_args(Dtype)
    if dtype is not None and dtype not in names:
        raise UsageError(
            f"there is no dtype {dtype}", where="--dtype", fix=f"use one of {', '.join(names)}"
        )


def locate_run(
    path: str | os.PathLike[str], *, base_only: bool = False, trust_remote_code: bool = False
) -> RunLocation:
    """Find the model that `path` names. The module's docstring lists the supported paths.

    Args:
        base_only: locate the base model instead of the trained model.
        trust_remote_code: run Python code that comes with the base model. If it is False, a run
            directory whose recipe enables the code is refused, because another person may have
            written the recipe.

    Raises:
        UsageError: the path does not exist or is not supported, or its code is not trusted.
        CheckpointError: the run directory has no complete checkpoint, or the given checkpoint is
            damaged.
    """
    path = os.fspath(path)
    local_path = Path(path)
    # A run directory, an adapter folder and a model folder have one of these files.
    names = (RECIPE, "adapter_config.json", "config.json")
    if path == demo_model.DEMO_NAME and not any((local_path / n).is_file() for n in names):
        note = f"the demo's model: {demo_model.DEMO_DESCRIPTION}"
        location = RunLocation("base", None, Model(name=str(demo_model.demo_model())), note=note)
    elif local_path.is_dir():
        if (local_path / RECIPE).is_file():
            folder, note, is_note_shown = find_saved_model(local_path)
            location = replace(_in_folder(folder, note=note), is_note_shown=is_note_shown)
        else:
            location = _in_folder(local_path)
    # A local folder has priority over a Hub id with the same name. Run directories are in `runs/`.
    elif _HUB_ID.match(path) and not (path.startswith("runs/") or local_path.parent.is_dir()):
        location = RunLocation("base", None, Model(name=path), note=_hub_note(path))
    elif local_path.is_file():
        raise _no_model(
            local_path, f"{path} is a {local_path.suffix or 'nameless'} file, not a model"
        )
    else:
        raise _no_model(local_path, f"there is no {path}")
    if trust_remote_code:
        location = _with_base(location, replace(location.base, trust_remote_code=True))
    elif location.folder and location.base.trust_remote_code:
        recipe = str(location.folder.parent / RECIPE)
        raise untrusted_code("model.trust_remote_code", location.base.name, recipe)
    if base_only and location.holds != "base":
        return replace(location, holds="base", note=f"the base of {path}: {location.base.name}")
    return location


def _hub_note(name: str) -> str:
    """Return a text that says whether a Hub id is in the cache.

    Raise UsageError if it is not in the cache and HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants

    from tunesmith.hub.fetch import repo_cache

    if repo_cache(name).is_dir():
        return f"{name} on the Hub"
    missing = f"there is neither a folder nor a cached model {name}"
    if constants.HF_HUB_OFFLINE:
        fetch = f"HF_HUB_OFFLINE=0 tunesmith fetch {name}"
        raise UsageError(
            missing,
            where=name,
            fix=f"use the output_dir of a run, or download a model from the Hub with `{fetch}`",
        )
    return f"{missing}: the model is looked up on the Hub"


def _no_model(path: Path, what: str) -> UsageError:
    """Build the error for a path that is not a model. The fix lists run directories nearby."""
    return UsageError(
        what,
        where=path,
        why="a run directory, checkpoint, adapter, model folder or Hub id is needed",
        fix=gguf_fix(path.parent, path.name) if path.suffix == ".gguf" else suggest_run(path),
    )


def require_held_out(location: RunLocation, path: str | Path) -> Run:
    """Return the recipe of a run. Raise UsageError if the run has no held-out rows."""
    run = location.run
    if run is None or not (run.data.validation or run.data.hold_out):
        why = location.note or f"{path} is not a run directory"
        if run:
            why = "the run's recipe has neither data.validation nor data.hold_out"
        raise UsageError(
            f"{path} has no held-out rows",
            where="--data",
            why=why,
            fix="give --data FILE with rows that the run was not trained on",
        )
    return run


def _in_folder(folder: Path, *, note: str = "") -> RunLocation:
    """Return the location of a checkpoint, adapter or model folder.

    Args:
        note: the note that `find_saved_model` has returned. If it is given, the folder is not
            checked for damage again.

    Raises:
        CheckpointError: the checkpoint is damaged, or it has no model.
        UsageError: the folder has no model.
    """
    recipe = folder.parent / RECIPE
    run = None
    if _SAVED_FOLDER_NAME.match(folder.name) and recipe.is_file():
        run = load_recipe(recipe, trusts_code=True)
        damage = None if note else manifest.find_damage(folder, contents=False)
        if damage:
            raise CheckpointError(
                f"{folder} is incomplete",
                where=folder,
                why=damage,
                fix=f"use the run directory {folder.parent}, which loads the newest "
                "complete checkpoint",
                cause="damaged",
            )
    if (folder / "adapter_config.json").is_file():
        base = run.model if run else _adapter_base(folder / "adapter_config.json")
        return RunLocation("adapter", folder, base, run, note)
    if (folder / "config.json").is_file():
        base = run.model if run else Model(name=str(folder), dtype=_stored_dtype(folder) or "auto")
        return RunLocation("full" if run else "base", folder, base, run, note)
    if (folder / "state").is_dir():
        raise CheckpointError(
            "this checkpoint has no model, only training state",
            where=folder,
            fix=f"give the run directory {folder.parent}, which has a checkpoint with a model",
        )
    raise _no_model(
        folder, f"{folder} has no model: it has no config.yaml, adapter_config.json or config.json"
    )


def _adapter_base(file: Path) -> Model:
    values = read_json(file)
    name = values.get("base_model_name_or_path")
    revision = values.get("revision")
    if not isinstance(name, str) or not name:
        raise ModelError(
            "the adapter's base model is unknown",
            where=f"{file}: base_model_name_or_path",
            fix="set base_model_name_or_path to the base's Hub id or folder",
        )
    return Model(
        name=name,
        revision=revision if isinstance(revision, str) else None,
        dtype=_stored_dtype(Path(name)) or "bf16",
    )


def _stored_dtype(folder: Path) -> Dtype | None:
    """Return the dtype in a model folder's config.json if it is fp16 or fp32, else None."""
    config = folder / "config.json"
    values = read_json(config) if config.is_file() else {}
    # In the config of a vision-language model, the dtype may be only in the section of the text
    # model.
    values = {**(values.get("text_config") or {}), **values}
    names: dict[str, Dtype] = {"float16": "fp16", "float32": "fp32"}
    return names.get(str(values.get("dtype") or values.get("torch_dtype")))


@lines_by_default()
def add_vision_if_needed(location: RunLocation, rows: Iterable[object]) -> RunLocation:
    """Enable the vision encoder of a model without a recipe, if a row has pictures."""
    from tunesmith.rows.picture_places import names_pictures

    if location.run is None and any(map(names_pictures, rows)):
        return replace(location, base=replace(location.base, vision=True))
    return location


def load_run(
    path: str | os.PathLike[str] | RunLocation,
    *,
    device: "str | torch.device | None" = None,
    base_only: bool = False,
    dtype: Dtype | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load the model of a run, a checkpoint, an adapter folder or a model folder.

    >>> tunesmith.load_run("runs/my-run")

    Args:
        path: path of a run, a checkpoint, an adapter or a model; or the `Result` of a run.
        device: the device, such as "cuda:1" or "cpu"; None: the GPU if there is one.
        base_only: load the base model instead of the trained model, with the chat template of the
            trained model.
        dtype: dtype of weights and matmuls: `bf16`, `fp16` or `fp32`. None: the dtype of the run
            or of the model. For a bf16 model without a run, None chooses as `model.dtype: auto`.
        trust_remote_code: run Python code that comes with the base model, which you have reviewed.

    Raises:
        UsageError, CheckpointError: as `locate_run`. Also CheckpointError if the run deleted the
            checkpoint while it was read.
        ModelError: the base model is missing, gated or damaged, or does not match the adapter; or a
            file differs from its checksum.
        MachineError: the device does not exist, or the CPU's memory cannot hold the weights.
    """
    check_dtype(dtype)
    # Locate the run first, so that a wrong path is reported before torch is imported.
    location = path
    if not isinstance(location, RunLocation):
        location = locate_run(location, base_only=base_only, trust_remote_code=trust_remote_code)
    import torch

    from tunesmith.build_model import build_model
    from tunesmith.planning.resolve import inference_plan, resolve_dtype_here

    torch_device = torch.device(select_device(device))
    # If the run is still training, it may delete the checkpoint while this function reads it.
    with raise_if_deleted(location):
        if location.base.dtype == "auto":
            chosen = dtype or resolve_dtype_here(location.base, torch_device)
            location = _with_base(location, replace(location.base, dtype=chosen))
        read = read_run_files(location, dtype=dtype)
        _check_memory(read.files, torch_device)
        plan = inference_plan(read.recipe, read.files, torch_device)
        train_model, _ = build_model(read.recipe, read.files, plan)
        train_model.eval()
        train_model.use_attention("generate")
        return LoadedModel(**vars(read), train_model=train_model)


def _with_base(location: RunLocation, base: Model) -> RunLocation:
    """Return a location with `base` as the base model, both in the location and in its recipe."""
    run = location.run
    return replace(location, base=base, run=replace(run, model=base) if run else None)


def read_run_files(location: RunLocation, *, dtype: Dtype | None = None) -> OpenedRun:
    """Check and read all files of a run or model, except for the weights.

    Call this inside `raise_if_deleted`. The errors are those of `load_run`.
    """
    from tunesmith.hub.fetch import fetch
    from tunesmith.model.arch.tokenizer import eos_ids

    if location.base.dtype == "auto":
        location = _with_base(location, replace(location.base, dtype=dtype or location.dtype))
    folder = location.folder
    if folder and location.holds == "base" and folder != Path(location.base.name):
        # Only the weights of the base model are used. Do not check the trained weights in this
        # folder, because they are not read.
        manifest.check_sums(
            folder,
            reads=lambda name: (
                not name.startswith("state/") and Path(name).suffix != ".safetensors"
            ),
        )
    elif folder:
        manifest.check_sums(folder)
    run = _inference_recipe(location, dtype)
    weights = folder if location.holds == "full" and folder else fetch(location.base)
    # The base model may be the result of an earlier run. Check its files too.
    if weights != folder:
        manifest.check_sums(weights)
    saved = folder if folder and (folder / "tokenizer_config.json").is_file() else None
    run, files = _read_files(location, run, weights, saved)
    ends = eos_ids(saved or weights, files.tokenizer) | eos_ids(weights, files.tokenizer)
    template = _template(location, files.tokenizer, ends, saved, files.pictures)
    return OpenedRun(location, run, files, template)


def select_device(device: "str | torch.device | None") -> str:
    """Return the name of the device, or the default device if `device` is None.

    The default is the first GPU, else the CPU. Raise MachineError if the device does not exist.
    """
    import torch

    names = ["cpu"]
    if torch.cuda.device_count():
        names = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), "cpu"]
    if device is None:
        return names[0]
    if str(device) not in names:
        raise MachineError(
            f"there is no device {device}",
            where="--device",
            why=f"this machine has {', '.join(names)}",
            fix="use one of these devices",
        )
    return str(device)


def _inference_recipe(location: RunLocation, dtype: Dtype | None) -> Run:
    """Return the recipe that the model is built from, with recomputation and compilation off."""
    from tunesmith.adapter.peft_files import read_adapter

    # A model without a run gets a placeholder recipe. A recipe must have a source and an
    # output_dir, but they are not used.
    run = location.run or Run(
        model=location.base, data=Data(train=(Source(source="none"),)), output_dir="."
    )
    adapter = Adapter(kind="none")
    if location.holds == "adapter" and location.folder:
        adapter = replace(read_adapter(location.folder), from_=str(location.folder))
    return replace(
        run,
        model=replace(run.model, dtype=dtype or run.model.dtype),
        adapter=adapter,
        train=replace(run.train, recompute="none", compile="off"),
    )


def _read_files(
    location: RunLocation, run: Run, weights: Path, saved: Path | None
) -> "tuple[Run, ModelFiles]":
    """Read the model's files and the tokenizer.

    Args:
        weights: the folder of the weights.
        saved: the folder of the saved tokenizer; None: the tokenizer of the base model.

    Return two values: the recipe, with the tokenizer's added tokens, and the files.
    """
    from tunesmith.hub.model_files import read_model_files
    from tunesmith.model.arch.tokenizer import load_original_tokenizer

    max_pixels = run.data.image_max_pixels
    files = read_model_files(weights, run.model, image_max_pixels=max_pixels)
    run = replace(run, model=files.model)
    if saved is None:
        return run, files
    tokenizer = load_original_tokenizer(saved, run.model)
    if location.run is None and run.adapter.modules_to_save:
        # Treat tokens of the adapter's tokenizer that the base model lacks as added tokens. The
        # embedding is resized to the size of the tokenizer, as in PEFT's AutoPeftModel.
        added = tokenizer.convert_ids_to_tokens(range(files.spec.vocab, len(tokenizer)))
        run = replace(run, model=replace(run.model, added_tokens=tuple(added)))
    return run, replace(files, model=run.model, tokenizer=tokenizer)


def _check_memory(files: "ModelFiles", device: "torch.device") -> None:
    """Raise MachineError if the memory of the machine cannot hold the weights on the CPU.

    The check uses the total memory, because other programs may free the memory that they use now.
    Models in a quantized format are not checked.
    """
    from tunesmith.model.known.dtypes import DTYPES
    from tunesmith.runtime.device import host_budget

    model = files.model
    if device.type != "cpu" or scheme_of(model) is not DENSE:
        return
    needed = files.spec.parameters * DTYPES[model.dtype].itemsize
    budget = host_budget()
    if needed > budget.ceiling:
        raise MachineError(
            f"the model does not fit into memory: its weights take {needed / 2**30:.1f} GiB, but "
            f"only {budget.ceiling / 2**30:.1f} GiB can be used",
            where=", ".join(filter(None, ["cpu", budget.limit.describe()])),
            why=f"the model has {files.spec.parameters:,} parameters in {model.dtype}",
            fix=budget.limit.fix(needed * 5 // 4 - budget.free)
            or "use a smaller model, or a machine with more memory",
        )


@contextmanager
def raise_if_deleted(location: RunLocation) -> Iterator[None]:
    """Raise CheckpointError if the run deletes the checkpoint while the block reads it.

    A run that is still training deletes old checkpoints, so some files may not have been read.
    """
    fault: Exception | None = None
    try:
        yield
    except Exception as error:
        fault = error
    folder = location.folder
    # When the run deletes a checkpoint, it deletes the manifest first. If the manifest is missing,
    # the run has begun to delete the checkpoint.
    if location.run and folder and not (folder / manifest.MANIFEST).is_file():
        raise CheckpointError(
            f"{folder.name} was deleted while it was being read",
            where=folder,
            why="the run is still training and keeps only the newest checkpoints (checkpoint.keep)",
            fix=f"try again with the run directory {folder.parent}",
        ) from fault
    if fault:
        raise fault


def _template(
    location: RunLocation,
    tokenizer: "PreTrainedTokenizerBase",
    ends: set[int],
    saved: Path | None,
    pictures: "PictureProcessor | None",
) -> "Template":
    """Return the chat template of the model. A run saves this template in its tokenizer.

    Args:
        ends: token ids that end an answer.
        saved: the folder of the saved tokenizer, or None.
    """
    from tunesmith.tokens.text.select_template import select_template
    from tunesmith.tokens.text.template import Template

    jinja = tokenizer.chat_template
    run = location.run
    data = run.data if run else Data(train=(Source(source="none"),))
    if saved is not None:
        # If the run saved no chat template, it was trained without a template.
        is_raw = jinja is None and run is not None
        if isinstance(jinja, str):
            is_raw = builtin_templates.is_raw(jinja)
        if is_raw:
            data = replace(data, template="raw", template_args={}, system=None)
        else:
            # Drop the template arguments, because the saved template already contains them.
            data = replace(data, template="auto", template_args={})
    template = select_template(data, tokenizer, ends, pictures)
    if saved is not None and template.jinja is not None and "message.input" in template.jinja:
        # The saved template is one of tunesmith's templates that take instruction and input
        # separately. Set its name, so that rows are converted as in training.
        alpaca_texts = [builtin_templates.alpaca(bos=bos) for bos in (True, False)]
        name = "alpaca" if template.jinja in alpaca_texts else "pattern"
        template = Template(tokenizer, ends, jinja=template.jinja, name=name, pictures=pictures)
    # If a base model has no chat template, its prompts are not changed, and chats are rendered as
    # alpaca text.
    template.raw |= run is None and jinja is None
    return template
