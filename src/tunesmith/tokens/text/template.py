"""Conversion of a sample to token ids and a loss mask.

The same code makes the prompts of training and of inference, so they are identical.

Conversations are rendered by one Jinja chat template, which comes from the tokenizer, a file or
`builtin_templates`. The template is saved with the trained model. If a BOS token is required, the
template writes it. A prompt with its completion becomes a conversation of two turns. `loss_mask`
finds the answers in the rendered text, and `align` converts their characters to tokens.

Without a template (`raw`), prompt and completion are joined unchanged. Rows of format text are
never rendered. Raw rows and text rows get an end token, and a BOS token if the tokenizer adds one.
"""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Literal
from unicodedata import normalize

import numpy as np

from tunesmith.errors import DataError, ModelError
from tunesmith.rows.messages import has_answer
from tunesmith.rows.samples import (
    PICTURE_MARK,
    Completion,
    Conversation,
    FunctionCall,
    Message,
    Sample,
    Text,
    with_system,
)
from tunesmith.tokens.text import builtin_templates
from tunesmith.tokens.text.align import Aligned, Aligner, CharSpan
from tunesmith.tokens.text.answer_ends import any_of
from tunesmith.tokens.text.example import Example
from tunesmith.tokens.text.loss_mask import RenderedAnswers, find_answers
from tunesmith.tokens.text.pictures_in_text import (
    SeenPictures,
    literal_placeholder,
    see_pictures,
    texts_in,
)
from tunesmith.tokens.text.probe import probe
from tunesmith.tokens.text.rendering import ChatRenderer
from tunesmith.tokens.text.thought_style import DEFAULT_STYLE
from tunesmith.tokens.text.thoughts import THOUGHT_TAGS
from tunesmith.units import count_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.tokens.text.placeholders import PictureProcessor

TrainOn = Literal["response", "last", "all"]
# How error messages name templates that are not files.
_TITLES = {
    "chat": "the tokenizer's chat template",
    "alpaca": "the alpaca text",
    "pattern": "the prompt's text",
}


@contextmanager
def row_errors(where: str) -> Iterator[None]:
    """Add the location `where` to an error that the `with` block raises without a location."""
    try:
        yield
    except (DataError, ModelError) as error:
        error.where = error.where or where
        raise


def title_of(name: str) -> str:
    """Return the text that names a template in error messages."""
    return _TITLES.get(name, f"the template {name}")


class Template:
    """A template that converts samples to text, tokens and a loss mask.

    Attributes:
        chat: renderer of the chat template. None if there is no template.
        name: `chat`, `alpaca`, `raw`, `text` (all rows have format text), `pattern`, or the name of
            a template file.
        jinja: the chat template that is saved with the trained model. For `raw` this is a template
            that writes the texts unchanged, or None if the tokenizer splits rendered texts
            differently.
        pictures: creates the placeholder tokens of pictures. If None, rows with pictures raise
            DataError.
        raw: whether prompt and completion are used unchanged.
        samples_answers: whether training samples its own answers. If so, an answer of a row that
            the template cannot write is left out, because training needs only the prompt.
        end_ids: ids of the supervised tokens that may end an answer. Generation must stop at them.
        earlier_end_ids: ids of the tokens that end earlier answers, but not the last answer. They
            are not supervised, and generation does not stop at them.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        eos_ids: Collection[int],
        *,
        jinja: str | None,
        name: str,
        pictures: "PictureProcessor | None" = None,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.pictures = pictures
        self.raw = name == "raw"
        self.samples_answers = False
        self.jinja = jinja
        self.has_fixed_date = jinja is not None and builtin_templates.writes_today(jinja)
        if jinja is not None:
            self.jinja = builtin_templates.with_fixed_date(jinja)
        self._aligner = Aligner(tokenizer)
        if not eos_ids and tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no end token",
                where="model.tokenizer",
                why="each answer must end with one, or the model never learns to stop",
                fix="set eos_token in the tokenizer's tokenizer_config.json",
            )
        self._eos_ids = frozenset(eos_ids or {tokenizer.eos_token_id})
        # End token of raw rows. It is the tokenizer's end token if generation stops at this token.
        self.raw_end = min(self._eos_ids)
        if tokenizer.eos_token_id in self._eos_ids:
            self.raw_end = tokenizer.eos_token_id
        self.chat: ChatRenderer | None = None
        self.end_ids = self._eos_ids
        self.earlier_end_ids: frozenset[int] = frozenset()
        if self.jinja is not None:
            self.chat = ChatRenderer(tokenizer, self.jinja, title_of(name), self._eos_ids)
            with row_errors("data.template"):
                self._probe(self.chat)
            # Generation must also stop at tokens that the template writes after an answer.
            self.end_ids |= frozenset(self.chat.ends.stops.values())
            self.earlier_end_ids = frozenset(self.chat.ends.earlier.values())
        self._bos = prefix_ids(tokenizer)
        if self.raw:
            self.jinja = self._raw_jinja()

    def _probe(self, chat: ChatRenderer) -> None:
        try:
            probe(chat)
        except DataError:
            if self.pictures is None:
                raise
            # Try again with lists of parts, because templates of some vision-language models, such
            # as LLaVA, read only lists.
            chat.takes_lists = True
            probe(chat)

    def _raw_jinja(self) -> str | None:
        """Return a template that writes texts unchanged.

        Return None if the texts would get other tokens with this template.
        """
        jinja = builtin_templates.raw(
            bos=self.tokenizer.decode(self._bos), end=self.tokenizer.decode([self.raw_end])
        )
        messages = [{"role": "user", "content": "One two."}]
        rendered = self.tokenizer.apply_chat_template(messages, chat_template=jinja)
        if rendered["input_ids"] != self.prompt(Completion("One two.", "")):
            return None
        return jinja

    def encode(self, sample: Sample, train_on: TrainOn, *, where: str) -> Example:
        """Tokenize one sample of any length and compute its mask; see `encode_many`."""
        [example] = self.encode_many([sample], train_on, where=[where])
        if isinstance(example, DataError):
            raise example
        return example

    def encode_many(
        self, samples: Sequence[Sample], train_on: TrainOn, *, where: Sequence[str]
    ) -> list[Example | DataError]:
        """Tokenize samples and compute their masks.

        The result has a DataError instead of an example for each sample that cannot be encoded.

        All samples are tokenized in one call.

        Args:
            train_on: `response` (every answer), `last` (the last answer) or `all` (every token
                except the first).
            where: the location of each row, for error messages.
        """
        samples = [self._as_turns(sample) for sample in samples]
        texts: dict[int, RenderedAnswers] = {}
        seen: dict[int, SeenPictures] = {}
        examples: dict[int, Example | DataError] = {}
        for i, (sample, place) in enumerate(zip(samples, where, strict=True)):
            try:
                with row_errors(place):
                    seen[i] = see_pictures(sample, self.pictures, place)
                    answers = self._locate(sample, train_on)
                    texts[i] = self._insert_placeholders(answers, seen[i].texts)
            except DataError as error:
                examples[i] = error
                if self.samples_answers or not has_answer(sample):
                    with suppress(DataError):
                        examples[i] = self._only_prompt(sample)
        try:
            # Tokenize all texts in one call, because the tokenizer processes the texts of a call
            # with several threads.
            aligned = self._aligner.encode(
                [answers.text for answers in texts.values()],
                [answers.spans for answers in texts.values()],
                self.end_ids,
            )
        except DataError as error:
            if len(samples) == 1:
                error.where = where[0]
                return [error]
            # A sample in the batch has an error. Encode the samples one by one to find it.
            rows = zip(samples, where, strict=True)
            return [self.encode_many([sample], train_on, where=[at])[0] for sample, at in rows]
        for (i, answers), tokens in zip(texts.items(), aligned, strict=True):
            try:
                with row_errors(where[i]):
                    examples[i] = self._example(samples[i], seen[i], answers, tokens)
            except DataError as error:
                examples[i] = error
        return [examples[i] for i in range(len(samples))]

    def _only_prompt(self, sample: Sample) -> Example:
        """Build the example of a prompt with an empty answer, which is only an end token."""
        ids = np.array([*self.prompt(sample), self.raw_end], np.int32)
        trained = np.arange(len(ids)) == len(ids) - 1
        return Example(ids, trained, control_tokens=self._control_tokens(sample))

    def prompt(self, sample: Sample, *, where: str = "") -> list[int]:
        """Return the token ids of a sample's prompt.

        The prompt is everything before the last answer, or the entire sample if it has no answer.

        Raises:
            DataError: the sample cannot be rendered.
        """
        sample = self._as_turns(sample)
        with row_errors(where):
            ids = self._aligner.ids([self._prompt_text(sample, where)])[0].tolist()
        has_template = self.chat is not None and isinstance(sample, Conversation)
        return ids if has_template else [*self._missing_bos(ids), *ids]

    def _prompt_text(self, sample: Sample, where: str) -> str:
        if isinstance(sample, Text):
            return sample.text
        if isinstance(sample, Completion):
            return sample.prompt
        messages = self._messages(sample)
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        placeholders = see_pictures(sample, self.pictures, where).texts
        if self.chat is None:
            # Without a template the texts are joined unchanged, and answers get an end token.
            end = self.tokenizer.decode([self.raw_end])
            text = ""
            for message in messages:
                if message["role"] not in ("user", "assistant") or message.get("tool_calls"):
                    raise DataError(
                        f"without a template, a prompt cannot have a {message['role']} message",
                        why="the model was trained without a template",
                        fix="remove the message, or set data.template=alpaca",
                    )
                text += message["content"]
                if message["role"] == "assistant":
                    text += end
            return text
        chat = self._chat_of(sample)
        text = chat.render(chat.in_form(messages), sample.tools or None, generate=True)
        return self._insert_placeholders(RenderedAnswers(text, []), placeholders).text

    def answer(self, sample: Sample, *, where: str = "") -> str:
        """Return the last answer as the model should generate it, up to its end token.

        The text is rendered by the template, not decoded from tokens. It includes special tokens
        that the template writes, for example those of tool calls. It is empty for rows of format
        text.

        Raises:
            DataError: the sample cannot be rendered.
        """
        sample = self._as_turns(sample)
        text = sample.completion if isinstance(sample, Completion) else ""
        if isinstance(sample, Conversation):
            sample = replace(sample, untrained=frozenset())  # include an answer that is not trained
            with row_errors(where):
                answers = self._locate_answers(sample, "last")
            text = "".join(answers.text[span.start : span.end] for span in answers.spans)
        # If the row's own text contains an end token, generation stops there.
        text = self._ends.split(text, maxsplit=1)[0]
        # Some tokenizers convert a letter and its accent to one character, so the model generates
        # this single character.
        return normalize("NFC", text) if self._composes_letters else text

    def final_answer(self, answer: str) -> tuple[str, str]:
        """Return the part of an answer after its thought, without and with special tokens.

        Args:
            answer: the text after the generation prompt, with special tokens.
        """
        style = DEFAULT_STYLE if self.chat is None else self.chat.traits.style
        final = style.answer_text(answer)
        return self.without_special_tokens(final), final

    @cached_property
    def tokenizer_hash(self) -> str:
        """Hash of the tokenizer, see the function `tokenizer_hash`.

        The hash is cached, because computing it takes 0.2 s with a large vocabulary.
        """
        return tokenizer_hash(self.tokenizer)

    @cached_property
    def _ends(self) -> re.Pattern[str]:
        return any_of(filter(None, map(self.tokenizer.decode, self.end_ids)))

    @cached_property
    def _composes_letters(self) -> bool:
        (ids,) = self._aligner.ids(["e\u0301"])
        return "\u00e9" in self.tokenizer.decode(ids.tolist())

    def first_answer(self, sample: Sample, train_on: TrainOn) -> str:
        """Return the first supervised answer as `answer` returns it, but without special tokens."""
        if isinstance(sample, Conversation) and train_on == "response":
            first = sample.supervised()[0]
            stop = next(i for i, message in enumerate(sample.messages, 1) if message is first)
            sample = first_turns(sample, stop)
        return self.without_special_tokens(self.answer(sample))

    def _control_tokens(self, sample: Sample) -> frozenset[str]:
        """Return the special tokens that the row's own text contains, see `Example.control_tokens`.

        The tags of a thought are not returned. In raw rows, a leading BOS token and trailing end
        tokens are not returned either, because they are intended. The result is empty for rows of
        format text.
        """
        texts: list[str] = []
        if isinstance(sample, Completion):
            prompt = sample.prompt.removeprefix(self.tokenizer.decode(self._bos))
            texts = [prompt, self._trailing_ends.sub("", sample.completion)]
        elif isinstance(sample, Conversation):
            texts = [*texts_in([sample.messages, sample.tools])]
        return frozenset(token for text in texts for token in self._control_token.findall(text))

    @cached_property
    def _control_token(self) -> re.Pattern[str]:
        tags = {tag for pair in THOUGHT_TAGS.items() for tag in pair}
        return any_of(t for t in self._special_tokens if t.strip() and t not in tags)

    @cached_property
    def _trailing_ends(self) -> re.Pattern[str]:
        return re.compile(f"(?:{self._ends.pattern})\\s*\\Z")

    def without_special_tokens(self, text: str) -> str:
        """Remove the special tokens that decoding an answer also removes."""
        for token in self._special_tokens:
            text = text.replace(token, "")
        return text

    @cached_property
    def _special_tokens(self) -> list[str]:
        """Special tokens that decoding removes. Longer tokens come first."""
        tokens = self.tokenizer.added_tokens_decoder.values()
        return sorted((token.content for token in tokens if token.special), key=len, reverse=True)

    def _as_turns(self, sample: Sample) -> Sample:
        """Convert a `Completion` to a conversation of two turns if there is a chat template."""
        if not isinstance(sample, Completion) or self.raw:
            return sample
        turns: list[Message] = [
            {"role": "user", "content": sample.prompt},
            {"role": "assistant", "content": sample.completion},
        ]
        return Conversation(with_system(turns, sample.system))

    def _messages(self, sample: Conversation) -> list[Message]:
        """Return the messages of a sample with all keys that the template reads.

        The alpaca template reads instruction and input separately. Some templates require ids of
        tool calls.
        """
        turns = sample.messages
        messages = list(turns)
        jinja = self.jinja or ""
        # The template reads the input separately from the instruction.
        if sample.instruction is not None and "message.input" in jinja:
            instruction, extra, _ = sample.instruction
            # Replace the last question by the instruction and the input of the row.
            at = max(i for i, message in enumerate(messages) if message["role"] == "user")
            messages[at] = {"role": "user", "content": instruction, "input": extra}
        if "tool_call" in jinja and ".id" in jinja:
            return _add_call_ids(messages)
        return messages

    def _locate(self, sample: Sample, train_on: TrainOn) -> RenderedAnswers:
        """Return the text of a sample and the spans of its supervised characters."""
        if isinstance(sample, Conversation):
            return self._locate_answers(sample, train_on)
        text = sample.text if isinstance(sample, Text) else sample.prompt + sample.completion
        if not text:
            raise DataError("the row has no text", fix="delete the row")
        start = 0 if isinstance(sample, Text) else len(sample.prompt)
        spans = [CharSpan(start, len(text))]
        # Use separate spans for prompt and completion even if both are supervised. The text is then
        # cut between them, so that the tokens are the same as in generation.
        if train_on == "all" and start:
            spans.insert(0, CharSpan(0, start))
        return RenderedAnswers(text, spans)

    def _locate_answers(self, sample: Conversation, train_on: TrainOn) -> RenderedAnswers:
        """Render a conversation, and find the characters that `train_on` supervises."""
        messages = self._messages(sample)
        if self.chat is None:
            raise DataError(
                "the row is a conversation, but there is no template for its turns",
                why="without a template, each row must have a prompt and a completion",
                fix='write {"prompt": "...", "completion": "..."},'
                " or train with data.template=alpaca",
            )
        locate = partial(find_answers, self._chat_of(sample), messages, sample.tools or None)
        # Answers before `first` belong to the prompt.
        first = len(messages) - 1 if train_on == "last" else sample.prompt_messages
        selected = set(range(first, len(messages)))
        excluded = selected & sample.untrained
        if train_on != "all":
            return locate(selected=selected - excluded)
        # With train_on all, supervise all characters after the prompt, except the answers that the
        # row excludes.
        answers = locate(selected=selected)
        edges = [answers.spans[0].start if sample.prompt_messages else 0]
        # Split the supervised span at each excluded answer.
        if excluded:
            for gap in locate(selected=excluded).spans:
                edges += [gap.start, gap.end]
        edges.append(len(answers.text))
        spans = map(CharSpan, edges[::2], edges[1::2])
        return answers._replace(spans=[span for span in spans if span.start < span.end])

    def _example(
        self, sample: Sample, seen: SeenPictures, answers: RenderedAnswers, aligned: Aligned
    ) -> Example:
        """Build the example of a tokenized sample. Raw rows get a BOS token and an end token."""
        ids = aligned.ids
        trained = aligned.trained
        if not isinstance(sample, Conversation):
            # Add the tokenizer's BOS token if it is missing, and a supervised end token.
            bos = np.array(self._missing_bos(ids), np.int32)
            has_end = self._has_own_end(sample, ids, trained)
            end = np.array([] if has_end else [self.raw_end], np.int32)
            ids = np.concatenate([bos, ids, end])
            trained = np.concatenate([np.zeros(len(bos), bool), trained, np.ones(len(end), bool)])
        elif not aligned.ended:
            raise DataError(
                "the end of an answer is not a separate token",
                why="the tokenizer merges it with adjacent text, or splits it",
                fix="add the end token of the template to model.added_tokens",
            )
        if len(ids) < 2:
            raise DataError("the row has no text", fix="delete the row")
        # The first token is never supervised, because no position predicts it.
        trained[0] = False
        if self.pictures is not None:
            # Remove the placeholders of pictures from the mask. With train_on all, they are inside
            # the spans.
            trained &= ~np.isin(ids, self.pictures.ids)
            placeholders = sum(text.count(self.pictures.token) for text in seen.texts)
            if np.count_nonzero(ids == self.pictures.token_id) != placeholders:
                raise literal_placeholder(self.pictures.token)
        return Example(
            ids,
            trained,
            digests=seen.digests,
            scaled=seen.scaled,
            flaws=(*_flaws(answers.text, aligned), *sorted(answers.missing)),
            control_tokens=self._control_tokens(sample),
        )

    def _has_own_end(self, sample: Text | Completion, ids: np.ndarray, trained: np.ndarray) -> bool:
        """Return whether a text ends with an end token, ignoring whitespace after it.

        An end token at the end of a prompt does not count, because it does not end an answer.
        """
        if not len(ids) or not trained[-1]:
            return False
        text = sample.text if isinstance(sample, Text) else sample.completion
        return ids[-1] in self.end_ids or bool(self._trailing_ends.search(text))

    def _chat_of(self, sample: Conversation) -> ChatRenderer:
        assert self.chat is not None
        return self.chat.for_pictures() if sample.pictures else self.chat

    def _insert_placeholders(
        self, answers: RenderedAnswers, texts: tuple[str, ...]
    ) -> RenderedAnswers:
        """Replace the n-th picture in the rendered text by the n-th of `texts`, its placeholders.

        The spans are shifted accordingly.
        """
        if not texts:
            return answers
        assert self.pictures is not None
        assert self.chat is not None
        mark = self.pictures.placeholder
        joined, *pieces = answers.text.split(mark)
        if len(pieces) != len(texts):
            raise self.chat.error(
                f"writes {mark} {len(pieces)} times for {count_of(len(texts), 'picture')}",
                "the model finds pictures by that token",
                "use the model's own chat template: data.template=chat",
            )
        ends = [match.end() for match in re.finditer(re.escape(mark), answers.text)]
        growths = [len(placeholders) - len(mark) for placeholders in texts]

        def moved(edge: int) -> int:
            # A span without an end token has the `stop` -1, which is unchanged, because no mark is
            # before it. No span ends inside a mark.
            return edge + sum(growths[: bisect_right(ends, edge)])

        for placeholders, piece in zip(texts, pieces, strict=True):
            joined += placeholders + piece
        spans = [CharSpan(*map(moved, span)) for span in answers.spans]
        return answers._replace(text=joined, spans=spans)

    def _missing_bos(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        has_bos = list(ids[:1]) == self._bos[:1]
        return [] if has_bos else self._bos


def first_turns(sample: Conversation, count: int) -> Conversation:
    """Return the first `count` messages of a conversation, with their pictures."""
    messages = sample.messages[:count]
    pictures = sum(message["content"].count(PICTURE_MARK) for message in messages)
    return replace(sample, messages=messages, pictures=sample.pictures[:pictures])


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the sha256 (hex) of all properties of a tokenizer that determine the tokens of a
    text.
    """
    special_tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    special = json.dumps(special_tokens, sort_keys=True)
    return hashlib.sha256((tokenizer.backend_tokenizer.to_str() + special).encode()).hexdigest()


def _flaws(text: str, aligned: Aligned) -> Iterator[str]:
    """Yield the names in ROW_WARNINGS of problems with the tokens at the edges of answers."""
    edges = [text[cut - 1 : cut + 1] for cut in aligned.cuts]
    if any(edge[0] in " \t" and not edge[1].isspace() for edge in edges):
        yield "blank"
    if aligned.merged_tokens:
        yield "merged"


def prefix_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the token ids that the tokenizer adds before every text, such as BOS."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


def _add_call_ids(messages: list[Message]) -> list[Message]:
    """Add missing ids to tool calls, and to their results in the same order.

    Most rows have no ids, but some templates write ids and fail if they are missing. Mistral's
    template requires nine letters and digits.
    """
    with_ids = []
    count = 0
    # Ids of the calls whose result has not been found yet, in order.
    waiting: list[str] = []
    for message in messages:
        copy = message.copy()
        if message.get("tool_calls"):
            calls: list[FunctionCall] = []
            for call in message["tool_calls"]:
                count += 1
                # `**call` comes last, so that an id in the row replaces the generated id.
                calls.append({"id": f"call{count:05d}", **call})
            copy["tool_calls"] = calls
            waiting = [call["id"] for call in calls]
        elif copy["role"] == "tool" and waiting:
            copy.setdefault("tool_call_id", waiting.pop(0))
        with_ids.append(copy)
    return with_ids
