"""The leaderboard in a real browser."""

import json
import time
from urllib.parse import quote

import pytest
from hall import body_of, images, post, served
from page_checks import LOW_CONTRAST, OVERLAPS

SCRIPT = "<script>window.hacked = 1</script>"
NAMES = [SCRIPT, "雪山队", "👩‍🚀👨‍👩‍👧 rockets", "Les Éléphants", "x" * 100, "\u202eright to left"]
PAGES = ["", f"submissions/{quote(SCRIPT, safe='')}", "docs"]


@pytest.fixture(scope="module")
def hall(folder, tmp_path_factory):
    """A competition under way."""
    with served(folder, tmp_path_factory.mktemp("place") / "c.sqlite") as address:
        for at, group in enumerate(NAMES):
            for n in range(at + 1):
                sent = body_of(group, shift=(at + n) % 4) | {"n": n}
                assert post(address, sent).status_code == 200
        post(address, {"groupname": NAMES[0], "images": images() | {"<b>nobody</b>": ["ga0.jpg"]}})
        yield address


def wait_until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize("width", [1920, 1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", PAGES)
def test_it_is_readable_wide_and_narrow_light_and_dark(browser, hall, path, width, scheme):
    browser.open(hall + path, width, scheme)
    assert browser.run(LOW_CONTRAST) == []
    assert browser.run(OVERLAPS) == []
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.errors() == []


def test_names_are_shown_as_they_are(browser, hall):
    browser.open(hall)
    assert sorted(browser.texts("tbody th")) == sorted(NAMES)
    assert browser.run("return window.hacked") is None
    for group in NAMES:
        browser.open(hall)
        browser.run("""[...document.querySelectorAll("tbody a")]
            .find((link) => link.textContent === arguments[0]).click()""", group)  # fmt: skip
        wait_until(lambda group=group: browser.texts("h1") == [group])
    browser.open(hall + PAGES[1])
    assert browser.texts("td:last-child")[-1] == "unknown queries: 1 (<b>nobody</b>)"
    assert browser.run("return window.hacked") is None


def test_a_phone_shows_rank_group_score_and_count(browser, hall):
    browser.open(hall, width=400)
    shown = browser.run("""return [...document.querySelector("tbody tr").children]
        .filter((cell) => cell.getClientRects().length).map((cell) => cell.textContent)""")
    assert shown[0] == "1"
    assert shown[2:] == ["600.0", "1"]
    assert len(shown) == 4


@pytest.mark.parametrize("width", [1920, 1280, 400])
def test_numbers_and_times_are_not_broken(browser, hall, width):
    browser.open(hall, width)
    lines = browser.run("""return [...document.querySelectorAll("tbody .number, tbody .when")].map((cell) => {
        const text = document.createRange();
        text.selectNodeContents(cell);
        return text.getClientRects().length;
    })""")
    assert len(lines) == 4 * len(NAMES)
    assert max(lines) == 1


def test_the_line_shows_each_score_and_ends_in_a_point(browser, hall):
    browser.open(hall)
    points = browser.run("""return [...document.querySelectorAll("tbody tr")].map((row) => {
        const line = row.querySelector("polyline").points, last = line.getItem(line.numberOfItems - 1);
        const end = row.querySelector("circle");
        return [row.children[3].textContent, line.numberOfItems, last.x, end.cx.baseVal.value];
    })""")
    assert len(points) == len(NAMES)
    assert all(int(count) == number and last == end for count, number, last, end in points)


LOOKED_AT = """document.dispatchEvent(new Event("visibilitychange"))"""  # as when its tab comes to the front


def test_it_updates_by_itself_and_says_when_it_cannot(browser, serve):
    with serve() as address:
        browser.open(address)
        assert "No group has submitted yet" in browser.texts("main")[0]
        browser.run("window.loaded = 1")
        post(address, body_of("first"))
        wait_until(lambda: browser.texts("tbody th") == ["first"])
        post(address, body_of("second", shift=1))
        browser.run(LOOKED_AT)
        wait_until(lambda: browser.texts("tbody th") == ["first", "second"])
        assert browser.texts("#state")[0].startswith("as of ")
        assert browser.run("return window.loaded") == 1  # the page was not loaded again
        assert browser.errors() == []
    browser.run(LOOKED_AT)
    wait_until(lambda: "the server does not answer" in browser.texts("#state")[0])
    assert browser.texts("tbody th") == ["first", "second"]
    browser.errors()  # it complained, as it should


def test_a_script_from_outside_would_not_run(browser, hall):
    browser.open(hall)
    browser.run("""const script = document.createElement("script");
        script.textContent = "window.hacked = 2"; document.body.append(script)""")
    assert browser.run("return window.hacked") is None
    assert json.dumps(browser.errors()).count("Content Security Policy") == 1
