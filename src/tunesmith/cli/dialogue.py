"""A conversation with one model or with two: what each has answered, and what fits into the context."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import TextStreamer

from tunesmith.adapter.lora import disabled
from tunesmith.data.formats import Conversation, with_system
from tunesmith.errors import UsageError
from tunesmith.inference.decoding import Answer, Decoding, answer_batch
from tunesmith.inference.load_run import LoadedModel
from tunesmith.inference.prompts import PLACEHOLDER

Side = Literal["base", "tuned"]


class Streamer(TextStreamer):
    """Passes on each piece of text as soon as it is whole words."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


@dataclass
class Turn:
    """A question and its answers."""

    question: str
    answers: dict[Side, str] = field(default_factory=dict)


class Dialogue:
    """Questions and answers in the template that was trained.

    Args:
        loaded: the tuned model, or a plain base.
        load_base: loads the base as a model of its own; used where switching the adapter off does not give it.
        decoding: how tokens are chosen.
        system: the system message to begin with, or None.
    """

    def __init__(
        self, loaded: LoadedModel, load_base: Callable[[], LoadedModel], decoding: Decoding, system: str | None
    ) -> None:
        self.loaded, self.load_base, self.decoding, self.system = loaded, load_base, decoding, system
        self.turns: list[Turn] = []
        self._base: LoadedModel | None = None

    def ask(
        self,
        question: str,
        side: Side,
        write: Callable[[str], None],
        notify: Callable[[str], None],
        cancelled: Callable[[], bool],
    ) -> Answer:
        """Answer the question, streaming to `write`; the answer is kept even when `cancelled` cut it short.

        Raises:
            UsageError: the question alone does not fit the model's context.
        """
        if not self.turns or self.turns[-1].question != question or side in self.turns[-1].answers:
            self.turns.append(Turn(question))
        loaded, view = self._model(side)
        try:
            prompt = self._prompt(side, loaded, notify)
        except UsageError:
            self.turns.pop()
            raise
        with view:
            answer = answer_batch(
                loaded.model,
                loaded.tokenizer,
                [prompt],
                self.decoding,
                stops=loaded.template.stops,
                streamer=Streamer(loaded.tokenizer, write),
                cancelled=cancelled,
            )[0]
        self.turns[-1].answers[side] = answer.text
        return answer

    def _model(self, side: Side) -> tuple[LoadedModel, AbstractContextManager[None]]:
        kind = self.loaded.location.kind
        if side == "tuned" or kind == "base":
            return self.loaded, nullcontext()
        if kind == "adapter":
            return self.loaded, disabled(self.loaded.model)
        self._base = self._base or self.load_base()
        return self._base, nullcontext()

    def messages(self, side: Side) -> list[dict[str, Any]]:
        """The conversation as `side` knows it; where it was not asked, the other's answer stands."""
        messages = with_system([], self.system)
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.question})
            answer = turn.answers.get(side, next(iter(turn.answers.values()), None))
            if answer is not None and (turn is not self.turns[-1] or side in turn.answers):
                messages.append({"role": "assistant", "content": answer})
        return messages

    def _prompt(self, side: Side, loaded: LoadedModel, notify: Callable[[str], None]) -> list[int]:
        """The prompt; drops as many of the oldest turns as do not fit beside the answer, and says so."""
        room, dropped = loaded.context - self.decoding.max_new_tokens, 0
        while True:
            messages = [*self.messages(side), {"role": "assistant", "content": PLACEHOLDER}]
            prompt = list(loaded.template.prompt(Conversation(messages)))
            if len(prompt) <= room:
                break
            if len(self.turns) == 1:
                raise UsageError(
                    f"the question has {len(prompt)} tokens, and there is room for {room}",
                    why=f"the model's context less --max-new-tokens {self.decoding.max_new_tokens}",
                    fix="ask something shorter, or start with a smaller --max-new-tokens",
                )
            self.turns.pop(0)
            dropped += 1
        if dropped:
            notify(f"the context is full: forgot the {dropped} oldest turn{'s' if dropped > 1 else ''}")
        return prompt

    def save(self, path: Path) -> int:
        """Append the conversation as rows of the `messages` format, one for each model that answered; return how many."""
        sides: list[Side] = [s for s in ("base", "tuned") if any(s in turn.answers for turn in self.turns)]
        with path.open("a", encoding="utf-8") as file:
            for side in sides:
                file.write(json.dumps({"messages": self.messages(side), "model": side}, ensure_ascii=False) + "\n")
        return len(sides)
