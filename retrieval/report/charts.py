"""The metrics of a run or a training in; charts, as PNG for slides and SVG for the page, out."""

from __future__ import annotations

import io
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from retrieval.report.thumbnails import RIGHT, UNKNOWN, WRONG

# All about as bright: each has a contrast of at least 3 : 1 on a white and on a dark page (WCAG 2.2, 1.4.11).
COLOURS = ("#0969da", "#1a7f37", "#cf222e", "#8250df", "#9a6700", "#bf3989", "#1b7c83", "#bc4c00", "#6e7781",
           "#6f7d00")  # fmt: skip
INK = "#010203"  # in the SVG the page replaces it by the colour of its text
MOST_CLASSES = 25  # in a chart; of more classes the worst are shown
# For letters that matplotlib's own font lacks: those of these fonts that are installed.
MORE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Hiragino Sans", "Microsoft YaHei",
              "SimHei", "WenQuanYi Zen Hei", "Arial Unicode MS")  # fmt: skip
STYLE = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
STYLE |= {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Chart:
    """A chart in both forms."""

    name: str
    svg: str
    png: bytes
    inches: float  # its width


def chart_of(figure: Figure, name: str, description: str) -> Chart:
    """Render a figure in both forms. A screen reader reads the description of its SVG.

    The ids in the SVG begin with the chart's name, since a page holds several charts. The canvases draw the
    figure once each, where Figure.savefig draws it twice.
    """
    with warnings.catch_warnings(), mpl.rc_context({"svg.hashsalt": name}):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for it in the PNG
        figure.set_dpi(110)
        FigureCanvasAgg(figure).print_png(png := io.BytesIO())
        figure.set_layout_engine("none")  # the PNG's layout serves both
        for part in (figure, *figure.axes):
            part.patch.set_visible(False)  # the page's ground shows through
        FigureCanvasSVG(figure).print_svg(text := io.StringIO(), metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    width, height = figure.get_size_inches()
    start = (
        f'<svg viewBox="0 0 {width * 72:g} {height * 72:g}" style="max-width: {width * 100:g}px" '
        f'role="img" aria-label="{escape(description)}"'
    )
    return Chart(name, re.sub(r"<svg[^>]*", lambda _: start, svg, count=1), png.getvalue(), width)


@contextmanager
def style() -> Iterator[None]:
    """Draw in INK, and in installed fonts where matplotlib's own font lacks a letter."""
    installed = set(get_font_names())
    fonts = ["DejaVu Sans", *(font for font in MORE_FONTS if font in installed)]
    with mpl.rc_context(STYLE | {"font.family": fonts}):
        yield


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure of this size in inches, with `columns` axes beside each other."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


# ---- charts of a run ------------------------------------------------------------------------------


@style()
def per_class(metrics: dict[str, dict[str, Any]]) -> Chart:
    """Draw the top-1 accuracy of each class with its interval, the worst first; of many classes the worst.

    If all bars would be empty, as with many classes of one query each, count the classes by their best match.
    """
    worst = worst_first(metrics)
    failing = sum(metrics[label]["top_1"] < 1 for label in worst)
    shown = worst if len(worst) <= MOST_CLASSES else worst[: max(1, min(MOST_CLASSES, failing))]
    if len(worst) > MOST_CLASSES and not any(metrics[label]["top_1"] for label in shown):
        return _classes_by_best_match(metrics)
    figure, (axes,) = new_figure(7, 1 + 0.3 * len(shown))
    shares = np.array([metrics[label]["top_1"] for label in shown])
    low, high = np.array([metrics[label]["top_1_interval"] for label in shown]).T
    rows = np.arange(len(shown))[::-1]
    axes.barh(rows, shares, color=COLOURS[0], height=0.7)
    lengths = np.maximum([shares - low, high - shares], 0)
    axes.errorbar(shares, rows, xerr=lengths, fmt="none", ecolor=INK, capsize=2, linewidth=1)
    axes.set_yticks(rows, [_short(label) for label in shown])
    axes.set_xlim(0, 1)
    of = f", the worst {len(shown)} of {len(worst)} classes" if len(worst) > len(shown) else ""
    axes.set_title(f"top-1 of each class, 95 % interval{of}")
    return chart_of(figure, "per_class", f"Top-1 of each class: the worst is {shown[0]}, {shares[0]:.2f}")


def worst_first(metrics: dict[str, dict[str, Any]]) -> list[str]:
    """Sort the classes by their top-1 accuracy, and equal ones by the rank of their first right images."""
    return sorted(metrics, key=lambda label: (metrics[label]["top_1"], metrics[label]["mrr"], label))


def _classes_by_best_match(metrics: dict[str, dict[str, Any]]) -> Chart:
    """Draw how many classes find a right image as the first match of all their queries, of some, or later."""
    groups = {"first match": 0, "first match of some queries": 0, "2nd or 3rd": 0, "4th or 5th": 0,
              "6th to 10th": 0, "none of the first 10": 0}  # fmt: skip
    for found in metrics.values():
        shares = (found["top_1"] == 1, found["top_1"], found["top_3"], found["top_5"], found["top_10"], 1)
        best = next(group for group, share in zip(groups, shares, strict=True) if share)
        groups[best] += 1
    if not groups["first match of some queries"]:  # as where each class has one query
        del groups["first match of some queries"]
    figure, (axes,) = new_figure(7, 3)
    bars = axes.barh(list(groups), list(groups.values()), color=COLOURS[0], height=0.7)
    axes.bar_label(bars, padding=4)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("classes")
    axes.set_title(f"best right match of each of {len(metrics)} classes")
    counts = ", ".join(f"{group}: {count}" for group, count in groups.items())
    return chart_of(figure, "per_class", f"Classes by their best right match. {counts}")


@style()
def confusion(queries: list[str], matches: list[str]) -> Chart:
    """Draw which class the first matches of each class have; of many classes the most confused.

    If there are many and no two are confused twice, draw which classes the wrong first matches have instead.
    """
    pairs = list(zip(queries, matches, strict=True))
    confused = Counter(pair for pair in pairs if pair[0] != pair[1])
    if len({*queries, *matches}) > MOST_CLASSES and set(confused.values()) == {1}:
        return _taken_for([match for _, match in confused])
    classes = sorted({*queries, *matches})
    if len(classes) > MOST_CLASSES:
        wrong = {label: sum(label in pair for pair in pairs if pair[0] != pair[1]) for label in classes}
        classes = sorted(sorted(wrong, key=wrong.__getitem__)[-MOST_CLASSES:])
    row = {label: number for number, label in enumerate(classes)}
    counts = np.zeros((len(classes), len(classes)), int)
    for query, match in pairs:
        if query in row and match in row:
            counts[row[query], row[match]] += 1
    shares = counts / np.maximum(1, np.array([queries.count(label) for label in classes]))[:, None]
    side = 2.2 + 0.42 * len(classes)
    figure, (axes,) = new_figure(side + 0.6, side)
    colours = np.zeros((*shares.shape, 4))
    colours[..., :3] = np.array([9, 105, 218]) / 255
    colours[..., 3] = 0.55 * shares
    axes.pcolormesh(colours, edgecolors="none")
    for (y, x), count in np.ndenumerate(counts):
        if count:
            axes.text(x + 0.5, y + 0.5, count, ha="center", va="center", fontsize=8)
    ticks, labels = np.arange(len(classes)) + 0.5, [_short(label) for label in classes]
    axes.set_xticks(ticks, labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, labels)
    axes.invert_yaxis()
    axes.set_xlabel("class of the first match")
    axes.set_ylabel("class of the query")
    of = "" if len(classes) == len({*queries, *matches}) else f", the {len(classes)} most confused classes"
    axes.set_title(f"first matches, right on the diagonal{of}")
    right = sum(query == match for query, match in pairs)
    return chart_of(
        figure, "confusion", f"Class of the first match: right for {right} of {len(pairs)} queries"
    )


def _taken_for(wrong: list[str]) -> Chart:
    """Draw the classes that most wrong first matches have."""
    shown = Counter(sorted(wrong)).most_common(MOST_CLASSES)
    figure, (axes,) = new_figure(7, 1.3 + 0.3 * len(shown))
    labels, counts = zip(*shown, strict=True)
    bars = axes.barh(range(len(shown)), counts, color=COLOURS[2], height=0.7)
    axes.bar_label(bars, padding=4)
    axes.set_yticks(range(len(shown)), [_short(label) for label in labels])
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("queries of other classes")
    axes.set_title(f"{len(wrong)} wrong first matches, of {len(set(wrong))} classes: the most frequent")
    return chart_of(
        figure, "confusion", f"{len(wrong)} wrong first matches; most, {counts[0]}, are {labels[0]}"
    )


@style()
def similarities(first: np.ndarray, right: np.ndarray | None, kind: str = "cosine") -> Chart:
    """Draw histograms of the first match's similarity (queries,), for right and for wrong matches."""
    figure, (axes,) = new_figure(7, 3)
    bins = np.linspace(min(first.min(), 0.99), max(1.0, first.max()), 41)
    parts = [("all", first, COLOURS[0])]
    if right is not None:
        parts = [("right", first[right], RIGHT), ("wrong", first[~right], WRONG)]
    for name, values, colour in parts:
        # wrong matches are hatched, so that they can be told apart without colours
        looks = {"hatch": "////", "fill": False} if name == "wrong" else {"color": colour, "alpha": 0.6}
        label = f"{name} ({len(values)})"
        axes.hist(values, bins, histtype="stepfilled", label=label, edgecolor=colour, **looks)
    axes.set_xlabel(f"{kind} similarity of the first match")
    axes.set_ylabel("queries")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_title("similarity of the first matches")
    axes.legend()
    medians = ", ".join(f"{name} {np.median(values):.2f}" for name, values, _ in parts if len(values))
    return chart_of(figure, "similarities", f"Similarity of the first match, in the median: {medians}")


@style()
def embedding_map(
    panels: dict[str, np.ndarray], labels: list[str | None], is_query: np.ndarray, colours: dict[str, str]
) -> tuple[Chart, list[list[int]]]:
    """Draw panels {title: positions (points, 2)}: a colour per label, ○ for the gallery, ▲ for the queries.

    `labels` and `is_query` belong to the points of every panel. A label without a colour is grey. Also return
    which points each group of marks in the SVG shows, in order: the groups are called tsne-points-0,
    tsne-points-1 and so on.
    """
    figure, all_axes = new_figure(6.2 * len(panels) + 1.3, 5.6, len(panels))
    behind: list[list[int]] = []
    array = np.array([label if label in colours else None for label in labels], dtype=object)
    for axes, (title, positions) in zip(all_axes, panels.items(), strict=True):
        for label in [None, *colours]:
            for side, marker in ((False, "o"), (True, "^")):
                rows = np.flatnonzero((array == label) & (is_query == side))
                if len(rows):
                    looks = {"color": colours.get(label, UNKNOWN), "marker": marker, "s": 24 if side else 16}
                    marks = axes.scatter(*positions[rows].T, linewidths=0, alpha=0.85, **looks)
                    marks.set_gid(f"points-{len(behind)}")
                    behind.append(rows.tolist())
        axes.set_title(title)
        axes.set_xticks([])
        axes.set_yticks([])
    _legend(figure, colours, others=None in array)
    description = f"t-SNE of {len(labels)} embeddings: {' and '.join(panels)}"
    return chart_of(figure, "tsne", description), behind


def _legend(figure: Figure, colours: dict[str, str], others: bool) -> None:
    marks = [("s", colour, _short(label)) for label, colour in colours.items()]
    marks += [("s", UNKNOWN, "others" if colours else "all")] if others else []
    marks += [("^", INK, "query"), ("o", INK, "gallery")]
    handles = [Line2D([], [], linestyle="", marker=m, color=colour, label=text) for m, colour, text in marks]
    figure.legend(handles=handles, loc="outside right upper", fontsize=9)


def _short(label: str) -> str:
    """Shorten a label so that it fits beside a chart, and escape what matplotlib takes for a formula."""
    text = label if len(label) <= 24 else label[:23] + "…"
    return text.replace("$", r"\$").encode("utf-8", "replace").decode()


# ---- the chart of a training ----------------------------------------------------------------------


@style()
def curves(history: list[dict[str, Any]], untuned: dict[str, Any]) -> Chart:
    """Draw the training loss by epoch, and top-1 and top-3 on validation; epoch 0 is the untuned network."""
    figure, (losses, shares) = new_figure(9, 3.5, 2)
    epochs = [line["epoch"] for line in history]
    losses.plot(
        epochs, [np.nan if line["loss"] is None else line["loss"] for line in history], "o-", color=COLOURS[0]
    )
    losses.set_title("training loss")
    for cut, colour in ((1, COLOURS[1]), (3, COLOURS[3])):
        values = [untuned[f"top_{cut}"], *(line[f"top_{cut}"] for line in history)]
        intervals = [untuned[f"top_{cut}_interval"], *(line[f"top_{cut}_interval"] for line in history)]
        low, high = zip(*intervals, strict=True)
        shares.plot([0, *epochs], values, "o-", color=colour, label=f"top-{cut}")
        shares.fill_between([0, *epochs], low, high, color=colour, alpha=0.15, linewidth=0)
        shares.axhline(values[0], color=colour, linestyle=":", linewidth=1)
    shares.set_title("validation (0: untuned; shaded: 95 %)")
    shares.legend(loc="best")
    for axes in (losses, shares):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    description = f"Top-1 on validation from {untuned['top_1']:.3f} untuned to {history[-1]['top_1']:.3f}"
    return chart_of(figure, "loss", description)
