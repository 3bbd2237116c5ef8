"""A sample -> token ids and loss mask: the prompt in use is the prompt that was trained.

Conversations are rendered by one Jinja chat template (the tokenizer's, a file's, or one of `builtin_templates`), which
is saved with the trained model; a template that wants a BOS writes it. A prompt and completion are a conversation of two
turns. `loss_mask` finds the answers in the text, `align` maps them to tokens.

Without a template (`raw`) prompt and completion stand as they are, one after the other, as rows of the format text
always do: a BOS where the tokenizer itself adds one, once, and an end token at the end.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tunesmith.config.schema import Data
from tunesmith.data import builtin_templates
from tunesmith.data.align import Aligned, Aligner, CharSpan
from tunesmith.data.batch import Example
from tunesmith.data.formats import Completion, Conversation, Sample, Text, with_system
from tunesmith.data.loss_mask import RENDER_ERRORS, AssistantMask
from tunesmith.errors import DataError, ModelError

TrainOn = Literal["response", "last", "all"]
_PLAIN = frozenset({"prompt-completion", "text"})  # formats whose rows need no template
_TOOLS = frozenset({"messages", "sharegpt"})  # formats whose rows may hold tool calls
_TITLES = {  # name: what errors call the template, what `describe` calls it
    "chat": ("the tokenizer's chat template", "chat: the tokenizer's chat template"),
    "alpaca": ("the alpaca text", "alpaca: Stanford's instruction text"),
    "pattern": ("the prompt's text", "pattern: one text with instruction and response"),
}


def select_template(data: Data, tokenizer: Any, eos_ids: Collection[int]) -> "Template":
    """The template that `data.template` names.

    `eos_ids`: those at which generation stops (the generation config's list). DataError where there is no such template
    or it cannot tell answers from prompts.
    """
    formats = {source.format for source in (*data.train, *data.validation)}
    tools = bool(formats & _TOOLS)
    own = _own_template(tokenizer, tools=tools)
    if data.template == "raw" or (data.template == "auto" and own is None and formats and formats <= _PLAIN):
        if data.system is not None:
            what, fix = "a raw prompt has no system message", "remove data.system, or data.template=alpaca"
            why = "data.template is raw" if data.template == "raw" else "the tokenizer has no chat template"
            raise DataError(what, where="data.system", why=why, fix=fix)
        return Template(tokenizer, eos_ids, jinja=None, name="raw")
    if data.template == "auto" and formats == {"text"}:
        try:  # chats with what is trained here use the tokenizer's template
            return Template(tokenizer, eos_ids, jinja=own, name="text")
        except DataError:
            return Template(tokenizer, eos_ids, jinja=None, name="raw")
    if data.template == "chat" and own is None:
        why = "`chat` takes the tokenizer's own; base models often have none"
        fix = "data.template=alpaca, or data.template=FILE.jinja"
        raise DataError("the tokenizer has no chat template", where="data.template", why=why, fix=fix)
    if data.template in ("auto", "chat") and own is not None:
        chat = Template(tokenizer, eos_ids, jinja=own, name="chat")
        return chat.with_tools() if tools else chat
    if data.template in ("auto", "alpaca"):
        bos = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in _added_before(tokenizer)
        return Template(tokenizer, eos_ids, jinja=builtin_templates.alpaca(bos=bos), name="alpaca")
    path = Path(data.template).expanduser()
    return Template(tokenizer, eos_ids, jinja=_read_template(path, tokenizer), name=path.name)


class Template:
    """How a sample becomes text, tokens and a loss mask.

    Attributes:
        name: `chat`, `alpaca`, `raw`, `text` (rows of that format only), `pattern`, or the name of a template file.
        jinja: the chat template, saved as the tokenizer's with the trained model. For `raw` it writes the texts as they
            stand; None where this tokenizer would split its rendering in another way than the texts themselves.
        raw: whether prompt and completion stand as they are.
        end_ids: ids of the tokens that may end an answer, at which generation must stop.
    """

    def __init__(self, tokenizer: Any, eos_ids: Collection[int], *, jinja: str | None, name: str) -> None:
        self._dated = jinja is not None and "strftime_now(" in jinja
        self.jinja = None if jinja is None else builtin_templates.with_fixed_date(jinja)
        self.name, self.tokenizer, self.raw = name, tokenizer, name == "raw"
        self._aligner = Aligner(tokenizer)
        if not eos_ids and tokenizer.eos_token_id is None:
            why = "each answer must end with one, or the model never learns to stop"
            fix = "set eos_token in the tokenizer's tokenizer_config.json"
            raise ModelError("the tokenizer has no end token", where="model.tokenizer", why=why, fix=fix)
        self._eos = frozenset(eos_ids or {tokenizer.eos_token_id})
        # What ends raw rows: the tokenizer's end token, if generation stops at it.
        self._end = tokenizer.eos_token_id if tokenizer.eos_token_id in self._eos else min(self._eos)
        title = _TITLES[name][0] if name in _TITLES else f"the template {name}"
        self._mask = AssistantMask(tokenizer, self.jinja, title, self._eos) if self.jinja is not None else None
        self._bos = _added_before(tokenizer)
        self.end_ids = self._mask.end_ids if self._mask else self._eos
        if self.raw:
            jinja = builtin_templates.raw(bos=tokenizer.decode(self._bos), end=tokenizer.decode([self._end]))
            asked = [{"role": "user", "content": "One two."}]
            given = tokenizer.apply_chat_template(asked, chat_template=jinja)["input_ids"]
            self.jinja = jinja if given == self.prompt(Completion("One two.", "")) else None

    def with_tools(self) -> "Template":
        """This template; or if it is ChatML and drops tool calls, one that renders those in Hermes' form."""
        if self._mask is None or self.jinja is None or self._mask.tools or not _is_chatml(self._mask):
            return self
        made = Template(self.tokenizer, self._eos, jinja=builtin_templates.with_tools(self.jinja), name=self.name)
        made._dated = self._dated
        return made

    def describe(self) -> str:
        """One line for the user: which prompt is in use, how an answer ends and how the loss mask is found."""
        end = repr(self.tokenizer.decode([self._end]))
        if self._mask is None:
            how = "prompt and completion as they stand, nothing between them"
            return f"raw: no template; {how}; each row ends with {end}"
        if self.name == "text":
            return f"text: rows as they are; each ends with {end}"
        parts = [_TITLES[self.name][1] if self.name in _TITLES else f"{self.name}: a chat template from a file"]
        if builtin_templates.HERMES in (self.jinja or ""):
            parts.append("tool calls in Hermes' form (plain ChatML has none)")
        if self._dated:
            parts.append(f"its date is fixed at {builtin_templates.DATE:%d %b %Y}, in every start and in what is saved")
        parts.append(f"answers end with {', '.join(repr(self.tokenizer.decode([i])) for i in sorted(self.end_ids))}")
        parts.append(f"loss mask by {'its {% generation %} blocks' if self._mask.tagged else 'sentinels'}")
        return "; ".join(parts)

    def encode(self, sample: Sample, train_on: TrainOn, *, where: str) -> Example:
        """Tokens and mask of one sample, however long it is; see `encode_many`."""
        return self.encode_many([sample], train_on, where=[where])[0]

    def encode_many(self, samples: Sequence[Sample], train_on: TrainOn, *, where: Sequence[str]) -> list[Example]:
        """Tokens and masks of many samples, with one call of the tokenizer.

        Args:
            train_on: `response` (every answer), `last` (the last one) or `all` (every token but the first).
            where: the rows' places, for the DataError of one that cannot be rendered or masked.
        """
        samples = [self._as_taken(sample) for sample in samples]
        located = [self._locate(sample, train_on, place) for sample, place in zip(samples, where, strict=True)]
        aligned = self._aligner.encode([text for text, _ in located], [spans for _, spans in located], self.end_ids)
        return [self._example(*one) for one in zip(samples, aligned, where, strict=True)]

    def prompt(self, sample: Sample) -> list[int]:
        """Token ids that the model is given: all before the last answer, which the sample may lack; may raise DataError."""
        sample = self._as_taken(sample)
        if isinstance(sample, Conversation):
            messages = self._messages(sample)
            if messages and messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            if self._mask is not None:
                text = self._mask.render(messages, sample.tools or None, generate=True)
                return self._aligner.ids([text])[0].tolist()
            sample = self._as_they_stand(messages)
        ids = self._aligner.ids([sample.prompt if isinstance(sample, Completion) else sample.text])[0].tolist()
        return [*self._missing_bos(ids), *ids]

    def _as_taken(self, sample: Sample) -> Sample:
        """The sample as this template takes it: with a template, prompt and completion are two turns."""
        if not isinstance(sample, Completion) or self.raw:
            return sample
        turns = [{"role": "user", "content": sample.prompt}, {"role": "assistant", "content": sample.completion}]
        return Conversation(with_system(turns, sample.system))

    def _as_they_stand(self, messages: list[dict[str, Any]]) -> Text:
        """Turns of a chat without a template: each text as it stands, answers with their end token."""
        end = self.tokenizer.decode([self._end])
        for message in messages:
            if message["role"] not in ("user", "assistant") or message.get("tool_calls"):
                what, why = f"a raw prompt has no {message['role']} message", "the model was trained without a template"
                raise DataError(what, why=why, fix="leave it out, or train with data.template=alpaca")
        return Text("".join(m["content"] + (end if m["role"] == "assistant" else "") for m in messages))

    def _messages(self, sample: Conversation) -> list[dict[str, Any]]:
        """The messages as the template reads them: instruction and input apart for alpaca's text, ids for calls."""
        messages, jinja = sample.messages, self.jinja or ""
        if sample.instruction is not None and "message.input" in jinja:
            instruction, extra, _ = sample.instruction
            at = max(i for i, message in enumerate(messages) if message["role"] == "user")
            messages = [*messages[:at], {"role": "user", "content": instruction, "input": extra}, *messages[at + 1 :]]
        return _with_ids(messages) if "tool_call" in jinja and ".id" in jinja else messages

    def _locate(self, sample: Sample, train_on: TrainOn, where: str) -> tuple[str, list[CharSpan]]:
        """The text of a sample as taken, and the spans of its supervised characters."""
        if not isinstance(sample, Conversation):
            whole = sample.prompt + sample.completion if isinstance(sample, Completion) else sample.text
            if not whole:
                raise DataError("the row holds no text", where=where, fix="delete the row")
            given = len(sample.prompt) if isinstance(sample, Completion) and train_on != "all" else 0
            return whole, [CharSpan(given, len(whole))]
        messages = self._messages(sample)
        if not messages or messages[-1]["role"] != "assistant":
            why = f"its last message is of role {messages[-1]['role']}" if messages else "it is empty"
            fix = "delete the row, or its last messages"
            raise DataError("the conversation does not end with an answer", where=where, why=why, fix=fix)
        if self._mask is None:
            what = "the row is a conversation, and there is no template to write its turns"
            why = "rows are raw: a prompt and a completion as they stand"
            fix = 'write {"prompt": "...", "completion": "..."}, or train with data.template=alpaca'
            raise DataError(what, where=where, why=why, fix=fix)
        first = len(messages) - 1 if train_on == "last" else sample.given
        wanted = set(range(first, len(messages))) - (sample.untrained if train_on != "all" else set())
        text, spans = self._mask.answers(messages, sample.tools or None, wanted=wanted, where=where)
        if train_on != "all":
            return text, spans
        no_loss, left_out = wanted & sample.untrained, list[CharSpan]()
        if no_loss:
            left_out = self._mask.answers(messages, sample.tools or None, wanted=no_loss, where=where)[1]
        edges = [spans[0].start if sample.given else 0, *(at for span in left_out for at in span[:2]), len(text)]
        return text, [CharSpan(*edge) for edge in zip(edges[::2], edges[1::2], strict=True) if edge[0] < edge[1]]

    def _example(self, sample: Sample, aligned: Aligned, where: str) -> Example:
        ids, trained = aligned.ids, aligned.trained
        if not isinstance(sample, Conversation):  # the BOS that the tokenizer adds, once, and a supervised end token
            before = np.array(self._missing_bos(ids), np.int32)
            after = np.array([] if len(ids) and int(ids[-1]) in self.end_ids else [self._end], np.int32)
            ids = np.concatenate([before, ids, after])
            trained = np.concatenate([np.zeros(len(before), bool), trained, np.ones(len(after), bool)])
            trained[-1] = True
        elif not aligned.ended:
            why = "the tokenizer joins it with the text beside it, or splits it"
            fix = "add it as a special token: model.added_tokens"
            raise DataError("the end of an answer is not one token of its own", where=where, why=why, fix=fix)
        if len(ids) < 2:
            raise DataError("the row holds no text", where=where, fix="delete the row")
        trained[0] = False  # nothing predicts the first token
        return Example(ids, trained)

    def _missing_bos(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        return [] if len(ids) and self._bos and int(ids[0]) == self._bos[0] else self._bos


def _added_before(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer itself puts before a text."""
    bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return full[: next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)]


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
    numbered, count, waiting = [], 0, list[str]()
    for message in messages:
        new: dict[str, Any] = {}
        if calls := message.get("tool_calls"):
            new["tool_calls"] = [{"id": f"call{n:05d}", **call} for n, call in enumerate(calls, count + 1)]
            count, waiting = count + len(calls), [call["id"] for call in new["tool_calls"]]
        elif message["role"] == "tool" and waiting:
            new["tool_call_id"] = message.get("tool_call_id", waiting.pop(0))
        numbered.append({**message, **new})
    return numbered


def _is_chatml(mask: AssistantMask) -> bool:
    try:
        text = mask.render([{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}])
    except DataError:
        return False
    return text.endswith("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n")


def _read_template(path: Path, tokenizer: Any) -> str:
    """A Jinja file, tried for its syntax; DataError, with file:line, if it cannot be read or is not Jinja."""
    import jinja2

    try:
        jinja = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = str(error.strerror if isinstance(error, OSError) else error)
        what, fix = f"the template {str(path)!r} cannot be read", "name a Jinja file, or one of auto, chat, alpaca, raw"
        raise DataError(what, where="data.template", why=why, fix=fix) from error
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "one"}], chat_template=jinja, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        where, why = f"{path}:{error.lineno}", str(error.message)
        raise DataError("the template is not valid Jinja", where=where, why=why, fix="fix that line") from error
    except RENDER_ERRORS:
        pass  # it may ask for more than one message; rows that it refuses are named when they come
    return jinja
