"""What the rows of a comparison are called, count and link to."""

import re
from datetime import UTC, datetime
from urllib.parse import unquote

import pytest
from ledgers import FAIR, GOOD, POOR, change, put, table

from retrieval.errors import InputError
from retrieval.report.comparison import compare_ledgers
from retrieval.run import set_aside


def test_runs_of_one_network_have_names_that_tell_them_apart(tmp_path):
    for size, first in ((64, POOR), (96, GOOD)):
        put(tmp_path, "word", first)
        change(tmp_path, settings={"image_size": size, "weights": "runs/supcon_s0/model.pth", "crop": "auto"})
    page = compare_ledgers([tmp_path])
    names = [f"word, image_size {size}, weights supcon_s0/model.pth" for size in (96, 64)]
    assert [row[0] for row in table(page)[1:]] == names
    assert f"right by {names[0]} only: 10" in page.read_text()
    assert f"right by {names[1]} only: 0" in page.read_text()
    assert f"{names[0]} 1000.0, {names[1]} 400.0" in page.read_text()


def test_a_network_trained_again_at_the_same_path_is_told_by_its_time(tmp_path):
    for hour, first in ((10, POOR), (12, GOOD)):
        put(tmp_path, "word", first)
        change(tmp_path, time=f"2026-11-24T{hour}:00:00+00:00")
    names = [row[0] for row in table(compare_ledgers([tmp_path]))[1:]]
    moments = [datetime(2026, 11, 24, hour, tzinfo=UTC).astimezone() for hour in (12, 10)]
    assert names == [f"word, {moment:%Y-%m-%d %H:%M:%S}" for moment in moments]


def test_equal_ranks_by_other_settings_are_two_rows_and_top_k_is_none_of_them(tmp_path):
    for size, top_k in ((64, 3), (64, 10), (96, 10)):
        put(tmp_path, "word", GOOD)
        change(tmp_path, settings={"image_size": size, "top_k": top_k})
    names = {row[0] for row in table(compare_ledgers([tmp_path]))[1:]}
    assert names == {"word, image_size 64 (2 runs)", "word, image_size 96"}


def test_the_newest_run_stands_for_all_by_the_clock_and_not_by_the_letters(tmp_path):
    """20:30 an hour east of Greenwich is before 20:00 in Greenwich."""
    for folder, time, total in (
        ("new", "2026-11-24T20:00:00+00:00", 7),
        ("old", "2026-11-24T20:30:00+01:00", 9),
    ):
        put(tmp_path, "word", GOOD)
        change(tmp_path, time=time, settings={"query_dir": folder}, seconds={"total": total})
    page = compare_ledgers([tmp_path])
    assert table(page)[1][-1] == "7"
    assert "**new: 10 queries" in page.with_name("comparison.md").read_text()
    assert "<caption>2 runs" in page.read_text()


def test_several_rows_are_told_apart_by_the_corrected_p_only(tmp_path):
    """6 against 0 is p = 0.031, which is told apart alone and not beside another such run."""
    first = (2,) * 6 + (1,) * 4
    put(tmp_path, "best", GOOD)
    put(tmp_path, "one", first)
    assert table(compare_ledgers([tmp_path]))[2][8] == "score and top-1"
    put(tmp_path, "two", first)
    rows = table(compare_ledgers([tmp_path]))[2:]
    assert [row[8] for row in rows] == ["score", "score"]


def test_the_tests_are_named_on_the_console_and_in_the_table(tmp_path, caplog):
    caplog.set_level("INFO")
    put(tmp_path, "word", GOOD)
    told = compare_ledgers([tmp_path]).with_name("comparison.md").read_text()
    for text in (told, caplog.text):
        assert "95 %" in text
        assert "McNemar" in text
        assert "Holm" in text


def test_of_many_names_the_page_shows_the_first_and_counts_the_rest(tmp_path):
    names = [f"a/{number:03}.jpg" for number in range(203)]
    put(tmp_path, "best", (1,) * 203, names)
    put(tmp_path, "other", (2,) * 203, names)
    page = compare_ledgers([tmp_path]).read_text()
    assert "<code>a/199.jpg</code>" in page
    assert "a/200.jpg" not in page
    assert "and 3 more" in page


def test_a_ledger_itself_is_compared_beside_its_folder(tmp_path):
    put(tmp_path, "word", GOOD)
    put(tmp_path / "deeper", "other", POOR)
    page = compare_ledgers([tmp_path / "runs.jsonl"])
    assert page == tmp_path / "comparison.html"
    assert [row[0] for row in table(page)[1:]] == ["word"]


@pytest.mark.parametrize("name", ["report.html", "metrics.json", "submission.json"])
def test_a_file_that_is_no_ledger_is_one_sentence(tmp_path, name):
    put(tmp_path, "word", GOOD)
    (tmp_path / name).write_text("\n" * 1000)
    with pytest.raises(InputError, match=rf"{name} is no ledger: give the folder of the runs"):
        compare_ledgers([tmp_path / name])


@pytest.mark.parametrize(
    "broken",
    [
        {"time": None},
        {"time": "yesterday"},
        {"metrics": 3},
        {"metrics": {"names": ["x"]}},
        {"metrics": {"top_1_interval": None}},
        {"metrics": {"score_interval": 3}},
        {"metrics": {"backbone": ["x"]}},
        {"metrics": {"gallery_images": "many"}},
        {"settings": {"weights": 3}},
        {"settings": {"query_dir": ["x"]}, "metrics": {"names": None}},
        {"seconds": {"total": "long"}},
        {"first": 1},
    ],
    ids=str,
)
def test_a_line_of_wrong_values_is_passed_over_too(tmp_path, caplog, broken):
    put(tmp_path, "word", GOOD)
    put(tmp_path, "broken", POOR)
    change(tmp_path, **broken)
    assert [row[0] for row in table(compare_ledgers([tmp_path]))[1:]] == ["word"]
    assert "runs.jsonl, line 2 is not a line of a ledger" in caplog.text


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ({"metrics": {"means": {"hubs": 10}}}, "word, hubs 10"),
        (
            {"metrics": {"means": {"centre": True, "query_expansion": "5:3"}}},
            "word, centre, query_expansion 5:3",
        ),
        ({"settings": {"search": "ivf"}}, "word, search ivf"),
        ({"settings": {"exclude_self": True, "search": "exact"}}, "word, exclude_self"),
    ],
    ids=str,
)
def test_a_name_shows_the_means_and_the_search(tmp_path, told, wanted):
    put(tmp_path, "word", GOOD)
    put(tmp_path, "word", GOOD)
    change(tmp_path, **told)
    assert {row[0] for row in table(compare_ledgers([tmp_path]))[1:]} == {"word", wanted}


@pytest.mark.parametrize(("cached", "wanted"), [(10, " (cached)"), (4, " (4 of 10 cached)"), (0, "")])
def test_a_run_whose_vectors_were_cached_says_so(tmp_path, cached, wanted):
    put(tmp_path, "word", GOOD)
    change(tmp_path, seconds={"total": 3.2}, metrics={"cached_gallery_images": cached})
    assert table(compare_ledgers([tmp_path]))[1][-1] == f"3{wanted}"


def links(page):
    return re.findall(r'<th scope="row"><a href="([^"]*)">([^<]*)', page.read_text())


def test_a_row_links_to_its_run_s_page_also_after_later_runs(tmp_path):
    for word, first in (("one", POOR), ("two", FAIR), ("three", GOOD)):
        folder = tmp_path / "a b" / ("elsewhere" if word == "three" else "results")
        folder.mkdir(parents=True, exist_ok=True)
        set_aside(folder)
        put(folder, word, first)
        (folder / "report.html").write_text(word)
    set_aside(tmp_path / "a b" / "results")
    put(tmp_path / "a b" / "results", "without a page", POOR)
    page = compare_ledgers([tmp_path])
    found = {name: (tmp_path / unquote(address)).read_text() for address, name in links(page)[:3]}
    assert found == {"three": "three", "two": "two", "one": "one"}
    assert len(links(page)) == 2 * 3  # tables


def test_a_page_that_is_gone_gets_no_link(tmp_path):
    put(tmp_path, "word", GOOD)
    assert links(compare_ledgers([tmp_path])) == []
    (tmp_path / "report.html").write_text("")
    assert len(links(compare_ledgers([tmp_path]))) == 2
    for broken in (b"", b"[]", b'{"time": "x"}'):
        (tmp_path / "metrics.json").write_bytes(broken)
        assert links(compare_ledgers([tmp_path])) == []


def test_the_scores_have_an_axis_with_numbers(browser, tmp_path):
    put(tmp_path, "word", FAIR)
    page = compare_ledgers([tmp_path])
    for width, ticks in ((1280, ["0", "250", "500", "750", "1000"]), (400, ["0", "500", "1000"])):
        browser.open(page.as_uri(), width)
        seen = browser.run("""return [...document.querySelectorAll(".axis i")]
            .filter((i) => i.getClientRects().length).map((i) => i.textContent)""")
        assert seen == ticks
        apart = browser.run("""
            const mid = (e) => e.getBoundingClientRect().left + e.getBoundingClientRect().width / 2;
            const tick = [...document.querySelectorAll(".axis i")].find((i) => i.textContent === "500");
            return Math.abs(mid(tick) - mid(document.querySelector(".bar")));""")
        assert apart < 2


def test_the_table_to_paste_holds_no_tags_and_no_broken_lines(tmp_path):
    put(tmp_path, "<img src=x>\nword", GOOD, query_dir="<b>NEWLINE# data")
    ledger = tmp_path / "runs.jsonl"
    ledger.write_text(ledger.read_text().replace("NEWLINE", "\\n"))  # which no form accepts in a new path
    page = compare_ledgers([tmp_path])
    text = page.with_name("comparison.md").read_text()
    assert "<" not in text
    assert [row[0] for row in table(page)[1:]] == ["&lt;img src=x&gt; word"]
    assert "**&lt;b&gt; # data: 10 queries" in text


def test_a_score_that_differs_by_one_query_in_ten_is_not_told_apart(tmp_path):
    put(tmp_path, "best", GOOD)
    put(tmp_path, "other", (2,) + (1,) * 9)
    assert table(compare_ledgers([tmp_path]))[2][7:9] == ["-60 [-180, +0]", "no"]


def test_the_images_are_called_as_in_the_newest_run_even_if_it_is_not_the_best(tmp_path):
    """A time without a zone is one of this machine's clock."""
    for word, first, time in (
        ("old", GOOD, "2026-11-20T20:00:00"),
        ("new", POOR, "2026-11-24T20:00:00+00:00"),
    ):
        put(tmp_path, word, first, query_dir=word)
        change(tmp_path, time=time)
    assert "**new: 10 queries" in compare_ledgers([tmp_path]).with_name("comparison.md").read_text()
