"""The picture of the results: the rates of all contestants."""

import re
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from PIL import Image

from bench.load import CLIENTS, METHODS
from bench.report import Results

GREY = "#808890"  # this and the other colours show on white and on black
COLOURS = {"GET": "#3b8eea", "PUT": "#e0823d"}
BAR_HEIGHT = 0.38


def plot(results: Results, path: Path) -> None:
    """Draw the picture as a PNG."""
    names = ("text.", "axes.label", "axes.edge", "xtick.", "ytick.")
    pyplot.rcParams.update({f"{name}color": GREY for name in names})
    pyplot.rcParams.update({"font.size": 10, "legend.frameon": False})
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    contestants = results.contestants[::-1]
    for offset, method in zip((BAR_HEIGHT / 2, -BAR_HEIGHT / 2), METHODS, strict=True):
        samples = [results.samples[contestant.name, method] for contestant in contestants]
        rates = [s.rate for s in samples]
        errors = [[s.rate - min(s.rates) for s in samples], [max(s.rates) - s.rate for s in samples]]
        places = [place + offset for place in range(len(contestants))]
        axes.barh(places, rates, BAR_HEIGHT, xerr=errors, color=COLOURS[method], ecolor=GREY, label=method)
        for place, s in zip(places, samples, strict=True):
            axes.text(max(s.rates), place, f" {s.rate:,.0f}", va="center", fontsize=8)
    axes.set_yticks(range(len(contestants)), [re.sub("[*`]", "", contestant.label) for contestant in contestants])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0.08)
    axes.set_title(f"Requests a second, {CLIENTS} clients: median, smallest, largest", loc="left")
    figure.legend(loc="outside lower center", ncols=len(METHODS))
    figure.savefig(path, dpi=120, transparent=True)
    Image.open(path).quantize(64).save(path, optimize=True)  # a third of the bytes
