"""The part of a report that says how its recipe was chosen, also in a real browser."""

import json
import re

import pytest
from page_checks import LOW_CONTRAST, OVERLAPS
from pages import drawn, found_of

from retrieval.report.choice import read_choice

HOSTILE = f"<script>window.hacked={'1' * 80}</script>"
PLAIN, BETTER = "efficientnet_lite0", "efficientnet_lite0 + whiten"
TRIES = [
    {"recipe": "efficientnet_lite0 + hubs 10", "score": 810.0, "gain": 10.0, "interval": [-4.0, 24.0]},
    {"recipe": BETTER, "score": 843.25, "gain": 43.25, "interval": [24.0, 62.0]},
]
STRANGE = [TRIES[0] | {"recipe": HOSTILE}]
RECIPE = {
    "recipe": BETTER,
    "settings": {"model_type": "efficientnet_lite0", "whiten": True},
    "passed_over": {"dlib": "it found no faces", HOSTILE: HOSTILE},
    "steps": [
        {"before": PLAIN, "score": 800.0, "score_interval": [780.0, 820.0], "best": BETTER, "taken": True,
         "gain_held_out": 41.25, "gain_held_out_interval": [17.5, 69.5], "tries": TRIES},
        {"before": BETTER, "score": 843.25, "score_interval": [820.0, 866.0], "best": BETTER, "taken": False,
         "gain_held_out": 0.0, "gain_held_out_interval": [0.0, 0.0], "tries": STRANGE},
    ],
    "score_on_drawn_days": 843.25, "score_interval": [820.0, 866.0],
    "days": 10, "matches": 80, "seed": 0, "tests": 7,
}  # fmt: skip


def written(folder, content):
    (folder / "recipe.json").write_text(json.dumps(content))
    return folder / "recipe.json"


def without_time(page):
    """The page without what differs from run to run: its time and the name of its folders."""
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d|/\S*pytest\S*", "", page)


@pytest.fixture(scope="module")
def chosen(few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chosen")
    drawn(found_of(few), folder, recipe=written(folder, RECIPE))
    return folder / "report.html"


def test_it_shows_what_was_chosen_each_step_and_every_try(browser, chosen):
    browser.open(chosen.as_uri())
    told = " ".join(" ".join(browser.texts("#why > p")).split())
    assert f"choose.py chose {BETTER} in place of the plain way, {PLAIN}." in told
    assert "10 days drawn from the labelled images, which also chose it, it scores 843.2 [820, 866]" in told
    assert "to allow for the 7 comparisons" in told
    assert "80 right gallery images" in told
    steps = [" ".join(text.split()) for text in browser.texts("#why > .scroll tbody tr")]
    assert steps == [
        f"{BETTER} before: {PLAIN} +41.2 [+17.5, +69.5] taken",
        f"none of them before: {BETTER} +0.0 [+0.0, +0.0] the plainer way stays",
    ]
    assert browser.texts("#why summary")[0] == f"Step 1: the 2 tries beside {PLAIN}"
    assert browser.texts("#why details tbody th") == [BETTER, TRIES[0]["recipe"], HOSTILE]
    assert browser.texts("#why details td")[:2] == ["843.2", "+43.2 [+24.0, +62.0]"]
    assert browser.run("return [...document.querySelectorAll('#why details')].some((d) => d.open)") is False


def test_a_hostile_recipe_gets_no_script_into_the_page(browser, chosen):
    browser.open(chosen.as_uri())
    assert browser.run("return window.hacked") is None
    assert browser.texts("#why li") == ["dlib: it found no faces", f"{HOSTILE}: {HOSTILE}"]
    assert browser.errors() == []


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_wide_and_narrow_light_and_dark(browser, chosen, width, scheme):
    browser.open(chosen.as_uri(), width, scheme)
    browser.run("document.querySelectorAll('#why details').forEach((d) => { d.open = true; })")
    assert browser.run(LOW_CONTRAST) == []
    assert browser.run(OVERLAPS) == []
    assert browser.run("return document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_where_nothing_was_chosen_the_page_is_that_without_a_recipe(few, tmp_path):
    by_hand = written(tmp_path, {"settings": {}})
    found = found_of(few)
    plain, page = drawn(found, tmp_path / "plain"), drawn(found, tmp_path / "by_hand", recipe=by_hand)
    assert "why" not in plain
    row = f"<td>{by_hand}</td>"
    assert row in page
    assert without_time(page.replace(row, "<td>–</td>")) == without_time(plain)


def test_steps_that_choose_py_did_not_write_are_not_shown(tmp_path, caplog):
    assert read_choice(None) is None
    assert read_choice(written(tmp_path, {"settings": {}, "steps": []})) is None
    assert not caplog.records
    steps = [RECIPE["steps"][0] | {"gain_held_out": "much"}]
    assert read_choice(written(tmp_path, RECIPE | {"steps": steps})) is None
    assert 'recipe.json was chosen: its "steps.0.gain_held_out" is not as choose.py writes it' in caplog.text
