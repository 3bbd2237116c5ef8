"""Keys and values of answers that are being sampled, and the attention of their next tokens.

A slot holds the keys and values of one answer and its prompt. First, one forward over a packed row
of prompts stores the keys and values of each prompt in the slots of its answers. After that, each
forward computes one new token per slot, in a flat row [1, slots]. Only attention needs the slots.
All other layers process each token independently, as in training.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Number of tokens by which full slots are enlarged.
GROWTH = 64
# Number of answers that are sampled at the same time in a training. It does not depend on the
# memory of the machine or on the ranks, because in 16-bit dtypes it slightly changes the answers.
ANSWERS_AT_ONCE = 64


def answers_at_once(group: int) -> int:
    """Return the number of answers that are sampled at the same time: a multiple of the group."""
    return max(1, ANSWERS_AT_ONCE // group) * group


class LayerSlots(NamedTuple):
    """Keys [slots, kv heads, room, d] and values [slots, kv heads, room, width] of one layer."""

    keys: Tensor
    values: Tensor


class Slots:
    """Keys and values of all attention layers. The order of the layers' calls identifies them.

    Args:
        prompt_lengths: the number of tokens of each prompt.
        answers: number of answers to each prompt. Each answer has its own slot.
        answer_tokens: maximum number of tokens of an answer.

    Attributes:
        lengths: int64 [slots], the number of tokens that each slot holds.
        longest: maximum of `lengths`, on the host.
    """

    def __init__(
        self,
        prompt_lengths: Sequence[int],
        answers: int,
        answer_tokens: int,
        device: torch.device,
    ) -> None:
        self.answers = answers
        self.max_room = max(prompt_lengths) + answer_tokens
        self.lengths = torch.tensor(prompt_lengths, device=device).repeat_interleave(answers)
        self.longest = max(prompt_lengths)
        self.holds_prompts = False
        self._layers: list[LayerSlots] = []
        self._next_layer = 0

    def add_prompts(self, k: Tensor, v: Tensor, edges: Sequence[int]) -> None:
        """Store the keys and values of the prompts for the next layer.

        Args:
            k, v: [n, kv heads, width], the keys and values of a packed row of prompts.
            edges: boundaries of the prompts in the row. Documents after the prompts are padding.
        """
        prompts = len(self.lengths) // self.answers

        def spread(x: Tensor) -> Tensor:
            # Fill unused places with zeros: their probability is 0, and 0 * NaN would be NaN.
            room = min(self.longest + GROWTH, self.max_room)
            slots = x.new_zeros(len(self.lengths), x.shape[1], room, x.shape[2])
            by_prompt = slots.unflatten(0, (prompts, self.answers))
            for prompt, (start, end) in zip(by_prompt, pairwise(edges), strict=False):
                prompt[:, :, : end - start] = x[start:end].transpose(0, 1)
            return slots

        self._layers.append(LayerSlots(spread(k), spread(v)))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Compute the attention of one new token per slot, and store its key and value.

        Args:
            q: [slots, heads, d].
            k, v: [slots, kv heads, width].
            scale, window, softcap, sinks: as for `attention.attend`.

        Returns:
            [slots, heads, width of v].
        """
        keys, values = self._add_tokens(k, v)
        room = self.longest + 1
        # The query heads of a key head form one matrix: [slots, kv heads, heads per kv head, d].
        queries = q.reshape(len(q), keys.shape[1], -1, q.shape[2])
        scores = (queries @ keys[:, :, :room].transpose(2, 3)).float() * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(room, device=q.device)
        last = self.lengths.unsqueeze(1)
        is_masked = place > last
        if window is not None:
            is_masked |= place <= last - window
        scores.masked_fill_(is_masked[:, None, None], float("-inf"))
        if sinks is not None:
            column = sinks.float().view(1, keys.shape[1], -1, 1).expand(len(q), -1, -1, -1)
            scores = torch.cat([scores, column], -1)
        probabilities = scores.softmax(-1)[..., :room].to(v.dtype)
        return (probabilities @ values[:, :, :room]).flatten(1, 2)

    def _add_tokens(self, k: Tensor, v: Tensor) -> LayerSlots:
        """Store the key and value of each slot's new token for the next layer, and return all keys
        and values of this layer.
        """
        number = self._next_layer
        self._next_layer = (number + 1) % len(self._layers)
        room = self._layers[number].keys.shape[2]
        if self.longest == room:
            growth = min(GROWTH + room // 2, self.max_room - room)
            grown = (F.pad(x, (0, 0, 0, growth)) for x in self._layers[number])
            self._layers[number] = LayerSlots(*grown)
        layer = self._layers[number]
        slots = torch.arange(len(k), device=k.device)
        layer.keys[slots, :, self.lengths] = k
        layer.values[slots, :, self.lengths] = v
        return layer

    def advance(self) -> None:
        """Count the token that the last forward has added to each slot."""
        self.lengths = self.lengths + 1
        self.longest += 1

    def keep(self, slots: Sequence[int]) -> None:
        """Drop all slots except `slots`."""
        chosen = torch.tensor(slots, device=self.lengths.device)
        self.lengths = self.lengths.index_select(0, chosen)
        # Replace one layer at a time, so that only one layer is in memory twice.
        for number, layer in enumerate(self._layers):
            self._layers[number] = LayerSlots(*(x.index_select(0, chosen) for x in layer))
