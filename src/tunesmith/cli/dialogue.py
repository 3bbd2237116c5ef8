"""A conversation with one model or with two: who answers, what each has said, what fits into the context."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import TextStreamer

from tunesmith.adapter.lora import disabled
from tunesmith.data.formats import Conversation
from tunesmith.errors import UsageError
from tunesmith.inference.generate import Answer, Decoding, answer_batch
from tunesmith.inference.load_run import LoadedModel, context_of

Who = Literal["base", "tuned"]
_LATER = "?"  # stands where the answer will be; a prompt ends before it


class Streamer(TextStreamer):
    """Hands on each piece of text as soon as it is whole words."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


@dataclass
class Turn:
    """A question and what was answered to it, by whoever was asked."""

    question: str
    answers: dict[Who, str] = field(default_factory=dict)


class Dialogue:
    """Questions and answers in the template that was trained.

    Args:
        opened: the tuned model, or a plain base.
        open_base: loads the base as a model of its own; used where it cannot be had by switching the adapter off.
        decoding: how tokens are chosen.
        system: the system message to begin with, or None.
    """

    def __init__(
        self, opened: LoadedModel, open_base: Callable[[], LoadedModel], decoding: Decoding, system: str | None
    ) -> None:
        self.opened, self.open_base, self.decoding, self.system = opened, open_base, decoding, system
        self.turns: list[Turn] = []
        self._base: LoadedModel | None = opened if opened.kind == "base" else None

    def reset(self) -> None:
        self.turns = []

    def ask(
        self, question: str, who: Who, write: Callable[[str], None], note: Callable[[str], None], stop: threading.Event
    ) -> Answer:
        """Answer the question, streaming to `write`; the answer is kept even when `stop` cut it short.

        Raises:
            UsageError: the question alone does not fit the model's context.
        """
        if not self.turns or self.turns[-1].question != question or who in self.turns[-1].answers:
            self.turns.append(Turn(question))
        opened, view = self._model(who)
        try:
            prompt = self._fitting(who, opened, note)
        except UsageError:
            self.turns.pop()
            raise
        with view:
            answers = answer_batch(
                opened.model,
                opened.tokenizer,
                [prompt],
                self.decoding,
                stops=opened.template.stops,
                streamer=Streamer(opened.tokenizer, write),
                stop=stop,
            )
        self.turns[-1].answers[who] = answers[0].text
        return answers[0]

    def _model(self, who: Who) -> tuple[LoadedModel, AbstractContextManager[None]]:
        if who == "tuned" or self.opened.kind == "base":
            return self.opened, nullcontext()
        if self.opened.kind == "adapter":
            return self.opened, disabled(self.opened.model)
        if self._base is None:
            self._base = self.open_base()
        return self._base, nullcontext()

    def messages(self, who: Who) -> list[dict[str, Any]]:
        """The conversation as `who` knows it; where it was not asked, what the other said stands."""
        said: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            said.append({"role": "user", "content": turn.question})
            answer = turn.answers.get(who, next(iter(turn.answers.values()), None))
            if answer is not None and (turn is not self.turns[-1] or who in turn.answers):
                said.append({"role": "assistant", "content": answer})
        return said

    def _fitting(self, who: Who, opened: LoadedModel, note: Callable[[str], None]) -> list[int]:
        """The prompt; as many of the oldest turns as do not fit beside the answer are forgotten, and it is said."""
        room = context_of(opened.model) - self.decoding.max_new_tokens
        dropped = 0
        while True:
            waiting = [*self.messages(who), {"role": "assistant", "content": _LATER}]
            prompt = list(opened.template.prompt(Conversation(waiting)))
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
            note(f"the context is full: forgot the {dropped} oldest turn{'s' if dropped > 1 else ''}")
        return prompt

    def save(self, path: Path) -> int:
        """Append what was said as rows of the `messages` format, one for each that answered; return how many."""
        who: list[Who] = [w for w in ("base", "tuned") if any(w in t.answers for t in self.turns)]
        rows = [json.dumps({"messages": self.messages(w), "model": w}, ensure_ascii=False) for w in who]
        with path.open("a", encoding="utf-8") as file:
            file.writelines(row + "\n" for row in rows)
        return len(rows)
