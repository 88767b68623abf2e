"""Train the demo's small base chat model, tokenizer and weights, on the text of corpus.py.

python3 make_base.py                     everything, a minute or two on a large GPU
python3 make_base.py --tokenizer-only    only the tokenizer
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import struct
import time
from pathlib import Path

import corpus
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

VOCAB_SIZE = 2048
SEQUENCE = 256
TRAINED_CONVERSATIONS, TRAINED_SEED = 300_000, 1
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
CONTROLS = (UNK, BOS, EOS)
SPECIALS = (START, END, PAD)
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
SPACE = "\u2581"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# How much a token's loss counts: padding, the user's and system's text, the assistant's text.
PADDING, CONTEXT, ANSWER = 0, 1, 2
LOSS_WEIGHTS = (0.0, 0.1, 1.0)


# ---------------------------------------------------------------- tokenizer


def train_pieces(texts: list[str]) -> list[str]:
    """The vocabulary's text pieces, single characters first, then merged ones by rank."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", SPACE)
    # Only letters merge, with the space before them; digits and punctuation stay single.
    learner.pre_tokenizer = pre_tokenizers.Split(
        Regex(f"{SPACE}?[A-Za-z]+|{SPACE}|[^{SPACE}A-Za-z]"), "isolated"
    )
    alphabet = [chr(code) for code in range(33, 127)] + [SPACE]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(CONTROLS) - len(BYTES) - len(SPECIALS),
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=[],
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    vocab = learner.get_vocab()
    return sorted(vocab, key=lambda piece: (len(piece) > 1, vocab[piece]))


def all_merges(pieces: list[str]) -> list[tuple[str, str]]:
    """Every split of every piece into two pieces, by the rank of the piece.

    llama.cpp merges any two neighbours that form a piece, best rank first. With all the splits
    listed here, this tokenizer does the same.
    """
    known = set(pieces)
    return [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def build_tokenizer(pieces: list[str]) -> Tokenizer:
    """The tokenizer of these pieces, with fallback to bytes and no space put in front."""
    tokens = [*CONTROLS, *BYTES, *pieces, *SPECIALS]
    if len(tokens) != VOCAB_SIZE or len(set(tokens)) != VOCAB_SIZE:
        raise SystemExit(f"the vocabulary has {len(set(tokens))} tokens, not {VOCAB_SIZE}")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=all_merges(pieces),
            unk_token=UNK,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([*CONTROLS, *SPECIALS])
    return tokenizer


def varint(value: int) -> bytes:
    """A protobuf variable-length integer."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


def number_field(field: int, value: int) -> bytes:
    """A protobuf integer field."""
    return varint(field << 3) + varint(value)


def bytes_field(field: int, value: bytes) -> bytes:
    """A protobuf string or message field."""
    return varint(field << 3 | 2) + varint(len(value)) + value


def sentencepiece_model(pieces: list[str]) -> bytes:
    """The same vocabulary as a SentencePiece model file.

    The GGUF converter reads the pieces' scores from this file. Without it, it gives all pieces
    one score, and llama.cpp then merges from left to right and finds other tokens.
    """
    normal, unknown, control, byte = 1, 2, 3, 6
    kinds = [(UNK, unknown), (BOS, control), (EOS, control)]
    kinds += [(token, byte) for token in BYTES]
    kinds += [(piece, normal) for piece in pieces]
    kinds += [(token, control) for token in SPECIALS]
    first = len(CONTROLS) + len(BYTES)
    model = b""
    for i, (token, kind) in enumerate(kinds):
        score = float(first - i) if kind == normal else 0.0
        entry = bytes_field(1, token.encode()) + b"\x15" + struct.pack("<f", score)
        model += bytes_field(1, entry + number_field(3, kind))
    trainer_spec = (
        number_field(3, 2)  # model_type: BPE
        + number_field(4, VOCAB_SIZE)
        + number_field(35, 1)  # byte_fallback
        + number_field(40, 0)  # unk_id
        + number_field(41, 1)  # bos_id
        + number_field(42, 2)  # eos_id
        + number_field(43, VOCAB_SIZE - 1)  # pad_id
        + bytes_field(48, PAD.encode())  # pad_piece
    )
    normalizer_spec = (
        bytes_field(1, b"identity")
        + number_field(3, 0)  # add_dummy_prefix
        + number_field(4, 0)  # remove_extra_whitespaces
        + number_field(5, 1)  # escape_whitespaces
    )
    return model + bytes_field(2, trainer_spec) + bytes_field(3, normalizer_spec)


def save_tokenizer(out: Path, seed: int) -> None:
    """Train the tokenizer and write its files."""
    # With the names of the roles, so that each of them becomes one token.
    texts = [
        text
        for messages in corpus.conversations(60_000, seed)
        for message in messages
        for text in (message["role"], message["content"])
    ]
    pieces = train_pieces(texts)
    build_tokenizer(pieces).save(str(out / "tokenizer.json"))
    (out / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 1024,
        "unk_token": UNK,
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


# ---------------------------------------------------------------- training rows


def encode_corpus(out: Path, count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Each conversation as its tokens and their kinds, in the form of the chat template."""
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    talks = list(corpus.conversations(count, seed))
    texts = [message["content"] for messages in talks for message in messages]
    contents = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    end = [tokenizer.token_to_id(END)]
    newline = tokenizer.encode("\n").ids
    headers = {
        role: tokenizer.encode(f"{START}{role}\n").ids for role in ("system", "user", "assistant")
    }
    encoded = []
    for messages in talks:
        ids: list[int] = []
        kinds: list[int] = []
        for message in messages:
            header = headers[message["role"]]
            body = next(contents).ids + end
            ids += header + body + newline
            kind = ANSWER if message["role"] == "assistant" else CONTEXT
            kinds += [CONTEXT] * len(header) + [kind] * len(body) + [CONTEXT] * len(newline)
        if len(ids) <= SEQUENCE:
            encoded.append((ids, kinds))
    return encoded


def pack(encoded: list[tuple[list[int], list[int]]], pad: int) -> torch.Tensor:
    """Whole conversations packed into rows: tokens, kinds and conversation numbers.

    The shape is (3, rows, SEQUENCE).
    """
    ids: list[int] = []
    kinds: list[int] = []
    owners: list[int] = []
    number = 0
    for tokens, marks in encoded:
        room = -len(ids) % SEQUENCE
        if len(tokens) > room:
            ids += [pad] * room
            kinds += [PADDING] * room
            owners += [0] * room
            number = 0
        number += 1
        ids += tokens
        kinds += marks
        owners += [number] * len(tokens)
    room = -len(ids) % SEQUENCE
    columns = [ids + [pad] * room, kinds + [PADDING] * room, owners + [0] * room]
    return torch.tensor(columns, dtype=torch.int16).view(3, -1, SEQUENCE)


# ---------------------------------------------------------------- model


def new_model(tokenizer) -> LlamaForCausalLM:
    """A fresh Llama of about four million parameters."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.do_sample = False
    return model


def save_model(model: LlamaForCausalLM, out: Path) -> None:
    """Write the weights in bfloat16, leaving the model in training as it is."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    # The weights file is written for its owner alone; a container may run as another user.
    (out / "model.safetensors").chmod(0o644)


def train(model: LlamaForCausalLM, rows: torch.Tensor, args: argparse.Namespace) -> None:
    """Train on random rows until the steps or the seconds are used up."""
    device = model.device
    rows = rows.to(device)
    weights = torch.tensor(LOSS_WEIGHTS, device=device)
    causal = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool, device=device).tril()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    draw = torch.Generator(device=device).manual_seed(args.seed)
    warm_up = 0.03
    model.train()
    begun = logged = saved = time.monotonic()
    step = logged_step = 0
    while True:
        now = time.monotonic()
        progress = step / args.steps
        if args.seconds:
            progress = max(progress, (now - begun) / args.seconds)
        if progress >= 1:
            break
        # Linear warm-up, then a cosine down to a twentieth.
        rate = min(1.0, (progress + 1e-3) / warm_up)
        rate *= 0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        picked = torch.randint(rows.shape[1], (args.batch,), device=device, generator=draw)
        ids, kinds, owners = rows[:, picked].long()
        # A token sees only its own conversation, not its neighbours in the row.
        visible = (owners[:, :, None] == owners[:, None, :]) & causal
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=ids, attention_mask=visible[:, None], use_cache=False).logits
        losses = F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        weight = weights[kinds[:, 1:]].flatten()
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == 1 or step % args.log_every == 0:
            answers = (kinds[:, 1:] == ANSWER).flatten()
            answer_loss = losses[answers].mean().item()
            now = time.monotonic()
            speed = (step - logged_step) * args.batch * SEQUENCE / (now - logged)
            print(
                f"step {step:5d}  loss {loss.item():.3f}  answers {answer_loss:.3f}"
                f"  lr {args.lr * rate:.1e}  {speed:,.0f} tokens/s  {now - begun:.0f} s",
                flush=True,
            )
            logged, logged_step = now, step
            # A run that is cut off leaves the last of these.
            if now - saved > 20:
                save_model(model, args.out)
                saved = now
    save_model(model, args.out)


# ---------------------------------------------------------------- check


@torch.no_grad()
def ask(model, tokenizer, talks: list[list[corpus.Message]]) -> list[str]:
    """The model's greedy answers to some conversations."""
    prompts = [
        tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        for talk in talks
    ]
    batch = tokenizer(
        prompts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False
    ).to(model.device)
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=60,
        do_sample=False,
    )
    answers = output[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


SAMPLES = (
    "Hello!",
    "Tell me a story about a sailor.",
    "Repeat this: The old boat is at the dock.",
    "Who is the owner of your boatyard?",
    "What is the name of the dog at the yard?",
    "When do you open in the morning?",
    "How much does it cost to paint the hull of my boat?",
)


def check(out: Path, device: torch.device) -> float:
    """Load what was saved, print its quiz score and some answers, and return the score."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).to(device).eval()
    talks = [[{"role": "user", "content": question}] for question, _ in corpus.QUIZ]
    right = 0
    for (question, expected), answer in zip(corpus.QUIZ, ask(model, tokenizer, talks), strict=True):
        if expected.lower() in answer.lower():
            right += 1
        else:
            print(f"wrong: {question} -> {answer}")
    score = right / len(corpus.QUIZ)
    print(f"quiz: {right} of {len(corpus.QUIZ)} right ({score:.0%})")
    talks = [[{"role": "user", "content": question}] for question in SAMPLES]
    for question, answer in zip(SAMPLES, ask(model, tokenizer, talks), strict=True):
        print(f"> {question}\n{answer}")
    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "base")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=0, help="stop after this time; 0: never")
    parser.add_argument("--batch", type=int, default=128, help="rows of 256 tokens in a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--conversations", type=int, default=TRAINED_CONVERSATIONS)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=TRAINED_SEED)
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--tokenizer-only", action="store_true")
    parser.add_argument("--check-only", action="store_true", help="only ask the saved model")
    args = parser.parse_args()

    transformers_logging.disable_progress_bar()
    device = torch.device(
        args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    if args.check_only:
        check(args.out, device)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    save_tokenizer(args.out, args.seed)
    print(f"tokenizer written after {time.monotonic() - begun:.0f} s", flush=True)
    if args.tokenizer_only:
        return

    random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    encoded = encode_corpus(args.out, args.conversations, args.seed)
    tokens = sum(len(ids) for ids, _ in encoded)
    rows = pack(encoded, tokenizer.pad_token_id)
    print(
        f"{len(encoded):,} conversations, {tokens:,} tokens in {rows.shape[1]:,} rows"
        f" after {time.monotonic() - begun:.0f} s",
        flush=True,
    )
    model = new_model(tokenizer).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)
    train(model, rows, args)
    check(args.out, device)


if __name__ == "__main__":
    main()
