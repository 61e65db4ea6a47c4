"""What the tests of the report share: the results of a run without a network, and their page."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from conftest import vectors_of
from PIL import Image

from get_images import find_images, label_of
from retrieval.backbones.backbone import Trained
from retrieval.metrics import measure
from retrieval.ranking.exact import rank
from retrieval.report.results import Results, Sample, sample_rows
from retrieval.report.run_report import write_report
from retrieval.run import Outcome, Run
from retrieval.settings import File, Form, GroupToken, NewFolder

SAVED = Outcome("saved", "scored by the folder labels: nothing was sent")
STRANGE = ["'\"><script>window.hacked=1<", "雪山", "🌋 {{ 7*7 }}", "a&amp;b $x^2"]


class Settings(Form):
    query_dir: NewFolder = Path("query")
    gallery_dir: NewFolder = Path("gallery")
    output_dir: NewFolder = Path("results")
    top_k: int = 3
    group_token: GroupToken = GroupToken("")
    recipe: File | None = None


def drawn(found, folder, outcome=SAVED, recipe=None):
    folder.mkdir(exist_ok=True)
    return write_report(Run(Settings(output_dir=folder, recipe=recipe)), found, outcome).read_text()


def found_of(folder, queries_of_each=None, gallery_of_each=None):
    """What a run on folder/query and folder/gallery finds, where an embedding is the image itself, 8 × 8."""
    sides = []
    for part, most in (("query", queries_of_each), ("gallery", gallery_of_each)):
        taken, counts = [], {}
        for file in find_images(folder / part):
            counts[label_of(file.name)] = counts.get(label_of(file.name), 0) + 1
            if most is None or counts[label_of(file.name)] <= most:
                taken.append(file)
        sides.append(taken)
    vectors = []
    for files in sides:
        pixels = {
            f.name: np.asarray(Image.open(f.path).convert("L").resize((8, 8)), float).ravel() for f in files
        }
        vectors.append(vectors_of({name: values - values.mean() for name, values in pixels.items()}))
    ranking = rank(*vectors, k=10)
    metrics = {"backbone": "pixels"} | measure(ranking, *vectors, 3)
    return Results(*sides, *vectors, ranking, metrics, sample=sample_of(*vectors))


def sample_of(queries, gallery):
    """The vectors that the report's map draws."""
    rows = sample_rows(queries, gallery)
    return Sample(rows, np.concatenate([queries.vectors, gallery.vectors])[rows])


def tuned(found):
    """The same results, as if of a fine-tuned network that holds the untuned one."""
    interval = {"top_1": 0.5, "top_3": 0.7, "top_1_interval": [0.4, 0.6], "top_3_interval": [0.6, 0.8]}
    history = [{"epoch": epoch, "loss": 1.0 / epoch} | interval for epoch in (1, 2)]
    return replace(found, trained=Trained(True, interval, history))
