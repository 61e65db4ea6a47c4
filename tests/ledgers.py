"""Runs in ledgers, for the tests of the comparison."""

import json

from conftest import ranking_of

from retrieval.metrics import first_hits, metrics_of
from retrieval.run import Outcome, Run
from retrieval.settings import Form, NewFolder

NAMES = [f"a/{number}.jpg" for number in range(10)]
OTHERS = [f"b/{number}.jpg" for number in range(10)]


class Settings(Form):
    query_dir: NewFolder
    output_dir: NewFolder
    model_type: str = "word"


def put(folder, word, first, names=NAMES, accuracy=None, labelled=True, query_dir="data/query"):
    """A run in the ledger of a folder, whose queries find their first right image at these ranks."""
    gallery = [*OTHERS[:9], "a/g.jpg"]
    ranking = {}
    for query, rank in zip(names, first, strict=True):
        wrong = OTHERS[:9]
        ranking[query] = [*wrong[: rank - 1], "a/g.jpg", *wrong[rank - 1 :]] if rank else OTHERS
    ranking = ranking_of(ranking)
    assert first_hits(ranking) == list(first)
    folder.mkdir(parents=True, exist_ok=True)
    line = Run(Settings(query_dir=query_dir, output_dir=folder, model_type=word))
    line.done("embed")
    metrics = {"backbone": word, "tuned": "tuned" in word, "names": line.write_names(names, gallery)}
    if labelled:
        metrics |= metrics_of(ranking)
        del metrics["points"]
    metrics |= {"queries": len(names), "gallery_images": 10, "k": 10}
    hits = {"first": list(first)} if labelled else {}
    line.conclude(metrics, Outcome("scored" if accuracy else "saved", "so", accuracy), **hits)


def table(page, more=False):
    """The rows of comparison.md beside a page, a list of cells each; `more`: of the second tables."""
    rows = []
    for block in page.with_name("comparison.md").read_text().split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("| ")]
        cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
        if cells and (cells[0][1] == "k") == more:
            rows += cells
    return [line for line in rows if line[0].strip("-")]


def change(folder, number=-1, **told):
    """Write other settings, metrics or times into a line of a ledger."""
    path = folder / "runs.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for part, value in told.items():
        lines[number][part] = lines[number][part] | value if isinstance(value, dict) else value
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


GOOD, FAIR, POOR = (1,) * 10, (1,) * 5 + (3, 0, 0, 0, 0), (2,) * 10
