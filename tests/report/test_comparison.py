import json
import re
from datetime import UTC, datetime
from urllib.parse import unquote

import pytest
from conftest import ranking_of, run_here
from pages import STRANGE

from retrieval.errors import InputError
from retrieval.metrics import competition_score, first_hits, metrics_of
from retrieval.report.comparison import compare_ledgers, holm, mcnemar
from retrieval.report.ledgers import read_ledgers
from retrieval.run import Outcome, Run, set_aside
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


GOOD, FAIR, POOR = (1,) * 10, (1,) * 5 + (3, 0, 0, 0, 0), (2,) * 10


def test_runs_on_the_same_images_stand_in_one_table_the_best_first(tmp_path, caplog):
    caplog.set_level("INFO")
    put(tmp_path / "x", "poor", POOR)
    put(tmp_path / "y", "good tuned", GOOD)
    put(tmp_path / "y", "fair", FAIR)
    page = compare_ledgers([tmp_path])
    heads, *rows = table(page)
    assert heads[0] == "network"
    assert [row[0] for row in rows] == ["good tuned", "fair", "poor"]
    assert [row[1] for row in rows] == ["yes", "no", "no"]
    assert [row[2].split()[0] for row in rows] == ["1.000", ".500", ".000"]
    assert rows[1][6].startswith(f"{competition_score(5, 6, 6, 10):.0f} [")
    assert rows[2][7].startswith("-600 [-600, -600]")
    assert [row[8] for row in rows] == ["–", "score", "score and top-1"]
    assert "good tuned" in caplog.text
    assert page == tmp_path / "comparison.html"


def test_a_second_table_shows_more_metrics(tmp_path):
    put(tmp_path, "good", GOOD)
    put(tmp_path, "poor", POOR)
    page = compare_ledgers([tmp_path])
    heads, *rows = table(page, more=True)
    assert heads == ["network", "k", "mAP@k", "MAP@R", "MRR", "precision@k"]
    # The gallery holds one right image: at rank 2, AP@10 and the reciprocal rank are 1/2, and AP@1 is 0.
    of_row = {row[0]: [row[1], *(cell.split()[0] for cell in row[2:])] for row in rows}
    assert of_row == {
        "good": ["10", "1.000", "1.000", "1.000", ".100"],
        "poor": ["10", ".500", ".000", ".500", ".100"],
    }
    assert "the same runs: more than the first right image" in page.read_text()


def test_a_ledger_without_these_metrics_gets_no_second_table(tmp_path):
    put(tmp_path, "word", FAIR)
    line = json.loads((tmp_path / "runs.jsonl").read_text())
    line["metrics"] = {name: value for name, value in line["metrics"].items() if not name.startswith("m")}
    (tmp_path / "runs.jsonl").write_text(json.dumps(line))
    page = compare_ledgers([tmp_path])
    assert table(page, more=True) == []
    assert len(table(page)) == 2


def test_mcnemar_by_hand_and_that_it_does_not_care_which_is_first():
    # 6 queries that one finds and 1 that the other finds: 2 · (C(7, 6) + C(7, 7)) / 2⁷
    one, two = (1,) * 6 + (2,), (2,) * 6 + (1,)
    assert mcnemar(one, two) == mcnemar(two, one) == pytest.approx(2 * (7 + 1) / 128)
    assert mcnemar(one, one) == 1.0
    assert mcnemar((1, 1), (2, 2)) == 0.5


def test_holm_by_hand():
    assert holm([0.02, 0.02, 0.02]) == pytest.approx([0.06] * 3)
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_same_run_again_is_one_row_and_a_changed_one_is_another(tmp_path):
    for _ in range(3):
        put(tmp_path, "word", FAIR)
    put(tmp_path, "word", POOR)
    rows = table(compare_ledgers([tmp_path]))[1:]
    assert [(row[0].startswith("word, 20"), row[0].endswith(" (3 runs)")) for row in rows] == [
        (True, True),
        (True, False),
    ]


def test_other_images_are_another_table_and_a_ledger_counts_once(tmp_path):
    put(tmp_path, "word", GOOD, query_dir="one")
    put(tmp_path, "word", GOOD, names=[f"a/other{number}.jpg" for number in range(10)], query_dir="two")
    page = compare_ledgers([tmp_path, tmp_path])
    text = page.with_name("comparison.md").read_text()
    assert text.count("| network ") == 2 * 2  # tables of each
    assert "**one: 10 queries × 10 images**" in text
    assert "**two: 10 queries × 10 images**" in text
    assert "runs)" not in text


def test_which_queries_one_run_finds_and_another_misses(tmp_path):
    put(tmp_path, "best", (1, 1, 1, 1, 1, 1, 1, 1, 2, 2))
    put(tmp_path, "other", (2, 2, 2, 1, 1, 1, 1, 1, 2, 1))
    page = compare_ledgers([tmp_path]).read_text()
    only_best, only_other = page.split("<details>")[1:]
    assert "right by best only: 3" in only_best
    assert [name in only_best for name in NAMES] == [True] * 3 + [False] * 7
    assert "right by other only: 1" in only_other
    assert [name in only_other for name in NAMES] == [False] * 9 + [True]


def test_names_that_are_lost_are_numbers(tmp_path):
    put(tmp_path, "best", GOOD)
    put(tmp_path, "other", POOR)
    for path in tmp_path.glob("names-*"):
        path.unlink()
    assert "<code>query 10</code>" in compare_ledgers([tmp_path]).read_text()


def test_runs_without_labels_show_the_servers_score(tmp_path):
    put(tmp_path, "low", GOOD, accuracy=500.0, labelled=False)
    put(tmp_path, "high", GOOD, accuracy=698.5, labelled=False)
    heads, *rows = table(compare_ledgers([tmp_path]))
    server = heads.index("server")
    assert [(row[0], row[server]) for row in rows] == [("high", "698.5"), ("low", "500")]
    assert {row[2] for row in rows} == {"–"}


def test_what_is_no_line_is_named_and_passed_over(tmp_path, caplog):
    put(tmp_path, "word", GOOD)
    good = (tmp_path / "runs.jsonl").read_bytes().strip()
    resent = b'{"time": "t", "outcome": {"accuracy": 1.0}, "settings": {}, "group_name": "x"}\n'
    torn = [b'{"time": "2026', b"[]", b"\xff\xfe", good.replace(b'"first": [1,', b'"first": [,'), b"1"]
    (tmp_path / "runs.jsonl").write_bytes(resent + b"\n".join([*torn, good]))
    (run_line,) = read_ledgers([tmp_path])
    assert run_line.backbone == "word"
    warned = [record.getMessage() for record in caplog.records]
    assert [text.partition(", line ")[2].split()[0] for text in warned] == ["2", "3", "4", "5", "6"]


def test_a_folder_whose_name_is_no_utf_8_is_compared_too(tmp_path):
    put(tmp_path, "word", GOOD, query_dir="caf\udce9")
    page = compare_ledgers([tmp_path])
    assert [row[0] for row in table(page)[1:]] == ["word"]
    assert "**caf?: 10 queries" in page.with_name("comparison.md").read_text()


def test_earlier_submissions_hold_no_ledgers_and_a_folder_without_one_is_told(tmp_path):
    put(tmp_path / "earlier" / "x", "word", GOOD)
    with pytest.raises(InputError, match=r"no runs.jsonl in or below .*: give the --output_dir of runs"):
        compare_ledgers([tmp_path])
    (tmp_path / "runs.jsonl").write_text("")
    with pytest.raises(InputError, match="holds a run"):
        compare_ledgers([tmp_path])


def test_names_are_text_in_the_page_and_cells_in_the_table(tmp_path):
    names = [f"a/{name}.jpg" for name in STRANGE]
    put(tmp_path, "a|b<script>", (1,) * 4, names, query_dir="<b>data</b>")
    put(tmp_path, "other", (2,) * 4, names, query_dir="<b>data</b>")
    page = compare_ledgers([tmp_path])
    text = page.read_text()
    assert "<script>" not in text
    assert "<b>data" not in text
    assert "雪山" in text
    assert "🌋" in text
    assert r"a\|b&lt;script&gt;" in page.with_name("comparison.md").read_text()


def test_real_runs_from_the_command_line(few, exported, tmp_path):
    folders = ("--query_dir", few / "query", "--gallery_dir", few / "gallery", "--custom_dataset")
    for name in ("one", "other"):
        ended = run_here("model_not_tuned.py", *folders, "--no_report", "--output_dir", f"results/{name}",
                    cwd=tmp_path)  # fmt: skip
        assert ended.returncode == 0, ended.stderr
    change(tmp_path / "results" / "other", settings={"image_size": 96})
    ended = run_here("-m", "retrieval.report", "results", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert f"{few / 'query'}: 8 queries × 24 images" in ended.stdout
    assert ended.stdout.count("efficientnet_lite0") == 2 * 2  # tables
    assert "wrote results/comparison.html" in ended.stdout
    (tmp_path / "empty").mkdir()
    ended = run_here("-m", "retrieval.report", "empty", cwd=tmp_path)
    assert ended.returncode == 2
    assert "error: there is no runs.jsonl in or below empty" in ended.stderr


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_and_is_readable(browser, tmp_path, width):
    from page_checks import LOW_CONTRAST, OVERLAPS, SCROLLS_UNSEEN

    put(tmp_path, "a network with a long name, fine-tuned with supcon", GOOD)
    put(tmp_path, "vit_large_patch14_clip_224.openai_ft_in12k_in1k@loose", FAIR)
    put(tmp_path, "other", POOR)
    page = compare_ledgers([tmp_path])
    for scheme in ("light", "dark"):
        browser.open(page.as_uri(), width, scheme)
        assert browser.run(LOW_CONTRAST) == []
        assert browser.run(OVERLAPS) == []
        assert browser.run(SCROLLS_UNSEEN) == []
        assert browser.run("return document.documentElement.scrollWidth") <= width


def change(folder, number=-1, **told):
    """Write other settings, metrics or times into a line of a ledger."""
    path = folder / "runs.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for part, value in told.items():
        lines[number][part] = lines[number][part] | value if isinstance(value, dict) else value
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


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
    for total, (word, first) in enumerate((("one", POOR), ("two", FAIR), ("three", GOOD)), 1):
        folder = tmp_path / "a b" / ("elsewhere" if word == "three" else "results")
        folder.mkdir(parents=True, exist_ok=True)
        set_aside(folder)
        put(folder, word, first)
        change(folder, seconds={"total": total})
        metrics = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps(metrics | {"seconds": {"total": total}}))
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
    for broken in (b"", b"[]", b'{"names": 3}'):
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
