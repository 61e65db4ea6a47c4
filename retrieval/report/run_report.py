"""A finished run in; report.html, one file that opens offline, and its charts as PNG out."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from get_images import label_of
from retrieval.backbones.backbone import package_versions
from retrieval.files import write_whole
from retrieval.html import render
from retrieval.metrics import CUTS, MORE
from retrieval.ranking.collapse import in_words as why_collapsed
from retrieval.report import charts
from retrieval.report.charts import Chart
from retrieval.report.choice import read_choice
from retrieval.report.embedding_map import draw_map
from retrieval.report.results import Results
from retrieval.report.thumbnails import draw_matches
from retrieval.report.viewer import Matches, page_data
from retrieval.run import Outcome, Run
from retrieval.settings import masked

PAGE, SHEET = "report.html", "similar_images.png"
TEMPLATES = Path(__file__).with_name("templates")


def write_report(run: Run, results: Results, outcome: Outcome) -> Path:
    """Write report.html, similar_images.png and the charts into the run's folder; return the page's path."""
    matches = Matches(results)
    draw_matches(results.ranking, results.queries, results.gallery, run.settings.top_k, run.folder / SHEET)
    maps, points = draw_map(results)
    drawn = {chart.name: chart for chart in [*maps, *_charts(results, matches)]}
    for chart in drawn.values():
        write_whole(run.folder / f"{chart.name}.png", chart.png)
    data = page_data(results, matches, points)
    queries, images = len(results.queries), len(results.gallery)
    classes = {data["labels"][row] for row in range(queries)}
    page = render(
        TEMPLATES,
        "report.html",
        title=f"{results.metrics['backbone']}: {queries} queries in {images} images",
        outcome=outcome,
        collapsed=why_collapsed(results.metrics) if results.metrics.get("collapsed") else "",
        tiles=_tiles(results.metrics | outcome.metrics),
        more=_more(results.metrics, results.ranking.rows.shape[1]),
        labelled=results.labelled,
        charts=drawn,
        data=data,
        failing=_failing(results.metrics.get("per_class", {})),
        query_classes=[(number, data["classes"][number]) for number in sorted(classes)],
        mapped=len(results.sample.rows),
        fused=results.fused,
        choice=read_choice(run.settings.recipe),
        images=queries + images,
        command=_command(run),
        time=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        tables=_tables(run, results.metrics.get("cached_gallery_images", 0)),
        left_out=_left_out(results),
    )
    write_whole(run.folder / PAGE, page)
    return run.folder / PAGE


def _charts(results: Results, matches: Matches) -> list[Chart]:
    """Draw the charts of the matches and, if the network is fine-tuned, of its training."""
    right = (matches.first == 1)[matches.embedded] if results.labelled else None
    kind = "fused" if results.fused else "cosine"
    drawn = [charts.similarities(matches.cosines[matches.embedded, 0], right, kind)]
    if results.labelled:
        of_queries = [label_of(name) or "none" for name in results.ranking.queries]
        of_matches = [label_of(results.gallery_vectors.names[row]) or "none" for row in matches.rows[:, 0]]
        drawn.append(charts.per_class(results.metrics["per_class"]))
        drawn.append(charts.confusion(of_queries, of_matches))
    if results.trained and results.trained.history:
        drawn.append(charts.curves(results.trained.history, results.trained.untuned))
    return drawn


def _failing(per_class: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the classes with wrong first matches, the worst first, and how many of their queries."""
    failing = [label for label in charts.worst_first(per_class) if per_class[label]["top_1"] < 1]
    counts = [(per_class[label]["queries"], per_class[label]["top_1"]) for label in failing]
    return [(label, f"{round((1 - right) * queries)} of {queries}")
            for label, (queries, right) in zip(failing, counts, strict=True)]  # fmt: skip


def _command(run: Run) -> str:
    """Return the command line that started the run, with the token and a URL's password hidden."""
    command = shlex.join(["python", Path(sys.argv[0]).name, *map(masked, sys.argv[1:])])
    token = run.settings.group_token.get_secret_value()
    return command.replace(token, str(run.settings.group_token)) if token else command


def _tiles(metrics: dict[str, Any]) -> list[dict[str, str]]:
    """Return the metrics at the top of the page, each with its interval."""
    tiles = []
    if "server_score" in metrics:
        tiles.append(
            {"name": "the server's score", "value": f"{metrics['server_score']:.1f}", "note": "of 1000"}
        )
    if "score" not in metrics:
        return tiles
    low, high = metrics["score_interval"]
    note = f"{low:.0f} to {high:.0f} of 1000 (95 %)"
    tiles.append({"name": "score by the folder labels", "value": f"{metrics['score']:.1f}", "note": note})
    for cut in CUTS:
        low, high = (100 * bound for bound in metrics[f"top_{cut}_interval"])
        value = f"{100 * metrics[f'top_{cut}']:.1f} %"
        tiles.append({"name": f"top-{cut}", "value": value, "note": f"{low:.1f} to {high:.1f} %"})
    return tiles


def _more(metrics: dict[str, Any], ranked: int) -> str:
    """Return a line of the metrics that tell more than the rank of the first right image, "" without labels.

    R is cut to the number of ranked images, so the line says that number.
    """
    titles = MORE | {"map_at_r": f"MAP@R (R ≤ {ranked})"}
    shown = []
    for name, title in titles.items():
        if name in metrics:
            value, (low, high) = metrics[name], metrics[f"{name}_interval"]
            title = title.replace("@k", f"@{metrics['k']}")
            shown.append(f"{title} {value:.3f} [{low:.3f}, {high:.3f}]")
    return " · ".join(shown)


def _tables(run: Run, cached: int) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the tables that say how the run was made: captions and rows."""
    seconds = run.rounded_seconds()
    seconds["all but this page"] = seconds.pop("total")
    steps = [(step, f"{spent:.1f}") for step, spent in seconds.items()]
    if cached:
        steps.append(("of the gallery", f"{cached} images came from the cache, which costs no embedding"))
    return [
        ("seconds of each step", steps),
        ("settings", [(name, "–" if value is None else str(value)) for name, value in run.settings]),
        ("versions", list(versions().items())),
    ]


def _left_out(results: Results) -> dict[str, list[str]]:
    """Return the names of the images that could not be embedded, or not as they should be, by the reason."""
    left_out = {
        "queries that could not be embedded": results.metrics["unreadable_queries"],
        "gallery images that could not be embedded": results.metrics["unreadable_gallery_images"],
        "damaged queries, of which a part was embedded": results.query_vectors.damaged,
        "damaged gallery images, of which a part was embedded": results.gallery_vectors.damaged,
        "queries without a face": results.query_vectors.without_face,
        "gallery images without a face": results.gallery_vectors.without_face,
    }
    return {reason: names for reason, names in left_out.items() if names}


def versions() -> dict[str, str]:
    """Return the versions of Python, the system and the packages, and the commit of this code, if known."""
    found = {"python": platform.python_version(), "system": platform.platform(terse=True)}
    return found | package_versions() | _commit(Path(__file__).parent.parent.parent)


def _commit(folder: Path) -> dict[str, str]:
    """Return the commit of the code in a folder, or nothing if git does not know it."""
    if not (folder / ".git").exists():  # or git would tell the commit of a repository around this folder
        return {}
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git
        return {}
    return {"commit": described.stdout.strip()} if described.returncode == 0 else {}
