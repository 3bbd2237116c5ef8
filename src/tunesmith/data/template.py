"""A sample -> tokens and the mask of those that are learnt: the prompt in use is the prompt that was trained.

    choose(data, tokenizer, eos_ids) -> Template        what the recipe asks for, or what the tokenizer brings
    Template.encode(sample, train_on, where=...)        Example: token ids, and which of them carry loss
    Template.prompt(sample)                             token ids up to where the answer starts

Conversations are rendered by one Jinja chat template (the tokenizer's, a file's, or one of `texts`), with
`apply_chat_template`, which adds no special token of its own: a template that wants a BOS writes it. The same template
is saved with what is trained. `masks` finds the answers in the text, `align` lays them on the tokens.

Raw rows (prompt-completion and text) are tokenised as they stand: a BOS where the tokenizer itself adds one, once, and
an end token at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tunesmith.config.schema import Data
from tunesmith.data import builtin_templates
from tunesmith.data.align import Aligned, Aligner, Span
from tunesmith.data.batch import Example
from tunesmith.data.formats import Completion, Conversation, Sample
from tunesmith.data.loss_mask import Masker
from tunesmith.errors import DataError, ModelError

TrainOn = Literal["response", "last", "all"]
_RAW = frozenset({"prompt-completion", "text"})
_TOOLS = frozenset({"messages", "sharegpt"})  # formats whose rows may hold tool calls
_BATCH = 256  # texts handed to the tokenizer at once


def select_template(data: Data, tokenizer: Any, eos_ids: Collection[int]) -> Template:
    """The template that `data.template` names.

    Args:
        data: the recipe's data block; `template`, `system` and the formats of its sources are read.
        tokenizer: a fast Transformers tokenizer.
        eos_ids: ids at which generation stops (the generation config's list).

    Raises:
        DataError: there is no such template, the file cannot be read, or its answers cannot be told from its prompts.
    """
    formats = {source.format for source in (*data.train, *data.validation)}
    tools = bool(formats & _TOOLS)
    own = _own_template(tokenizer, tools=tools)
    if data.template == "auto" and formats and formats <= _RAW:
        try:  # chats with what is trained here go on by the tokenizer's template, if it has one
            return Template(tokenizer, eos_ids, jinja=own, name="text", system=data.system)
        except DataError:
            return Template(tokenizer, eos_ids, jinja=None, name="text", system=data.system)
    if data.template == "chat" and own is None:
        raise DataError(
            "the tokenizer has no chat template",
            where="data.template",
            why="`chat` takes the tokenizer's own; base models often have none",
            fix="data.template=alpaca, or data.template=FILE.jinja",
        )
    if data.template in ("auto", "chat") and own is not None:
        chat = Template(tokenizer, eos_ids, jinja=own, name="chat", system=data.system)
        return chat.with_tools() if tools else chat
    if data.template in ("auto", "alpaca"):
        jinja = builtin_templates.alpaca(bos=_adds_bos(tokenizer))
        return Template(tokenizer, eos_ids, jinja=jinja, name="alpaca", system=data.system)
    jinja = _read(Path(data.template).expanduser(), tokenizer)
    return Template(tokenizer, eos_ids, jinja=jinja, name=Path(data.template).name, system=data.system)


class Template:
    """How a sample becomes text, tokens and a mask.

    Attributes:
        name: `chat`, `alpaca`, `text` (raw rows only), `pattern`, or the name of a template file.
        jinja: the chat template, saved as the tokenizer's in what is written; None if only raw text is taken.
        end_ids: ids of the tokens that may end an answer.
        stops: ids at which generation from a prompt must stop; the same set.
        notes: what befell rows that were encoded, counted; such as tokens that straddle the start of an answer.
    """

    def __init__(
        self, tokenizer: Any, eos_ids: Collection[int], *, jinja: str | None, name: str, system: str | None = None
    ) -> None:
        dated = jinja is not None and "strftime_now(" in jinja
        jinja = builtin_templates.with_fixed_date(jinja) if jinja is not None and dated else jinja
        self.name, self.tokenizer, self.jinja, self.system, self._dated = name, tokenizer, jinja, system, dated
        self._aligner = Aligner(tokenizer)
        self._eos = frozenset(eos_ids) or frozenset({_eos(tokenizer)})
        # What ends raw rows: the tokenizer's end token, if generation stops at it.
        self._end = tokenizer.eos_token_id if tokenizer.eos_token_id in self._eos else min(self._eos)
        titles = {"chat": "the tokenizer's chat template", "alpaca": "the alpaca text", "pattern": "the prompt's text"}
        title = titles.get(name, f"the template {name}")
        self._masker = Masker(tokenizer, jinja, title, self._eos) if jinja is not None else None
        self._hermes = False
        self.notes: Counter[str] = self._masker.notes if self._masker else Counter()
        self._before, self._after = _added(tokenizer)

    @classmethod
    def text(cls, pattern: str, tokenizer: Any, eos_ids: Collection[int]) -> Template:
        """A template of one text with {instruction}, {input} and {response}; the end token follows.

        What is learnt is `train_on`'s to say, as elsewhere: `all`, or `response` for the response and the end token.

        Raises:
            DataError: the text lacks a field or has one too many.
        """
        jinja = builtin_templates.pattern(pattern, bos=_adds_bos(tokenizer))
        return cls(tokenizer, frozenset(eos_ids) | {_eos(tokenizer)}, jinja=jinja, name="pattern")

    def with_tools(self) -> Template:
        """This template; or if it is ChatML and drops tool calls, one that renders those in Hermes' form."""
        if self._masker is None or self.jinja is None or self._masker.tools or not _is_chatml(self._masker):
            return self
        jinja = builtin_templates.with_tools(self.jinja)
        extended = Template(self.tokenizer, self._eos, jinja=jinja, name=self.name, system=self.system)
        extended._hermes = True
        return extended

    @property
    def end_ids(self) -> frozenset[int]:
        return self._masker.end_ids if self._masker else self._eos

    @property
    def stops(self) -> frozenset[int]:
        return self.end_ids | self._eos

    def describe(self) -> str:
        """One line for the user: which prompt is in use, how an answer ends and how the mask is found."""
        ends = ", ".join(repr(self.tokenizer.decode([id_])) for id_ in sorted(self.end_ids))
        if self._masker is None or self.name == "text":
            return f"text: rows as they stand; each ends with {self.tokenizer.decode([self._end])!r}"
        what = {
            "chat": "chat: the tokenizer's chat template",
            "alpaca": "alpaca: Stanford's instruction text",
            "pattern": "pattern: one text with instruction and response",
        }.get(self.name, f"{self.name}: a chat template from a file")
        tools = "; tools in Hermes' form, which the tokenizer's ChatML lacks" if self._hermes else ""
        how = "its {% generation %} blocks" if self._masker.generation else "marks"
        date = (
            f"; its date stands at {builtin_templates.DATE:%d %b %Y}, at every start and in what is written"
            if self._dated
            else ""
        )
        return f"{what}{tools}{date}; answers end with {ends}; mask by {how}"

    def encode(self, sample: Sample, train_on: TrainOn, *, where: str) -> Example:
        """Tokens and mask of one sample, however long it is.

        Args:
            train_on: `response` (every answer), `last` (the last one) or `all` (every token but the first).
            where: the row's place, for errors.

        Raises:
            DataError: the template cannot render the row, drops a part of it, or its answers cannot be told.
        """
        return self.encode_many([sample], train_on, where=[where])[0]

    def encode_many(self, samples: Sequence[Sample], train_on: TrainOn, *, where: Sequence[str]) -> list[Example]:
        """As `encode`, for many samples; the tokenizer is called once for some hundreds of them."""
        examples: list[Example] = []
        for at in range(0, len(samples), _BATCH):
            part = samples[at : at + _BATCH]
            places = where[at : at + _BATCH]
            located = [self._locate(s, train_on, w) for s, w in zip(part, places, strict=True)]
            found = self._aligner.encode([text for text, _ in located], [spans for _, spans in located], self.stops)
            for sample, aligned, place in zip(part, found, places, strict=True):
                examples.append(self._example(sample, aligned, train_on, place))
        return examples

    def prompt(self, sample: Sample) -> list[int]:
        """Token ids that the model is given: all before the last answer, which the sample may lack.

        Raises:
            DataError: the template cannot render it, or takes raw text only.
        """
        if isinstance(sample, Conversation):
            sample = self._prepare(sample)
            messages = sample.messages
            if messages and messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            text = self._chat("").render(messages, sample.tools, generate=True)
            return self._aligner.ids([text])[0].tolist()
        text = sample.prompt if isinstance(sample, Completion) else sample.text
        ids = self._aligner.ids([text])[0].tolist()
        return [*self._missing_bos(ids), *ids]

    # --- conversations ----------------------------------------------------------------------------------------------

    def _chat(self, where: str) -> Masker:
        if self._masker is None:
            raise DataError(
                "raw text is what is trained here, and this is a conversation",
                where=where,
                why="the tokenizer has no chat template, and no source of the recipe holds conversations",
                fix="give a prompt as text; or train with data.template=alpaca",
            )
        return self._masker

    def _prepare(self, sample: Conversation) -> Conversation:
        """The recipe's system message where there is none; instruction and input apart for the texts of our own."""
        messages, given = sample.messages, sample.given
        if sample.instruction is not None and "message.input" in (self.jinja or ""):
            instruction, extra, _ = sample.instruction
            at = max(i for i, message in enumerate(messages) if message["role"] == "user")
            messages = [*messages[:at], {"role": "user", "content": instruction, "input": extra}, *messages[at + 1 :]]
        if self.system is not None and messages and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
            given += 1 if given else 0
        if self.jinja is not None and "tool_call" in self.jinja and ".id" in self.jinja:
            messages = _with_ids(messages)
        return Conversation(messages, sample.tools or None, given, sample.instruction)

    def _locate(self, sample: Sample, train_on: TrainOn, where: str) -> tuple[str, list[Span]]:
        """The text of a sample, and the spans of its characters that are learnt."""
        if not isinstance(sample, Conversation):
            whole = sample.prompt + sample.completion if isinstance(sample, Completion) else sample.text
            if not whole:
                raise DataError("the row holds no text", where=where, fix="delete the row")
            given = len(sample.prompt) if isinstance(sample, Completion) and train_on != "all" else 0
            return whole, [Span(given, len(whole))]
        sample = self._prepare(sample)
        if not sample.messages or sample.messages[-1]["role"] != "assistant":
            raise DataError(
                "the conversation does not end with an answer",
                where=where,
                why=f"its last message is of role {sample.messages[-1]['role']}" if sample.messages else "it is empty",
                fix="delete the row, or its last messages",
            )
        text, answers = self._chat(where).answers(sample.messages, sample.tools, where=where)
        answers = answers[-1:] if train_on == "last" else [a for a in answers if a.message >= sample.given]
        if train_on == "all":
            return text, [Span(answers[0].spans[0].start if sample.given else 0, len(text))]
        return text, [span for answer in answers for span in answer.spans]

    def _example(self, sample: Sample, aligned: Aligned, train_on: TrainOn, where: str) -> Example:
        ids, trained = aligned.ids, aligned.trained
        if isinstance(sample, Conversation):
            if not aligned.ended:
                raise DataError(
                    "the end of an answer is not one token of its own",
                    where=where,
                    why="the tokenizer joins it with the text beside it, or splits it",
                    fix="add it as a special token: model.added_tokens",
                )
        else:
            ids, trained = self._closed(ids, trained)
        if aligned.straddled:
            self.notes["tokens that straddle the start of an answer, not learnt"] += aligned.straddled
        if len(ids) < 2:
            raise DataError("the row holds no text", where=where, fix="delete the row")
        trained[0] = False  # nothing stands before it
        return Example(ids, trained)

    # --- raw text ---------------------------------------------------------------------------------------------------

    def _closed(self, ids: np.ndarray, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Raw text's tokens with the BOS that the tokenizer adds, once, and an end token, which is learnt."""
        before = self._missing_bos(ids)
        ended = bool(len(ids)) and int(ids[-1]) in self.stops
        after = [] if ended else [self._end]
        ids = np.concatenate([np.array(before, np.int32), ids, np.array(after, np.int32)]).astype(np.int32)
        trained = np.concatenate([np.zeros(len(before), bool), trained, np.ones(len(after), bool)])
        trained[-1] = True
        return ids, trained

    def _missing_bos(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        return [] if len(ids) and self._before and int(ids[0]) == self._before[0] else self._before


def _eos(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end token",
            where="model.tokenizer",
            why="each answer must end with one, or the model never learns to stop",
            fix="set eos_token in the tokenizer's tokenizer_config.json",
        )
    return int(tokenizer.eos_token_id)


def _added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer itself puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
    return full[:at], full[at + len(bare) :]


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer.bos_token_id in _added(tokenizer)[0]


def _own_template(tokenizer: Any, *, tools: bool) -> str | None:
    """The tokenizer's chat template as one text; some have several by name, `tool_use` among them."""
    own = tokenizer.chat_template
    if not isinstance(own, dict):
        return own
    if tools and "default" in own and "tool_use" in own:
        return builtin_templates.either("{%- if tools %}", own["tool_use"], own["default"])
    return own.get("default")


def _with_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ids for calls that have none, and for their results in the same order.

    Templates that write ids insist on them (Mistral's: nine letters and digits), and most rows have none.
    """
    numbered: list[dict[str, Any]] = []
    waiting: list[str] = []
    count = 0
    for message in messages:
        more: dict[str, Any] = {}
        if message.get("tool_calls"):
            more["tool_calls"] = [
                {"id": f"call{n:05d}", **call} for n, call in enumerate(message["tool_calls"], count + 1)
            ]
            count += len(message["tool_calls"])
            waiting = [call["id"] for call in more["tool_calls"]]
        elif message["role"] == "tool" and waiting:
            more["tool_call_id"] = message.get("tool_call_id", waiting.pop(0))
        numbered.append({**message, **more})
    return numbered


def _is_chatml(masker: Masker) -> bool:
    pair = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    try:
        text = masker.render(pair)
    except DataError:
        return False
    return text.endswith("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n")


def _read(path: Path, tokenizer: Any) -> str:
    """A Jinja file, tried for its syntax.

    Raises:
        DataError: it cannot be read, or is no Jinja; with file:line.
    """
    import jinja2

    try:
        jinja = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the template {str(path)!r} cannot be read",
            where="data.template",
            why=str(error.strerror if isinstance(error, OSError) else error),
            fix="name a Jinja file, or one of auto, chat, alpaca",
        ) from error
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "one"}], chat_template=jinja, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            "the template is no valid Jinja",
            where=f"{path}:{error.lineno}",
            why=str(error.message),
            fix="mend that line",
        ) from error
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
        pass  # it may ask for more than one message; rows that it refuses are named when they come
    return jinja
