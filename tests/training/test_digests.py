"""Digests of tensors: their bits, written out by hand, and where these stand in files."""

import hashlib
import json
import struct

import torch
from safetensors import safe_open

from palm_rlhf_pytorch.training.digests import tensors_digest
from palm_rlhf_pytorch.training.tensor_file import save_tensors

ROWS = torch.tensor([[1.0, -2.0, 0.5], [3.0, 4.0, -0.25]])
ROWS_BYTES = struct.pack("<6f", 1.0, -2.0, 0.5, 3.0, 4.0, -0.25)
COLUMNS_BYTES = struct.pack("<6f", 1.0, 3.0, -2.0, 4.0, 0.5, -0.25)


def sha256(*parts):
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_digest_is_sha256_of_names_and_bytes_one_after_the_other():
    counts = torch.tensor([7, -1], dtype=torch.int16)
    told = [("a.weight", ROWS), ("b", counts)]
    expected = sha256(b"a.weight", ROWS_BYTES, b"b", struct.pack("<2h", 7, -1))
    assert tensors_digest(told) == expected
    assert tensors_digest(iter(told)) == expected
    assert tensors_digest(told, told="config") == sha256(
        b"config", b"a.weight", ROWS_BYTES, b"b", struct.pack("<2h", 7, -1)
    )
    assert tensors_digest([]) == sha256() and tensors_digest([("", ROWS[:0])]) == sha256()


def test_digest_is_of_what_a_tensor_holds_not_of_how_it_lies_in_memory():
    parameter = torch.nn.Parameter(ROWS.t())
    assert not parameter.is_contiguous()
    assert tensors_digest([("", parameter)]) == sha256(COLUMNS_BYTES)
    assert tensors_digest([("", ROWS[:, 1])]) == sha256(struct.pack("<2f", -2.0, 4.0))
    assert tensors_digest([("", torch.tensor(0.5))]) == sha256(struct.pack("<f", 0.5))
    assert tensors_digest([("", torch.tensor([1.0, -2.0], dtype=torch.bfloat16))]) == sha256(b"\x80\x3f\x00\xc0")


def test_digest_in_a_tensor_file_keeps_its_bits(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_tensors(path, {"b": torch.tensor([True]), "a": ROWS}, kind="Rows", config={"dim": 3})
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    fields = json.dumps([metadata[name] for name in ("format_version", "kind", "config", "extra")]).encode()
    first, second = (b'["a", "torch.float32", [2, 3]]', ROWS_BYTES), (b'["b", "torch.bool", [1]]', b"\x01")
    assert metadata["sha256"] == sha256(fields, *first, *second)
