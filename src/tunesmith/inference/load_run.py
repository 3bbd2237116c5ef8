"""Load what a run has written, to chat with it, generate, evaluate or merge.

    RUN  a run directory      its final/, else its newest whole checkpoint
         checkpoint-N, final  as it is; the run's config.yaml is one folder up
         an adapter's folder  PEFT files; adapter_config.json names the base
         a model's folder     Transformers files
         a recipe, a Hub id, a .gguf   the plain base model (only where a command takes one)
         demo                 the demo's model, a plain base too

`locate_run` reads small files only, so that a wrong path is reported before torch is imported;
`load_run` loads. The chat template is always the saved one: the prompt in use is the prompt that
was trained.
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from tunesmith.checkpoint import manifest
from tunesmith.checkpoint.saved_model import find_saved_model
from tunesmith.config.load import load_recipe, untrusted_code
from tunesmith.config.schema import Adapter, Data, Dtype, Model, Run, Source
from tunesmith.data.text import builtin_templates
from tunesmith.errors import CheckpointError, MachineError, ModelError, UsageError
from tunesmith.host import demo_model
from tunesmith.host.files import from_here
from tunesmith.host.logger import lines_by_default
from tunesmith.metrics.result_table import ResultTable, Tabular
from tunesmith.model.safetensors_files import read_json
from tunesmith.quant.schemes import DENSE, scheme_of
from tunesmith.run_dir import RECIPE, held_out_hash, name_a_run

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tunesmith.data.rows.samples import Picture
    from tunesmith.data.text.example import Pixels
    from tunesmith.data.text.placeholders import PictureProcessor
    from tunesmith.data.text.template import Template
    from tunesmith.hub.model_files import ModelFiles
    from tunesmith.methods.base import TrainModel

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.\-]*/[\w.\-]+$")
_SAVED_FOLDER_NAME = re.compile(r"^(final|checkpoint-\d+)$")


@dataclass(frozen=True)
class RunLocation:
    """The place that a path stands for, read from small files alone.

    Attributes:
        holds: PEFT files over a base; a whole model that a run wrote; a plain model.
        folder: the tokenizer and the adapter or model; None for a base that is not a run's.
        base: the base model; where it holds a `full` model, the one it was trained from.
        run: the resolved recipe beside it, if there is one.
        note: which of several candidates was chosen, and why.
        is_worth_telling: the note is for the user: the path stands for a run, or for its recipe,
            and does not hold the last step of a finished one.
    """

    holds: Literal["adapter", "full", "base"]
    folder: Path | None
    base: Model
    run: Run | None = field(default=None, repr=False)
    note: str = ""
    is_worth_telling: bool = False

    @property
    def held_out_hash(self) -> str | None:
        """The hash of the rows that the run held out; None where unknown."""
        return held_out_hash(self.folder.parent) if self.folder else None

    @property
    def dtype(self) -> Dtype:
        """The base's dtype; bf16 where it is `auto`, for what only reads the weights."""
        return "bf16" if self.base.dtype == "auto" else self.base.dtype

    @property
    def sources(self) -> tuple[Source, ...]:
        """The run's own sources: rows of the same shape share their column mappings."""
        return (*self.run.data.validation, *self.run.data.train) if self.run else ()


@dataclass(frozen=True)
class OpenedRun:
    """The run or model that a path stands for, read but for its weights.

    Attributes:
        recipe: by which the model is built; of what no run wrote, too.
        files: of the base, or where all was trained of the trained model, with the saved tokenizer.
        template: the saved one.
    """

    location: RunLocation
    recipe: Run = field(repr=False)
    files: "ModelFiles" = field(repr=False)
    template: "Template" = field(repr=False)

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The saved one, with a padding token."""
        return self.files.tokenizer


@dataclass(frozen=True)
class LoadedModel(OpenedRun, Tabular):
    """A model ready to answer: in eval mode, with an attention that takes padding masks.

    Attributes:
        train_model: the root of training, for losses; see `training_attention`.
    """

    train_model: "TrainModel" = field(repr=False)

    def table(self) -> ResultTable:
        """Show what was loaded, where it is, and how it is prompted."""
        device, dtype = str(self.model.device), str(self.model.dtype).removeprefix("torch.")
        rows = [
            ("model", str(self.location.folder or self.location.base.name)),
            ("kind", self.location.holds),
            ("base", self.location.base.name),
            ("device", f"{device}, in {dtype}"),
            ("next", "list(tunesmith.generate(loaded, [{'prompt': 'Hello'}]))"),
        ]
        if self.location.is_worth_telling:
            rows.insert(1, ("", self.location.note))
        return ResultTable(rows)

    @property
    def model(self) -> "PreTrainedModel":
        """Transformers' causal LM; its linear layers carry the adapter, if there is one."""
        return self.train_model.model

    @property
    def run(self) -> Run | None:
        return self.location.run

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @property
    def context(self) -> int | None:
        """Tokens that the model's positions reach; None where nothing limits them, as in Mamba."""
        try:
            positions = self.model.config.max_position_embeddings
        except AttributeError:
            return None
        return None if positions is None else int(positions)

    @property
    def system(self) -> str | None:
        """The system message that the run gave to rows without one."""
        return self.run.data.system if self.run else None

    def pixels(self, pictures: "tuple[Picture, ...]", where: str = "") -> "Pixels | None":
        """The pictures of a prompt as the model takes them; None of none.

        where: the row's place, for the DataError of a picture that cannot be read.
        """
        from tunesmith.data.batches.pixels import PixelMaker, PixelTask

        if not pictures or self.template.pictures is None:
            return None
        return PixelMaker(self.template.pictures)(PixelTask(pictures, where=where))

    @contextmanager
    def training_attention(self) -> "Iterator[TrainModel]":
        """The root with the attention backend of training, for losses; that of inference again
        afterwards."""
        self.train_model.use_training_attention()
        try:
            yield self.train_model
        finally:
            self.train_model.use_inference_attention()


def check_dtype(dtype: str | None) -> None:
    """UsageError for a dtype of another name than the recipe's."""
    names = get_args(Dtype)
    if dtype is not None and dtype not in names:
        fix = f"use one of {', '.join(names)}"
        raise UsageError(f"there is no dtype {dtype}", where="--dtype", fix=fix)


def locate_run(
    path: str | os.PathLike[str], *, base_only: bool = False, trust_remote_code: bool = False
) -> RunLocation:
    """Find what `path`, one of the forms in the module's docstring, stands for; with `base_only`
    the base of it.

    trust_remote_code: the base may run Python code that comes with it. A run directory that enables
        this itself is refused, because others may have written it.

    Raises:
        UsageError: there is no such path, it is none of these, or its code is not trusted.
        CheckpointError: a run directory without a finished checkpoint, or a damaged one that was
            named.
    """
    path = os.fspath(path)
    place = Path(path)
    if path == demo_model.DEMO_NAME and not _holds_model(place):
        base = Model(name=str(demo_model.demo_model()))
        location = RunLocation(
            "base", None, base, note=f"the demo's model: {demo_model.DEMO_DESCRIPTION}"
        )
    elif place.is_dir():
        if (place / RECIPE).is_file():
            folder, note, is_worth_telling = find_saved_model(place)
            location = replace(_in_folder(folder, note=note), is_worth_telling=is_worth_telling)
        else:
            location = _in_folder(place)
    elif place.is_file() and place.suffix in (".yaml", ".yml"):
        run = load_recipe(place, trusts_code=trust_remote_code or None)
        note = f"the base of the recipe {path}: {run.model.name}"
        has_run = (Path(run.output_dir) / RECIPE).is_file()
        if has_run:
            note += f"; its run is {from_here(run.output_dir)}"
        location = RunLocation("base", None, run.model, run, note, is_worth_telling=has_run)
    elif place.is_file() and place.suffix == ".gguf":
        location = RunLocation("base", None, Model(name=path))
    # A folder of that name wins over a Hub id.
    elif _HUB_ID.match(path) and not place.parent.is_dir():
        location = RunLocation("base", None, Model(name=path), note=_note_of_hub(path))
    elif place.is_file():
        raise _no_model(place, f"{path} is a {place.suffix or 'nameless'} file, not a model")
    else:
        raise _no_model(place, f"there is no {path}")
    if trust_remote_code:
        location = _with_base(location, replace(location.base, trust_remote_code=True))
    elif location.folder and location.base.trust_remote_code:
        recipe = str(location.folder.parent / RECIPE)
        raise untrusted_code(location.base.name, recipe)
    if base_only and location.holds != "base":
        return replace(location, holds="base", note=f"the base of {path}: {location.base.name}")
    return location


def _holds_model(folder: Path) -> bool:
    """Tell whether a folder is a run, an adapter or a model."""
    names = (RECIPE, "adapter_config.json", "config.json")
    return any((folder / name).is_file() for name in names)


def _note_of_hub(name: str) -> str:
    """Say what is known of a name that is no folder's; UsageError if the Hub cannot be asked."""
    from huggingface_hub import constants

    from tunesmith.hub.fetch import repo_cache

    if repo_cache(name).is_dir():
        return f"{name} on the Hub"
    missing = f"there is neither a folder nor a cached model {name}"
    if constants.HF_HUB_OFFLINE:
        fetch = f"HF_HUB_OFFLINE=0 tunesmith fetch {name}"
        fix = f"use the output_dir of a run; or, of a model on the Hub, {fetch}"
        raise UsageError(missing, where=name, fix=fix)
    return f"{missing}: it is looked up on the Hub"


def _no_model(path: Path, what: str) -> UsageError:
    """The error for a path that stands for nothing; it names the folders there."""
    return UsageError(
        what,
        where=str(path),
        why="a run directory, checkpoint, adapter, model folder, recipe (.yaml), .gguf file or "
        "Hub id is needed",
        fix=name_a_run(path),
    )


def require_held_out(location: RunLocation, path: str | Path) -> Run:
    """The recipe of a run; UsageError unless it holds out rows to validate on."""
    run = location.run
    if run is None or not (run.data.validation or run.data.hold_out):
        why = location.note or "it is not a run directory"
        if run:
            why = "its recipe has neither data.validation nor data.hold_out"
        raise UsageError(
            f"{path} has no held-out rows of its own",
            where="--data",
            why=why,
            fix="use a file with answers that it was not trained on: --data FILE",
        )
    return run


def _in_folder(folder: Path, *, note: str = "") -> RunLocation:
    """A checkpoint, an adapter or a model; `note` is that of `find_saved_model`, which has
    checked for damage."""
    recipe = folder.parent / RECIPE
    run = None
    if _SAVED_FOLDER_NAME.match(folder.name) and recipe.is_file():
        run = load_recipe(recipe, trusts_code=True)
        damage = None if note else manifest.find_damage(folder, contents=False)
        if damage:
            raise CheckpointError(
                f"{folder} is incomplete",
                where=str(folder),
                why=damage,
                fix=f"use the run directory {folder.parent}, which loads the newest "
                "complete checkpoint",
                cause="damaged",
            )
    if (folder / "adapter_config.json").is_file():
        base = run.model if run else _base_of_adapter(folder / "adapter_config.json")
        return RunLocation("adapter", folder, base, run, note)
    if (folder / "config.json").is_file():
        base = run.model if run else Model(name=str(folder), dtype=_stored_dtype(folder) or "auto")
        return RunLocation("full" if run else "base", folder, base, run, note)
    if (folder / "state").is_dir():
        raise CheckpointError(
            "this checkpoint has training state only",
            where=str(folder),
            fix=f"use the run directory, which loads a checkpoint with a model: {folder.parent}",
        )
    raise _no_model(
        folder, f"{folder} has no model: no config.yaml, adapter_config.json or config.json"
    )


def _base_of_adapter(file: Path) -> Model:
    values = read_json(file)
    name = values.get("base_model_name_or_path")
    revision = values.get("revision")
    if not isinstance(name, str) or not name:
        raise ModelError(
            "the adapter's base model is unknown",
            where=f"{file}: base_model_name_or_path",
            fix="write the base's Hub id or folder there",
        )
    return Model(
        name=name,
        revision=revision if isinstance(revision, str) else None,
        dtype=_stored_dtype(Path(name)) or "bf16",
    )


def _stored_dtype(folder: Path) -> Dtype | None:
    """The dtype of weights by a model folder's config.json, where that is fp16 or fp32."""
    config = folder / "config.json"
    values = read_json(config) if config.is_file() else {}
    # A vision-language model may have it for its parts alone.
    values = {**(values.get("text_config") or {}), **values}
    names: dict[str, Dtype] = {"float16": "fp16", "float32": "fp32"}
    return names.get(str(values.get("dtype") or values.get("torch_dtype")))


@lines_by_default()
def that_sees(location: RunLocation, rows: Iterable[object]) -> RunLocation:
    """The location, with the vision part of a model that no recipe describes where the first rows
    have pictures.
    """
    from tunesmith.data.rows.picture_places import names_pictures

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
    """Load what `path` stands for.

    >>> tunesmith.load_run("runs/my-run")

    Args:
        path: of a run, a checkpoint, an adapter or a model; or the `Result` of a run.
        device: None takes the GPU where there is one.
        base_only: the base of it, with the tuned model's template, without what was trained.
        dtype: of weights and products: `bf16`, `fp16` or `fp32`. None: the run's, or the model's
            own; for a model of no run in bf16 what `model.dtype: auto` stands for on the device.
        trust_remote_code: run Python code that comes with the base, which you have reviewed.

    Raises:
        UsageError, CheckpointError: as `locate_run`; the run deleted this checkpoint meanwhile.
        ModelError: the base is missing, gated, damaged, or does not fit the adapter; a file differs
            from its checksum.
        MachineError: there is no such device, or the CPU's memory cannot hold the weights.
    """
    check_dtype(dtype)
    # A wrong path is reported before torch is imported.
    location = path
    if not isinstance(location, RunLocation):
        location = locate_run(location, base_only=base_only, trust_remote_code=trust_remote_code)
    import torch

    from tunesmith.build_model import build_model
    from tunesmith.planning.resolve import inference_plan, resolve_dtype_here

    place = torch.device(select_device(device))
    # Until the files are open nobody may delete the checkpoint.
    with undeleted(location):
        if location.base.dtype == "auto":
            chosen = dtype or resolve_dtype_here(location.base, place)
            location = _with_base(location, replace(location.base, dtype=chosen))
        read = read_run_files(location, dtype=dtype)
        _check_room(read.files, place)
        plan = inference_plan(read.recipe, read.files, place)
        train_model, _ = build_model(read.recipe, read.files, plan)
        train_model.eval()
        train_model.use_inference_attention()
        return LoadedModel(location, read.recipe, read.files, read.template, train_model)


def _with_base(location: RunLocation, base: Model) -> RunLocation:
    """Return the location with other settings of its base, also in the recipe of its run."""
    run = location.run
    return replace(location, base=base, run=replace(run, model=base) if run else None)


def read_run_files(location: RunLocation, *, dtype: Dtype | None = None) -> OpenedRun:
    """Check and read all that `location` has but its weights, in a block of `undeleted`.

    Raises: as `load_run`.
    """
    from tunesmith.hub.fetch import fetch
    from tunesmith.model.tokenizer import eos_ids

    if location.base.dtype == "auto":
        location = _with_base(location, replace(location.base, dtype=dtype or location.dtype))
    folder = location.folder
    if folder and location.holds == "base" and folder != Path(location.base.name):
        # The weights are those of the run's base.
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
    # A base may be a model that an earlier run wrote.
    if weights != folder:
        manifest.check_sums(weights)
    saved = folder if folder and (folder / "tokenizer_config.json").is_file() else None
    run, files = _read_files(location, run, weights, saved)
    ends = eos_ids(saved or weights, files.tokenizer) | eos_ids(weights, files.tokenizer)
    template = _template(location, files.tokenizer, ends, saved, files.pictures)
    return OpenedRun(location, run, files, template)


def select_device(device: "str | torch.device | None") -> str:
    """The name of a device of this machine; the GPU where none is named."""
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
            fix="name one of these",
        )
    return str(device)


def _inference_recipe(location: RunLocation, dtype: Dtype | None) -> Run:
    """The recipe by which the model is built: the run's, without what is for training only."""
    from tunesmith.adapter.peft_files import read_adapter

    # Without a run's own recipe there is a placeholder; it needs a source and an output_dir, and
    # neither is read or written.
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
    """The model's files with the `saved` tokenizer, and the recipe with the tokens that it adds."""
    from tunesmith.hub.model_files import read_model_files
    from tunesmith.model.tokenizer import load_tokenizer

    most = run.data.image_max_pixels
    files = read_model_files(weights, run.model, image_max_pixels=most)
    run = replace(run, model=files.model)
    if saved is None:
        return run, files
    tokenizer = load_tokenizer(saved, run.model)
    if location.run is None and run.adapter.modules_to_save:
        # The adapter's tokenizer tells which rows the base lacks, as for PEFT's AutoPeftModel.
        added = tokenizer.convert_ids_to_tokens(range(files.spec.vocab, len(tokenizer)))
        run = replace(run, model=replace(run.model, added_tokens=tuple(added)))
    return run, replace(files, model=run.model, tokenizer=tokenizer)


def _check_room(files: "ModelFiles", device: "torch.device") -> None:
    """MachineError where a CPU cannot hold the dense weights, whatever other programs give back."""
    from tunesmith.model.dtypes import DTYPES
    from tunesmith.runtime.device import host_budget

    model = files.model
    if device.type != "cpu" or scheme_of(model) is not DENSE:
        return
    needed = files.spec.parameters * DTYPES[model.dtype].itemsize
    budget = host_budget()
    if needed > budget.ceiling:
        raise MachineError(
            f"the model does not fit: its weights take {needed / 2**30:.1f} GiB, and "
            f"{budget.ceiling / 2**30:.1f} GiB can be used",
            where=", ".join(filter(None, ["cpu", budget.limit.describe()])),
            why=f"{files.spec.parameters:,} parameters in {model.dtype}",
            fix=budget.limit.fix(needed * 5 // 4 - budget.free)
            or "a smaller model, or a machine with more memory",
        )


@contextmanager
def undeleted(location: RunLocation) -> Iterator[None]:
    """CheckpointError where a run that goes on deletes the checkpoint in the block: some of its
    files went unread."""
    fault: Exception | None = None
    try:
        yield
    except Exception as error:
        fault = error
    folder = location.folder
    # The manifest is the first file that is deleted.
    if location.run and folder and not (folder / manifest.MANIFEST).is_file():
        raise CheckpointError(
            f"{folder.name} was deleted while it was read",
            where=str(folder),
            why="its run is still training and keeps only the newest checkpoints (checkpoint.keep)",
            fix=f"try again, with the run directory: {folder.parent}",
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
    """The template in use: what a run has written holds it as the tokenizer's chat template."""
    from tunesmith.data.text.select_template import select_template
    from tunesmith.data.text.template import Template

    jinja = tokenizer.chat_template
    run = location.run
    data = run.data if run else Data(train=(Source(source="none"),))
    if saved is not None:
        # A run whose folder has no chat template was trained without one.
        is_raw = jinja is None and run is not None
        if isinstance(jinja, str):
            is_raw = builtin_templates.is_raw(jinja)
        if is_raw:
            data = replace(data, template="raw", template_args={}, system=None)
        else:
            # Its arguments are a part of the saved template.
            data = replace(data, template="auto", template_args={})
    template = select_template(data, tokenizer, ends, pictures)
    if saved is not None and template.jinja is not None and "message.input" in template.jinja:
        # One of our own texts, with instruction and input apart: rows must reach it in that form,
        # as in training.
        alpaca_texts = [builtin_templates.alpaca(bos=bos) for bos in (True, False)]
        name = "alpaca" if template.jinja in alpaca_texts else "pattern"
        template = Template(tokenizer, ends, jinja=template.jinja, name=name, pictures=pictures)
    # A base model without a template gets unchanged prompts; its chats take the alpaca
    # text.
    template.raw |= run is None and jinja is None
    return template
