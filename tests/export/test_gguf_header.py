"""What is read of a GGUF file is what llama.cpp's own reader finds there."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from jobs.errors import AccessError
from jobs.export.gguf_header import ADD_BOS, add_no_bos, adds_bos, read_header


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_rope_freq_base(10000.0)
    writer.add_chat_template("{{ 'grüße' }}")
    writer.add_token_list(["<s>", "ä", "b" * 300])
    writer.add_token_scores([0.0, -1.0, -2.5])
    writer.add_add_bos_token(True)
    writer.add_tensor("token_embd.weight", np.ones((3, 32), np.float32))
    writer.add_tensor("norm.weight", np.ones(32, np.float16))
    packed = gguf.quants.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.w", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_values_and_tensors_are_those_of_the_librarys_reader(written: Path) -> None:
    header, reader = read_header(written), gguf.GGUFReader(written)
    lists = {"tokenizer.ggml.tokens", "tokenizer.ggml.scores"}
    fields = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.") and name not in lists
    }
    assert header.values == fields
    assert header.values["tokenizer.chat_template"] == "{{ 'grüße' }}"
    found = [(each.name, each.shape, each.type) for each in header.tensors]
    assert found == [
        (t.name, tuple(int(n) for n in t.shape), int(t.tensor_type)) for t in reader.tensors
    ]
    assert (32, 3) in [shape for _, shape, _ in found]


def test_a_file_is_told_to_add_no_bos_and_nothing_else_changes(written: Path) -> None:
    before = written.read_bytes()
    assert adds_bos(read_header(written))
    add_no_bos(written)
    assert not adds_bos(read_header(written))
    assert gguf.GGUFReader(written).get_field(ADD_BOS).contents() is False
    changed = [a != b for a, b in zip(before, written.read_bytes(), strict=True)]
    assert sum(changed) == 1


@pytest.mark.parametrize("length", [0, 3, 10, 60, 200])
def test_half_a_file_is_refused_by_name(written: Path, length: int) -> None:
    half = written.with_name("half.gguf")
    half.write_bytes(written.read_bytes()[:length])
    with pytest.raises(AccessError, match=r"half\.gguf is no GGUF file"):
        read_header(half)
