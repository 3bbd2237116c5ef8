"""A conversation with a trained model or its base."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

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

CHAT_COMMANDS_HINT = (
    "the model sees earlier questions too: /reset starts a new conversation, /quit exits"
)


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
    """Reads lines, and shows the answers of the loaded model."""

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
        self.side = "base" if loaded.location.holds == "base" else "tuned"
        self.pictures = tuple(Picture(file, path=Path(file)) for file in args.image)
        if self.pictures and loaded.template.pictures is None:
            raise UsageError(
                "this model sees no pictures",
                where="--image",
                why="model.vision is false, or the model has no vision part",
                fix="remove --image; or train a vision-language model with model.vision=true",
            )
        self.turns: list[tuple[str, str]] = []  # questions and answers
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
                    self.turns.clear()
                    notify("all forgotten")
                elif command.startswith("/"):
                    notify(f"there is no command {command}: {CHAT_COMMANDS_HINT}")
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

    def answer(self, question: str) -> None:
        """Stream one answer. ctrl-C ends the answer, which stays; from a pipe it ends the chat."""

        def write(text: str) -> None:
            # A model may write control characters, which would change the terminal.
            print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)

        if self.on_terminal:
            sys.stdout.write(f"{self.side}> ")
        loaded = self.loaded
        with StopRequest(interactive=True) as stop:
            prompt, pixels = self._prompt(question)
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
        self.turns.append((question, answer.text))
        if stop.requested():
            notify("\n(stopped)")
            if not self.on_terminal:
                # Nobody is there to ask again: the first ctrl-C ends a chat from a pipe.
                raise KeyboardInterrupt
        elif not answer.finished:
            limit = self.decoding.max_new_tokens
            notify(f"\n(cut at {limit} tokens; raise it with --max-new-tokens)")
        print(flush=True)

    def _prompt(self, question: str) -> tuple[list[int], Pixels | None]:
        """The prompt's tokens, and its pictures: they stand before the first question.

        Raise UsageError if the conversation leaves no room for the answer.
        """
        loaded = self.loaded
        messages: list[Message] = []
        for text, reply in [*self.turns, (question, ANSWER_PLACEHOLDER)]:
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": reply})
        messages[0]["content"] = PICTURE_MARK * len(self.pictures) + messages[0]["content"]
        conversation = Conversation(
            with_system(messages, self.system), self.tools, pictures=self.pictures
        )
        prompt = list(loaded.template.prompt(conversation))
        longest = self.decoding.max_new_tokens
        if loaded.context is not None and len(prompt) > loaded.context - longest:
            raise UsageError(
                f"the conversation has {len(prompt)} tokens, but only "
                f"{loaded.context - longest} fit",
                why=f"the model's context minus --max-new-tokens {longest}",
                fix="/reset starts a new conversation; or start with a smaller --max-new-tokens",
            )
        return prompt, loaded.pixels(self.pictures)
