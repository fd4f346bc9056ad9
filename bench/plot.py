"""The picture of the results: all contestants, and hello by number of clients."""

import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

from bench.load import CLIENTS, METHODS
from bench.measure import CLIENT_COUNTS, Case, Measurements

GREY = "#808890"  # this and the other colours show on white and on black
COLOURS = {"GET": "#3b8eea", "PUT": "#e0823d"}
BAR_HEIGHT = 0.38


def plot(measured: Measurements, path: Path) -> None:
    """Draw the picture as a PNG."""
    names = ("text.", "axes.label", "axes.edge", "xtick.", "ytick.")
    pyplot.rcParams.update({f"{name}color": GREY for name in names})
    pyplot.rcParams.update({"font.size": 10, "legend.frameon": False})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 6), width_ratios=(2, 1), layout="constrained")
    draw_contestants(left, measured)
    draw_clients(right, measured)
    for axes in (left, right):
        axes.set_facecolor("none")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(METHODS))
    figure.savefig(path, dpi=120, transparent=True)


def draw_contestants(axes: Any, measured: Measurements) -> None:
    """Draw the rates of all contestants as bars, with the smallest and largest."""
    contestants = measured.contestants[::-1]
    for offset, method in zip((BAR_HEIGHT / 2, -BAR_HEIGHT / 2), METHODS, strict=True):
        for position, contestant in enumerate(contestants):
            samples = measured.results[Case(contestant.name, method)]
            low, high = samples.rate - min(samples.rates), max(samples.rates) - samples.rate
            label = method if position == 0 else None
            axes.barh(
                position + offset,
                samples.rate,
                BAR_HEIGHT,
                xerr=[[low], [high]],
                color=COLOURS[method],
                ecolor=GREY,
                label=label,
            )
            axes.text(samples.rate + high, position + offset, f" {samples.rate:,.0f}", va="center", fontsize=8)
    axes.set_yticks(range(len(contestants)), [re.sub("[*`]", "", contestant.label) for contestant in contestants])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0.08)
    axes.set_title(f"Requests a second, {CLIENTS} clients: median, smallest, largest", loc="left")


def draw_clients(axes: Any, measured: Measurements) -> None:
    """Draw hello's rates by number of clients as lines."""
    for method in METHODS:
        rates = [measured.rate("hello", method, clients) for clients in CLIENT_COUNTS]
        axes.plot(CLIENT_COUNTS, rates, "o-", color=COLOURS[method])
    axes.set_xscale("log")
    axes.set_ylim(0, None)
    axes.set_xticks(CLIENT_COUNTS, [f"{count:,}" for count in CLIENT_COUNTS])
    axes.minorticks_off()
    axes.set_title("hello, by number of clients", loc="left")
    axes.yaxis.set_major_formatter("{x:,.0f}")
