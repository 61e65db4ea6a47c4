"""How a submission is sent again: the command that a failure prints, and what becomes of the new score."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GALLERY, RANKING, Server, answer, ranking_of, run_here
from test_client import send

from retrieval.report.comparison import compare_ledgers
from retrieval.report.ledgers import read_ledgers
from retrieval.run import Outcome, Run
from retrieval.settings import Form, NewFolder
from retrieval.submission.submission_file import faults_of, read_submission, write_submission

# ---- the printed command


def command_in(outcome):
    """The command that an outcome offers, the last line of its sentence."""
    return outcome.sentence.splitlines()[-1].strip()


@pytest.mark.parametrize(
    ("status", "place", "offered", "words"),
    [(404, "retrieval", "retrieval/", "to send it to the same URL with a slash at its end"),
     (404, "other/", None, "to send it to the right URL"),
     (405, "", None, "to send it to the right URL"),
     (301, "retrieval/", None, "to send it to the right URL"),
     (401, "retrieval/", "retrieval/ --group_token TOKEN", "if the token was wrong"),
     (403, "retrieval/", "retrieval/ --group_token TOKEN", "if the token was wrong"),
     (422, "retrieval/", "retrieval/", "run the script again with the right folders; or, to send the same"),
     (500, "retrieval/", "retrieval/", "to send it again")],
)  # fmt: skip
def test_what_was_just_refused_is_not_offered_as_the_cure(saved, status, place, offered, words):
    with Server(answer(status, b"no")) as server:
        root = server.url.removesuffix("retrieval/")
        outcome = send(saved, f"{root}{place}", token="secret", retries=0)
    assert f"is saved; {words}" in outcome.sentence
    url = "http://HOST:3001/retrieval/" if offered is None else f"{root}{offered}"
    assert command_in(outcome).endswith(f" {saved} --server_url {url}")
    assert "secret" not in outcome.sentence


@pytest.mark.parametrize("url", ["https://{}/retrieval/", "ftp://{}/", "htp://{}/"])
def test_a_url_that_leads_nowhere_is_not_offered_again(saved, url):
    with Server(answer()) as server:
        outcome = send(saved, url.format(f"127.0.0.1:{server.http.server_port}"))
    assert command_in(outcome).endswith("--server_url http://HOST:3001/retrieval/")


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["plain", "two words", "it's; rm -rf $HOME", "-x"])
def test_the_printed_command_works_from_any_folder(tmp_path, monkeypatch, folder):
    """The run was started in `folder`, whose .env holds the token; the user now types in another folder."""
    here = tmp_path / folder
    here.mkdir()
    (here / ".env").write_text("GROUP_TOKEN=secret\n")
    monkeypatch.chdir(here)
    path = write_submission(ranking_of(RANKING, GALLERY), "Team AAA", "-results")
    with Server(answer(503, b"busy"), answer()) as server:
        command = command_in(send(path, server.url, retries=0))
        bin_folder = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        ended = subprocess.run(command, shell=True, cwd="/", env=os.environ | {"PATH": bin_folder},
                               capture_output=True, text=True)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "the server's score: 698 of 1000" in ended.stdout
    assert server.received[1][2]["X-Group-Token"] == "secret"


# ---- where the new score stands

NOT_SCORED = Outcome("failed", "no <answer>")
PAGE = '<h1>T</h1>\n<p id="outcome">no &lt;answer&gt;</p>\n<p>the rest</p>\n'


class Settings(Form):
    query_dir: NewFolder = Path("query")
    output_dir: NewFolder


def finished_run(folder, group="my-team", outcome=NOT_SCORED, ranking=RANKING):
    """The files that a run without labels leaves, whose submission was not scored, say; the submission."""
    run = Run(Settings(output_dir=folder))
    folder.mkdir(exist_ok=True)
    path = write_submission(ranking_of(ranking, GALLERY), group, folder)
    run.done("embed")
    names = run.write_names(list(ranking), GALLERY)
    metrics = {
        "backbone": "word",
        "tuned": False,
        "names": names,
        "queries": 2,
        "gallery_images": 12,
        "k": 10,
    }
    run.conclude(metrics, outcome)
    (folder / "report.html").write_text(PAGE)
    return path


def resend(path, *flags, reply=b'{"accuracy": 698.0}', status=200, **environment):
    with Server(answer(status, reply)) as server:
        command = ("-m", "retrieval.submission", path, "--server_url", server.url, *flags)
        ended = run_here(*command, cwd=path.parent, **environment)
    return ended, [json.loads(body) for *_, body in server.received]


def metrics_beside(path):
    return json.loads(path.with_name("metrics.json").read_bytes())


def test_the_score_of_a_resent_submission_stands_where_the_runs_own_would(tmp_path):
    path = finished_run(tmp_path / "out")
    before = metrics_beside(path)
    ended, _ = resend(path)
    assert ended.returncode == 0, ended.stderr
    assert metrics_beside(path) == before | {"server_score": 698.0}
    lines = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    assert (lines[1]["run"], lines[1]["outcome"]["accuracy"]) == (1, 698.0)
    page = path.with_name("report.html").read_text()
    assert page.startswith('<h1>T</h1>\n<p id="outcome">sent again as &#x27;my-team&#x27; on 20')
    assert "the server&#x27;s score: 698 of 1000" in page
    assert page.endswith("</p>\n<p>the rest</p>\n")
    (run,) = read_ledgers([tmp_path])
    assert run.accuracy == 698.0
    assert "| 698 " in compare_ledgers([tmp_path]).with_name("comparison.md").read_text()
    for name in ("runs.jsonl", "metrics.json", "report.html"):
        assert f"{tmp_path}/out/{name}" in ended.stdout


def test_each_of_several_runs_gets_its_own_score(tmp_path):
    """The submission of the first run lies in earlier/ once the second has written its own."""
    finished_run(tmp_path)
    second = finished_run(tmp_path, ranking={"q1.jpg": GALLERY[::-1], "q2.jpg": GALLERY})
    (first,) = tmp_path.glob("earlier/*/submission.json")
    resend(second, reply=b'{"accuracy": 20}')
    resend(first, reply=b'{"accuracy": 10}')
    resend(second, reply=b'{"accuracy": 30}')
    assert [metrics_beside(path)["server_score"] for path in (first, second)] == [10, 30]
    assert [run.accuracy for run in read_ledgers([tmp_path])] == [10, 30]
    assert not first.with_name("runs.jsonl").exists()


@pytest.mark.parametrize("reply", [b'{"results": [1, 1, 1]}', b"oops", b'{"accuracy": "high"}'])
def test_a_resend_without_a_score_leaves_the_runs_own(tmp_path, reply):
    path = finished_run(tmp_path, outcome=Outcome("scored", "no <answer>", 500.0, 200))
    resend(path, reply=reply)
    assert metrics_beside(path)["server_score"] == 500
    assert path.with_name("report.html").read_text() == PAGE
    assert [run.accuracy for run in read_ledgers([tmp_path])] == [500]


def without_metrics(path):
    path.with_name("metrics.json").unlink()


def with_broken_metrics(path):
    path.with_name("metrics.json").write_text("{")


def with_a_broken_ledger(path):
    path.with_name("runs.jsonl").write_text('7\n{"cut off\n[]\n{}\n')


def without_a_page(path):
    path.with_name("report.html").unlink()


@pytest.mark.parametrize("lose", [without_metrics, with_broken_metrics, with_a_broken_ledger, without_a_page])
def test_a_file_of_the_run_that_is_lost_costs_no_score(tmp_path, lose):
    path = finished_run(tmp_path)
    lose(path)
    ended, _ = resend(path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "the server's score: 698 of 1000" in ended.stdout
    assert json.loads((tmp_path / "runs.jsonl").read_text().splitlines()[-1])["outcome"]["accuracy"] == 698


def test_a_score_is_not_written_into_the_files_of_a_run_that_came_meanwhile(tmp_path):
    path = finished_run(tmp_path)

    def answer_after_another_run(handler):
        finished_run(tmp_path, ranking={"q1.jpg": GALLERY[::-1], "q2.jpg": GALLERY})
        answer()(handler)

    with Server(answer_after_another_run) as server:
        run_here("-m", "retrieval.submission", path, "--server_url", server.url, cwd=tmp_path)
    assert "server_score" not in metrics_beside(path)
    assert sorted(run.accuracy or 0 for run in read_ledgers([tmp_path])) == [0, 698]


# ---- --group_name


@pytest.mark.parametrize("group", ["Team AAA", "Équipe β", "'\"<b> & \\"])
def test_a_submission_can_be_sent_again_under_another_name(tmp_path, group):
    path = finished_run(tmp_path)
    before = read_submission(path)
    ended, sent = resend(path, "--group_name", group)
    assert ended.returncode == 0, ended.stderr
    assert sent == [before | {"groupname": group}] == [read_submission(path)]
    assert f"{path} has the group name {group!r} now, in place of 'my-team'" in ended.stdout
    assert list(read_submission(path)) == ["groupname", "images"]
    assert metrics_beside(path)["server_score"] == 698


@pytest.mark.parametrize("environment", [{}, {"GROUP_NAME": "other"}, {"GROUP_NAME": "my-team"}])
def test_without_the_flag_the_name_in_the_file_stays(tmp_path, environment):
    """A name in .env must not rename what was saved by the flag of a run."""
    path = finished_run(tmp_path, group="Team B")
    (tmp_path / ".env").write_text("GROUP_NAME=another\n")
    body = path.read_bytes()
    _, sent = resend(path, **environment)
    assert path.read_bytes() == body
    assert sent == [json.loads(body)]


def test_a_name_that_cannot_be_written_is_not_sent(tmp_path, monkeypatch):
    path = finished_run(tmp_path)
    body = path.read_bytes()

    def refuse(*_):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("retrieval.submission.resending.write_whole", refuse)
    ended, sent = resend(path, "--group_name", "Team AAA")
    assert (ended.returncode, sent, path.read_bytes()) == (1, [], body)


# ---- --check

QUERIES = list(RANKING)
SOUND = {"groupname": "Team AAA", "images": dict.fromkeys(QUERIES, GALLERY[:10])}
FAULTS = {
    "missing queries: 1 (q2.jpg)": {"images": {"q1.jpg": GALLERY[:10]}},
    "queries that are not in the query folder: 1 (q3.jpg)":
        {"images": SOUND["images"] | {"q3.jpg": GALLERY[:10]}},
    "queries without a list of names: 1 (q1.jpg)": {"images": SOUND["images"] | {"q1.jpg": "a.jpg"}},
    "queries that do not have 10 names: 2 (q1.jpg, q2.jpg)":
        {"images": {"q1.jpg": GALLERY[:9], "q2.jpg": GALLERY[:11]}},
    "queries that name an image twice: 1 (q1.jpg)":
        {"images": SOUND["images"] | {"q1.jpg": [*GALLERY[:9], GALLERY[0]]}},
    "names that are not in the gallery folder: 1 (x.jpg)":
        {"images": SOUND["images"] | {"q1.jpg": [*GALLERY[:9], "x.jpg"]}},
    "there is no group name": {"groupname": " "},
    "a submission looks like": {"groupname": 7},
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_kind_of_fault_has_its_sentence(fault):
    (found,) = faults_of(SOUND | FAULTS[fault], QUERIES, GALLERY)
    assert found.startswith(fault)
    assert faults_of(SOUND, QUERIES, GALLERY) == []


@pytest.fixture
def folders(tmp_path):
    """The images of the sound submission, as far as a check looks at them: their names."""
    for part, names in (("query", QUERIES), ("gallery", GALLERY)):
        (tmp_path / part).mkdir()
        for name in names:
            (tmp_path / part / name).touch()
    return tmp_path


def check(folder, content, **environment):
    (folder / "a.json").write_text(content if isinstance(content, str) else json.dumps(content))
    flags = ("--query_dir", "query", "--gallery_dir", "gallery")
    return run_here("-m", "retrieval.submission", "--check", "a.json", *flags, cwd=folder, **environment)


def test_a_sound_file_is_called_sound_and_not_sent(folders):
    with Server(answer()) as server:
        ended = check(folders, SOUND, SERVER_URL=server.url)
    assert (ended.returncode, ended.stderr, server.received) == (0, "", [])
    assert ended.stdout == (
        "a.json is sound: each of the 2 queries has 10 different names of the 12 gallery images, and the "
        "group name is 'Team AAA'. Nothing was sent\n"
    )
    assert not (folders / "runs.jsonl").exists()


@pytest.mark.parametrize(("content", "sentences"), [
    ({"groupname": "", "images": {"q1.jpg": ["x.jpg"] * 10}},
     ["a.json: there is no group name: give --group_name NAME", "a.json: missing queries: 1 (q2.jpg)",
      "a.json: queries that name an image twice: 1 (q1.jpg)",
      "a.json: names that are not in the gallery folder: 1 (x.jpg)"]),
    ('{"groupname": "a", "images": {"q1.jpg": [], "q1.jpg": []}}',
     ["a.json: names that stand twice: 1 (q1.jpg), and only one can count"]),
    ("{", ["a.json is not JSON ("]),
    ("[]", ["a.json: a submission looks like {"]),
])  # fmt: skip
def test_a_file_with_faults_is_told_each_of_them(folders, content, sentences):
    ended = check(folders, content)
    assert (ended.returncode, ended.stdout) == (1, "")
    lines = ended.stderr.splitlines()
    assert len(lines) == len(sentences)
    for line, sentence in zip(lines, sentences, strict=True):
        assert line.startswith(f"error: {sentence}")


def test_a_small_gallery_asks_for_fewer_names():
    assert faults_of({"groupname": "a", "images": {"q": ["a", "b"]}}, ["q"], ["a", "b"]) == []
    assert len(faults_of({"groupname": "a", "images": {"q": ["a"]}}, ["q"], ["a", "b"])) == 1
