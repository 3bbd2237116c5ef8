"""Which recurrent layers take a whole packed row in one call: those whose kernels are handed the
edges of its documents, and keep them apart, by trying.

What Transformers' layers hand on differs, and so do the kernels that may be installed. A layer's
scan takes the edges by one of two keywords (FLA's delta rules) or the number of each token's
document (mamba-ssm). Its convolution takes the numbers too if it is causal-conv1d's; without that
package it is PyTorch's, which knows no documents, and empty places between them keep it apart.
"""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.model.documents import Documents, use_documents
from tunesmith.model.load import materialize, one_line
from tunesmith.model.recurrent import PackedCall, run_by_document, use_packed_calls

# Longer than a chunk of FLA's kernels, 64 tokens, with edges within chunks.
TRIAL_LENGTHS = (75, 130, 61)
# Of the largest value, in output and gradient. Measured in bf16 with kernels written in PyTorch
# (tests/model/test_recurrent_kernels.py): right ones differ from one row a document by 0.005 at
# most, and where one document's state reaches the next, the worse of the two is off by 0.15 in the
# smallest layer and by 0.4 in one of real width.
TRIAL_TOLERANCE = 0.03


@dataclass(frozen=True)
class Trial:
    """The result of trying a class of layers on packed rows.

    Attributes:
        call: by which its kernels keep documents apart; None: it runs on one row a document.
        why: what stands against a call.
    """

    call: PackedCall | None
    why: str = ""


def try_packed_calls(
    model: PreTrainedModel, class_names: Collection[str], device: torch.device
) -> dict[str, Trial]:
    """Try the kernels of these classes on a layer of each, with random weights on the device.

    `model` is on meta, in the dtype of the run, as Transformers builds it.
    """
    shape = (1, sum(TRIAL_LENGTHS), model.config.get_text_config().hidden_size)
    generator = torch.Generator().manual_seed(1)
    row, cotangent = torch.randn(2, *shape, generator=generator).to(device, model.dtype)
    trials = {}
    for name in class_names:
        for module in model.modules():
            if type(module).__name__ == name:
                trials[name] = _try_layer(_random_layer(module, device), row, cotangent)
                break
    return trials


def describe_trials(trials: Mapping[str, Trial]) -> list[str]:
    """A line for the user on each class, with what it takes to make it faster."""
    lines = []
    for name, trial in trials.items():
        if trial.call is not None:
            lines.append(f"{name}: its kernels process all documents of a row in one call")
        else:
            lines.append(
                f"warning: {name}: recurrent layers run on one row a document, padded to a common "
                f"length, which is slower than one call: {trial.why}"
            )
    return lines


def _possible_calls(layer: nn.Module) -> list[PackedCall]:
    calls = [
        PackedCall("cu_seq_lens_q"),  # as Transformers documents it
        PackedCall("cu_seqlens"),  # Kimi Linear hands its keywords on as they are
    ]
    # The widest of its convolutions: a gap of width - 1 holds none of the document before.
    widths = [conv.kernel_size[0] for conv in layer.modules() if isinstance(conv, nn.Conv1d)]
    if widths:
        calls.append(PackedCall("cu_seq_lens_q", seq_idx=False, gap=max(widths) - 1))
    return calls


def _random_layer(module: nn.Module, device: torch.device) -> nn.Module:
    layer = copy.deepcopy(module)
    materialize(layer, device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            # Spread by fan-in: activations of layers of any width are about 1.
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    run_by_document(layer, [type(module).__name__])
    return layer


def _try_layer(layer: nn.Module, row: Tensor, cotangent: Tensor) -> Trial:
    """The first call that is right, in training and out of it."""
    name = type(layer).__name__
    why = "its forward does not pass document boundaries to a kernel"
    for call in _possible_calls(layer):
        try:
            layer.train()
            is_right = _keeps_apart(layer, call, row, cotangent)
            layer.eval()  # Mamba 2 calls other kernels
            if is_right and _keeps_apart(layer, call, row, cotangent):
                return Trial(call)
        except TypeError:
            continue  # its forward takes other arguments, and no edges
        # Code of Transformers and of whatever kernels are installed.
        except Exception as error:
            why = one_line(error)
        finally:
            use_packed_calls(layer, {name: None})
    return Trial(None, why)


def _keeps_apart(layer: nn.Module, call: PackedCall, row: Tensor, cotangent: Tensor) -> bool:
    """Check whether a row of documents gives what one row a document gives: output and gradient."""
    name = type(layer).__name__
    use_packed_calls(layer, {name: call})
    results = _run(layer, row, cotangent)
    use_packed_calls(layer, {name: None})
    # The same layer and input, with one row a document.
    for result, expected in zip(results, _run(layer, row, cotangent), strict=True):
        difference = float((result - expected).abs().max())
        # Not so of a value that is not a number.
        if not difference <= TRIAL_TOLERANCE * float(expected.abs().max()):
            return False
    return True


def _run(layer: nn.Module, row: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """The output of a layer for a packed row [1, n, width], and the gradient of the row."""
    edges = [0, TRIAL_LENGTHS[0], sum(TRIAL_LENGTHS[:2]), sum(TRIAL_LENGTHS)]
    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=row.device)
    documents = Documents(cu_seqlens, max(TRIAL_LENGTHS))
    documents.set_edges(edges)
    row = row.clone().requires_grad_()
    with use_documents(documents), torch.enable_grad():
        output = layer(row)
    if isinstance(output, tuple):
        output = output[0]
    # The gradient of a weighted sum: each output has its own weight, so none cancels.
    (gradient,) = torch.autograd.grad((output * cotangent).sum(), row)
    return output.detach(), gradient
