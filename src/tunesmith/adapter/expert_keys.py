"""Adapters whose experts stand in the file one by one, as vLLM reads those of most mixtures.

    ...mlp.experts.3.gate_proj.lora_A.weight   [rank, in]       of expert 3
    ...mlp.experts.3.up_proj.lora_B.weight     [width, rank]

Here, as in PEFT's stacked form, gate and up are rows of one stack and share their A. So a file
whose gate and up have each an A of its own is of twice the rank, and not read.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.adapter.expert_lora import ExpertsLora
from tunesmith.errors import ModelError
from tunesmith.model.names import name_in_whole
from tunesmith.model.weights import StoredTensor
from tunesmith.quant.experts import UPDATE, expert_modules, stack_of, stacks_in_order

PREFIX = "base_model.model."
KEY = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.(lora_[AB])\.weight")
# The projections of an expert: the two halves of the first stack, and the second stack.
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
# As Mixtral's checkpoints call them, and those of models that follow it.
OF_MIXTRAL = {"w1": GATE, "w3": UP, "w2": DOWN}
# Types whose checkpoints have the experts in another module than Transformers' classes.
BLOCK = {"mixtral": "block_sparse_moe", "minimax_m2": "block_sparse_moe"}


def projections_in(names: Collection[str]) -> set[str]:
    """What the tensors of these names call the projections of single experts."""
    matches = [KEY.fullmatch(name) for name in names]
    return {match[3] for match in matches if match}


def stored_module(model: nn.Module, name: str) -> str:
    """The name that the experts' module of this name has in a file of PEFT's one-by-one form."""
    whole = name_in_whole(model, name)
    config: Any = model.config
    block = BLOCK.get(config.model_type)
    if block is None:
        return whole
    parent = whole.removesuffix(".mlp.experts")
    return f"{parent}.{block}.experts"


@dataclass(frozen=True)
class StackFactors:
    """Where PEFT's stacked form has the factors of one stack.

    Attributes:
        module: full name of the experts; stack: the name of the parameter there.
        key: the names of both factors in the file, up to ".lora_A.weight".
    """

    module: str
    stack: str
    key: str
    update: ExpertsLora


def stacks_of(model: nn.Module) -> Iterator[StackFactors]:
    """Every adapted stack: of two stacks of a module PEFT wraps the first one twice."""
    for name, module in expert_modules(model).items():
        updates = {}
        for stack in stacks_in_order(module):
            update = getattr(module, stack + UPDATE, None)
            if update is not None:
                updates[stack] = update
        key = PREFIX + name_in_whole(model, name) + len(updates) * ".base_layer"
        for stack, update in updates.items():
            key = key.removesuffix(".base_layer")
            yield StackFactors(name, stack, key, update)


def parts_of_stack(module: nn.Module, stack: str) -> dict[str, slice]:
    """The projections in a stack of experts, and the rows of each in an expert's B."""
    rows = slice(None)
    if stack == "down_proj":
        return {DOWN: rows}
    if not module.has_gate:
        return {UP: rows}
    # Interleaved, or one after the other: as halves of what is left.
    if not module.is_concatenated:
        return {GATE: slice(0, None, 2), UP: slice(1, None, 2)}
    width = stack_of(module, stack).shape[2] // 2
    return {GATE: slice(0, width), UP: slice(width, 2 * width)}


class JoinedFactor(StoredTensor):
    """A or B of a stack, of which the file has the factors of each expert by themselves.

    Attributes:
        experts: for each expert a tensor of the file for each projection.
        rows: of an expert's B, those of each projection.
    """

    def __init__(
        self, name: str, shape: torch.Size, experts: list[list[StoredTensor]], rows: list[slice]
    ) -> None:
        self.name = name
        self.shape = shape
        self.file_shape = shape
        self.dtype = experts[0][0].dtype
        self.experts = experts
        self.rows = rows
        self.is_a = name.endswith("lora_A.weight")

    def with_shape(self, shape: torch.Size) -> "JoinedFactor":
        joined = JoinedFactor(self.name, self.file_shape, self.experts, self.rows)
        joined.shape = shape
        return joined

    def shapes_of_parts(self) -> list[torch.Size]:
        """The shapes that an expert's tensors are to have."""
        count = len(self.experts)
        if self.is_a:
            return len(self.rows) * [torch.Size([self.file_shape[0] // count, self.file_shape[1]])]
        rank = self.file_shape[1] // count
        return [torch.Size([len(range(self.file_shape[0])[rows]), rank]) for rows in self.rows]

    def share_a(self) -> bool:
        """Whether an expert's projections have one A in common; always of B."""
        if not self.is_a:
            return True
        for first, *others in self.experts:
            if not all(torch.equal(first.read(), other.read()) for other in others):
                return False
        return True

    def into(self, target: Tensor, begin: int = 0) -> None:
        flat = target.view(-1)
        flat.copy_(self._join().view(-1)[begin : begin + len(flat)])

    def _join(self) -> Tensor:
        if self.is_a:
            return torch.cat([tensors[0].read() for tensors in self.experts])
        joined = torch.empty(self.file_shape, dtype=self.dtype)
        by_expert = b_by_expert(joined, len(self.experts))
        for expert, tensors in zip(by_expert, self.experts, strict=True):
            for rows, tensor in zip(self.rows, tensors, strict=True):
                expert[rows] = tensor.read()
        return joined


def b_by_expert(lora_B: Tensor, experts: int) -> Tensor:
    """B [experts, out, rank], a view; of [out, rank * experts] as PEFT's file has it, or of
    [out, rank, experts].
    """
    if lora_B.ndim == 2:
        lora_B = lora_B.unflatten(1, (-1, experts))
    return lora_B.permute(2, 0, 1)


def join_experts(
    model: nn.Module, stored: Mapping[str, StoredTensor], file: Path
) -> dict[str, StoredTensor]:
    """The tensors of an adapter's file, with the factors of single experts joined to those of
    stacks.

    ModelError where the file has some of them and not all, of other shapes, in both forms, or with
    an A of its own for gate and for up.
    """
    single: dict[tuple[str, str, str], str] = {}
    for name in stored:
        match = KEY.fullmatch(name)
        if match:
            projection = OF_MIXTRAL.get(match[3], match[3])
            single[f"{match[1]}.{match[2]}", projection, match[4]] = name
    joined = dict(stored)
    if not single:
        return joined
    missing: list[str] = []
    for factors in stacks_of(model):
        # PEFT has no such form of Llama 4: its names stay unknown.
        if factors.update.is_swapped:
            continue
        _check_one_form(factors, stored, file)
        module = model.get_submodule(factors.module)
        parts = parts_of_stack(module, factors.stack)
        prefix = PREFIX + stored_module(model, factors.module)
        if not any(f"{prefix}.0" == expert for expert, _, _ in single):
            prefix = PREFIX + name_in_whole(model, factors.module)
        for factor, parameter in factors.update.named_parameters():
            experts = []
            for expert in range(factors.update.shape[0]):
                tensors = []
                for projection in parts:
                    stored_name = single.get((f"{prefix}.{expert}", projection, factor))
                    if stored_name is None:
                        missing.append(f"{prefix}.{expert}.{projection}.{factor}.weight")
                        continue
                    tensors.append(stored[stored_name])
                    joined.pop(stored_name)
                experts.append(tensors)
            key = f"{factors.key}.{factor}.weight"
            if not missing:
                rows = list(parts.values())
                # PEFT's file has B flat: the experts vary fastest in its columns.
                rows_and_columns = (parameter.shape[0], math.prod(parameter.shape[1:]))
                shape = torch.Size(rows_and_columns)
                joined[key] = JoinedFactor(key, shape, experts, rows)
    check_none(missing, "are missing in the adapter", file)
    _check_parts(joined, file)
    return joined


def _check_one_form(factors: StackFactors, stored: Collection[str], file: Path) -> None:
    """ModelError where the file has the stack, too."""
    key = f"{factors.key}.lora_A.weight"
    if key in stored:
        raise ModelError(
            "the adapter stores its experts both separately and stacked: "
            f"{key.removeprefix(PREFIX)}",
            where=str(file),
            why="each form is complete, and it is unclear which one to use",
            fix="remove one of the two, or save the adapter again",
        )


def _check_parts(joined: Mapping[str, StoredTensor], file: Path) -> None:
    """ModelError for experts of another shape, or that no stack can hold."""
    reshaped = []
    for factor in joined.values():
        if not isinstance(factor, JoinedFactor):
            continue
        for tensors in factor.experts:
            shapes = factor.shapes_of_parts()
            for tensor, shape in zip(tensors, shapes, strict=True):
                if tensor.shape != shape:
                    reshaped.append(tensor.name)
    check_none(reshaped, "have another shape", file)
    for factor in joined.values():
        if isinstance(factor, JoinedFactor) and not factor.share_a():
            raise ModelError(
                f"gate_proj and up_proj have different lora_A: {factor.experts[0][0].name}",
                where=str(file),
                why="here both are rows of one stack and share lora_A, as in PEFT's stacked form",
                fix="merge it into its base with PEFT, and start from the merged model",
            )


def check_none(names: Collection[str], problem: str, file: Path) -> None:
    """ModelError that says the problem and some of the names, if there are any."""
    if not names:
        return
    shown = ", ".join(name.removeprefix(PREFIX) for name in sorted(names)[:3])
    if len(names) > 3:
        shown += ", ..."
    raise ModelError(
        f"{len(names)} tensors {problem}: {shown}",
        where=str(file),
        why="adapter and model do not match",
        fix="use the base model, target, rank and modules_to_save that the adapter was "
        "trained with",
    )
