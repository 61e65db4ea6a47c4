import math
import tracemalloc
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from retrieval import records
from retrieval.errors import InputError
from retrieval.ranking import exact
from retrieval.ranking.exact import cosines_of, merge, rank
from retrieval.records import UNREADABLE, Embeddings

CHOOSE_LIBRARY = exact._choose_library


def unit(vectors):
    vectors = np.asarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)


def embeddings(vectors, prefix):
    return Embeddings([f"{prefix}{row}" for row in range(len(vectors))], unit(vectors))


@pytest.fixture(params=["numpy", "torch", "as on a GPU"], autouse=True)
def _library(request, monkeypatch):
    """Each test runs by numpy, as before torch is imported, by torch, and by what a GPU does."""
    if request.param == "numpy":
        monkeypatch.setattr(exact, "sys", SimpleNamespace(modules={}))
    if request.param == "as on a GPU":
        gpu = exact._library_of_gpu("cpu")
        monkeypatch.setattr(exact, "_choose_library", lambda *_: nullcontext(gpu._replace(tile=exact.TILE)))


def naive(queries, gallery, keep):
    """The definition: every cosine in float64, a stable sort, the first ones."""
    result = {}
    for name, query in zip(queries.names, queries.vectors.astype(np.float64), strict=True):
        cosines = (query * gallery.vectors.astype(np.float64)).sum(axis=1)
        best = sorted(range(len(cosines)), key=lambda row: -cosines[row])[:keep]
        result[name] = [gallery.names[row] for row in best]
    return result


def by_sorting(queries, gallery, keep):
    """The definition, with the gallery's zeros last and the gallery's order for a query of zeros."""
    readable = gallery.vectors.any(axis=1)
    result = {}
    for name, query in zip(queries.names, queries.vectors.astype(np.float64), strict=True):
        every = np.arange(len(gallery.names))
        cosines = cosines_of(query[None], np.zeros_like(every), gallery.vectors, every)
        best = np.lexsort((-cosines, ~readable))[:keep]
        result[name] = [gallery.names[row] for row in best]
    return result


def test_by_hand():
    queries = embeddings([[1, 0], [0, 1]], "q")
    gallery = embeddings([[0, 5], [1, 1], [3, 0], [-1, 0]], "g")
    ranking = rank(queries, gallery, 3)
    assert ranking.names() == {"q0": ["g2", "g1", "g0"], "q1": ["g0", "g1", "g2"]}
    assert ranking.rows.tolist() == [[2, 1, 0], [0, 1, 2]]
    assert ranking.cosines == pytest.approx(np.array([[1, 0.5**0.5, 0], [1, 0.5**0.5, 0]]))
    assert (ranking.rows.dtype, ranking.cosines.dtype) == (np.int64, np.float64)


def test_the_same_as_the_definition_whatever_the_chunks(monkeypatch):
    random = np.random.default_rng(0)
    queries, gallery = (embeddings(random.normal(size=(n, 64)), p) for n, p in ((40, "q"), (300, "g")))
    expected = naive(queries, gallery, 10)
    for images, tile in ((2, 6), (7, 70), (64, 640), (300, 2**23)):
        monkeypatch.setattr(exact, "IMAGES", images)
        monkeypatch.setattr(exact, "TILE", tile)
        monkeypatch.setattr(records, "CHUNK_BYTES", 4 * 64 * images)
        assert rank(queries, gallery, 10).names() == expected


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
    with pytest.MonkeyPatch.context() as patch:
        for module, name, most in (
            (exact, "IMAGES", 64),
            (exact, "TILE", 900),
            (exact, "PIECE", 99),
            (records, "CHUNK_BYTES", 9999),
        ):
            patch.setattr(module, name, data.draw(st.sampled_from([1, 7, most, 2**20]), label=name))
        assert rank(*sides, keep).names() == by_sorting(*sides, keep)


@pytest.mark.parametrize("dimension", [3, 64, 1280])
def test_ties_keep_the_gallerys_order(dimension):
    random = np.random.default_rng(1)
    kinds = random.normal(size=(3, dimension))
    gallery = embeddings(kinds[random.integers(0, 3, size=777)], "g")  # only three different vectors
    queries = embeddings(random.normal(size=(5, dimension)), "q")
    ranking = rank(queries, gallery, 777)
    for rows in ranking.rows:
        kind = [gallery.vectors[row].tobytes() for row in rows]
        starts = [i for i in range(1, 777) if kind[i] != kind[i - 1]]
        assert len(starts) == 2
        for group in np.split(rows, starts):
            assert (np.diff(group) > 0).all()
    assert np.array_equal(rank(queries, gallery, 10).rows, ranking.rows[:, :10])


def test_what_float32_cannot_tell_apart_is_ordered_by_float64():
    # 400 gallery vectors whose cosines with the query differ by about 1e-9, shuffled.
    random = np.random.default_rng(2)
    base = unit(random.normal(size=(1, 512)))
    vectors = np.repeat(base, 400, axis=0)
    vectors += (random.normal(size=vectors.shape) * 1e-6).astype(np.float32)
    queries, gallery = Embeddings(["q"], base), Embeddings([f"g{row}" for row in range(400)], vectors)
    cosines = (vectors.astype(np.float64) * base).sum(axis=1)
    assert rank(queries, gallery, 10).rows[0].tolist() == np.argsort(-cosines, kind="stable")[:10].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_the_candidates_are_enough_where_everything_is_close(seed):
    """2000 vectors around the query: float32 alone picks the wrong ten."""
    random = np.random.default_rng(seed)
    base = unit(random.normal(size=(1, 1280)))
    vectors = unit(base + random.normal(size=(2000, 1280)).astype(np.float32) * 1e-6)
    cosines = (vectors.astype(np.float64) * base).sum(axis=1)
    gallery = Embeddings([f"g{row}" for row in range(2000)], vectors)
    ranking = rank(Embeddings(["q"], base), gallery, 10)
    assert ranking.rows[0].tolist() == np.argsort(-cosines, kind="stable")[:10].tolist()


@pytest.mark.parametrize("side", [1, -1])
def test_vectors_of_a_collapsed_network_take_few_exact_cosines(side, monkeypatch):
    """Cosines of ±1 that differ by 1e-8, less than float32 can promise; a few images cannot be read."""
    random = np.random.default_rng(4)
    base = random.normal(size=512)
    queries = unit(base + 1e-4 * random.normal(size=(40, 512)))
    vectors = unit(side * base + 1e-4 * random.normal(size=(600, 512)))
    vectors[[3, 77, 500]] = 0
    queries, gallery = (Embeddings([str(row) for row in range(len(x))], x) for x in (queries, vectors))
    pairs, update = [], exact._update
    monkeypatch.setattr(exact, "_update", lambda *args: (pairs.append(len(args[3])), update(*args)))
    assert rank(queries, gallery, 10).names() == by_sorting(queries, gallery, 10)
    assert 400 <= sum(pairs) < 500  # ten of each query; float32 alone leaves all 24 000


def test_many_unreadable_gallery_images_push_no_readable_one_out():
    gallery = embeddings([[0, 0]] * 15 + [[-1, 0], [-1, 1]], "g")
    assert rank(embeddings([[1, 0]], "q"), gallery, 2).names() == {"q0": ["g16", "g15"]}


def test_unreadable_gallery_images_come_last_and_an_unreadable_query_gets_the_gallerys_order(caplog):
    queries = embeddings([[1, 0], [0, 0]], "q")
    gallery = embeddings([[0, 0], [-1, 0], [1, 0], [0, 0], [-1, 1]], "g")
    ranking = rank(queries, gallery, 5)
    assert ranking.names() == {
        "q0": ["g2", "g4", "g1", "g0", "g3"],
        "q1": ["g1", "g2", "g4", "g0", "g3"],
    }
    assert ranking.cosines == pytest.approx(
        np.array([[1, -(0.5**0.5), -1, UNREADABLE, UNREADABLE], [0, 0, 0, UNREADABLE, UNREADABLE]])
    )
    for k in (1, 3, 4):
        assert np.array_equal(rank(queries, gallery, k).rows, ranking.rows[:, :k])
    assert (queries.unreadable, gallery.unreadable) == (["q1"], ["g0", "g3"])
    assert "1 queries without an embedding" in caplog.text


def test_a_small_gallery_is_ranked_whole():
    assert rank(embeddings([[1, 0]], "q"), embeddings([[1, 0]], "g"), 10).names() == {"q0": ["g0"]}


def test_a_query_tied_with_a_whole_gallery_takes_little_memory():
    gallery = Embeddings([str(row) for row in range(40_000)], np.ones((40_000, 64), dtype=np.float32) / 8)
    queries = Embeddings(["q"], gallery.vectors[:1])
    peak, ranking = peak_of(queries, gallery, 10)
    assert ranking.rows[0].tolist() == list(range(10))
    assert peak < 10 * 2**20  # in one piece, float64 products would take 20 MB


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that torch makes: tracemalloc sees numpy's memory only."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        for tensor in made if isinstance(made, tuple) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return made


def peak_of(queries, gallery, keep):
    """The most bytes of rank() beyond its result at a time, or of torch's largest tensor; and the result."""
    with LargestTensor():  # imports what it needs
        torch.zeros(1)
    tracemalloc.start()
    with LargestTensor() as largest:
        result = rank(queries, gallery, keep)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return max(peak - result.rows.nbytes - result.cosines.nbytes, largest.bytes), result


@pytest.fixture
def small(monkeypatch):
    """A fiftieth of what rank() holds at a time."""
    monkeypatch.setattr(exact, "IMAGES", 512)
    monkeypatch.setattr(exact, "TILE", 2**21 // 50)
    monkeypatch.setattr(records, "CHUNK_BYTES", 2**26 // 50)
    monkeypatch.setattr(exact, "PIECE", 2**15 // 50)


@pytest.mark.usefixtures("small")
def test_memory_grows_neither_with_the_queries_nor_with_the_gallery(tmp_path):
    """The stated bound a fiftieth in size; the gallery is a file that is mapped."""
    random = np.random.default_rng(3)
    peaks = []
    for count, asked in ((2_000, 500), (20_000, 1_000)):
        unit(random.normal(size=(count, 16))).tofile(tmp_path / "vectors")
        vectors = np.memmap(tmp_path / "vectors", np.float32, "r", shape=(count, 16))
        gallery = Embeddings(list(map(str, range(count))), vectors)
        queries = embeddings(random.normal(size=(asked, 16)), "q")
        peak, result = peak_of(queries, gallery, 10)
        peaks.append(peak)
        few = Embeddings(queries.names[:5], queries.vectors[:5])
        assert by_sorting(few, gallery, 10).items() <= result.names().items()
        assert gallery.unreadable == []
    assert max(peaks) < 2**28 / 50  # the similarities would take 80 MB
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("kinds", "asked"), [(1, 40), (20, 300)])
def test_many_copies_are_ranked_within_the_bound(kinds, asked):
    random = np.random.default_rng(4)
    vectors = unit(random.normal(size=(kinds, 16)))
    gallery = embeddings(vectors[random.integers(kinds, size=20_000)], "g")
    queries = embeddings(vectors[random.integers(kinds, size=asked)], "q")
    peak, result = peak_of(queries, gallery, 10)
    assert peak < 2**28 / 50
    few = Embeddings(queries.names[:20], queries.vectors[:20])
    assert by_sorting(few, gallery, 10).items() <= result.names().items()


def test_nothing_to_rank():
    ranking = rank(embeddings([[1, 0]], "q"), Embeddings([], np.empty((0, 2), np.float32)), 10)
    assert (ranking.names(), ranking.rows.shape) == ({"q0": []}, (1, 0))


# ---- the two libraries, and what they are given


@pytest.mark.parametrize("dimension", [1, 2, 7, 130, 1280])
def test_the_cosines_are_those_of_exact_sums(dimension):
    random = np.random.default_rng(5)
    queries, gallery = (embeddings(random.normal(size=(n, dimension)), p) for n, p in ((4, "q"), (30, "g")))
    ranking = rank(queries, gallery, 10)
    for query, rows, cosines in zip(queries.vectors.tolist(), ranking.rows, ranking.cosines, strict=True):
        for row, cosine in zip(gallery.vectors[rows].tolist(), cosines, strict=True):
            assert cosine == pytest.approx(
                math.fsum(a * b for a, b in zip(query, row, strict=True)), abs=1e-15
            )


def test_numpy_and_torch_agree_bit_for_bit(monkeypatch):
    monkeypatch.setattr(exact, "_choose_library", CHOOSE_LIBRARY)
    random = np.random.default_rng(6)
    kinds = random.normal(size=(50, 67))
    queries = embeddings(kinds[random.integers(50, size=40)], "q")
    gallery = embeddings(kinds[random.integers(50, size=900)] + 1e-7 * random.normal(size=(900, 67)), "g")
    both = []
    for modules in ({}, {"torch": torch}):
        monkeypatch.setattr(exact, "sys", SimpleNamespace(modules=modules))
        both.append(rank(queries, gallery, 10))
    assert np.array_equal(both[0].rows, both[1].rows)
    assert both[0].cosines.tobytes() == both[1].cosines.tobytes()


def test_a_large_problem_and_a_device_are_for_torch(monkeypatch):
    monkeypatch.setattr(exact, "_choose_library", CHOOSE_LIBRARY)
    used = []
    monkeypatch.setattr(
        torch, "from_numpy", lambda array, put=torch.from_numpy: used.append(array) or put(array)
    )
    monkeypatch.setattr(exact, "sys", SimpleNamespace(modules={}))
    sides = embeddings([[1, 0]], "q"), embeddings([[1, 0], [0, 1]], "g")
    rank(*sides)
    assert not used
    rank(*sides, device="mps")  # counts as the CPU
    assert used
    used.clear()
    monkeypatch.setattr(exact, "SMALL", 3)  # of four multiply-adds
    rank(*sides)
    assert used


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_finds_the_same(monkeypatch):
    monkeypatch.setattr(exact, "_choose_library", CHOOSE_LIBRARY)
    random = np.random.default_rng(9)
    kinds = random.normal(size=(300, 131))
    queries = embeddings(np.vstack([kinds[:50], np.zeros((1, 131))]), "q")
    gallery = embeddings(np.vstack([kinds[random.integers(300, size=20_000)], np.zeros((5, 131))]), "g")
    here, there = rank(queries, gallery, 200), rank(queries, gallery, 200, device="cuda")
    assert np.array_equal(here.rows, there.rows)
    assert here.cosines.tobytes() == there.cosines.tobytes()


def test_torch_multiplies_float32_as_float32_meanwhile(monkeypatch):
    monkeypatch.setattr(exact, "_choose_library", CHOOSE_LIBRARY)
    monkeypatch.setattr(exact, "sys", SimpleNamespace(modules={"torch": torch}))
    during = []

    def search(*given, search=exact._search):
        during.append(torch.get_float32_matmul_precision())
        return search(*given)

    monkeypatch.setattr(exact, "_search", search)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    try:
        rank(embeddings([[1, 0]], "q"), embeddings([[1, 0]], "g"))
        assert (during, torch.get_float32_matmul_precision()) == (["highest"], "high")
    finally:
        torch.set_float32_matmul_precision(before)


def test_vectors_of_any_length_are_ranked_by_the_cosine():
    gallery = Embeddings(["long", "near"], np.array([[50, 50], [0.9, 0.1]]))  # float64
    ranking = rank(Embeddings(["q"], np.array([[3, 0]], np.float32)), gallery)
    assert ranking.names() == {"q": ["near", "long"]}
    assert ranking.cosines == pytest.approx(np.array([[0.9 / 0.82**0.5, 0.5**0.5]]), abs=1e-6)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e30, 1e-30])
def test_vectors_that_are_no_numbers_are_refused(wrong):
    vectors = np.array([[1, 0], [0, 0], [wrong, 0]], np.float32)
    good = embeddings([[1, 0]], "q")
    with pytest.raises(
        InputError, match="the vector of x2 holds NaN or infinity, or is too long or too short"
    ):
        rank(good, Embeddings(["x0", "x1", "x2"], vectors))
    with pytest.raises(InputError, match="the vector of x2 holds NaN"):
        rank(Embeddings(["x0", "x1", "x2"], vectors), good)


def test_queries_and_gallery_of_different_networks_are_refused():
    with pytest.raises(
        InputError, match="the queries have 2 dimensions and the gallery images have 3: embed"
    ):
        rank(embeddings([[1, 0]], "q"), embeddings([[1, 0, 0]], "g"))


# ---- merge


def test_the_best_of_several_candidates_by_hand():
    cosines = np.array([[0.1, 0.9, 0.5, 0.9, -2.0], [0.0, 0.0, -2.0, 0.0, 0.0]])
    rows = np.array([[4, 8, 0, 2, 1], [5, 3, 0, 1, 2]])
    best, best_rows = merge(cosines, rows, 3)
    assert best_rows.tolist() == [[2, 8, 0], [1, 2, 3]]
    assert best.tolist() == [[0.9, 0.9, 0.5], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_shards_of_a_gallery_merge_into_the_ranking_of_the_whole(parts):
    random = np.random.default_rng(7)
    vectors = random.normal(size=(9, 33))[random.integers(9, size=60)]
    vectors[[3, 30, 31]] = 0
    gallery = embeddings(vectors, "g")
    queries = embeddings(np.vstack([random.normal(size=(6, 33)), np.zeros((1, 33)), vectors[:3]]), "q")
    whole, found = rank(queries, gallery, 12), []
    for rows in np.array_split(np.arange(60), parts):
        part = rank(queries, Embeddings([gallery.names[row] for row in rows], gallery.vectors[rows]), 12)
        found.append((part.cosines, part.rows + rows[0]))
    cosines, rows = merge(*(np.concatenate(side, axis=1) for side in zip(*found, strict=True)), 12)
    assert np.array_equal(rows, whole.rows)
    assert cosines.tobytes() == whole.cosines.tobytes()
