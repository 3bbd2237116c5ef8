"""A conversation with a trained model, with its base, or with both."""

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from tunesmith.adapter.lora import disabled
from tunesmith.cli.options import notify, notify_weights, stdin_lines
from tunesmith.config.schema import Source
from tunesmith.data.rows.messages import read_tools
from tunesmith.data.rows.row_reader import RowReader
from tunesmith.data.rows.samples import (
    PICTURE_MARK,
    Conversation,
    Message,
    Picture,
    ToolSchema,
    with_system,
)
from tunesmith.data.text.example import Pixels
from tunesmith.errors import TunesmithError, UsageError
from tunesmith.host.signals import StopRequest
from tunesmith.host.streams import visible
from tunesmith.inference.decoding import Decoding, answer_batch
from tunesmith.inference.load_run import LoadedModel, RunLocation, load_run
from tunesmith.tools.evaluate.decoding_options import decoding_of
from tunesmith.tools.evaluate.generate import ANSWER_PLACEHOLDER
from tunesmith.units import count_of

CHAT_COMMANDS_HINT = (
    "the model sees earlier questions too: /reset starts a new conversation, /quit exits"
)
# What the commands that were removed set while the chat went on.
AT_THE_START = "--base, --side-by-side and --system can only be set at startup"
BASE_SIDE = "base"
TUNED_SIDE = "tuned"


def start_chat(args: argparse.Namespace, location: RunLocation) -> None:
    """Load the model of `location` and chat with it, by the options of `chat`."""
    # Wrong options end it before weights are read.
    decoding = decoding_of(args)
    tools = read_tools_file(args.tools) if args.tools else None
    if args.image and location.run is None:
        location = replace(location, base=replace(location.base, vision=True))
    loaded = load_run(location, device=args.device)
    chat = Chat(args, loaded, decoding, tools)
    if chat.on_terminal:
        about = decoding.describe()
        if loaded.template.raw:
            about += f"; {loaded.template.describe()}"
        notify(f"{location.note or args.run}: {about}\n{CHAT_COMMANDS_HINT}")
    else:
        notify_weights(location)
    chat.talk()


def read_tools_file(name: str) -> list[ToolSchema] | None:
    """Return the tools of a JSON file. Raise UsageError if the file cannot be read."""
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "the tools cannot be read",
            where=name,
            why=str(error),
            fix="--tools FILE: a JSON list of tools in UTF-8",
        ) from error
    return read_tools(RowReader({"tools": text}, Source(source=name), name))


class Chat:
    """Reads lines, and shows the answers of the loaded model, of its base, or of both."""

    def __init__(
        self,
        args: argparse.Namespace,
        loaded: LoadedModel,
        decoding: Decoding,
        tools: list[ToolSchema] | None = None,
    ) -> None:
        self.args = args
        self.loaded = loaded
        self.decoding = decoding
        self.tools = tools
        self.system = loaded.system
        if args.system is not None:
            self.system = args.system or None
        if args.side_by_side:
            self.sides = [BASE_SIDE, TUNED_SIDE]
        elif args.base or loaded.location.holds == "base":
            self.sides = [BASE_SIDE]
        else:
            self.sides = [TUNED_SIDE]
        self.pictures = tuple(Picture(file, path=Path(file)) for file in args.image)
        if self.pictures and loaded.template.pictures is None:
            raise UsageError(
                "this model sees no pictures",
                where="--image",
                why="model.vision is false, or the model has no vision part",
                fix="remove --image; or train a vision-language model with model.vision=true",
            )
        # Each side sees its own answers alone, as in a chat of its own.
        self.turns: dict[str, list[tuple[str, str]]] = {}
        self._forget()
        # Of a full fine-tune, at its first answer.
        self.base: LoadedModel | None = None
        self.on_terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def talk(self) -> None:
        """Until /quit, the end of the input, or ctrl-C twice."""
        if self.on_terminal:
            lines = self._typed_lines()
        else:
            # From a pipe no prompt is printed, and a fault ends it.
            lines = (line.strip() for _, line in stdin_lines())
        for line in lines:
            command = line.partition(" ")[0]
            try:
                if command in ("/quit", "/exit", "/bye"):
                    return
                if command == "/reset":
                    self._forget()
                    notify("all forgotten")
                elif command.startswith("/"):
                    notify(f"there is no command {command}: {CHAT_COMMANDS_HINT}; {AT_THE_START}")
                else:
                    self.answer(line)
            except KeyboardInterrupt:
                # ctrl-C outside of an answer, or in one that goes to a pipe.
                print(flush=True)
                return
            except TunesmithError as error:
                # On a terminal the user can ask again.
                if not self.on_terminal:
                    raise
                notify(error.text())

    def _typed_lines(self) -> Iterator[str]:
        import readline  # noqa: F401  line editing and history for input()

        interrupted = False
        while True:
            try:
                line = input("you> ").strip()
                if line:
                    yield line
                interrupted = False
            except (EOFError, KeyboardInterrupt) as error:
                if interrupted or isinstance(error, EOFError):
                    break
                notify("\nctrl-C again exits")
                interrupted = True
        notify("")

    def _forget(self) -> None:
        self.turns = {side: [] for side in self.sides}

    def answer(self, question: str) -> None:
        """Show the answers of all sides.

        KeyboardInterrupt ends the chat: ctrl-C twice, or once without a terminal.
        """
        for side in self.sides:
            if self.on_terminal:
                sys.stdout.write(f"{side}> ")
            elif len(self.sides) > 1:
                sys.stdout.write(f"{side}: ")
            go_on = self._ask(side, question)
            print(flush=True)
            if not go_on:
                return

    def _ask(self, side: str, question: str) -> bool:
        """Stream one answer; False when ctrl-C ended it: it stays, and no other side answers."""

        def write(text: str) -> None:
            # A model may write control characters, which would change the terminal.
            print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)

        with StopRequest(interactive=True) as stop:
            loaded = self.loaded
            adapter_off: AbstractContextManager[None] = nullcontext()
            if side == BASE_SIDE and loaded.location.holds == "adapter":
                adapter_off = disabled(loaded.model)
            elif side == BASE_SIDE and loaded.location.holds == "full":
                # A full fine-tune has its base in other files: they are read at its first use.
                if self.base is None:
                    self.base = load_run(
                        self.args.run,
                        device=self.args.device,
                        base_only=True,
                        trust_remote_code=self.args.trust_remote_code,
                    )
                loaded = self.base
            prompt, pixels = self._prompt(side, question, loaded)
            with adapter_off:
                (answer,) = answer_batch(
                    loaded.model,
                    loaded.tokenizer,
                    [prompt],
                    self.decoding,
                    stops=loaded.template.end_ids,
                    write=write,
                    cancelled=stop.requested,
                    pictures=[pixels],
                )
        self.turns[side].append((question, answer.text))
        if stop.requested():
            notify("\n(stopped)")
            if not self.on_terminal:
                # Nobody is there to ask again: the first ctrl-C ends a chat from a pipe.
                raise KeyboardInterrupt
        elif not answer.finished:
            limit = self.decoding.max_new_tokens
            notify(f"\n(cut at {limit} tokens; raise it with --max-new-tokens)")
        return not stop.requested()

    def _prompt(
        self, side: str, question: str, loaded: LoadedModel
    ) -> tuple[list[int], Pixels | None]:
        """The prompt's tokens, and its pictures: they stand before the first question.

        Drops as many of the side's oldest turns as do not fit beside the answer, and says so.
        """
        room = math.inf
        if loaded.context is not None:
            room = loaded.context - self.decoding.max_new_tokens
        turns = self.turns[side]
        prompt: list[int] = []
        # The fewest oldest turns that make the rest fit.
        for dropped in range(len(turns) + 1):
            messages: list[Message] = []
            for text, reply in [*turns[dropped:], (question, ANSWER_PLACEHOLDER)]:
                messages.append({"role": "user", "content": text})
                messages.append({"role": "assistant", "content": reply})
            messages[0]["content"] = PICTURE_MARK * len(self.pictures) + messages[0]["content"]
            conversation = Conversation(
                with_system(messages, self.system), self.tools, pictures=self.pictures
            )
            prompt = list(loaded.template.prompt(conversation))
            if len(prompt) <= room:
                del turns[:dropped]
                if dropped:
                    forgotten = count_of(dropped, "oldest turn")
                    notify(f"the context is full: {side} forgot its {forgotten}")
                return prompt, loaded.pixels(self.pictures)
        what = f"the question has {len(prompt)} tokens, but only {room} fit"
        why = f"the model's context minus --max-new-tokens {self.decoding.max_new_tokens}"
        fix = "shorten the question, or start with a smaller --max-new-tokens"
        raise UsageError(what, why=why, fix=fix)
