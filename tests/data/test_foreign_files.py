"""Files that carry a name we know and are of another tool: one line that names them."""

from __future__ import annotations

import json

import pytest

from guided_diffusion.data.listing import list_records


@pytest.mark.parametrize(
    "index",
    [
        {"format": 1},
        {"format": 1, "count": 3, "shape": [8, 8, 3], "shards": ["a.npy"], "labels": None},
        {"format": 1, "count": 3, "shape": 8, "shards": []},
        {"format": "npz", "files": []},
        {"name": "of another tool"},
        [1, 2],
    ],
)
def test_an_index_of_another_tool_is_named(tmp_path, index):
    (tmp_path / "packed.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"packed.json: not the index|packed data of format 'npz'") as raised:
        list_records(str(tmp_path))
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"MDB of something else", bytes(8192)])
def test_an_lmdb_that_is_something_else_is_named(tmp_path, content):
    pytest.importorskip("lmdb")
    (tmp_path / "data.mdb").write_bytes(content)
    with pytest.raises(ValueError, match=r"data.mdb: not a readable lmdb|no images found"):
        list_records(str(tmp_path))
