"""How a weight was held while the adapter was trained, a piece at a time: NF4 and LLM.int8.

What comes out is bit for bit what bitsandbytes gives for the whole tensor with its defaults (blocks
of 64, double quantization): blocks and rows are independent of one another, so pieces may be as
small as one likes; only the scales of the scales take the whole tensor, 1/64 of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_blockwise,
    get_4bit_type,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_blockwise,
)

BLOCK = 64
STATE = "quant_state.bitsandbytes__nf4"
STATE_BYTES = 256  # of the JSON in it, filled up with spaces: its length has to be known beforehand

# Where one 4-bit value ends and the next begins: halfway between neighbours, in float32, as
# bitsandbytes has it on CPUs.
_CODE = get_4bit_type("nf4", device="cpu").numpy()
COUNTED = 2**15  # weights whose bounds are counted at a time: it all stays in a core's cache
_BOUNDS = ((_CODE[1:] + _CODE[:-1]) / np.float32(2)).astype(np.float32)


class Nf4:
    """A tensor in 4 bit: `put` all of it, `settle`, and `take` what the bits stand for.

    `put` and `take` name places in the flat tensor that are multiples of the block.
    """

    def __init__(self, shape: tuple[int, ...], device: str) -> None:
        self.shape = shape
        count = int(np.prod(shape))
        self._packed = torch.empty((count + 1) // 2, dtype=torch.uint8, device=device)
        self._absmax = torch.empty(-(-count // BLOCK), dtype=torch.float32, device=device)
        self._scales: QuantState | None = None

    def put(self, start: int, values: torch.Tensor) -> None:
        packed, absmax = quantize(values)
        self._packed[start // 2 : start // 2 + len(packed)] = packed
        self._absmax[start // BLOCK : start // BLOCK + len(absmax)] = absmax

    def settle(self) -> None:
        """Quantize the blocks' scales in their turn."""
        self._offset = self._absmax.mean()
        codes, scales = quantize_blockwise(self._absmax - self._offset, blocksize=256)
        self._absmax = dequantize_blockwise(codes, scales).add_(self._offset).float()
        self._codes, self._scales = codes, scales

    def take(self, start: int, stop: int) -> torch.Tensor:
        count = stop - start
        shape = (count // BLOCK, BLOCK) if count % BLOCK == 0 else (count,)
        values: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            self._packed[start // 2 : (stop + 1) // 2].unsqueeze(1),
            self._absmax[start // BLOCK : -(-stop // BLOCK)],
            BLOCK, "nf4", shape, torch.float32,
        )  # fmt: skip
        return values.reshape(-1)

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """What bitsandbytes saves of it, by the ends of the names."""
        assert self._scales is not None
        state = QuantState(
            absmax=self._codes,
            shape=torch.Size(self.shape),
            dtype=dtype,
            blocksize=BLOCK,
            code=get_4bit_type("nf4", device=self._packed.device),
            quant_type="nf4",
            offset=self._offset,
            state2=self._scales,
        ).as_dict(packed=True)
        text = bytes(state[STATE].tolist()).ljust(STATE_BYTES)
        state[STATE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return {"": self._packed.unsqueeze(1), **{f".{name}": t for name, t in state.items()}}


def nf4_tensors(shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Types and shapes of what `Nf4.tensors` will give."""
    count = int(np.prod(shape))
    blocks = -(-count // BLOCK)
    return {
        "": (torch.uint8, ((count + 1) // 2, 1)),
        ".absmax": (torch.uint8, (blocks,)),
        ".quant_map": (torch.float32, (16,)),
        ".nested_absmax": (torch.float32, (-(-blocks // 256),)),
        ".nested_quant_map": (torch.float32, (256,)),
        f".{STATE}": (torch.uint8, (STATE_BYTES,)),
    }


def quantize(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A flat float32 piece as packed 4-bit values and the blocks' scales.

    On a CPU bitsandbytes takes 40 ns for a weight, with a binary search for each. Counting the
    bounds that it lies above gives the same in 1.2.
    """
    count = values.numel()
    if values.device.type != "cpu" or count % BLOCK:
        packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(
            values, BLOCK, "nf4", torch.uint8
        )
        return packed.reshape(-1), absmax
    blocks = values.view(-1, BLOCK)
    absmax = blocks.abs().amax(-1)
    scaled = (blocks * absmax.clamp(min=1e-38).reciprocal_().unsqueeze(1)).numpy().reshape(-1)
    codes = np.empty(count, np.uint8)
    above = np.empty((len(_BOUNDS), min(count, COUNTED)), np.bool_)
    for start in range(0, count, COUNTED):
        part = scaled[start : start + COUNTED]
        np.greater(part, _BOUNDS[:, None], out=above[:, : len(part)])
        lies = above[:, : len(part)].view(np.uint8)
        np.add.reduce(lies, axis=0, dtype=np.uint8, out=codes[start : start + COUNTED])
    pairs = codes.view("<u2")  # little end first: the first value is low, and goes high
    packed = pairs << 4
    packed |= pairs >> 8
    return torch.from_numpy(packed.astype(np.uint8)), absmax


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """A whole weight as its 4-bit form stands for it, in float32."""
    held = Nf4(tuple(weight.shape), weight.device.type)
    held.put(0, weight.float().reshape(-1))
    held.settle()
    return held.take(0, weight.numel()).reshape(weight.shape)


def through_int8(rows: torch.Tensor) -> torch.Tensor:
    """Whole rows of a weight as LLM.int8 holds them, in float32."""
    kept: Any = int8_vectorwise_quant(rows.to(torch.float16))
    values: torch.Tensor = int8_vectorwise_dequant(kept[0], kept[1])
    return values.float()
