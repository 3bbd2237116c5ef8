"""Open what a run has written, to chat with it, generate, evaluate or merge.

    RUN  a run directory      its final/, else its newest whole checkpoint
         checkpoint-N, final  as it stands; the run's config.yaml lies one folder up
         an adapter's folder  PEFT files; the base is the one that adapter_config.json names
         a model's folder     Transformers files
         a recipe, a Hub id, a .gguf   the plain base model (only where a command takes one)

`locate` looks at files only, so that a wrong path is told before anything heavy is imported; `open_model` loads.
The chat template is always the saved one: the prompt in use is the prompt that was trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.checkpoint import state
from tunesmith.config.schema import Adapter, Data, Model, Run, Source
from tunesmith.errors import CheckpointError, MachineError, ModelError, UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tunesmith.data.template import Template
    from tunesmith.methods.base import TrainModel

Kind = Literal["adapter", "full", "base"]
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.\-]*/[\w.\-]+$")
_OURS = re.compile(r"^(final|checkpoint-\d+)$")
_HERE = "."  # output_dir of a Run that is made up for loading: nothing is ever written there


@dataclass(frozen=True)
class RunLocation:
    """What a path stands for, told from files alone.

    Attributes:
        kind: adapter (PEFT files over a base), full (a whole model that a run wrote), base (a plain model).
        folder: where the tokenizer and the adapter or model lie; None for a base that is not a run's.
        base: the base model, as a recipe writes it; for `full`, what it was trained from if the run says so, else
            the folder itself.
        run: the resolved recipe beside it, if there is one.
        note: a line for the user: which of several was taken, and why.
    """

    kind: Kind
    folder: Path | None
    base: Model
    run: Run | None
    note: str


@dataclass
class LoadedModel:
    """A model ready to answer, in eval mode, its attention set to sdpa (which takes padding masks).

    Attributes:
        model: Transformers' causal LM; for kind `adapter` its linear layers carry the adapter.
        train_model: the same model below the root that training uses, for losses; see `for_loss`.
        tokenizer: the saved one.
        template: the saved one.
        run: the resolved recipe, where known.
        base_name: what the base is called in a recipe.
        kind: see Place.
        place: where it came from.
        folder: where the weights were read from: the base's files, or for kind `full` the trained ones.
    """

    model: PreTrainedModel
    train_model: TrainModel
    tokenizer: PreTrainedTokenizerBase
    template: Template
    run: Run | None
    base_name: str
    kind: Kind
    place: RunLocation
    folder: Path

    @property
    def pad_id(self) -> int:
        """The padding token; `load_tokenizer` has seen to it that there is one."""
        return int(self.tokenizer.pad_token_id)


def locate_run(path: str | Path, *, base_only: bool = False) -> RunLocation:
    """Tell what `path` stands for.

    Args:
        path: one of the forms in this file's opening text.
        base_only: take the base instead of what was trained from it.

    Raises:
        UsageError: there is no such path, or it is none of these.
        CheckpointError: a run directory without a finished checkpoint, or a torn one was asked for by name.
    """
    place = _locate(path)
    if base_only and place.kind != "base":
        return replace(place, kind="base", note=f"the base of {path}: {place.base.name}")
    return place


def _locate(path: str | Path) -> RunLocation:
    folder = Path(path)
    if folder.is_dir():
        if (folder / "config.yaml").is_file():
            return _from_run(folder)
        return _from_folder(folder, note="")
    if folder.is_file():
        return _from_file(folder)
    text = str(path)
    if _HUB_ID.match(text) and not folder.parent.is_dir():
        return RunLocation("base", None, Model(name=text), None, f"{text} on the Hub")
    raise UsageError(
        f"there is no {text}",
        where=text,
        why="neither a run directory, a checkpoint, an adapter, a model, a recipe nor a Hub id",
        fix=_nearby(folder),
    )


def _nearby(folder: Path) -> str:
    parent = folder.parent
    names = sorted(p.name for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else []
    if names:
        return f"{parent} holds: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
    return "give the output_dir of a run, as `tunesmith train` printed it"


def _from_file(path: Path) -> RunLocation:
    from tunesmith.config.load import load_recipe

    if path.suffix == ".gguf":
        return RunLocation("base", None, Model(name=str(path)), None, "")
    if path.suffix in {".yaml", ".yml"}:
        run = load_recipe(path)
        return RunLocation("base", None, run.model, run, f"the base of the recipe {path}: {run.model.name}")
    raise UsageError(
        f"{path} is a {path.suffix or 'nameless'} file, not a model",
        where=str(path),
        fix="give a run directory, a checkpoint, an adapter's or model's folder, a recipe (.yaml) or a .gguf",
    )


def _from_run(folder: Path) -> RunLocation:
    order = [folder / "final", *(found.path for found in state.list_checkpoints(folder))]
    torn = []
    for candidate in order:
        if not candidate.is_dir():
            continue
        fault = state.find_damage(candidate, contents=False)
        if fault is not None:
            torn.append(f"{candidate.name}: {fault}")
            continue
        if not _written(candidate):
            torn.append(f"{candidate.name}: holds training state only")
            continue
        skipped = f" (skipped {'; '.join(torn)})" if torn else ""
        return _from_folder(candidate, note=f"from {candidate}{skipped}")
    raise CheckpointError(
        "this run has no finished checkpoint",
        where=str(folder),
        why="; ".join(torn) or "neither final/ nor a checkpoint-N/ is there",
        fix=f"go on with it: tunesmith train {folder / 'config.yaml'}",
    )


def _written(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file()


def _from_folder(folder: Path, *, note: str) -> RunLocation:
    ours = _OURS.match(folder.name) is not None
    run = _run_beside(folder) if ours else None
    if ours and run is not None and not note and (fault := state.find_damage(folder, contents=False)):
        raise CheckpointError(
            f"{folder} is not whole",
            where=str(folder),
            why=fault,
            fix=f"give the run directory {folder.parent}, which takes the newest whole one",
        )
    if (folder / "adapter_config.json").is_file():
        base = run.model if run else _base_of_adapter(folder / "adapter_config.json")
        return RunLocation("adapter", folder, base, run, note)
    if (folder / "config.json").is_file():
        if run is not None:
            return RunLocation("full", folder, run.model, run, note)
        return RunLocation("base", folder, _model_in(folder), None, note)
    if (folder / "state").is_dir():
        raise CheckpointError(
            "this checkpoint holds training state only",
            where=str(folder),
            why="a sharded full fine-tune writes Transformers files in final/ and by export",
            fix=f"tunesmith export {folder}",
        )
    raise UsageError(
        f"{folder} holds no model",
        where=str(folder),
        why="there is neither config.yaml (a run), adapter_config.json (an adapter) nor config.json (a model) in it",
        fix=_nearby(folder / "x") if any(p.is_dir() for p in folder.iterdir()) else _nearby(folder),
    )


def _run_beside(folder: Path) -> Run | None:
    from tunesmith.config.load import load_recipe

    recipe = folder.parent / "config.yaml"
    return load_recipe(recipe) if recipe.is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(
            f"{path.name} cannot be read", where=str(path), why=str(error), fix="write it again"
        ) from error
    if not isinstance(values, dict):
        raise ModelError(f"{path.name} is not a JSON object", where=str(path), fix="write it again")
    return values


def _base_of_adapter(path: Path) -> Model:
    values = _read_json(path)
    name = values.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ModelError(
            "the adapter does not name its base model",
            where=f"{path}: base_model_name_or_path",
            fix='write the base\'s Hub id or folder there: "base_model_name_or_path": "..."',
        )
    revision = values.get("revision")
    return Model(name=name, revision=revision if isinstance(revision, str) else None, dtype=_dtype_of(Path(name)))


def _model_in(folder: Path) -> Model:
    return Model(name=str(folder), dtype=_dtype_of(folder))


def _dtype_of(folder: Path) -> Literal["bf16", "fp16", "fp32"]:
    """What a model folder says its weights are; bf16 where it cannot be told without asking the Hub."""
    config = folder / "config.json"
    values = _read_json(config) if config.is_file() else {}
    told = values.get("dtype") or values.get("torch_dtype")
    return {"float16": "fp16", "float32": "fp32"}.get(str(told), "bf16")  # type: ignore[return-value]


# --- loading --------------------------------------------------------------------------------------------------------


def load_run(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    base_only: bool = False,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    place: RunLocation | None = None,
) -> LoadedModel:
    """Load what `path` stands for.

    Args:
        path: see this file's opening text.
        device: where to; None takes the GPU where there is one.
        base_only: the base of it, in the tuned model's template, without what was trained.
        dtype: of weights and products; None takes the run's or the model's own.
        place: from `locate`, where that was called already.

    Raises:
        UsageError, CheckpointError: as `locate`.
        ModelError: the base is missing, gated, damaged, or does not fit the adapter.
    """
    from tunesmith.build_model import build_model
    from tunesmith.hub.fetch import fetch
    from tunesmith.model.tokenizer import eos_ids, load_tokenizer

    chosen = device_of(device)
    place = place or locate_run(path, base_only=base_only)
    run = _as_run(place, dtype)
    weights = place.folder if place.kind == "full" and place.folder else fetch(place.base)
    saved = place.folder if place.folder and (place.folder / "tokenizer_config.json").is_file() else None
    train_model = build_model(run, weights, device=chosen)
    train_model.eval()
    train_model.model.set_attn_implementation("sdpa")
    tokenizer = load_tokenizer(saved or weights, replace(run.model, tokenizer=None) if saved else run.model)
    template = _template(run.data, tokenizer, eos_ids(saved or weights, tokenizer) | eos_ids(weights, tokenizer), saved)
    return LoadedModel(
        train_model.model, train_model, tokenizer, template, place.run, place.base.name, place.kind, place, weights
    )


def device_of(name: str | torch.device | None) -> torch.device:
    """The device by its name; None takes the GPU where there is one.

    Raises:
        MachineError: there is no such device here.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if str(name) not in there and not (str(name) == "cuda" and len(there) > 1):
        raise MachineError(
            f"there is no device {name}",
            where="--device",
            why=f"this machine has {', '.join(there)}",
            fix="name one of these",
        )
    return torch.device(name)


def _template(data: Data, tokenizer: Any, ends: set[int], saved: Path | None) -> Template:
    """The template in use; what a run has written holds it as the tokenizer's chat template.

    The system message is left to the caller, who may want another one, or none.
    """
    from tunesmith.data import builtin_templates
    from tunesmith.data.template import Template, select_template

    data = replace(data, system=None, template="auto" if saved else data.template)
    chosen = select_template(data, tokenizer, ends)
    if saved is None or chosen.jinja is None or "message.input" not in chosen.jinja:
        return chosen
    # A text of our own that lays out instruction and input apart: rows must come to it in that form, as in training.
    ours = any(chosen.jinja == builtin_templates.alpaca(bos=bos) for bos in (True, False))
    return Template(tokenizer, ends, jinja=chosen.jinja, name="alpaca" if ours else "pattern")


def _as_run(place: RunLocation, dtype: Literal["bf16", "fp16", "fp32"] | None) -> Run:
    """The recipe that builds this model: the run's own, or one made up for an adapter's or a model's folder."""
    from tunesmith.adapter.peft_files import read_adapter

    run = place.run or Run(model=place.base, data=Data(train=(Source(source="none"),)), output_dir=_HERE)
    adapter = Adapter(kind="none")
    if place.kind == "adapter" and place.folder is not None:
        adapter = replace(read_adapter(place.folder), from_=str(place.folder))
    model = replace(run.model, dtype=dtype or run.model.dtype)
    return replace(run, model=model, adapter=adapter, train=replace(run.train, recompute="none", compile="off"))


@contextmanager
def for_loss(opened: LoadedModel) -> Iterator[TrainModel]:
    """The model with the attention of training, and sdpa again afterwards."""
    opened.train_model.use_training_attention()
    try:
        yield opened.train_model
    finally:
        opened.model.set_attn_implementation("sdpa")


def context_of(model: PreTrainedModel) -> int:
    """Tokens that the model's positions reach."""
    return int(model.config.max_position_embeddings)


def known_sources(run: Run | None) -> tuple[Source, ...]:
    """The run's own sources, whose column mappings a row of the same shape shares."""
    return (*run.data.validation, *run.data.train) if run else ()


def system_of(run: Run | None) -> str | None:
    """The system message that the run gave to rows without one."""
    return run.data.system if run else None
