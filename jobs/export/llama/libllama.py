"""A model in libllama, through its Python bindings: tokens, logits, answers. In the worker only."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np

# Positions that go through the model at once. Their logits lie in memory together: 150 MB where the
# vocabulary has 150,000 tokens.
BATCH = 256
WARN, ERROR = 3, 4  # enum ggml_log_level

# Bytes of weights below which one thread does it all: several would wait for one another, each keeping
# a core busy, for longer than they reckon. Where other work had the cores, a model of 4 MB made 4
# tokens a second with two threads, and 3,500 with one.
SMALL = 64 * 2**20


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes, _: Any) -> None:
    if level in (WARN, ERROR):
        print(text.decode("utf-8", "replace"), end="", flush=True)


class Vocabulary:
    """What a GGUF file says of tokens. `alone`: its weights stay where they are."""

    def __init__(self, path: str, alone: bool = True) -> None:
        lib.llama_log_set(_log, ctypes.c_void_p(0))
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.vocab_only = alone
        self.handle = lib.llama_model_load_from_file(path.encode(), params)
        if not self.handle:
            raise RuntimeError(f"libllama cannot load {path}")
        self.vocab = lib.llama_model_get_vocab(self.handle)
        self.vocab_size = int(lib.llama_vocab_n_tokens(self.vocab))

    def tokenize(self, text: str) -> list[int]:
        """With special tokens as such, and none that the file would add."""
        data = text.encode()
        room = len(data) + 8
        tokens = (lib.llama_token * room)()
        count = lib.llama_tokenize(self.vocab, data, len(data), tokens, room, False, True)
        if count < 0:
            raise RuntimeError(f"libllama cannot tokenize {text[:80]!r}")
        return list(tokens[:count])


class Model(Vocabulary):
    """A GGUF file with a context for one sequence at a time; `callback` sees the computation."""

    def __init__(self, path: str, context: int, threads: int, callback: Any = None) -> None:
        super().__init__(path, alone=False)
        if lib.llama_model_size(self.handle) < SMALL:
            threads = 1
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, BATCH, BATCH
        params.n_threads = params.n_threads_batch = threads
        if callback is not None:
            params.cb_eval = callback
        self.context = lib.llama_init_from_model(self.handle, params)
        if not self.context:
            raise RuntimeError(f"libllama cannot make a context of {context} tokens for {path}")
        self.batch = lib.llama_batch_init(BATCH, 0, 1)
        self.decode_seconds = 0.0
        self._decode([0], 0, set())  # reads the weights from the disk: no part of any speed
        self.decode_seconds = 0.0

    def text_of(self, tokens: list[int]) -> str:
        pieces = b""
        for token in tokens:
            piece = ctypes.create_string_buffer(256)
            size = lib.llama_token_to_piece(self.vocab, token, piece, len(piece), 0, True)
            if size < 0:
                piece = ctypes.create_string_buffer(-size)
                size = lib.llama_token_to_piece(self.vocab, token, piece, len(piece), 0, True)
            pieces += piece.raw[:size]
        return pieces.decode("utf-8", "replace")

    def logits(self, tokens: list[int], wanted: list[int]) -> Iterator[tuple[list[int], Any]]:
        """The logits after each of the wanted positions, as many rows at a time as one batch has."""
        self.forget()
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            here = [position for position in wanted if start <= position < start + len(part)]
            self._decode(part, start, {position - start for position in here})
            if here:
                yield here, np.stack([self._row(position - start) for position in here])

    def read(self, tokens: list[int]) -> None:
        """Compute all that there is for each of the tokens; the last layer leaves out those whose
        logits nobody wants."""
        self.forget()
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            self._decode(part, start, set(range(len(part))))

    def answer(self, prompt: list[int], limit: int) -> tuple[list[int], bool, float, float]:
        """The greedy answer's tokens, whether it stops by itself, and the seconds for the prompt and
        for the answer."""
        before = self.decode_seconds
        *_, (_, row) = self.logits(prompt, [len(prompt) - 1])
        prompt_seconds = self.decode_seconds - before
        tokens: list[int] = []
        stopped, last = False, row[0]
        while len(tokens) < limit:
            token = int(last.argmax())
            if lib.llama_vocab_is_eog(self.vocab, token):
                stopped = True
                break
            tokens.append(token)
            self._decode([token], len(prompt) + len(tokens) - 1, {0})
            last = self._row(0)
        return tokens, stopped, prompt_seconds, self.decode_seconds - before - prompt_seconds

    def metadata(self) -> dict[str, str]:
        """What the file says of itself, but for its lists."""
        found = {}
        for index in range(lib.llama_model_meta_count(self.handle)):
            key = self._text(lib.llama_model_meta_key_by_index, index)
            found[key] = self._text(lib.llama_model_meta_val_str_by_index, index)
        return found

    def add_adapter(self, path: str, scale: float) -> None:
        """Add a LoRA adapter, times `scale`, to all that is computed from now on."""
        adapter = lib.llama_adapter_lora_init(self.handle, path.encode())
        if not adapter:
            raise RuntimeError(f"libllama cannot load the adapter {path}")
        adapters = (lib.llama_adapter_lora_p_ctypes * 1)(adapter)
        if lib.llama_set_adapters_lora(self.context, adapters, 1, (ctypes.c_float * 1)(scale)) != 0:
            raise RuntimeError(f"libllama cannot use the adapter {path}")

    def forget(self) -> None:
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)

    def _text(self, get: Any, index: int) -> str:
        size = get(self.handle, index, ctypes.create_string_buffer(1), 1)
        buffer = ctypes.create_string_buffer(size + 1)
        get(self.handle, index, buffer, size + 1)
        return buffer.value.decode("utf-8", "replace")

    def _row(self, index: int) -> Any:
        row = lib.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(row, (self.vocab_size,)).copy()

    def _decode(self, tokens: list[int], start: int, wanted: set[int]) -> None:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = start + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = index in wanted
        began = time.perf_counter()
        code = lib.llama_decode(self.context, batch)
        self.decode_seconds += time.perf_counter() - began
        if code != 0:
            raise RuntimeError(f"libllama's decoding ended with code {code}")
