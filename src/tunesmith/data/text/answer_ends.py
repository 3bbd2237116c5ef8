"""The tokens with which a chat template ends answers.

Most templates end each answer with one token, at which generation stops. Some do not:

- gpt-oss writes `<|return|>` after the last answer, and `<|end|>` after earlier ones. That also
  ends its thinking, so generation cannot stop there, and a model that learned to end an answer with
  it would go on. Earlier answers are supervised up to it.
- GLM writes nothing. Its model is to begin the next turn, `<|user|>` or `<|observation|>`, where
  generation stops: the last answer of a row gets that token.
- A tool call may have an end of its own, gpt-oss's `<|call|>` and Gemma 4's `<|tool_response>`.

`probe.py` renders small conversations, and hands over what the template writes after each
message, up to the next text of the conversation: its tail.
"""

import re
import sys
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AnswerEnds:
    """The tokens and texts that may end an answer.

    Args:
        eos_ids: ids at which generation stops.

    Attributes:
        stops: text and id of each token that ends an answer and is supervised: those of `eos_ids`,
            and the template's own, at which generation must stop too.
        earlier: of those that end only answers before the last one; they are not supervised.
        next_turn: what a last answer gets, by whether it is a tool call.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", eos_ids: Collection[int]) -> None:
        self.stops: dict[str, int] = {}
        for id_ in sorted(eos_ids):
            text = tokenizer.decode([id_])
            if text:
                self.stops[text] = id_
        self.earlier: dict[str, int] = {}
        self.next_turn: dict[bool, str] = {}
        self._added = {t.content: id_ for id_, t in tokenizer.added_tokens_decoder.items()}

    def pattern(self, *, is_last: bool = True) -> re.Pattern[str]:
        """Match what ends an answer; the last answer ends with one of `stops`."""
        return any_of(self.stops if is_last else {**self.stops, **self.earlier})

    def search(
        self, text: str, begin: int = 0, limit: int = sys.maxsize, *, is_last: bool = True
    ) -> re.Match[str] | None:
        """The first end in text[begin:limit]; of several at one place, the longest."""
        return self.pattern(is_last=is_last).search(text, begin, limit)

    def read_turns(self, question: str, earlier: str, last: str) -> None:
        """Learn from the tails of a question, of the answer to it, and of a last answer."""
        if self.search(earlier) and self.search(last):
            return
        earlier_token = any_of(self._added).search(earlier)
        last_token = any_of(self._added).search(last)
        if last_token is None:
            next_turn = self.search(earlier)
            if next_turn is not None and earlier[: next_turn.start()] == last:
                self.next_turn[False] = next_turn[0]
            return
        if earlier_token is None:
            return
        if earlier_token[0] == last_token[0]:
            self._add_stop(last_token[0])
            return
        # The beginning of the next turn's header is no end: what ends an answer stands at one place
        # in both, and ends questions too.
        closing = any_of(self._added).search(question)
        is_end = closing is not None and closing[0] == earlier_token[0]
        is_at_one_place = earlier[: earlier_token.start()] == last[: last_token.start()]
        if is_end and is_at_one_place and earlier_token[0] not in self.stops:
            self.earlier[earlier_token[0]] = self._added[earlier_token[0]]
            self._add_stop(last_token[0])

    def read_call(self, call: str, last_calls: str, text_of_calls: str) -> None:
        """Learn from the tails of a tool call with its result, and of a last message with calls.

        text_of_calls: that message from its first call on.
        """
        end = self.search(call)
        if end is not None:
            if not self.search(last_calls) and call[: end.start()] == last_calls:
                self.next_turn[True] = end[0]
            return
        tokens = list(any_of(self._added).finditer(last_calls))
        if not tokens or last_calls[tokens[-1].end() :].strip():
            return
        # A token that ends each of several calls does not end the message.
        token = tokens[-1][0]
        if call.startswith(last_calls.rstrip()) and text_of_calls.count(token) == 1:
            self._add_stop(token)

    def _add_stop(self, token: str) -> None:
        self.stops[token] = self._added[token]


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Matches any of some texts; of several at one place, the longest. Of none, nothing."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
