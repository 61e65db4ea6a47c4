"""The checks and the score, without a server."""

import json

import pytest
from conftest import ranking_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retrieval.metrics import METRICS, hits_of
from retrieval.server.answer_key import AnswerKey
from retrieval.server.scoring import RefusedError, Submission, judge, parse, score

QUERIES = {"a/1.jpg": "a", "a/2.jpg": "a", "b/3.jpg": "b", "c/4.jpg": "c"}
GALLERY = {f"{who}/g{n}.jpg": who for who in "abd" for n in range(5)} | {"x/none.jpg": None}
KEY = AnswerKey(QUERIES, GALLERY)
RIGHT = {query: [f"{who}/g0.jpg", "x/none.jpg"] for query, who in QUERIES.items() if who != "c"}
RIGHT |= {"c/4.jpg": ["x/none.jpg"]}  # the gallery lacks c
moderate = settings(deadline=None, max_examples=200, suppress_health_check=list(HealthCheck))


def sent(images, group="team"):
    return json.dumps({"groupname": group, "images": images}).encode()


def why(images):
    with pytest.raises(RefusedError) as refused:
        judge(parse(sent(images)), KEY)
    return str(refused.value)


def test_a_case_by_hand():
    order = ["d/g0.jpg", "d/g1.jpg", "d/g2.jpg", "d/g3.jpg", "d/g4.jpg"]
    images = {
        "a/1.jpg": ["a/g1.jpg", *order],  # right at 1
        "a/2.jpg": [*order[:4], "a/g0.jpg"],  # right at 5
        "b/3.jpg": [*order, "b/g0.jpg"],  # right at 6
        "c/4.jpg": order,  # never
    }
    first = judge(parse(sent(images)), KEY)
    assert first == {"a/1.jpg": 1, "a/2.jpg": 5, "b/3.jpg": 6, "c/4.jpg": 0}
    accuracy, told = score(first, KEY)
    assert accuracy == (600 * 1 + 300 * 2 + 100 * 3) / 4 == 375
    right = {"right1": ["a"], "right5": ["a", "a"], "right10": ["a", "a", "b"]}
    wrong = {"wrong1": ["a", "b", "c"], "wrong5": ["b", "c"], "wrong10": ["c"]}
    assert told == right | wrong | {"results": [0.25, 0.5, 0.75]}
    accuracy, told = score(first, KEY, ("a/1.jpg", "c/4.jpg"))
    assert (accuracy, told["right1"], told["wrong10"]) == (500, ["a"], ["c"])


def test_the_reply_that_was_seen_on_the_day():
    key = AnswerKey({f"{n}/q": str(n) for n in range(300)}, {f"{n}/g": str(n) for n in range(300)})
    ranks = [1] * 194 + [5] * (229 - 194) + [10] * (243 - 229) + [0] * 57
    images = {}
    for n, rank in enumerate(ranks):
        images[f"{n}/q"] = [f"{(n + step) % 300}/g" for step in range(1, 11)]
        if rank:
            images[f"{n}/q"][rank - 1] = f"{n}/g"
    accuracy, told = score(judge(Submission("team", images), key), key)
    assert accuracy == 698.0
    assert [round(share, 4) for share in told["results"]] == [0.6467, 0.7633, 0.81]


def test_base_names_and_paths_mean_the_same():
    bases = {q.partition("/")[2]: [n.partition("/")[2] for n in names] for q, names in RIGHT.items()}
    bases["1.jpg"] = ["g0.jpg"]  # three folders have one
    assert "several images have, so that only their paths below the folder tell which: 1 (g0.jpg)" in why(
        bases
    )
    lone = AnswerKey(QUERIES, {"a/one.jpg": "a", "b/two.jpg": "b"})
    by_path = {query: ["a/one.jpg", "b/two.jpg"] for query in QUERIES}
    by_base = {query.partition("/")[2]: ["one.jpg", "two.jpg"] for query in QUERIES}
    assert judge(Submission("t", by_path), lone) == judge(Submission("t", by_base), lone)


WRONG = {
    "unknown queries: 1 (nobody.jpg)": RIGHT | {"nobody.jpg": ["a/g0.jpg"]},
    "missing queries: 4 (a/1.jpg, a/2.jpg, b/3.jpg, …)": {},
    "missing queries: 1 (c/4.jpg)": {q: names for q, names in RIGHT.items() if q != "c/4.jpg"},
    "unknown gallery images: 4 (w, x, y, …)": RIGHT | {"c/4.jpg": ["z", "y", "x", "w"]},
    "queries that name a gallery image twice: 1 (c/4.jpg)": RIGHT | {"c/4.jpg": ["a/g0.jpg"] * 2},
    "queries with more than 10 names: 1 (c/4.jpg)": RIGHT | {"c/4.jpg": list(GALLERY)[:11]},
    "queries without a name: 1 (c/4.jpg)": RIGHT | {"c/4.jpg": []},
    "queries given twice, by path and by base name: 1 (c/4.jpg)": RIGHT | {"4.jpg": ["a/g0.jpg"]},
    r"names with \ in place of /: 1 (a\g0.jpg)": RIGHT | {"c/4.jpg": [r"a\g0.jpg"]},
    "unknown gallery images: 1 (/etc/passwd)": RIGHT | {"c/4.jpg": ["/etc/passwd"]},
    r"unknown gallery images: 1 (\ud800)": RIGHT | {"c/4.jpg": ["\ud800"]},
    r"unknown gallery images: 1 (\x1b[31m)": RIGHT | {"c/4.jpg": ["\x1b[31m"]},
}


@pytest.mark.parametrize("sentence", WRONG)
def test_what_is_wrong_is_said_with_the_first_three_and_the_count(sentence):
    assert why(WRONG[sentence]) == sentence


def test_a_repeat_by_two_names_of_one_image_is_one():
    lone = AnswerKey(QUERIES, {"a/one.jpg": "a", "b/two.jpg": "b"})
    images = {query: ["a/one.jpg"] for query in QUERIES} | {"c/4.jpg": ["a/one.jpg", "one.jpg"]}
    with pytest.raises(RefusedError, match="a gallery image twice: 1"):
        judge(Submission("t", images), lone)


SHAPES = {
    "the body has no groupname and images": b'[{"query": "a"}]',
    "no groupname and images": b'{"groupname": "a"}',
    "images is not a dict: send": b'{"groupname": "a", "images": []}',
    "images is not a dict": b'{"groupname": "a", "images": 1}',
    "queries without a list of names: 2 (a, b)": b'{"groupname": "a", "images": {"a": "b", "b": [1]}}',
    "groupname is not a text": b'{"groupname": 1, "images": {}}',
    "not JSON (Expecting value: line 1 column 1 (char 0))": b"",
    "not JSON ('utf-8' codec can't decode byte 0xff": b"\xff{}",
    "the body is not JSON (": b"[" * 100_000,
    "not JSON (Exceeds the limit (4300 digits)": b'{"a": ' + b"9" * 5000 + b"}",
    "stand twice in one object: 1 (a)": b'{"images": {"a": [], "a": []}}',
    "the body has no groupname": b"null",
}


@pytest.mark.parametrize("sentence", SHAPES)
def test_what_has_another_shape_is_told_the_right_one(sentence):
    with pytest.raises(RefusedError) as refused:
        parse(SHAPES[sentence])
    assert sentence in str(refused.value)
    told = any(word in sentence for word in ("groupname is", "twice"))
    assert told or '{"groupname": "…", "images": {' in str(refused.value)


@pytest.mark.parametrize("group", ["", "  ", "a\nb", "\0", "x" * 101, "\ud800", "\u200b"])
def test_groups_that_no_page_can_show(group):
    with pytest.raises(RefusedError, match="groupname"):
        parse(sent({}, group))


@pytest.mark.parametrize("group", [" Team A ", "雪山", "👩‍🚀", "<script>", "a/b", "..", "x" * 100])
def test_groups_are_free_text(group):
    assert parse(sent({}, group)).group == group.strip()


def test_a_mark_of_byte_order_and_unknown_fields_do_no_harm():
    body = b"\xef\xbb\xbf" + json.dumps({"groupname": "a", "images": {}, "more": [1e999]}).encode()
    assert parse(body) == Submission("a", {})


# ---- any JSON, any permutation

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
NEARLY = st.fixed_dictionaries({
    "groupname": st.just("team") | JSON,
    "images": st.dictionaries(
        st.sampled_from([*QUERIES, "1.jpg", "2.jpg", "x"]),
        st.lists(st.sampled_from([*GALLERY, "none.jpg", "g0.jpg", "y"]), max_size=11) | JSON,
    ),
})  # fmt: skip
WHOLE = st.fixed_dictionaries({
    query: st.permutations(list(GALLERY)).flatmap(
        lambda names: st.integers(1, 10).map(lambda count: names[:count])
    )
    for query in QUERIES
})  # fmt: skip


def is_valid(content):
    """The rules once more, told the slow way."""
    if not isinstance(content, dict) or not isinstance(content.get("images"), dict):
        return False
    bases = {"1.jpg": "a/1.jpg", "2.jpg": "a/2.jpg", "none.jpg": "x/none.jpg"}
    asked = [bases.get(query, query) for query in content["images"]]
    lists = list(content["images"].values())
    if sorted(asked) != sorted(QUERIES) or not all(isinstance(names, list) for names in lists):
        return False
    if not all(isinstance(name, str) for names in lists for name in names):
        return False
    named = [[bases.get(name, name) for name in names] for names in lists]
    return all(
        0 < len(names) <= 10 and len({*names}) == len(names) and {*names} <= {*GALLERY} for names in named
    )


@moderate
@given(JSON | NEARLY | WHOLE.map(lambda images: {"groupname": "team", "images": images}))
def test_any_json_is_scored_if_it_is_valid_and_else_refused_with_a_sentence(content):
    refused = None
    try:
        judge(parse(json.dumps(content).encode()), KEY)
    except RefusedError as error:
        refused = str(error)
    if refused is None:
        assert is_valid(content)
    else:
        assert not is_valid(content) or content["groupname"] != "team"
        assert refused.encode()  # of letters that UTF-8 can say


@moderate
@given(st.binary())
def test_any_bytes_are_refused_with_a_sentence(body):
    with pytest.raises(RefusedError):
        parse(body)


@moderate
@given(WHOLE, st.randoms())
def test_any_permutation_scores_as_the_metrics_say(images, random):
    shuffled = dict(random.sample(list(images.items()), len(images)))
    accuracy, found = score(judge(parse(sent(shuffled)), KEY), KEY)
    labelled = {query: [name if GALLERY[name] else f"nobody/{name}" for name in names]
                for query, names in images.items()}  # fmt: skip
    padded = {query: [*names, *["nobody/none"] * (10 - len(names))] for query, names in labelled.items()}
    hits = hits_of(ranking_of(padded))
    told = {name: metric.values(hits, 10).mean() for name, metric in METRICS.items()}
    assert accuracy == pytest.approx(told["score"], abs=1e-9)
    assert found["results"] == [told["top_1"], told["top_5"], told["top_10"]]
