"""Fill a model's memory from safetensors files, tensor by tensor.

Peak memory is the model and one slice: a tensor whose place is on the CPU in the stored dtype is read straight into it,
any other goes through a stage of 16 MiB. The pages that were read are let go at once, so that loading 140 GB leaves
nothing behind in the page cache, which on a machine with unified memory is the GPU's memory too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.model.safetensors_files import Entry, entries, let_go, opened, read_into, weight_files

_STORED = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
SLICE = 16 << 20  # bytes that are staged at a time where a tensor is not read straight into its place


class Stored:
    """A tensor of the checkpoint, not yet read: what a hook of `load_weights` gets.

    Attributes:
        name: its name in the file.
        shape, dtype: as stored.
    """

    def __init__(self, entry: Entry, fd: int) -> None:
        self._entry, self._fd = entry, fd
        self.name, self.shape = entry.name, torch.Size(entry.shape)
        self.dtype = _STORED[entry.dtype]

    def read(self) -> torch.Tensor:
        """The whole tensor, on the CPU, in its stored dtype."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self._fill(tensor.view(-1), 0)
        let_go(self._fd, self._entry)
        return tensor

    def slices(self, size: int = SLICE) -> Iterator[tuple[int, torch.Tensor]]:
        """The flattened tensor in pieces of at most `size` bytes: (first element, piece); each piece reuses one memory."""
        elements, item = self.shape.numel(), self.dtype.itemsize
        stage = torch.empty(min(elements, max(1, size // item)), dtype=self.dtype)
        for start in range(0, elements, max(1, len(stage))):
            piece = stage[: min(len(stage), elements - start)]
            self._fill(piece, start * item)
            yield start, piece
        let_go(self._fd, self._entry)

    def into(self, place: torch.Tensor) -> None:
        """Read into `place` (same number of elements, contiguous), converting to its dtype and device."""
        flat = place.view(-1)
        if place.device.type == "cpu" and place.dtype == self.dtype:
            self._fill(flat, 0)
            let_go(self._fd, self._entry)
            return
        for start, piece in self.slices():
            flat[start : start + len(piece)].copy_(piece)

    def _fill(self, flat: torch.Tensor, offset: int) -> None:
        if flat.numel():
            read_into(self._fd, self._entry, flat.view(torch.uint8).numpy().data, offset)


class Source(Protocol):
    """What a hook is handed for a tensor: one of a file (`Stored`), or one that is drawn."""

    def read(self) -> torch.Tensor: ...


Hook = Callable[[Mapping[str, Source]], None]


def load_weights(
    model: PreTrainedModel,
    folder: Path,
    *,
    skip: Callable[[str], bool] = lambda name: False,
    convert: Mapping[str, Hook] | None = None,
) -> int:
    """Fill a materialised model's parameters from a folder's safetensors files.

    Args:
        model: every parameter has its memory; it may carry adapters.
        folder: of the checkpoint.
        skip: says by name which parameters are not in the checkpoint (an adapter's own).
        convert: parameter name -> hook that takes the tensor itself, as nf4 does. It gets {"": the tensor} and, from
            checkpoints that bitsandbytes quantised, its companions {"absmax": ..., "quant_map": ...,
            "nested_absmax": ..., "nested_quant_map": ..., "quant_state.bitsandbytes__nf4": ...}. Hooks of tensors in
            one file run in the order of the file.

    Returns:
        bytes read from the checkpoint.

    Raises:
        ModelError: tensors are missing, unexpected or of another shape (the first few are listed), or a file is damaged.
    """
    hooks = dict(convert or {})
    places = {n: p for n, p in model.named_parameters(remove_duplicate=False) if not skip(n) and n not in hooks}
    kept = model.state_dict(keep_vars=True).keys()  # without the buffers that no checkpoint holds
    places |= {n: b for n, b in model.named_buffers() if n in kept and not skip(n)}
    plan = _LoadPlan(places, hooks, [e for f in weight_files(folder) for e in entries(f)], grows=_grows(model))
    plan.check(str(folder))
    total = 0
    with torch.no_grad():
        for file in sorted({e.file for e in plan.all()}):
            with opened(file) as fd:
                for name, group in plan.of(file):
                    stored = {suffix: Stored(entry, fd) for suffix, entry in group.items()}
                    total += sum(entry.size for entry in group.values())
                    if name in hooks:
                        hooks[name](stored)
                    else:
                        _place(stored[""], places[name])
    return total


def _grows(model: PreTrainedModel) -> set[nn.Parameter]:
    """Parameters with one row per token of the vocabulary, which may have more rows than the checkpoint."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {p for end in ends if end is not None for p in end.parameters(recurse=False)}


def _place(stored: Stored, place: torch.Tensor) -> None:
    """Read a tensor into its parameter; further rows of an embedding or head become the mean of the stored ones.

    The mean is where a new token's logits and inputs are those of an average token, so that an untrained row neither
    dominates the softmax nor is out of distribution (Hewitt, 2021, "Initializing new word embeddings for pretrained
    language models"); without noise it is the same on every machine.
    """
    if not place.is_contiguous():
        raise ValueError(f"{stored.name}: its place is not contiguous")
    known = stored.shape[0] if stored.shape and place.shape != stored.shape else None
    stored.into(place if known is None else place[:known])
    if known is not None:
        place[known:] = place[:known].mean(dim=0, dtype=torch.float32).to(place.dtype)


class _LoadPlan:
    """Which tensor of the checkpoint goes where."""

    def __init__(
        self,
        places: Mapping[str, torch.Tensor],
        hooks: Mapping[str, Hook],
        found: list[Entry],
        *,
        grows: set[nn.Parameter],
    ) -> None:
        self.places, self.grows = places, grows
        self.groups: dict[str, dict[str, Entry]] = {}
        self.unexpected: list[str] = []
        wanted = set(places) | set(hooks)
        self.wanted = wanted
        for entry in found:
            name, suffix = _target(entry.name, wanted, hooks)
            if name:
                self.groups.setdefault(name, {})[suffix] = entry
            elif not entry.name.endswith("rotary_emb.inv_freq"):  # old Llama checkpoints carry the frequencies
                self.unexpected.append(entry.name)

    def check(self, where: str) -> None:
        self._ties(where)
        covered = {id(self.places[n]) for n in self.groups if n in self.places}
        missing = [
            n
            for n in sorted(self.wanted)
            if "" not in self.groups.get(n, {}) and not (n in self.places and id(self.places[n]) in covered)
        ]
        shapes = [
            f"{n}: {list(group[''].shape)} in the file, {list(self.places[n].shape)} in the model"
            for n, group in sorted(self.groups.items())
            if n in self.places and "" in group and not self._fits(n, group[""])
        ]
        foreign = [e.name for group in self.groups.values() for e in group.values() if e.dtype not in _STORED]
        for what, names in (
            ("tensors are missing", missing),
            ("tensors belong nowhere in this model", self.unexpected),
            ("tensors have another shape", shapes),
            ("tensors have a type that cannot be read", foreign),
        ):
            if names:
                raise ModelError(
                    f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}",
                    where=where,
                    why="the weights and config.json do not describe the same model",
                    fix="set model.quantize: nf4"
                    if any("bitsandbytes__" in n for n in names)
                    else "fetch the model again, or correct config.json",
                )

    def _fits(self, name: str, entry: Entry) -> bool:
        place = self.places[name]
        if tuple(place.shape) == entry.shape:
            return True
        larger = place.shape[1:] == entry.shape[1:] and place.shape[0] > entry.shape[0] > 0
        return larger and any(place is p for p in self.grows)

    def _ties(self, where: str) -> None:
        """Of names that share a parameter keep one; when the checkpoint holds two, they must hold the same."""
        first: dict[int, str] = {}
        for name in sorted(self.groups):
            if name not in self.places or "" not in self.groups[name]:
                continue
            kept = first.setdefault(id(self.places[name]), name)
            if kept == name:
                continue
            if not _same(self.groups[kept][""], self.groups[name][""]):
                raise ModelError(
                    f"{kept} and {name} differ, but the config ties them",
                    where=where,
                    fix="set tie_word_embeddings: false in config.json",
                )
            del self.groups[name]

    def all(self) -> list[Entry]:
        return [entry for group in self.groups.values() for entry in group.values()]

    def of(self, file: Path) -> list[tuple[str, dict[str, Entry]]]:
        """The groups whose tensor is in `file`, in the file's order. bitsandbytes keeps companions in the same file."""
        here = [(name, group) for name, group in self.groups.items() if group[""].file == file]
        return sorted(here, key=lambda pair: pair[1][""].start)


def _target(stored: str, wanted: set[str], hooks: Mapping[str, Hook]) -> tuple[str, str]:
    """The model's name for a stored tensor, and the companion suffix; ("", "") when it has no place.

    A checkpoint saved from the backbone alone lacks the prefix `model.`; one saved from a wrapper has it twice.
    """
    for name in (stored, f"model.{stored}", stored.removeprefix("model.")):
        if name in wanted:
            return name, ""
        for cut in range(len(name)):
            if name[cut] == "." and name[:cut] in hooks:
                return name[:cut], name[cut + 1 :]
    return "", ""


def _same(a: Entry, b: Entry) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if (a.file, a.start) == (b.file, b.start):
        return True
    with opened(a.file) as fa, opened(b.file) as fb:
        pairs = zip(Stored(a, fa).slices(), Stored(b, fb).slices(), strict=True)
        return all(torch.equal(x, y) for (_, x), (_, y) in pairs)
