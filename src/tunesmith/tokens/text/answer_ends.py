"""Detection of the tokens that a chat template writes at the end of answers.

Most templates end each answer with one token, at which generation stops. The exceptions:

- gpt-oss writes `<|return|>` after the last answer and `<|end|>` after earlier answers. `<|end|>`
  also ends the model's thinking, so generation cannot stop at this token, and a model that learned
  to end an answer with `<|end|>` would continue to write. Earlier answers are therefore supervised
  up to `<|end|>`, without this token.
- GLM writes no token after an answer. The model itself begins the next turn with `<|user|>` or
  `<|observation|>`, where generation stops. This token is appended to the last answer of a row.
- A tool call may have its own end token: `<|call|>` in gpt-oss, `<|tool_response>` in Gemma 4.

`probe.py` renders short conversations. For each message, it passes the text that the template
writes between this message and the next message to this module. This text is called the tail of the
message.
"""

import re
import sys
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AnswerEnds:
    """Tokens and texts that may end an answer.

    Args:
        eos_ids: ids at which generation stops.

    Attributes:
        stops: text -> id of each supervised end token. These are the tokens of `eos_ids`, and the
            end tokens of the template at which generation must stop, too.
        earlier: text -> id of each token that ends earlier answers, but not the last answer. These
            tokens are not supervised.
        next_turn: the text of the token that is appended to the last answer of a row. The key True
            is for answers with tool calls, and False is for other answers.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", eos_ids: Collection[int]) -> None:
        self.stops: dict[str, int] = {}
        for id_ in sorted(eos_ids):
            text = tokenizer.decode([id_])
            if text:
                self.stops[text] = id_
        self.earlier: dict[str, int] = {}
        self.next_turn: dict[bool, str] = {}
        self._added = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items()}

    def pattern(self, *, is_last: bool = True) -> re.Pattern[str]:
        """Return a pattern that matches the end tokens of an answer.

        The last answer ends with a token of `stops`.
        """
        return any_of(self.stops if is_last else {**self.stops, **self.earlier})

    def search(
        self, text: str, begin: int = 0, limit: int = sys.maxsize, *, is_last: bool = True
    ) -> re.Match[str] | None:
        """Return the first end token in text[begin:limit], or None.

        If several tokens match at the same position, the longest token is returned.
        """
        return self.pattern(is_last=is_last).search(text, begin, limit)

    def read_turns(self, question: str, earlier: str, last: str) -> None:
        """Detect end tokens from the text that the template writes after a question (`question`),
        after an answer that is not the last (`earlier`), and after the last answer (`last`).
        """
        if self.search(earlier) and self.search(last):
            return
        added_token = any_of(self._added)
        earlier_token = added_token.search(earlier)
        last_token = added_token.search(last)
        if last_token is None:
            next_turn = self.search(earlier)
            if next_turn is not None and earlier[: next_turn.start()] == last:
                self.next_turn[False] = next_turn[0]
            return
        if earlier_token is None:
            return
        earlier_end = earlier_token[0]
        last_end = last_token[0]
        if earlier_end == last_end:
            self._add_stop(last_end)
            return
        # `earlier_end` may be an end token, or a token of the next turn's header. It is an end
        # token if it is at the same position as `last_end`, and questions end with it, too.
        closing = added_token.search(question)
        is_end = closing is not None and closing[0] == earlier_end
        is_at_same_position = earlier[: earlier_token.start()] == last[: last_token.start()]
        if is_end and is_at_same_position and earlier_end not in self.stops:
            self.earlier[earlier_end] = self._added[earlier_end]
            self._add_stop(last_end)

    def read_call(self, call: str, last_calls: str, text_of_calls: str) -> None:
        """Detect the end token of tool calls.

        Args:
            call: the text that the template writes between a tool call and its result.
            last_calls: the tail of a message that is the last one and has several tool calls.
            text_of_calls: the text of the last message, starting with its first call.
        """
        end = self.search(call)
        if end is not None:
            if call[: end.start()] == last_calls and not self.search(last_calls):
                self.next_turn[True] = end[0]
            return
        tokens = list(any_of(self._added).finditer(last_calls))
        if not tokens or last_calls[tokens[-1].end() :].strip():
            return
        # If the token occurs after each of several calls, it ends a call, but not the message.
        token = tokens[-1][0]
        occurs_once = text_of_calls.count(token) == 1
        if occurs_once and call.startswith(last_calls.rstrip()):
            self._add_stop(token)

    def _add_stop(self, token: str) -> None:
        self.stops[token] = self._added[token]


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the words, and prefers the longest.

    If there are no words, the pattern never matches.
    """
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
