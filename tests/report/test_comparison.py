import json

import pytest
from conftest import run_here
from ledgers import FAIR, GOOD, NAMES, POOR, change, put, table
from pages import STRANGE

from retrieval.errors import InputError
from retrieval.metrics import competition_score
from retrieval.report.comparison import compare_ledgers, holm, mcnemar
from retrieval.report.ledgers import read_ledgers


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
