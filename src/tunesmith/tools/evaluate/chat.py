"""Chat with a trained model or its base model in the terminal."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tunesmith.answers.answers import answer_batch
from tunesmith.answers.decoding import Decoding
from tunesmith.answers.load_run import LoadedModel, RunLocation, load_run
from tunesmith.answers.sampler import Prompt
from tunesmith.cli.options import notify, notify_weights, stdin_lines
from tunesmith.config.schema import Source
from tunesmith.errors import TunesmithError, UsageError
from tunesmith.host.signals import StopRequest
from tunesmith.host.streams import visible
from tunesmith.presentation.data import template_line
from tunesmith.rows.messages import read_tools
from tunesmith.rows.row_reader import RowReader
from tunesmith.rows.samples import (
    PICTURE_MARK,
    Conversation,
    Message,
    Picture,
    ToolSchema,
    with_system,
)
from tunesmith.tools.evaluate.decoding_options import read_decoding

CHAT_COMMANDS_HINT = (
    "the model also sees the earlier questions; /reset starts a new conversation, /quit exits"
)


def start_chat(args: argparse.Namespace, location: RunLocation) -> None:
    """Load the model of `location` and chat with it. `args` are the options of the command."""
    # Check the options before the weights are read.
    decoding = read_decoding(args)
    tools = read_tools_file(args.tools) if args.tools else None
    if args.image and location.run is None:
        location = replace(location, base=replace(location.base, vision=True))
    loaded = load_run(location, device=args.device)
    chat = Chat(args, loaded, decoding, tools)
    if chat.on_terminal:
        about = decoding.describe()
        if loaded.template.raw:
            about += f"; {template_line(loaded.template)}"
        notify(f"{location.note or args.run}: {about}\n{CHAT_COMMANDS_HINT}")
    else:
        notify_weights(location)
    chat.talk()


def read_tools_file(name: str) -> list[ToolSchema] | None:
    """Return the tools that a JSON file lists. Raise UsageError if the file cannot be read."""
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "the file given with --tools cannot be read",
            where=name,
            why=str(error),
            fix="use --tools with a JSON file in UTF-8 that holds a list of tools",
        ) from error
    return read_tools(RowReader({"tools": text}, Source(source=name), name))


class Chat:
    """Conversation with a loaded model. It reads questions line by line and prints the answers."""

    def __init__(
        self,
        args: argparse.Namespace,
        loaded: LoadedModel,
        decoding: Decoding,
        tools: list[ToolSchema] | None = None,
    ) -> None:
        self.loaded = loaded
        self.decoding = decoding
        self.tools = tools
        self.system = loaded.system if args.system is None else args.system or None
        self.side = "base" if loaded.location.holds == "base" else "tuned"
        self.pictures = tuple(Picture(file, path=Path(file)) for file in args.image)
        if self.pictures and loaded.template.pictures is None:
            raise UsageError(
                "this model cannot read pictures",
                where="--image",
                why="model.vision is false, or the model has no vision encoder",
                fix="remove --image, or train a vision-language model with model.vision=true",
            )
        self.turns: list[tuple[str, str]] = []  # (question, answer)
        self.on_terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def talk(self) -> None:
        """Answer questions until the input ends, or the user enters /quit or presses ctrl-C twice.

        ctrl-C during an answer only stops this answer. In a pipe, the first ctrl-C ends the chat.
        """
        if self.on_terminal:
            lines = self._typed_lines()
        else:
            # If stdin is a pipe, no prompt is printed, and an error ends the chat.
            lines = (line.strip() for _, line in stdin_lines())
        for line in lines:
            command = line.partition(" ")[0]
            try:
                if command in ("/quit", "/exit", "/bye"):
                    return
                if command == "/reset":
                    self.turns.clear()
                    notify("a new conversation has started")
                elif command.startswith("/"):
                    notify(f"there is no command {command}; {CHAT_COMMANDS_HINT}")
                else:
                    self.answer(line)
            except KeyboardInterrupt:
                # ctrl-C was pressed while no answer was generated, or the chat reads from a pipe.
                print(flush=True)
                return
            except TunesmithError as error:
                # On a terminal, print the error and continue, because the user can ask again.
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
        """Print one answer while it is generated.

        ctrl-C stops the answer, and the partial answer stays in the conversation. If stdin is a
        pipe, ctrl-C ends the chat.
        """

        def write(text: str) -> None:
            # Escape control characters, because they could change the terminal's settings.
            print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)

        if self.on_terminal:
            sys.stdout.write(f"{self.side}> ")
        loaded = self.loaded
        with StopRequest(interactive=True) as stop:
            (answer,) = answer_batch(
                loaded.train_model,
                loaded.tokenizer,
                [self._prompt(question)],
                self.decoding,
                stops=loaded.template.end_ids,
                write=write,
                cancelled=stop.requested,
            )
        self.turns.append((question, answer.text))
        if stop.requested():
            notify("\n(stopped)")
            if not self.on_terminal:
                # If the questions come from a pipe, end the chat at the first ctrl-C, because
                # nobody can type a further question.
                raise KeyboardInterrupt
        elif not answer.finished:
            limit = self.decoding.max_new_tokens
            notify(
                f"\n(the answer was cut off at {limit} tokens; allow more with --max-new-tokens)"
            )
        print(flush=True)

    def _prompt(self, question: str) -> Prompt:
        """Return the prompt, in which the pictures are before the first question.

        Raise UsageError if the conversation is too long for the model's context.
        """
        loaded = self.loaded
        messages: list[Message] = []
        for text, reply in [*self.turns, (question, "")]:
            messages += [
                {"role": "user", "content": text},
                {"role": "assistant", "content": reply},
            ]
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
                why=f"the model's context has {loaded.context} tokens, and {longest} of them are "
                "reserved for the answer (--max-new-tokens)",
                fix="start a new conversation with /reset, or use a smaller --max-new-tokens",
            )
        return loaded.prompt(prompt, self.pictures)
