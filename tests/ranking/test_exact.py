import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval import records
from retrieval.ranking import exact
from retrieval.ranking.exact import rank
from retrieval.records import Embeddings


def unit(vectors):
    vectors = np.asarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)


def embeddings(vectors, prefix):
    return Embeddings([f"{prefix}{row}" for row in range(len(vectors))], unit(vectors))


def naive(queries, gallery, keep):
    """The definition: every cosine in float64, a stable sort, the first ones."""
    result = {}
    for name, query in zip(queries.names, queries.vectors.astype(np.float64), strict=True):
        cosines = [sum(query * vector) for vector in gallery.vectors.astype(np.float64)]
        best = sorted(range(len(cosines)), key=lambda row: -cosines[row])[:keep]
        result[name] = [gallery.names[row] for row in best]
    return result


def by_sorting(queries, gallery, keep):
    """The definition, with the gallery's zeros last and the gallery's order for a query of zeros."""
    readable = gallery.vectors.any(axis=1)
    result = {}
    for name, query in zip(queries.names, queries.vectors.astype(np.float64), strict=True):
        cosines = (gallery.vectors * query).sum(axis=1)
        best = np.lexsort((-cosines, ~readable))[:keep]
        result[name] = [gallery.names[row] for row in best]
    return result


def test_by_hand():
    queries = embeddings([[1, 0], [0, 1]], "q")
    gallery = embeddings([[0, 5], [1, 1], [3, 0], [-1, 0]], "g")
    assert rank(queries, gallery, 3) == {"q0": ["g2", "g1", "g0"], "q1": ["g0", "g1", "g2"]}


def test_the_same_as_the_definition_whatever_the_chunks(monkeypatch):
    random = np.random.default_rng(0)
    queries, gallery = (embeddings(random.normal(size=(n, 64)), p) for n, p in ((40, "q"), (300, "g")))
    expected = naive(queries, gallery, 10)
    for images, tile, best_bytes in ((1, 1, 1), (7, 70, 16 * 10 * 9), (64, 640, 2**26), (300, 2**23, 2**26)):
        monkeypatch.setattr(exact, "IMAGES", images)
        monkeypatch.setattr(exact, "TILE", tile)
        monkeypatch.setattr(exact, "BEST_BYTES", best_bytes)
        assert rank(queries, gallery, 10) == expected


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_the_same_as_the_definition_for_awkward_vectors_and_sizes(data):
    """Copies, zeros of both signs, near ties, more kept than there is, chunks and tiles of any size."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32), label="seed"))
    dimension = data.draw(st.sampled_from([1, 2, 3, 17, 130]))
    kinds = unit(random.normal(size=(data.draw(st.integers(1, 40)), dimension)))
    kinds[random.random(len(kinds)) < data.draw(st.sampled_from([0, 0.3]))] *= -0.0
    noise = data.draw(st.sampled_from([0, 1e-8, 1e-6, 1e-3]))
    sides = []
    for most, prefix in ((12, "q"), (120, "g")):
        vectors = kinds[random.integers(len(kinds), size=data.draw(st.integers(1, most)))]
        readable = vectors.any(axis=1, keepdims=True)
        sides.append(embeddings(vectors + noise * random.normal(size=vectors.shape) * readable, prefix))
    keep = data.draw(st.integers(1, 130))
    sizes = {"IMAGES": 64, "TILE": 900, "CHUNK_BYTES": 9999, "BEST_BYTES": 999, "PAIRS": 64, "PIECE": 99}
    with pytest.MonkeyPatch.context() as patch:
        for name, most in (sizes | {"COMBS": 300}).items():
            patch.setattr(
                records if name == "CHUNK_BYTES" else exact,
                name,
                data.draw(st.sampled_from([1, 7, most, 2**20]), label=name),
            )
        assert rank(*sides, keep) == by_sorting(*sides, keep)


@pytest.mark.parametrize("dimension", [3, 64, 1280])
def test_ties_keep_the_gallerys_order(dimension):
    random = np.random.default_rng(1)
    kinds = random.normal(size=(3, dimension))
    gallery = embeddings(kinds[random.integers(0, 3, size=777)], "g")  # only three different vectors
    queries = embeddings(random.normal(size=(5, dimension)), "q")
    for names in rank(queries, gallery, 777).values():
        rows = [int(name[1:]) for name in names]
        kind = [gallery.vectors[row].tobytes() for row in rows]
        starts = [i for i in range(1, 777) if kind[i] != kind[i - 1]]
        assert len(starts) == 2
        for group in np.split(rows, starts):
            assert (np.diff(group) > 0).all()
    assert rank(queries, gallery, 10) == {q: names[:10] for q, names in rank(queries, gallery, 777).items()}


def test_what_float32_cannot_tell_apart_is_ordered_by_float64():
    # 400 gallery vectors whose cosines with the query differ by about 1e-9, shuffled.
    random = np.random.default_rng(2)
    base = unit(random.normal(size=(1, 512)))
    vectors = np.repeat(base, 400, axis=0)
    vectors += (random.normal(size=vectors.shape) * 1e-6).astype(np.float32)
    queries, gallery = Embeddings(["q"], base), Embeddings([f"g{row}" for row in range(400)], vectors)
    cosines = (vectors.astype(np.float64) * base).sum(axis=1)
    assert rank(queries, gallery, 10)["q"] == [f"g{row}" for row in np.argsort(-cosines, kind="stable")[:10]]


@pytest.mark.parametrize("seed", range(3))
def test_the_candidates_are_enough_where_everything_is_close(seed):
    """2000 vectors around the query: float32 alone picks the wrong ten."""
    random = np.random.default_rng(seed)
    base = unit(random.normal(size=(1, 1280)))
    vectors = unit(base + random.normal(size=(2000, 1280)).astype(np.float32) * 1e-6)
    cosines = (vectors.astype(np.float64) * base).sum(axis=1)
    gallery = Embeddings([f"g{row}" for row in range(2000)], vectors)
    expected = [f"g{row}" for row in np.argsort(-cosines, kind="stable")[:10]]
    assert rank(Embeddings(["q"], base), gallery, 10)["q"] == expected


def test_many_unreadable_gallery_images_push_no_readable_one_out():
    gallery = embeddings([[0, 0]] * 15 + [[-1, 0], [-1, 1]], "g")
    assert rank(embeddings([[1, 0]], "q"), gallery, 2) == {"q0": ["g16", "g15"]}


def test_unreadable_gallery_images_come_last_and_an_unreadable_query_gets_the_gallerys_order(caplog):
    queries = embeddings([[1, 0], [0, 0]], "q")
    gallery = embeddings([[0, 0], [-1, 0], [1, 0], [0, 0], [-1, 1]], "g")
    assert rank(queries, gallery, 5) == {
        "q0": ["g2", "g4", "g1", "g0", "g3"],
        "q1": ["g1", "g2", "g4", "g0", "g3"],
    }
    assert (queries.unreadable, gallery.unreadable) == (["q1"], ["g0", "g3"])
    assert "1 queries without an embedding" in caplog.text


def test_a_small_gallery_is_ranked_whole():
    assert rank(embeddings([[1, 0]], "q"), embeddings([[1, 0]], "g"), 10) == {"q0": ["g0"]}


def test_a_query_tied_with_a_whole_gallery_takes_little_memory():
    gallery = Embeddings([str(row) for row in range(40_000)], np.ones((40_000, 64), dtype=np.float32) / 8)
    queries = Embeddings(["q"], gallery.vectors[:1])
    tracemalloc.start()
    assert rank(queries, gallery, 10)["q"] == [str(row) for row in range(10)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20  # in one piece, float64 products would take 20 MB


def peak_of(queries, gallery, keep):
    """The most bytes that rank() held at a time beyond its result; and the result."""
    tracemalloc.start()
    result = rank(queries, gallery, keep)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - sum(names.__sizeof__() for names in result.values()) - result.__sizeof__(), result


SMALL = {"TILE": 2**16, "CHUNK_BYTES": 2**17, "BEST_BYTES": 2**17, "PAIRS": 2**12, "PIECE": 2**12}


def test_memory_grows_neither_with_the_queries_nor_with_the_gallery(monkeypatch, tmp_path):
    """The stated bound a two-hundredth in size; the gallery is a file that is mapped."""
    for name, size in (SMALL | {"IMAGES": 128}).items():
        monkeypatch.setattr(records if name == "CHUNK_BYTES" else exact, name, size)
    random = np.random.default_rng(3)
    peaks = []
    for count, asked in ((2_000, 1_000), (20_000, 3_000)):
        unit(random.normal(size=(count, 16))).tofile(tmp_path / "vectors")
        vectors = np.memmap(tmp_path / "vectors", np.float32, "r", shape=(count, 16))
        gallery = Embeddings(list(map(str, range(count))), vectors)
        queries = embeddings(random.normal(size=(asked, 16)), "q")
        peak, result = peak_of(queries, gallery, 10)
        peaks.append(peak)
        few = Embeddings(queries.names[:5], queries.vectors[:5])
        assert {name: result[name] for name in few.names} == by_sorting(few, gallery, 10)
        assert gallery.unreadable == []
    assert max(peaks) < 1.5 * 2**20  # the similarities would take 240 MB
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize("kinds", [1, 20])
def test_many_copies_are_ranked_within_the_bound(monkeypatch, kinds):
    for name, size in (SMALL | {"IMAGES": 512}).items():
        monkeypatch.setattr(records if name == "CHUNK_BYTES" else exact, name, size)
    random = np.random.default_rng(4)
    vectors = unit(random.normal(size=(kinds, 16)))
    gallery = embeddings(vectors[random.integers(kinds, size=20_000)], "g")
    queries = embeddings(vectors[random.integers(kinds, size=300)], "q")
    peak, result = peak_of(queries, gallery, 10)
    assert peak < 2**20
    few = Embeddings(queries.names[:20], queries.vectors[:20])
    assert {name: result[name] for name in few.names} == by_sorting(few, gallery, 10)


def test_nothing_to_rank():
    assert rank(embeddings([[1, 0]], "q"), Embeddings([], np.empty((0, 2), np.float32)), 10) == {"q0": []}
