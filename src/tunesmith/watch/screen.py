"""The live page's content in the terminal, for a machine that no browser reaches."""

import asyncio
import signal
import threading
from collections.abc import Sequence
from typing import Any, ClassVar

from rich.table import Table
from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Grid, VerticalScroll
from textual.widgets import Footer, Static, TabbedContent, TabPane
from textual_plotext import PlotextPlot

from tunesmith.metrics.terminal import format_seconds
from tunesmith.report.run_files import DamagedFile
from tunesmith.watch.feed import WatchedRun, curves

POLL = 1.0  # seconds between two looks at the runs
SHOWN = 4  # charts at a time
AXES = ("step", "tokens", "seconds")
PARTS = (1.0, 0.5, 0.1)  # of the x axis that the charts show, counted from its end
COLOURS = ((108, 176, 255), (255, 148, 87), (98, 212, 135), (210, 155, 255), (240, 192, 64), (79, 211, 230))
FIGURES = (
    ("loss", "loss", "{:.4f}"), ("val_loss", "val_loss", "{:.4f}"), ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("mfu", "MFU", "{:.1%}"), ("memory_gib", "memory", "{:.1f} GiB"), ("gpu_utilization", "GPU", "{:.0f} %"),
    ("gpu_power_watts", "power", "{:.0f} W"), ("gpu_temperature_celsius", "temperature", "{:.0f} °C"),
    ("network_bytes_per_second", "network", "{:,.0f} B/s"), ("data_share", "wait for data", "{:.1%}"), ("idle_share", "imbalance", "{:.1%}"),
)  # fmt: skip


class WatchScreen(App[None]):
    """Where the runs stand above, and below it their curves, samples, recipe and log."""

    TITLE = "tunesmith watch"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #runs { height: auto; max-height: 40%; padding: 0 1; }
    TabbedContent { height: 1fr; }
    Grid { grid-size: 2 2; grid-gutter: 0 1; }
    VerticalScroll > Static { padding: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        ("n", "turn('page', 1)", "next charts"), ("p", "turn('page', -1)", "charts before"),
        ("x", "turn('axis', 1)", "steps, tokens, time"), ("z", "turn('part', 1)", "all, last half, last tenth"),
        ("q", "quit", "end"), Binding("ctrl+c", "quit", show=False, priority=True),
    ]  # fmt: skip

    def __init__(self, runs: Sequence[WatchedRun]) -> None:
        super().__init__()
        self.runs = runs
        self._lock = threading.Lock()
        self._shown = {"page": 0, "axis": 0, "part": 0}

    def compose(self) -> ComposeResult:
        yield Static(id="runs")
        with TabbedContent():
            with TabPane("Curves", id="curves"), Grid():
                for _ in range(SHOWN):
                    yield PlotextPlot()
            for name in ("Samples", "Recipe", "Log"):
                with TabPane(name, id=name.lower()), VerticalScroll():
                    yield Static(id=f"{name.lower()}-text")
        yield Footer()

    def on_mount(self) -> None:
        # An exception would show as a traceback.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.exit)
        self._show()
        self.set_interval(POLL, self._look)

    @work(thread=True, exclusive=True)
    def _look(self) -> None:
        changed = [run.refresh(self._lock) for run in self.runs]
        if any(changed):
            self.call_from_thread(self._show)

    def action_turn(self, what: str, by: int) -> None:
        self._shown[what] += by
        self._show()

    def _show(self) -> None:
        axis, part = AXES[self._shown["axis"] % len(AXES)], PARTS[self._shown["part"] % len(PARTS)]
        with self._lock:
            ends = [run.axis(axis)[-1] for run in self.runs if run.axis(axis)]
            low = max(ends, default=0.0) * (1 - part)
            panels = curves(self.runs, axis, low, float("inf"), self.size.width)
            states = [run.status() for run in self.runs]
            texts = [run.texts() for run in self.runs]
        self.query_one("#runs", Static).update(_summary(states))
        self._shown["page"] = page = min(max(0, self._shown["page"]), max(0, len(panels) - 1) // SHOWN)
        for plot, panel in zip(self.query(PlotextPlot), panels[page * SHOWN :] + [None] * SHOWN, strict=False):
            self._draw(plot, panel, axis)
        self.query_one("#samples-text", Static).update(_samples(states, texts))
        self.query_one("#recipe-text", Static).update(_recipe(states, texts))
        self.query_one("#log-text", Static).update(Text("\n".join(line for state in states for line in state["log"])))

    def _draw(self, plot: PlotextPlot, panel: dict[str, Any] | None, axis: str) -> None:
        plot.plt.clear_figure()
        if panel is not None:
            plot.plt.title(f"{panel['title']} ({panel['unit']})" if panel["unit"] else panel["title"])
            plot.plt.xlabel("time, minutes" if axis == "seconds" else axis)
            ends: list[float] = []
            smoothed = {row["run"] for row in panel["series"] if row["field"] == "loss, smoothed"}
            rows = [row for row in panel["series"] if row["field"] != "loss" or row["run"] not in smoothed]
            for row in rows:
                held_out, many = row["field"] == "val_loss", len(self.runs) > 1
                names = [self.runs[row["run"]].files.name] if many else []
                names += [f"rank {row['rank']}"] if row["rank"] is not None else [row["field"].partition(",")[0]]
                x = [value / 60 for value in row["x"]] if axis == "seconds" else row["x"]
                ends = [min([*ends, x[0]]), max([*ends, x[-1]])]
                colour = COLOURS[(row["run"] if many else row["rank"] or held_out) % len(COLOURS)]
                draw = plot.plt.scatter if held_out and many else plot.plt.plot
                label, marker = " ".join(names) if len(rows) > 1 else None, "dot" if held_out else "braille"
                draw(x, row["y"], label=label, color=colour, marker=marker)
            ticks = [ends[0] + (ends[1] - ends[0]) * part / 4 for part in range(5)]
            plot.plt.xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        plot.refresh()


def _summary(states: Sequence[dict[str, Any]]) -> Table:
    """A line a run with its progress, one with its figures, and what went wrong."""
    table = Table.grid(padding=(0, 2))
    for state in states:
        steps = f"step {state['step']:,}" + (f" of {state['steps']:,}" if state["steps"] else "")
        left = f", {format_seconds(state['seconds_left'])} left" if state["seconds_left"] is not None else ""
        style = {"running": "bold green", "failed": "bold red", "killed": "bold red"}.get(state["state"], "bold")
        table.add_row(Text.assemble((state["name"], "bold"), "  ", (state["state"], style), f"  {steps}{left}"))
        figures = state["figures"]
        shown = [f"{label} {form.format(figures[name])}" for name, label, form in FIGURES if name in figures]
        table.add_row(Text("  ".join(shown)))
        told = [f"{key}: {value}" for key, value in state["end"].items()]
        told += state["warnings"][-3:]
        told += [str(DamagedFile(**file)) for file in state["damaged"]]
        told += [f"no connection: {state['lost']}"] if state["lost"] else []
        if told:
            table.add_row(Text("\n".join(told), style="yellow"))
    return table


def _samples(states: Sequence[dict[str, Any]], texts: Sequence[dict[str, Any]]) -> Text:
    """For each prompt its answers, the newest first."""
    shown = Text()
    for prompt in dict.fromkeys(row["prompt"] for text in texts for row in text["samples"]):
        shown.append(f"{prompt}\n", style="bold")
        for state, text in zip(states, texts, strict=True):
            for row in reversed([row for row in text["samples"] if row["prompt"] == prompt]):
                run = f"{state['name']}, " if len(states) > 1 else ""
                shown.append(f"  {run}step {row['step']}: ", style="dim").append(f"{row['answer']}\n")
        shown.append("\n")
    return shown or Text("no samples yet: log.samples=4 lets the model answer four prompts at each validation")


def _recipe(states: Sequence[dict[str, Any]], texts: Sequence[dict[str, Any]]) -> Table:
    """The keys, beside each other for several runs; those that differ stand out."""
    table = Table(box=None)
    for header in ("key", *(state["name"] for state in states)):
        table.add_column(Text(header), overflow="fold")
    for key in dict.fromkeys(key for text in texts for key in text["recipe"]):
        values = [str(text["recipe"].get(key, "")) for text in texts]
        table.add_row(Text(key, style="dim"), *map(Text, values), style="yellow" if len({*values}) > 1 else "")
    return table
