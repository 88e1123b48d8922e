"""Train the small models with a multi-token-prediction (MTP) head that the benchmarks decode.

    pip install '.[train]'
    python benchmarks/train_fixture.py plain OUT
    python benchmarks/train_fixture.py hybrid OUT --minutes 20

A random model accepts no drafts, so speculative decoding needs one that has learned something.
This one learns the source of Python's standard library in about twenty minutes on one core, from
a byte-level BPE of 1,024 tokens. ``plain`` has the layout of MiMo (attention in every layer),
``hybrid`` that of Qwen3.5 (three gated delta nets to each attention).

OUT becomes a model folder in the layout of the original checkpoints, with the head's weights,
and OUT-4bit what mlx_lm converts it to, without them. Both are compared with PyTorch here.
"""

import argparse
import copy
import itertools
import json
import math
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm import convert, load
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 1024
EOS = "<|endoftext|>"
EOS_ID = 0
EPS = 1e-6
THETA = 10000.0
WINDOW = 256  # tokens a training example
CHUNK = 64  # tokens that a delta net takes at once; divides WINDOW
DEPTH = 2  # tokens the head learns to draft
BATCH = 4
PEAK_RATE = 3e-3
LOSS_WEIGHTS = (1.0, 0.3, 0.2)  # the next token, then the head's first and second draft
GROUP = 32  # weights that share a scale in 4 bits


@dataclass(frozen=True)
class Family:
    """What sets one layout apart: sizes, details of attention, and the checkpoint's names."""

    mlp: int
    rotary: int  # dimensions of a head that are rotated
    hidden_first: bool  # the head's projection reads (hidden, embedding), not the reverse
    qwen: bool  # output gate, q and k norms, norms stored as gamma - 1, linear layers
    names: dict[str, str]  # our prefix -> the checkpoint's; the first match counts
    layers: int = 8
    hidden: int = 96
    heads: int = 3
    kv_heads: int = 1
    head_dim: int = 32
    attention_every: int = 4
    key_heads: int = 2
    value_heads: int = 4
    kernel: int = 4

    def is_linear(self, layer: int) -> bool:
        return self.qwen and (layer + 1) % self.attention_every != 0

    def checkpoint_name(self, name: str) -> str:
        ours = next(prefix for prefix in self.names if name.startswith(prefix))
        return self.names[ours] + name.removeprefix(ours)


MIMO = {
    "head.block.": "model.mtp_layers.0.",
    "head.embedding_norm.": "model.mtp_layers.0.token_layernorm.",
    "head.hidden_norm.": "model.mtp_layers.0.hidden_layernorm.",
    "head.projection.": "model.mtp_layers.0.input_proj.",
    "head.norm.": "model.mtp_layers.0.final_layernorm.",
    "": "model.",
}
QWEN = {
    "head.block.": "mtp.layers.0.",
    "head.embedding_norm.": "mtp.pre_fc_norm_embedding.",
    "head.hidden_norm.": "mtp.pre_fc_norm_hidden.",
    "head.projection.": "mtp.fc.",
    "head.norm.": "mtp.norm.",
    "": "model.language_model.",
}
FAMILIES = {
    "plain": Family(mlp=288, rotary=32, hidden_first=True, qwen=False, names=MIMO),
    "hybrid": Family(mlp=224, rotary=16, hidden_first=False, qwen=True, names=QWEN),
}


class Norm(nn.Module):
    """RMS norm; Qwen's checkpoints hold most of their weights as the distance from one."""

    def __init__(self, size: int, *, from_one: bool) -> None:
        super().__init__()
        self.from_one = from_one
        self.weight = nn.Parameter(torch.zeros(size) if from_one else torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 1 if self.from_one else self.weight
        return functional.rms_norm(x, weight.shape, weight, EPS)


def rotate(x: Tensor, positions: Tensor, size: int) -> Tensor:
    """Rotary embedding of the first `size` dimensions, halves paired."""
    rates = THETA ** (-torch.arange(0, size, 2) / size)
    angles = positions[:, None] * rates
    cos, sin = angles.cos(), angles.sin()
    first, second, rest = x.split([size // 2, size // 2, x.shape[-1] - size], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention, causal unless masked; Qwen's has an output gate and norms."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family
        bias, size = not family.qwen, family.head_dim
        gates = 2 if family.qwen else 1
        self.q_proj = nn.Linear(family.hidden, family.heads * size * gates, bias=bias)
        self.k_proj = nn.Linear(family.hidden, family.kv_heads * size, bias=bias)
        self.v_proj = nn.Linear(family.hidden, family.kv_heads * size, bias=bias)
        self.o_proj = nn.Linear(family.heads * size, family.hidden, bias=False)
        if family.qwen:
            self.q_norm = Norm(size, from_one=True)
            self.k_norm = Norm(size, from_one=True)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        family = self.family
        query, *gate = self.q_proj(x).unflatten(-1, (family.heads, -1)).split(family.head_dim, -1)
        key = self.k_proj(x).unflatten(-1, (family.kv_heads, -1))
        value = self.v_proj(x).unflatten(-1, (family.kv_heads, -1)).transpose(1, 2)
        if family.qwen:
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotate(query.transpose(1, 2), positions, family.rotary)
        key = rotate(key.transpose(1, 2), positions, family.rotary)
        groups = family.heads // family.kv_heads
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        y = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None
        )
        y = y.transpose(1, 2).flatten(2)
        if gate:
            y = y * gate[0].flatten(2).sigmoid()
        return self.o_proj(y)


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The recurrence of a delta net over a window, from an empty state, by chunks.

    State: S[t] = a[t] S[t-1] + k[t] u[t]^T with u[t] = beta[t] (v[t] - a[t] S[t-1]^T k[t]) and
    a = exp(decay). Within a chunk each u depends on those before it through a triangular
    matrix, so one solve finds them all, but for the part that the state before the chunk adds.
    `q`, `k`, `v` are [batch, heads, time, size], the others [batch, heads, time].
    """
    q, k, v = (t.unflatten(2, (-1, CHUNK)) for t in (q, k, v))
    beta = beta.unflatten(2, (-1, CHUNK))[..., None]
    total = decay.unflatten(2, (-1, CHUNK)).cumsum(-1)[..., None]
    past = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    # Masked before the exponential, where the future would overflow.
    fade = (total - total.mT).masked_fill(~past, -torch.inf).exp()
    mixing = (beta * (k @ k.mT) * fade).tril(-1)
    known = torch.cat((beta * v, beta * total.exp() * k), dim=-1)
    solved = torch.linalg.solve_triangular(mixing, known, upper=False, unitriangular=True)
    own, carried = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    scores = (q @ k.mT) * fade
    q = q * total.exp()
    end = total[..., -1:, :]
    k = k * (end - total).exp()
    state = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1])
    outputs = []
    for chunk in range(q.shape[2]):
        update = own[:, :, chunk] - carried[:, :, chunk] @ state
        outputs.append(q[:, :, chunk] @ state + scores[:, :, chunk] @ update)
        state = end[:, :, chunk].exp() * state + k[:, :, chunk].mT @ update
    return torch.cat(outputs, dim=2)


class DeltaNet(nn.Module):
    """Qwen3.5's linear attention: a short convolution, then the gated delta rule."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family
        keys = family.key_heads * family.head_dim
        values = family.value_heads * family.head_dim
        self.sizes = (keys, keys, values)
        channels = sum(self.sizes)
        self.in_proj_qkv = nn.Linear(family.hidden, channels, bias=False)
        self.in_proj_z = nn.Linear(family.hidden, values, bias=False)
        self.in_proj_b = nn.Linear(family.hidden, family.value_heads, bias=False)
        self.in_proj_a = nn.Linear(family.hidden, family.value_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, family.kernel, groups=channels, bias=False)
        # Heads start with memories of half a token to about 40.
        self.A_log = nn.Parameter(torch.linspace(-4.0, 0.5, family.value_heads))
        self.dt_bias = nn.Parameter(torch.ones(family.value_heads))
        self.norm = Norm(family.head_dim, from_one=False)
        self.out_proj = nn.Linear(values, family.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        family = self.family
        mixed = functional.pad(self.in_proj_qkv(x).mT, (family.kernel - 1, 0))
        mixed = functional.silu(self.conv1d(mixed)).mT
        q, k, v = (
            part.unflatten(-1, (-1, family.head_dim)).transpose(1, 2)
            for part in mixed.split(self.sizes, dim=-1)
        )
        q, k = (t * (t.square().sum(-1, keepdim=True) + EPS).rsqrt() for t in (q, k))
        groups = family.value_heads // family.key_heads
        q, k = (t.repeat_interleave(groups, dim=1) for t in (q, k))
        decay = -self.A_log.exp() * functional.softplus(self.in_proj_a(x) + self.dt_bias)
        beta = self.in_proj_b(x).sigmoid()
        y = gated_delta_rule(q * family.head_dim**-0.5, k, v, decay.mT, beta.mT).transpose(1, 2)
        return self.out_proj(self.norm(y).flatten(2) * functional.silu(self.in_proj_z(x)))


class MLP(nn.Module):
    def __init__(self, family: Family) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(family.hidden, family.mlp, bias=False)
        self.up_proj = nn.Linear(family.hidden, family.mlp, bias=False)
        self.down_proj = nn.Linear(family.mlp, family.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, family: Family, *, linear: bool) -> None:
        super().__init__()
        self.input_layernorm = Norm(family.hidden, from_one=family.qwen)
        self.post_attention_layernorm = Norm(family.hidden, from_one=family.qwen)
        self.mlp = MLP(family)
        self.linear = linear
        if linear:
            self.linear_attn = DeltaNet(family)
        else:
            self.self_attn = Attention(family)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.input_layernorm(x)
        x = x + (self.linear_attn(y) if self.linear else self.self_attn(y, positions, mask))
        return x + self.mlp(self.post_attention_layernorm(x))


class Head(nn.Module):
    """The MTP head: from the state after token i and token i+1 to a state for token i+2."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.hidden_first = family.hidden_first
        self.embedding_norm = Norm(family.hidden, from_one=family.qwen)
        self.hidden_norm = Norm(family.hidden, from_one=family.qwen)
        self.projection = nn.Linear(2 * family.hidden, family.hidden, bias=False)
        self.block = Block(family, linear=False)
        self.norm = Norm(family.hidden, from_one=family.qwen)

    def join(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        pair = [self.embedding_norm(embedding), self.hidden_norm(hidden)]
        if self.hidden_first:
            pair.reverse()
        return self.projection(torch.cat(pair, dim=-1))

    def forward(self, hidden: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Both drafts' states for all positions; `embeddings` are those of tokens 1 to time+1.

        As in decoding, a second draft sees the first drafts' entries up to its own position,
        which rest on the trunk's states, and one entry made from a draft: itself.
        """
        length = hidden.shape[1]
        steps = torch.arange(length)
        entries = self.join(hidden, embeddings[:, :length])
        first = self.norm(self.block(entries, steps))
        entries = torch.cat((entries, self.join(first, embeddings[:, 1:])), dim=1)
        past = torch.ones(length, length, dtype=torch.bool).tril()
        own = torch.eye(length, dtype=torch.bool)
        mask = torch.cat((past.repeat(2, 1), torch.cat((torch.zeros_like(own), own))), dim=1)
        second = self.norm(self.block(entries, torch.cat((steps, steps + 1)), mask))
        return first, second[:, length:]


class Model(nn.Module):
    """Trunk, tied embedding and head."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, family.hidden)
        self.layers = nn.ModuleList(
            Block(family, linear=family.is_linear(layer)) for layer in range(family.layers)
        )
        self.norm = Norm(family.hidden, from_one=family.qwen)
        self.head = Head(family)
        nn.init.normal_(self.embed_tokens.weight, std=0.05)
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                nn.init.normal_(weight, std=(2 * family.layers * weight.shape[1]) ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [1 + DEPTH, batch, time, vocabulary] from tokens [batch, time + DEPTH].

        At position i the first are for token i+1, the head's for i+2 and i+3.
        """
        length = tokens.shape[1] - DEPTH
        embeddings = self.embed_tokens(tokens)
        x = embeddings[:, :length]
        for layer in self.layers:
            x = layer(x, torch.arange(length))
        hidden = self.norm(x)
        states = torch.stack((hidden, *self.head(hidden, embeddings[:, 1:])))
        return functional.linear(states, self.embed_tokens.weight)


def read_corpus() -> tuple[list[str], list[str]]:
    """The standard library's files, and every twentieth of them held out."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
    paths = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))
    texts = [path.read_text("utf-8", errors="ignore") for path in paths]
    held_out = texts[10::20]
    del texts[10::20]
    return texts, held_out


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokens_of(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    encoded = tokenizer.encode_batch(texts)
    return torch.tensor([token for one in encoded for token in (*one.ids, EOS_ID)])


def losses(model: Model, window: Tensor) -> Tensor:
    """Mean cross-entropy of the next token and of each draft."""
    logits = model(window[:, :-1])
    targets = torch.stack([window[:, d : d + WINDOW] for d in range(1, DEPTH + 2)])
    each = functional.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none")
    return each.view(DEPTH + 1, -1).mean(1)


def train(model: Model, tokens: Tensor, minutes: float, seed: int) -> None:
    """Train for `minutes` of wall-clock time, in which the rate warms up and falls to zero.

    Muon trains the layers' matrices: 200 steps in, its loss was 0.3 below AdamW's.
    """
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    embedding = matrices.pop("embed_tokens.weight")
    others = [embedding, *(p for p in model.parameters() if p.ndim != 2)]
    optimizers = [
        torch.optim.Muon(matrices.values(), weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    weights = torch.tensor(LOSS_WEIGHTS)
    window = torch.arange(WINDOW + DEPTH + 1)
    generator = torch.Generator().manual_seed(seed)
    shown, started = torch.zeros(DEPTH + 1), time.monotonic()
    for step in itertools.count():
        done = (time.monotonic() - started) / (60 * minutes)
        if done >= 1:
            break
        starts = torch.randint(len(tokens) - len(window), (BATCH, 1), generator=generator)
        each = losses(model, tokens[starts + window])
        model.zero_grad()
        (weights * each).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = PEAK_RATE * min(1, step / 100) * (1 + math.cos(math.pi * done)) / 2
            optimizer.step()
        shown += each.detach() / 100  # of the last 100 steps
        if step % 100 == 99:
            pace = (step + 1) * BATCH * WINDOW / (time.monotonic() - started)
            means = " ".join(f"{loss:.3f}" for loss in shown.tolist())
            print(f"step {step + 1} ({done:.0%}): losses {means}, {pace:.0f} tokens/s", flush=True)
            shown.zero_()


def settings(name: str, family: Family) -> dict:
    """config.json, as the family's own checkpoints write it."""
    sizes = {
        "hidden_size": family.hidden,
        "intermediate_size": family.mlp,
        "num_hidden_layers": family.layers,
        "num_attention_heads": family.heads,
        "num_key_value_heads": family.kv_heads,
        "head_dim": family.head_dim,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": EPS,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "eos_token_id": EOS_ID,
    }
    if name == "plain":
        return sizes | {
            "model_type": "mimo",
            "architectures": ["MiMoForCausalLM"],
            "attention_bias": True,
            "rope_theta": THETA,
            "num_nextn_predict_layers": 1,
            "torch_dtype": "float32",
        }
    kinds = ("full_attention", "linear_attention")
    text = sizes | {
        "model_type": "qwen3_5_text",
        "attention_bias": False,
        "full_attention_interval": family.attention_every,
        "layer_types": [kinds[family.is_linear(layer)] for layer in range(family.layers)],
        "linear_num_key_heads": family.key_heads,
        "linear_num_value_heads": family.value_heads,
        "linear_key_head_dim": family.head_dim,
        "linear_value_head_dim": family.head_dim,
        "linear_conv_kernel_dim": family.kernel,
        "mtp_num_hidden_layers": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": THETA,
            "partial_rotary_factor": family.rotary / family.head_dim,
        },
    }
    return {
        "model_type": "qwen3_5",
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": text,
        "tie_word_embeddings": True,
        "eos_token_id": EOS_ID,
        "torch_dtype": "float32",
    }


def export(model: Model, name: str, tokenizer: Tokenizer, out: Path) -> None:
    family = FAMILIES[name]
    weights = {family.checkpoint_name(k): v for k, v in model.state_dict().items()}
    out.mkdir(parents=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    about = {
        "config.json": settings(name, family),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": EOS,
            "model_max_length": 4096,
            "clean_up_tokenization_spaces": False,
        },
        "generation_config.json": {"eos_token_id": EOS_ID},
    }
    for file, content in about.items():
        (out / file).write_text(json.dumps(content, indent=2) + "\n")


def in_four_bits(model: Model) -> Model:
    """A copy with the weights that 4-bit matrices stand for, the head's too."""
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            weight = mx.array(module.weight.detach().numpy()).astype(mx.float16)
            packed, *scales = mx.quantize(weight, GROUP, 4)
            weight = mx.dequantize(packed, *(s.astype(mx.float32) for s in scales), GROUP, 4)
            module.weight.data = torch.from_numpy(np.array(weight))
    return rounded


@torch.no_grad()
def report(title: str, model: Model, folder: Path, held_out: Tensor) -> None:
    """Print what the model and its head are worth, and how far mlx_lm's logits are from ours.

    The head's worth is how often its choice is the trunk's own, given the true tokens before.
    """
    windows = torch.stack(held_out.split(WINDOW + DEPTH + 1)[:-1:10])
    surprise, agreement = [], []
    for batch in windows.split(BATCH):
        surprise.append(losses(model, batch)[0])
        trunk, *drafts = model(batch[:, :-1]).argmax(-1)
        same = [draft[:, :-d] == trunk[:, d:] for d, draft in enumerate(drafts, start=1)]
        agreement.append(torch.stack([one.float().mean() for one in same]))
    first, second = torch.stack(agreement).mean(0).tolist()
    loaded, _ = load(str(folder))
    loaded.set_dtype(mx.float32)
    theirs = np.array(loaded(mx.array(windows[:2, :WINDOW].numpy())))
    ours = model(windows[:2, : WINDOW + DEPTH])[0].numpy()
    print(
        f"{title}: held-out perplexity {torch.stack(surprise).mean().exp():.2f}, agreement"
        f" {first:.3f} at depth 1, {second:.3f} at depth 2; mlx_lm's logits differ by at most"
        f" {np.abs(theirs - ours).max():.1e}; weights"
        f" {(folder / 'model.safetensors').stat().st_size:,} bytes"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("out", type=Path, help="a new folder; OUT-4bit is made beside it")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more do not help at this size")
    options = parser.parse_args()
    small = options.out.with_name(options.out.name + "-4bit")
    for folder in (options.out, small):
        if folder.exists():
            parser.error(f"{folder} exists already")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    texts, held_out_texts = read_corpus()
    tokenizer = train_tokenizer(texts)
    tokens, held_out = tokens_of(tokenizer, texts), tokens_of(tokenizer, held_out_texts)
    model = Model(FAMILIES[options.family])
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {len(tokens):,} tokens, {len(held_out):,} held out", flush=True)
    train(model, tokens, options.minutes, options.seed)

    export(model, options.family, tokenizer, options.out)
    convert(
        str(options.out), str(small), quantize=True, q_bits=4, q_group_size=GROUP, dtype="float16"
    )
    report("32 bits", model, options.out, held_out)
    report("4 bits", in_four_bits(model), small, held_out)


if __name__ == "__main__":
    main()
