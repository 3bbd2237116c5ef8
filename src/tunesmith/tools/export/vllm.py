"""A run as a folder that vLLM serves, rounded to fp8.

A folder in 16 bits is what `merge` writes.
"""

import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tunesmith.checkpoint.model_card import weights_file
from tunesmith.errors import ModelError
from tunesmith.host.files import follow_umask
from tunesmith.inference.load_run import (
    locate_run,
    read_run_files,
    select_device,
    undeleted,
)
from tunesmith.model.stored_form import is_stored_otherwise
from tunesmith.quant.linear_layers import linear_names
from tunesmith.tools.export.compressed import RoundedWeight
from tunesmith.tools.export.merge import add_files_to_card, write_merged
from tunesmith.tools.export.merge_check import Difference, compare_logits, probe_prompts
from tunesmith.tools.export.output import (
    move_into_place,
    new_folder_place,
    part_folder,
)
from tunesmith.tools.export.streamed_model import Values, decoder_layers, streamed_logits
from tunesmith.tools.export.tuned_weights import TunedModel, open_tuned_model

log = logging.getLogger(__name__)

QUANT = "fp8"  # the word of --quant

# What config.json says of the weights, in compressed-tensors' words.
QUANTIZATION_CONFIG: dict[str, object] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "float",
                "strategy": "channel",
                "symmetric": True,
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
        }
    },
}


@dataclass(frozen=True)
class RoundedFolder:
    """A finished export.

    Attributes:
        layers: linear layers that were rounded.
        rounded: the folder's values against the tuned model, both in fp32 arithmetic; activations
            are not rounded.
        base: the base against the tuned model; None for a whole model that was trained.

    Without a check `positions` is 0, and the differences are None.
    """

    output: str
    quant: str
    layers: int
    bytes: int
    positions: int
    rounded: Difference | None
    base: Difference | None


def export_rounded(
    path: str | Path,
    output: str | Path,
    *,
    device: str | None = None,
    check: bool = True,
    trust_remote_code: bool = False,
    checking: Callable[[int, int], None] = lambda done, total: None,
) -> RoundedFolder:
    """Write what a run has trained with its linear weights in fp8.

    Args:
        check: compare it with the tuned model, by passes over all weights in fp32.
        trust_remote_code: as for `load_run`.
        checking: gets the layers that were computed for that, and all of them.

    Raises:
        UsageError: the output is not a new or empty folder.
        ModelError: the model is stored in another form.
        MachineError: no room on the disk.
    """
    location = locate_run(path, trust_remote_code=trust_remote_code)
    goal = new_folder_place(output, location)
    place = torch.device(select_device(device))
    with undeleted(location):
        tuned = open_tuned_model(read_run_files(location))
        weights = round_weights(tuned)
        with part_folder(goal) as part:
            tuned.model.config.quantization_config = QUANTIZATION_CONFIG
            write_merged(tuned, part, "bf16", weights, shown_dtype=QUANT)
            del tuned.model.config.quantization_config
            follow_umask(part)
            positions, kl, base = 0, None, None
            if check:
                positions, kl, base = _compare(tuned, weights, place, checking)
            measured = (kl.mean_kl, kl.agreement) if kl else ()
            kind = f"compressed-tensors, {QUANT}"
            add_files_to_card(part, weights_file(part, kind, *measured))
            move_into_place(part, goal)
    size = sum(file.stat().st_size for file in goal.iterdir())
    return RoundedFolder(str(output), QUANT, len(weights), size, positions, kl, base)


def round_weights(tuned: TunedModel) -> dict[str, RoundedWeight]:
    """The linear layers of the decoder, by the names of their weights."""
    # Experts are stored one by one under other names than those of the layers here.
    if is_stored_otherwise(tuned.model):
        raise ModelError(
            f"a {tuned.model.config.model_type} is not written in {QUANT} yet",
            where="--quant",
            why="its checkpoints store experts separately, or contain other parts than the "
            "text model",
            fix="--quant bf16",
        )
    weights = {}
    for layer in linear_names(tuned.model, head=False):
        name = f"{layer}.weight"
        weights[name] = RoundedWeight(name, tuned.weights[name])
    return weights


def _compare(
    tuned: TunedModel,
    weights: Mapping[str, RoundedWeight],
    device: torch.device,
    checking: Callable[[int, int], None],
) -> tuple[int, Difference, Difference | None]:
    """Positions, and the rounded model and the base against the tuned one."""
    prompts, _ = probe_prompts(tuned)
    in_place = dict(tuned.weights)
    # The rounded weights in the place of the tuned ones: they already hold the adapter.
    for name, weight in weights.items():
        in_place[name] = replace(tuned.weights[name], source=weight, update=None)

    has_base = all(weight.base is not None for weight in tuned.weights.values())
    total = len(decoder_layers(tuned.model)) * (3 if has_base else 2)
    log.info(f"check: {total} layers are computed in fp32 (--no-check skips this)")
    done = itertools.count(1)

    def logits(model: TunedModel, values: Values) -> list[torch.Tensor]:
        return streamed_logits(
            model,
            prompts,
            values=values,
            dtype=torch.float32,
            device=device,
            on_layer=lambda: checking(next(done), total),
        )

    checking(0, total)
    expected = logits(tuned, "adapter")
    rounded = compare_logits(expected, logits(replace(tuned, weights=in_place), "merged"))
    base = None
    if has_base:
        base = compare_logits(expected, logits(tuned, "base"))
    return sum(map(len, prompts)), rounded, base
