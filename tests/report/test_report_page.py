"""The page in a real browser."""

import shutil

import pytest
from page_checks import LOW_CONTRAST, OVERLAPS, SCROLLS_UNSEEN
from pages import STRANGE, drawn, found_of
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from get_images import label_of


@pytest.fixture
def page(digits_page):
    return digits_page.as_uri()


def names_shown(browser):
    return browser.texts("#queries .query .caption:not(strong)")


def select(browser, field, value):
    Select(browser.driver.find_element(By.ID, field)).select_by_value(value)


def test_every_query_is_reached_by_the_keys_and_back(browser, page, digits):
    browser.open(page)
    seen = names_shown(browser)
    first = list(seen)
    for _ in range(10):
        browser.press(Keys.ARROW_RIGHT)
        seen += names_shown(browser) if names_shown(browser)[0] not in seen else []
    assert sorted(seen) == sorted(digits.ranking.queries)
    assert browser.texts("#where") == ["33 to 40 of 40"]
    for _ in range(10):
        browser.press(Keys.ARROW_LEFT)
    assert names_shown(browser) == first
    assert browser.errors() == []


def test_the_buttons_turn_the_pages_and_stop_at_the_ends(browser, page):
    browser.open(page)
    before, after = (browser.driver.find_element(By.ID, name) for name in ("before", "after"))
    assert not before.is_enabled()
    after.click()
    assert browser.texts("#where") == ["9 to 16 of 40"]
    before.click()
    assert browser.texts("#where") == ["1 to 8 of 40"]


def test_the_filters_by_class_by_verdict_and_by_name(browser, page, digits):
    browser.open(page)
    select(browser, "class", browser.run("return String(data.classes.indexOf('3'))"))
    assert sorted(names_shown(browser)) == [name for name in digits.ranking.queries if label_of(name) == "3"]
    select(browser, "class", "all")
    right = [name for name, best in digits.ranking.names().items() if label_of(best[0]) == label_of(name)]
    assert 0 < len(right) < 40
    select(browser, "verdict", "right")
    assert browser.texts("#where") == [f"1 to {min(8, len(right))} of {len(right)}"]
    assert set(names_shown(browser)) <= set(right)
    select(browser, "verdict", "wrong")
    assert browser.texts("#where")[0].endswith(f"of {40 - len(right)}")
    assert not set(names_shown(browser)) & set(right)
    select(browser, "verdict", "all")
    name = digits.ranking.queries[7]
    browser.driver.find_element(By.ID, "text").send_keys(name.upper())
    assert names_shown(browser) == [name]
    browser.press("no such name")
    assert browser.texts("#queries") == ["no query is like this"]


def test_keys_that_are_typed_into_a_field_turn_no_page(browser, page):
    browser.open(page)
    browser.driver.find_element(By.ID, "text").send_keys("0", Keys.ARROW_RIGHT)
    assert browser.texts("#where")[0].startswith("1 to 8 of")


def test_the_orders(browser, page, digits):
    browser.open(page)
    orders = {}
    for order in ("worst", "uncertain", "random", "name"):
        select(browser, "order", order)
        orders[order] = names_shown(browser)
    assert orders["name"] == sorted(digits.ranking.queries)[:8]
    assert len({tuple(names) for names in orders.values()}) == 4
    select(browser, "order", "uncertain")
    margins = browser.run("return shown.map((query) => data.margin[query])")
    assert margins == sorted(margins)
    select(browser, "order", "worst")
    first = browser.run("return shown.map((q) => data.first[q] || 99)")
    assert first == sorted(first, reverse=True)


def test_right_and_wrong_matches_differ_in_more_than_colour(browser, page, digits):
    browser.open(page)
    select(browser, "order", "name")
    name = names_shown(browser)[0]
    wanted = ["✓" if label_of(match) == label_of(name) else "✗" for match in digits.ranking.names()[name]]
    assert [text[0] for text in browser.texts("#queries > li:first-child .cosine")] == wanted
    cosines = [float(text[2:]) for text in browser.texts("#queries > li:first-child .cosine")]
    assert cosines == sorted(cosines, reverse=True)
    frames = browser.run("""
        return [...document.querySelectorAll("#queries > li:first-child .matches .picture")]
          .map((e) => getComputedStyle(e).borderTopStyle)""")
    assert frames == ["solid" if mark == "✓" else "dashed" for mark in wanted]


def test_pointing_at_the_map_shows_the_image_and_a_click_its_matches(browser, page):
    browser.open(page)
    x, y, name = browser.run("""
        at("tsne").scrollIntoView({ block: "center", behavior: "instant" });
        for (const mark of document.querySelectorAll("#tsne use")) {
          const box = mark.getBoundingClientRect();
          const [x, y] = [box.left + box.width / 2, box.top + box.height / 2];
          const row = rowOf(document.elementFromPoint(x, y) || document.body);
          if (row < queries.length) return [x, y, data.names[row]];
        }""")
    place = {"x": x, "y": y, "button": "left", "clickCount": 1}
    browser.driver.execute_cdp_cmd("Input.dispatchMouseEvent", place | {"type": "mouseMoved"})
    assert browser.texts("#hint .caption")[0] == name
    assert browser.run("return document.querySelector('#hint img').complete")
    for kind in ("mousePressed", "mouseReleased"):
        browser.driver.execute_cdp_cmd("Input.dispatchMouseEvent", place | {"type": kind})
    assert names_shown(browser) == [name]


def test_each_mark_of_the_map_is_a_point_and_before_and_after_show_the_same(browser, page):
    browser.open(page)
    counts = browser.run("""return data.points.map((rows, n) =>
        [rows.length, document.querySelectorAll(`#tsne-points-${n} use`).length])""")
    assert all(rows == marks for rows, marks in counts)
    rows = browser.run("return data.points.flat()")
    assert sorted(rows[: len(rows) // 2]) == sorted(rows[len(rows) // 2 :])


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_wide_and_narrow_light_and_dark(browser, page, width, scheme):
    browser.open(page, width, scheme)
    assert browser.run(LOW_CONTRAST) == []
    assert browser.run(OVERLAPS) == []
    assert browser.run(SCROLLS_UNSEEN) == []
    assert browser.run("return document.documentElement.scrollWidth") <= width


def test_the_measurement_of_contrast_and_of_overlaps_would_see_them(browser, page):
    browser.open(page)
    browser.run("""document.querySelector("h1").style.color = "#bbbbbb";
        document.querySelector("h2").style.marginTop = "-80px";""")
    assert browser.run(LOW_CONTRAST)
    assert browser.run(OVERLAPS)
    browser.open(page, 400)
    browser.run(
        """for (const node of document.querySelectorAll(".scroll")) node.style.background = "none";"""
    )
    assert browser.run(SCROLLS_UNSEEN)


def test_pictures_are_undistorted_and_have_words(browser, page):
    browser.open(page)
    images = browser.run("""return [...document.images].map((i) =>
        [i.alt, i.naturalWidth, getComputedStyle(i).objectFit])""")
    assert len(images) > 80
    assert all(alt and width and fit == "contain" for alt, width, fit in images)
    charts = browser.run("""return [...document.querySelectorAll("figure > svg")].map((s) =>
        [s.getAttribute("aria-label"), s.viewBox.baseVal.width / s.viewBox.baseVal.height,
         s.getBoundingClientRect().width / s.getBoundingClientRect().height])""")
    assert len(charts) == 5
    assert all(words and wanted == pytest.approx(shape, rel=0.02) for words, wanted, shape in charts)


def test_it_opens_offline_and_asks_for_nothing(browser, page):
    browser.open(page)
    assert browser.run("return performance.getEntriesByType('resource').map((e) => e.name)") == []


def test_strange_names_are_shown_as_they_are(browser, sample, tmp_path):
    source = sorted((sample / "test" / "gallery" / "0").iterdir())
    for part in ("query", "gallery"):
        for number, name in enumerate(STRANGE):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            shutil.copy(source[number], tmp_path / "images" / part / name / f"{name}.png")
    drawn(found_of(tmp_path / "images"), tmp_path / "out")
    browser.open((tmp_path / "out" / "report.html").as_uri())
    assert browser.run("return window.hacked") is None
    assert sorted(names_shown(browser)) == sorted(f"{name}/{name}.png" for name in STRANGE)
    assert set(STRANGE) < set(browser.texts("#class option"))
    assert "雪山" in browser.texts("#per_class svg text")
    assert browser.errors() == []
