"""What a training takes of a GPU's memory, reckoned from the model's shape. Without torch and a GPU.

What is counted is every tensor that is there at the worst moment, as the engines' kernels keep them
(unsloth 2026.10, transformers 5.17, bitsandbytes 0.50); how near it comes is in
bench/results/memory.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from jobs.spec import Spec
from jobs.train.engines import Name
from jobs.train.fit import ENOUGH, MARGIN, Plan
from jobs.train.shape import Shape

GIB = 2**30
HALF, FULL = 2, 4  # bytes of a 16-bit and of a 32-bit number

# NF4 with double quantization: half a byte a weight, a scale of a byte for each 64, and for each 256
# of these one of 4 bytes (Dettmers et al. 2023, section 3).
BYTES_OF = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0, "16bit": 2.0}

# Of AdamW's two states, for a weight. bitsandbytes' has a scale of 4 bytes for each 256 of either, and
# keeps small tensors in 32 bit.
STATES = {"adamw": 8.0, "adamw_8bit": 2 * (1 + 4 / 256)}
SMALL = 4096
PAGED = "paged_"  # the machine's memory holds these states where the GPU's is short

# CUDA's own context and the kernels that are loaded: outside of what torch's allocator counts.
CONTEXT = int(0.76 * GIB)

# cuBLAS's own buffers, one for the forward and one for the backward pass (torch's default on Hopper;
# older GPUs have smaller ones).
MATRICES = 2 * 32 * 2**20

# Of the inputs of layers whose activations are made again, unsloth moves all but about so many to the
# machine's memory: those on their way, in two buffers, and the last ones.
STAYING = 5

# unsloth's loss: up to so many rows and columns of float32 logits at a time (its fused_linear.py).
LOSS_ROWS, LOSS_COLUMNS, LOSS_LEAST = 4096, 16384, 512 * 151936
SMALL_CARD = 24.5 * GIB
TRL_LOSS_ROWS = 256

# Soft-capped attention (`jobs.train.softcap`): so many scores at a time, but those of one head of keys
# in a conversation at the least; and on the way back each of them three times in 32 bit and once in 16.
SCORES, SCORE_BYTES = 1 << 25, 14


@dataclass(frozen=True)
class Estimate:
    """Bytes, by what they are for."""

    weights: int
    lora: int
    optimizer: int
    """The LoRA matrices' gradients and AdamW's states."""
    activations: int
    """What the forward pass keeps for the backward pass."""
    workspace: int
    """What is there for a moment: gradients of activations, unpacked weights, logits."""
    context: int

    @property
    def allocated(self) -> int:
        """The most that torch's allocator holds at one time: `torch.cuda.max_memory_allocated` of a
        step with several parts, in which gradients and optimizer states are there already."""
        return self.weights + self.lora + self.optimizer + self.activations + self.workspace

    @property
    def total(self) -> int:
        return self.allocated + self.context

    def as_json(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def reckon(
    shape: Shape,
    spec: Spec,
    plan: Plan,
    longest: int,
    engine: Name = "unsloth",
    card: float = 80 * GIB,
) -> Estimate:
    """What training takes with this plan, the longest row having so many tokens, on a GPU with
    `card` bytes of memory."""
    tokens = max(plan.tokens, longest)
    trained, states = _trained(shape, spec)
    if spec.train.optimizer.startswith(PAGED):
        states = 0
    weights = (
        shape.linear_weights * BYTES_OF[spec.model.load_in]
        + shape.outer_weights * HALF
        + 2 * HALF * shape.positions * shape.head * (engine == "unsloth")  # tables of rotations
    )
    count = _Unsloth if engine == "unsloth" else _Transformers
    kept = count(shape, spec, tokens, longest)
    layer = kept.layer()
    again = plan.checkpointing
    # All LoRA matrices once more in 16 bit while a part goes through (`jobs.train.fused_lora`).
    halves = HALF * sum(_lora_sizes(shape, spec)) if kept.fused and not again else 0
    one = HALF * tokens * shape.hidden  # what goes into a layer, which is kept in any case
    activations = shape.layers * layer
    if again:
        others = min(shape.layers - 1, STAYING) if engine == "unsloth" else shape.layers - 1
        activations = layer + others * one
    workspace = max(
        kept.backward(),
        kept.scores(),
        kept.loss(card) - (layer - one) * again,  # when no layer is at work
        # When there are no activations any more: AdamW's temporary copy of a state, and before it a
        # part's gradients in 16 and in 32 bit, beside those of the parts before.
        max(FULL * trained, 3 * halves) - activations,
    )
    return Estimate(
        weights=int(weights),
        lora=FULL * trained,
        optimizer=int(FULL * trained + states),
        activations=int(activations) + halves,
        workspace=int(workspace) + kept.unpacked + MATRICES,
        context=CONTEXT,
    )


def holds_unpacked(
    shape: Shape, spec: Spec, most: int, longest: int, free: int, engine: Name, card: float
) -> bool:
    """Whether there is room to hold a 4-bit base unpacked (see `jobs.train.unpack`), with as many
    tokens at a time as make the card fast and all activations kept."""
    if spec.model.load_in != "4bit" or spec.lora.loftq:
        return False
    plan = Plan(min(most, max(ENOUGH, longest)))
    return reckon(shape, unpacked(spec), plan, longest, engine, card).allocated <= MARGIN * free


def unpacked(spec: Spec) -> Spec:
    """The spec of a training whose base takes as much memory as this one's unpacked."""
    return spec.model_copy(update={"model": spec.model.model_copy(update={"load_in": "16bit"})})


def is_rough(shape: Shape, spec: Spec, engine: Name) -> bool:
    """Whether nobody has measured how near the reckoning comes with these settings."""
    return (
        engine != "unsloth"
        or shape.head_norms
        or shape.norms != 2
        or spec.lora.dropout > 0
        or spec.model.load_in == "8bit"
        or not takes_layers_whole(shape, spec)
        or bool(spec.lora.modules_to_save)
        or spec.train.optimizer.startswith(PAGED)
    )


def _trained(shape: Shape, spec: Spec) -> tuple[int, float]:
    """The number of trained weights, and the bytes of AdamW's states for them."""
    sizes = _lora_sizes(shape, spec)
    if spec.lora.dora:
        for name in targets(shape, spec):
            sizes += shape.layers * [shape.linears[name][1]]
    for name in spec.lora.modules_to_save:
        if name in ("embed_tokens", "lm_head"):
            sizes.append(shape.vocabulary * shape.hidden)
    each, small = STATES[spec.train.optimizer.removeprefix(PAGED)], STATES["adamw"]
    return sum(sizes), sum(size * (small if size < SMALL else each) for size in sizes)


def _lora_sizes(shape: Shape, spec: Spec) -> list[int]:
    sizes: list[int] = []
    for name in targets(shape, spec):
        inputs, outputs = shape.linears[name]
        sizes += shape.layers * [spec.lora.rank * inputs, spec.lora.rank * outputs]
    return sizes


def takes_layers_whole(shape: Shape, spec: Spec) -> bool:
    """Whether unsloth's own functions for whole attentions and MLPs are used: with LoRA and no more
    on every linear module."""
    plain = spec.lora.bias == "none" and not spec.lora.dora
    return plain and set(targets(shape, spec)) == set(shape.linears)


def checkpoint_bytes(shape: Shape, spec: Spec) -> int:
    """What a checkpoint takes on a disk: the trained weights, once more as the best evaluation found
    them where those are kept, and AdamW's states."""
    trained, states = _trained(shape, spec)
    return int((1 + spec.train.keeps_best) * FULL * trained + states)


def targets(shape: Shape, spec: Spec) -> list[str]:
    """The linear modules of a layer that get LoRA."""
    named = spec.lora.target
    if named == "all-linear":
        return list(shape.linears)
    return [name for name in shape.linears if any(n.split(".")[-1] == name for n in named)]


class _Unsloth:
    """Bytes as unsloth's kernels keep them. Each of the tensors is named in the comment beside it."""

    FUSES = True

    def __init__(self, shape: Shape, spec: Spec, tokens: int, longest: int) -> None:
        self.shape, self.spec, self.tokens, self.longest = shape, spec, tokens, longest
        self.several = (
            tokens > longest
        )  # conversations in a part, which a kernel of its own keeps apart
        self.whole = takes_layers_whole(shape, spec)
        # Whether LoRA's matrices are taken together: see `jobs.train.fused_lora`.
        plain = self.whole and not spec.lora.dropout and spec.model.load_in != "8bit"
        self.fused = self.FUSES and plain
        # The largest matrix in 16 bit: unsloth keeps the place for one.
        self.unpacked = 0 if spec.model.load_in == "16bit" else HALF * shape.hidden * shape.inner

    def layer(self) -> int:
        """What one layer's forward pass keeps."""
        s = self.shape
        # What goes into each norm, and what comes out of the two that are before attention and MLP: what
        # comes out of others is only added.
        values = (s.norms + 2) * s.hidden
        values += self._attention()
        # Gate and up; where unsloth does not take the whole MLP at once, what the activation makes of
        # gate as well, and with LoRA on `down` the product.
        values += 2 * s.inner if self.whole else 4 * s.inner
        if s.head_norms:
            values += s.q + s.kv
        if self.fused:
            values += len(targets(s, self.spec)) * self.spec.lora.rank  # inputs multiplied with A
        elif s.biased:
            values += 5 * s.hidden  # as measured with Qwen2.5-1.5B, from 2,048 tokens on
        floats = s.norms + s.heads  # each norm's scale; each head's sum of exponentials
        masks = 0
        if self.spec.lora.dropout:
            masks = 5 * s.hidden + s.q + s.inner  # a byte for each input of each linear module
        return self.tokens * (HALF * values + FULL * floats + masks)

    def _attention(self) -> int:
        s = self.shape
        if self.several or s.softcapped:
            return 2 * s.q + 2 * s.kv  # queries, keys, values, output
        return 3 * s.q + 2 * s.kv  # queries, keys, values, output, and the output as one row

    def backward(self) -> int:
        """What the last layer's backward pass needs for a moment."""
        s = self.shape
        # Gradients of the MLP's output, and of gate, up or their product.
        rows = HALF * self.tokens * (s.hidden + s.inner)
        return rows + self.unpacked * (not self.fused)

    def scores(self) -> int:
        """What soft-capped attention needs for a moment on the way back (`jobs.train.softcap`)."""
        s = self.shape
        if not s.softcapped:
            return 0
        count = max(
            min(SCORES, s.heads * self.tokens * self.longest),
            s.heads // s.kv_heads * self.longest**2,
        )
        gradients = HALF * self.tokens * (2 * s.q + 2 * s.kv)  # of what comes out as well
        return SCORE_BYTES * count + gradients

    def loss(self, card: float) -> int:
        """Final norm and loss."""
        s = self.shape
        states = 6 * HALF * self.tokens * s.hidden  # what goes in, comes out, and their gradients
        if self.tokens >= LOSS_ROWS or card <= SMALL_CARD:
            rows = min(self.tokens, LOSS_ROWS)
            return states + FULL * rows * (min(s.vocabulary, LOSS_COLUMNS) + s.hidden)
        rows = _power(self.tokens * s.hidden / s.vocabulary)
        least = max(_power(LOSS_LEAST / s.vocabulary), 512)
        rows = min(max(rows, least), LOSS_ROWS, self.tokens)
        return states + FULL * rows * (s.vocabulary + s.hidden)


class _Transformers(_Unsloth):
    """Bytes as transformers and peft keep them under autocast."""

    FUSES = False

    def layer(self) -> int:
        s = self.shape
        values = 2 * s.norms * s.hidden  # what goes into each norm in 32 bit
        values += s.norms * s.hidden  # what comes out of it
        values += 2 * s.q + 2 * s.kv  # queries, keys, values, output
        values += 4 * s.inner  # gate, up, the activation of gate, and the product
        values += len(targets(s, self.spec)) * self.spec.lora.rank
        masks = 0
        if self.spec.lora.dropout:
            masks = (1 + HALF) * (5 * s.hidden + s.q + s.inner)  # the mask, and what is left
        return self.tokens * (HALF * values + FULL * (s.norms + s.heads) + masks)

    def backward(self) -> int:
        s = self.shape
        return HALF * self.tokens * (3 * s.hidden + 2 * s.inner) + self.unpacked

    def loss(self, card: float) -> int:
        s = self.shape
        rows = min(self.tokens, TRL_LOSS_ROWS)
        # Logits in 16 and 32 bit, their exponentials and their gradient.
        states = (FULL + 3 * HALF) * self.tokens * s.hidden
        return states + rows * s.vocabulary * (HALF + 3 * FULL)


def _power(number: float) -> int:
    """The largest power of two up to `number`, at least 1."""
    return 1 << max(int(number).bit_length() - 1, 0)
