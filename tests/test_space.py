import numpy as np
import pytest

from retrieval import space
from retrieval.settings import RunError


def test_memory_is_that_of_the_container_and_what_does_not_fit_lies_in_a_file(tmp_path, monkeypatch, caplog):
    whole = space.memory()
    monkeypatch.setattr(space, "LIMIT", tmp_path / "memory.max")
    assert space.memory() >= whole
    (tmp_path / "memory.max").write_text("max\n")
    assert space.memory() >= whole
    (tmp_path / "memory.max").write_text("1000000\n")
    assert space.memory() == 1_000_000
    assert not isinstance(space.zeros((10, 10), np.float32, "vectors"), np.memmap)
    caplog.set_level("INFO")
    large = space.zeros((1000, 100), np.float32, "vectors")
    assert isinstance(large, np.memmap)
    assert "0.0 GB of vectors lie in" in caplog.text
    for word in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(word, raising=False)
    monkeypatch.setattr(space, "ON_DISK", str(tmp_path))
    assert space._folder() == str(tmp_path)  # not /tmp, which may lie in memory
    monkeypatch.setenv("TMP", "/elsewhere")
    assert space._folder() != str(tmp_path)
    assert not isinstance(space.zeros((100, 100), np.float32, "vectors"), np.memmap)
    assert isinstance(space.zeros((100, 100), np.float32, "vectors", 8), np.memmap)  # each has an eighth
    large[999] = 1
    assert large.sum() == 100
    with pytest.raises(RunError, match="of vectors do not fit into"):
        space.zeros((10**9, 10**6), np.float32, "vectors")
