"""Talk to what was trained, to its base, or to both.

example:
  tunesmith chat runs/my-run
  tunesmith chat runs/my-run --side-by-side
  echo "What do you know?" | tunesmith chat runs/my-run

ctrl-C ends an answer. Without a terminal every line of stdin is a question, and only answers go to stdout.
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from tunesmith.cli.options import add_decoding, add_run, decoding_of, stdin_lines
from tunesmith.errors import TunesmithError, UsageError
from tunesmith.signals import StopRequest

if TYPE_CHECKING:
    from tunesmith.inference.decoding import Decoding
    from tunesmith.inference.load_run import LoadedModel

COMMANDS = """/base  /adapter  /both   who answers from here on
/reset                   forget what was said
/system [TEXT]           show the system message, or set it (/system - for none)
/save FILE               append the conversation to FILE as training rows
/quit                    leave (so does ctrl-D, or ctrl-C twice)"""
EPILOG = f"commands in the chat:\n{COMMANDS}"
BASE, TUNED = "base", "tuned"  # the two sides of a chat
COLUMNS = 80  # a terminal this wide shows two answers beside each other
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x9b]")  # a model's escape sequences must not drive the terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    first = parser.add_mutually_exclusive_group()
    first.add_argument("--base", action="store_true", help="begin with the base model; /adapter switches")
    first.add_argument("--side-by-side", action="store_true", help="begin with both, each question to base and tuned")
    parser.add_argument("--system", metavar="TEXT", help="system message (default: the one of the recipe)")
    add_decoding(parser, max_new_tokens=512)


def run(args: argparse.Namespace) -> None:
    from tunesmith.inference.load_run import load_run, locate_run

    location = locate_run(args.run)
    if location.kind == "base" and args.side_by_side:
        what = f"{args.run} is a plain model, with nothing to compare it with"
        fix = "give a run, a checkpoint or an adapter, or leave --side-by-side out"
        raise UsageError(what, where="--side-by-side", fix=fix)
    decoding = decoding_of(args)
    loaded = load_run(location, device=args.device)
    chat = Chat(args, loaded, decoding)
    if chat.on_terminal:
        about = f"{location.note or args.run}: {decoding.describe()}; {loaded.template.describe()}"
        notify(f"{about}\n/help shows the commands")
    chat.talk()


def notify(text: str) -> None:
    """A note to the user beside the answers: on stderr."""
    print(text, file=sys.stderr, flush=True)


class Chat:
    """Reads lines, obeys the commands, shows the answers of the loaded model and of its base."""

    def __init__(self, args: argparse.Namespace, loaded: "LoadedModel", decoding: "Decoding") -> None:
        self.args, self.loaded, self.decoding = args, loaded, decoding
        self.system = loaded.system if args.system is None else args.system or None
        # What each side was asked and has answered; neither is shown an answer of the other.
        self.turns: dict[str, list[tuple[str, str]]] = {BASE: [], TUNED: []}
        only_base = args.base or loaded.location.kind == "base"
        self.sides = [BASE, TUNED] if args.side_by_side else [BASE if only_base else TUNED]
        self.base: LoadedModel | None = None  # of a full fine-tune, once it is asked
        self.on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.commands: dict[str, Callable[[str], None]] = {
            "/base": lambda _: self.switch_to([BASE]),
            "/adapter": lambda _: self.switch_to([TUNED]),
            "/both": lambda _: self.switch_to([BASE, TUNED]),
            "/reset": self.reset,
            "/system": self.set_system,
            "/save": self.save,
            "/help": lambda _: notify(COMMANDS),
        }

    def talk(self) -> None:
        """Until /quit, the end of the input, or ctrl-C twice."""
        lines = self._typed_lines() if self.on_terminal else (line.strip() for _, line in stdin_lines())
        for line in lines:
            word, _, rest = line.partition(" ")
            try:
                if word in ("/quit", "/exit"):
                    return
                if word in self.commands:
                    self.commands[word](rest.strip())
                elif line.startswith("/"):
                    notify(f"there is no command {word}\n{COMMANDS}")
                else:
                    self.answer(line)
            except KeyboardInterrupt:
                print(flush=True)
                return
            except TunesmithError as error:
                if not self.on_terminal:
                    raise
                notify(error.text())

    def _typed_lines(self) -> Iterator[str]:
        import readline  # noqa: F401  line editing and history for input()

        interrupted = False
        while True:
            try:
                if line := input("you> ").strip():
                    yield line
                interrupted = False
            except (EOFError, KeyboardInterrupt) as error:
                if interrupted or isinstance(error, EOFError):
                    break
                notify("\nctrl-C again leaves")
                interrupted = True
        notify("")

    def switch_to(self, sides: list[str]) -> None:
        if self.loaded.location.kind == "base" and TUNED in sides:
            notify("this is a plain model; nothing was trained onto it")
            return
        self.sides = sides
        most = max(map(len, self.turns.values()))
        known = {side: len(self.turns[side]) for side in sides}
        behind = (f"{side} knows {count} of {most} turns" for side, count in known.items() if count < most)
        notify("; ".join([f"from here on: {' and '.join(sides)}", *behind]))

    def reset(self, _: str) -> None:
        self.turns = {BASE: [], TUNED: []}
        notify("all forgotten")

    def set_system(self, text: str) -> None:
        if text:
            self.system = None if text == "-" else text
        notify(f"system: {self.system or '(none)'}")

    def save(self, name: str) -> None:
        """Append the conversation as rows of the `messages` format, one for each side that answered."""
        sides = [side for side, turns in self.turns.items() if turns]
        if not name or not sides:
            notify("nothing was said yet" if name else "name a file: /save FILE")
            return
        try:
            with open(os.path.expanduser(name), "a", encoding="utf-8") as file:
                rows = ({"messages": self.messages(side), "model": side} for side in sides)
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            notify(f"error: {name} cannot be written: {error.strerror}")
            return
        notify(f"{len(sides)} row{'s' if len(sides) > 1 else ''} added to {name}")

    def answer(self, question: str) -> None:
        """Show the answers of all sides; KeyboardInterrupt ends the chat: ctrl-C twice, or once without a terminal."""
        if self.on_terminal and len(self.sides) > 1 and shutil.get_terminal_size().columns >= COLUMNS:
            self._answer_in_columns(question)
            return
        for side in self.sides:
            if self.on_terminal or len(self.sides) > 1:
                sys.stdout.write(f"{side}> " if self.on_terminal else f"{side}: ")
            go_on = self._ask(side, question, lambda text: print(text, end="", flush=True))
            print(flush=True)
            if not go_on:
                return

    def _answer_in_columns(self, question: str) -> None:
        """The answers beside each other, in columns that fill as they come."""
        from rich.live import Live
        from rich.table import Table
        from rich.text import Text

        texts = dict.fromkeys(self.sides, "")

        def columns() -> Table:
            table = Table(*texts, expand=True)
            table.add_row(*map(Text, texts.values()))
            return table

        with Live(columns(), refresh_per_second=12) as live:
            for side in self.sides:

                def write(text: str, side: str = side) -> None:
                    texts[side] += text
                    live.update(columns())

                if not self._ask(side, question, write):
                    return

    def _ask(self, side: str, question: str, write: Callable[[str], None]) -> bool:
        """Stream one answer; False when ctrl-C ended it: it is kept, and no other side is asked."""
        from tunesmith.adapter.lora import disabled
        from tunesmith.inference.decoding import answer_batch
        from tunesmith.inference.load_run import load_run

        with StopRequest(interactive=True) as stop:
            loaded = self.loaded
            adapter_off: AbstractContextManager[None] = nullcontext()
            if side == BASE and loaded.location.kind == "adapter":
                adapter_off = disabled(loaded.model)
            elif side == BASE and loaded.location.kind == "full":
                loaded = self.base = self.base or load_run(self.args.run, device=self.args.device, base_only=True)
            prompt = self._prompt(side, question, loaded)
            clean = (lambda text: write(_CONTROL.sub("", text))) if sys.stdout.isatty() else write
            ask = partial(answer_batch, stops=loaded.template.end_ids, write=clean, cancelled=stop.requested)
            with adapter_off:
                (answer,) = ask(loaded.model, loaded.tokenizer, [prompt], self.decoding)
        self.turns[side].append((question, answer.text))
        if stop.requested():
            notify("\n(stopped)")
            if not self.on_terminal:
                raise KeyboardInterrupt
        elif not answer.finished:
            notify(f"\n(cut at {self.decoding.max_new_tokens} tokens; --max-new-tokens gives more)")
        return not stop.requested()

    def messages(self, side: str, *, forgotten: int = 0) -> list[dict[str, Any]]:
        """The conversation with `side`, without its oldest `forgotten` turns."""
        from tunesmith.data.formats import with_system

        pairs = [(("user", asked), ("assistant", answer)) for asked, answer in self.turns[side][forgotten:]]
        return with_system([{"role": role, "content": text} for pair in pairs for role, text in pair], self.system)

    def _prompt(self, side: str, question: str, loaded: "LoadedModel") -> list[int]:
        """The prompt; drops as many of the side's oldest turns as do not fit beside the answer, and says so."""
        from tunesmith.data.formats import Conversation
        from tunesmith.inference.generate import PLACEHOLDER

        room, turns = loaded.context - self.decoding.max_new_tokens, self.turns[side]
        asked = [{"role": "user", "content": question}, {"role": "assistant", "content": PLACEHOLDER}]
        prompt: list[int] = []
        for dropped in range(len(turns) + 1):
            messages = [*self.messages(side, forgotten=dropped), *asked]
            prompt = list(loaded.template.prompt(Conversation(messages)))
            if len(prompt) <= room:
                del turns[:dropped]
                if dropped:
                    notify(f"the context is full: {side} forgot its {dropped} oldest turn{'s' if dropped > 1 else ''}")
                return prompt
        what = f"the question has {len(prompt)} tokens, and there is room for {room}"
        why = f"the model's context less --max-new-tokens {self.decoding.max_new_tokens}"
        raise UsageError(what, why=why, fix="ask something shorter, or start with a smaller --max-new-tokens")
