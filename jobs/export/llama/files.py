"""Work on GGUF files and tokenizers with llama.cpp's Python code alone. In the worker only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf


def split(source: str, target: str, max_bytes: int) -> dict[str, Any]:
    """Write a GGUF file as several, none larger than `max_bytes` but for its header.

    They are named as libllama finds them: `target` with -00001-of-00003 before its suffix.
    """
    reader = gguf.GGUFReader(source)
    arch = reader.get_field(gguf.Keys.General.ARCHITECTURE).contents()
    writer = gguf.GGUFWriter(target, arch, split_max_size=max_bytes)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == gguf.Keys.General.ARCHITECTURE:
            continue  # the writer has its own
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:  # mapped, not read: they go from file to file
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    names = writer.format_shard_names(Path(target))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"files": [path.name for path in names]}


def pre_tokenizer(folder: str) -> dict[str, Any]:
    """What the converter's table says of the tokenizer in a folder; None where it does not know it."""
    from conversion.base import TextModel  # type: ignore[import-not-found]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    try:
        return {"pre": TextModel.get_vocab_base_pre(None, tokenizer)}
    except NotImplementedError:
        return {"pre": None}
