"""Equal content, equal hash; anything else, another."""

import pytest
import torch
import xxhash

from headstart.system.hashing import PIECE_BYTES, hash_files, hash_json, hash_tensors


def test_the_order_of_keys_does_not_matter():
    value = {"b": {"d": 1, "c": [1, 2]}, "a": None}
    assert hash_json(value) == hash_json({"a": None, "b": {"c": [1, 2], "d": 1}})
    assert hash_json(value) == xxhash.xxh3_128_hexdigest(b'{"a":null,"b":{"c":[1,2],"d":1}}')
    assert hash_json(value) != hash_json({"a": None, "b": {"c": [2, 1], "d": 1}})


def test_what_json_cannot_write_has_no_hash():
    with pytest.raises(ValueError):
        hash_json({"loss": float("nan")})


@pytest.fixture
def files(tmp_path):
    """Two files, the first larger than a piece."""
    contents = {"large": b"a" * PIECE_BYTES + b"b", "small": b"c"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return [tmp_path / name for name in contents]


def test_files_hash_by_name_content_and_order(files):
    before = hash_files(files)
    assert len(before) == 32 and hash_files(files) == before
    assert hash_files(files[::-1]) != before != hash_files(files[:1])
    large, small = files
    large.write_bytes(large.read_bytes()[:-1] + b"c")
    assert hash_files(files) != before
    large.write_bytes(large.read_bytes()[:-1] + b"b")
    assert hash_files(files) == before
    assert hash_files([large, small.rename(small.with_name("other"))]) != before


def test_where_files_lie_does_not_matter(files, tmp_path):
    before = hash_files(files)
    (tmp_path / "elsewhere").mkdir()
    moved = [file.rename(tmp_path / "elsewhere" / file.name) for file in files]
    assert hash_files(moved) == before


def test_one_changed_number_in_a_tensor_changes_the_hash():
    tensor = torch.arange(12.0).view(3, 4)
    before = hash_tensors([("a", tensor)])
    assert hash_tensors([("a", tensor.T.contiguous().T)]) == before  # strides are not content
    assert hash_tensors([("b", tensor)]) != before != hash_tensors([("a", tensor.view(4, 3))])
    tensor[2, 1] += 1e-5
    assert hash_tensors([("a", tensor)]) != before
