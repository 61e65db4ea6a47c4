import os
import re

import numpy as np
import pytest
from conftest import ROOT

from retrieval.embedding.embeddings_file import read_embeddings, write_embeddings
from retrieval.errors import InputError
from retrieval.records import Embeddings

QUERIES = Embeddings(["a/ä.jpg", "b/\udc80.jpg"], np.array([[1, 0], [0, 0]], np.float32))
GALLERY = Embeddings(["c.jpg"], np.array([[0, 1]], np.float32))


def test_what_is_written_is_read_also_without_pickle(tmp_path):
    write_embeddings(tmp_path / "embeddings.npz", QUERIES, GALLERY)
    for found, given in zip(read_embeddings(tmp_path), (QUERIES, GALLERY), strict=True):
        assert found.names == given.names
        assert found.vectors.dtype == np.float32
        assert (found.vectors == given.vectors).all()
    with np.load(tmp_path / "embeddings.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == ["gallery", "gallery_names", "queries", "query_names"]
    assert os.listdir(tmp_path) == ["embeddings.npz"]


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results" / "lite0").mkdir(parents=True)
    write_embeddings(tmp_path / "results" / "lite0" / "embeddings.npz", QUERIES, GALLERY)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "fusion.md").read_text(), re.S)
    names = {}
    exec(example, names)
    assert names["cosines"].tolist() == [[0], [0]]


def test_it_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_embeddings(tmp_path / "embeddings.npz", QUERIES, GALLERY)
    before = (tmp_path / "embeddings.npz").read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space"):
        write_embeddings(tmp_path / "embeddings.npz", GALLERY, QUERIES)
    assert (tmp_path / "embeddings.npz").read_bytes() == before
    assert os.listdir(tmp_path) == ["embeddings.npz"]


def test_a_folder_without_it_and_another_file_are_errors(tmp_path):
    with pytest.raises(InputError, match=r"holds no embeddings\.npz: run its command again with --save"):
        read_embeddings(tmp_path)
    (tmp_path / "embeddings.npz").write_bytes(b"something else")
    with pytest.raises(InputError, match="is not a file of --save_embeddings"):
        read_embeddings(tmp_path)
    np.savez(tmp_path / "embeddings.npz", vectors=np.ones(3))
    with pytest.raises(InputError, match="is not a file of --save_embeddings"):
        read_embeddings(tmp_path)
