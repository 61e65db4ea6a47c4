import numpy as np
import pytest

from retrieval import machine
from retrieval.errors import RunError


def test_memory_is_that_of_the_container_and_what_does_not_fit_lies_in_a_file(tmp_path, monkeypatch, caplog):
    whole = machine.memory()
    monkeypatch.setattr(machine, "MEMORY_LIMIT", tmp_path / "memory.max")
    assert machine.memory() >= whole
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory() >= whole
    (tmp_path / "memory.max").write_text("1000000\n")
    assert machine.memory() == 1_000_000
    assert not isinstance(machine.zeros((10, 10), np.float32, "vectors"), np.memmap)
    caplog.set_level("INFO")
    large = machine.zeros((1000, 100), np.float32, "vectors")
    assert isinstance(large, np.memmap)
    assert "0.0 GB of vectors are stored in" in caplog.text
    for word in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(word, raising=False)
    monkeypatch.setattr(machine, "ON_DISK", str(tmp_path))
    assert machine._folder_on_disk() == str(tmp_path)  # not /tmp, which may lie in memory
    monkeypatch.setenv("TMP", "/elsewhere")
    assert machine._folder_on_disk() != str(tmp_path)
    assert not isinstance(machine.zeros((100, 100), np.float32, "vectors"), np.memmap)
    assert isinstance(machine.zeros((100, 100), np.float32, "vectors", 8), np.memmap)  # each has an eighth
    large[999] = 1
    assert large.sum() == 100
    with pytest.raises(RunError, match="of vectors do not fit into"):
        machine.zeros((10**9, 10**6), np.float32, "vectors")
