"""Pretrain a language model of Llama's shape on a file of tokens.

`pretrain_lm` has a million weights and trains on a CPU; `llama_125m`, `llama_1b` and `llama_8b` are
for GPUs. They differ in sizes alone, and are sharded by FSDP in bf16, with compiled layers whose
activations are computed again in backward.

`tokens` is a file of token ids in a row without a header, as nanoGPT and Megatron-LM write them
(`.bin`): 16 bits each where the vocabulary has at most 65,536 tokens, and 32 bits otherwise, in the
byte order of x86. A folder stands for all its `.bin` files, of which those named `val*` are held
out. `write_tokens` makes such a file. Workers read only the blocks that they need. Without `tokens`
the bytes of Python's standard library are the tokens.

The weights have the names of Llama in transformers, which loads what `launcher export` writes:

    launcher run pretrain_lm --out runs/lm
    launcher run pretrain_lm batch_tokens=8192 tokens_per_sample=128
    launcher export runs/lm --hf exported

Verified on 1 and 2 CPU ranks with a million weights, also under ZeRO 3, with tensor_parallel=2, and
compiled with activation checkpointing in bf16. The default run takes 1 min 15 s on 2 cores and
reaches 2.49 bits per held-out byte. The larger sizes have been planned, and built without values;
they have not been trained.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launcher import Data, Recipe, RecipeError, TokenFiles, adamw, cosine, main, warmup
from launcher.recipes.gpt import bits_per_byte, count_tokens, cross_entropy, read_documents

if TYPE_CHECKING:
    from torch import Tensor, nn

TokenType = Literal["uint16", "uint32"]
"""How a token is stored."""

TENSOR_PARALLEL = {
    "model.embed_tokens": "embedding_rowwise",
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.k_proj": "colwise",
    "model.layers.*.self_attn.v_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
    "lm_head": "colwise_rep",
}
"""How tensor_parallel splits the model: heads and hidden features over the ranks of a group."""

_HELD_OUT = 256
"""Largest number of blocks that are held out where no file is named val*."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model."""

    vocabulary: int
    """Number of different tokens."""

    layers: int
    """Number of transformer layers."""

    width: int
    """Features of each position."""

    heads: int
    """Attention heads of each layer."""

    key_heads: int
    """Heads of keys and values, each of which serves several attention heads."""

    hidden: int
    """Features inside the MLP of each layer."""

    theta: float = 500_000.0
    """Base of the wavelengths of rotary positions."""

    tied: bool = False
    """Whether the head has the weights of the embedding."""


def pretrain_lm(
    *,
    tokens: Path | None = None,
    token_type: TokenType | None = None,
    block: int = 128,
    vocabulary: int = 256,
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    key_heads: int = 2,
    hidden: int = 512,
) -> Recipe:
    """A language model of Llama's shape with a million weights, minutes on a CPU.

    Args:
        tokens: File of tokens, or folder of such files; none reads Python's library as bytes.
        token_type: How a token is stored; none derives it from the vocabulary.
        block: Tokens of a training sample.
        vocabulary: Number of different tokens.
        layers: Number of transformer layers.
        width: Features of each position.
        heads: Attention heads of each layer.
        key_heads: Heads of keys and values.
        hidden: Features inside the MLP of each layer.
    """
    shape = Shape(
        vocabulary=vocabulary,
        layers=layers,
        width=width,
        heads=heads,
        key_heads=key_heads,
        hidden=hidden,
        theta=10_000.0,
    )
    return Recipe(
        name="pretrain_lm",
        model=lambda: build_model(shape, block),
        data=lambda: build_data(tokens, token_type, block, vocabulary),
        forward=lambda model, batch: model(batch[0]),
        tensor_parallel_plan=TENSOR_PARALLEL,
        loss=cross_entropy,
        count=count_tokens,
        metrics={"bits_per_token": bits_per_byte},
        optimizer=adamw(beta2=0.95, weight_decay=0.1, decay_1d=False),
        schedule=warmup(cosine(final_factor=0.1), fraction=0.1),
        batch_size=32,
        lr=0.003,
        lr_batch_size=32,
        lr_rule="sqrt",
        steps=400,
        evaluate_every=10_000,
        max_grad_norm=1.0,
        in_memory=tokens is None,
    )


def llama_125m(
    *, tokens: Path | None = None, token_type: TokenType | None = None, block: int = 2048
) -> Recipe:
    """A model with 124 million weights and GPT-2's vocabulary, on 2.6 billion tokens.

    Args:
        tokens: File of tokens, or folder of such files; none reads Python's library as bytes.
        token_type: How a token is stored; none derives it from the vocabulary.
        block: Tokens of a training sample.
    """
    shape = Shape(
        vocabulary=50_304,
        layers=12,
        width=768,
        heads=12,
        key_heads=12,
        hidden=2048,
        theta=10_000.0,
        tied=True,
    )
    recipe = _sharded("llama_125m", shape, tokens, token_type, block)
    return replace(recipe, batch_size=256, lr=6e-4, lr_batch_size=256, steps=5_000)


def llama_1b(
    *, tokens: Path | None = None, token_type: TokenType | None = None, block: int = 4096
) -> Recipe:
    """A model of the shape of Llama 3.2 1B, on 26 billion tokens.

    Args:
        tokens: File of tokens, or folder of such files; none reads Python's library as bytes.
        token_type: How a token is stored; none derives it from the vocabulary.
        block: Tokens of a training sample.
    """
    shape = Shape(
        vocabulary=128_256,
        layers=16,
        width=2048,
        heads=32,
        key_heads=8,
        hidden=8192,
        tied=True,
    )
    recipe = _sharded("llama_1b", shape, tokens, token_type, block)
    return replace(recipe, batch_size=256, lr=4e-4, lr_batch_size=256, steps=25_000)


def llama_8b(
    *, tokens: Path | None = None, token_type: TokenType | None = None, block: int = 8192
) -> Recipe:
    """A model of the shape of Llama 3 8B, on 168 billion tokens.

    Args:
        tokens: File of tokens, or folder of such files; none reads Python's library as bytes.
        token_type: How a token is stored; none derives it from the vocabulary.
        block: Tokens of a training sample.
    """
    shape = Shape(
        vocabulary=128_256,
        layers=32,
        width=4096,
        heads=32,
        key_heads=8,
        hidden=14_336,
    )
    recipe = _sharded("llama_8b", shape, tokens, token_type, block)
    return replace(recipe, batch_size=512, lr=3e-4, lr_batch_size=512, steps=40_000)


def _sharded(
    name: str, shape: Shape, tokens: Path | None, token_type: TokenType | None, block: int
) -> Recipe:
    """Return a recipe for GPUs, whose batch size and learning rate are those of `pretrain_lm`."""
    return replace(
        pretrain_lm(),
        name=name,
        model=lambda: build_model(shape, block),
        data=lambda: build_data(tokens, token_type, block, shape.vocabulary),
        schedule=warmup(cosine(final_factor=0.1), fraction=0.05),
        evaluate_every=1_000,
        in_memory=False,
        strategy="fsdp",
        precision="bf16",
        micro_batch_size=1,
        compile=True,
        activation_checkpointing=True,
    )


def build_model(shape: Shape, block: int) -> nn.Module:  # noqa: C901  # one class per part
    """Return a net that maps tokens (N, T) to logits (N, T, vocabulary).

    It computes what LlamaForCausalLM of transformers does, whose names its weights have.

    Args:
        shape: The sizes of the model.
        block: Longest sequence that the model is meant for, for its description.

    Raises:
        RecipeError: The sizes do not fit each other.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    _check(shape)
    head_width = shape.width // shape.heads

    def linear(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False)

    def norm() -> nn.RMSNorm:
        return nn.RMSNorm(shape.width, eps=1e-5)

    class Attention(nn.Module):
        """Causal attention, in which several heads share one head of keys and values."""

        def __init__(self) -> None:
            super().__init__()
            self.q_proj = linear(shape.width, shape.heads * head_width)
            self.k_proj = linear(shape.width, shape.key_heads * head_width)
            self.v_proj = linear(shape.width, shape.key_heads * head_width)
            self.o_proj = linear(shape.heads * head_width, shape.width)

        def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
            batch, length, _ = x.shape
            # With tensor_parallel a rank has some of the heads, so -1 stands for their number.
            query, key, value = (
                project(x).view(batch, length, -1, head_width).transpose(1, 2)
                for project in (self.q_proj, self.k_proj, self.v_proj)
            )
            context = functional.scaled_dot_product_attention(
                rotate(query, turns), rotate(key, turns), value, is_causal=True, enable_gqa=True
            )
            output: Tensor = self.o_proj(context.transpose(1, 2).reshape(batch, length, -1))
            return output

    class MLP(nn.Module):
        """Hidden layer with a gate: SwiGLU (arXiv:2002.05202)."""

        def __init__(self) -> None:
            super().__init__()
            self.gate_proj = linear(shape.width, shape.hidden)
            self.up_proj = linear(shape.width, shape.hidden)
            self.down_proj = linear(shape.hidden, shape.width)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
            return output

    class Layer(nn.Module):
        """Attention and a hidden layer, each with a residual sum."""

        def __init__(self) -> None:
            super().__init__()
            self.self_attn = Attention()
            self.mlp = MLP()
            self.input_layernorm = norm()
            self.post_attention_layernorm = norm()

        def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
            x = x + self.self_attn(self.input_layernorm(x), turns)
            output: Tensor = x + self.mlp(self.post_attention_layernorm(x))
            return output

    class Body(nn.Module):
        """The embedding and the layers."""

        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
            self.layers = nn.ModuleList(Layer() for _ in range(shape.layers))
            self.norm = norm()

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed_tokens(tokens)
            turns = rotations(tokens.shape[1], head_width, shape.theta, x)
            for layer in self.layers:
                x = layer(x, turns)
            output: Tensor = self.norm(x)
            return output

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = describe(shape, block)
            self.model = Body()
            self.lm_head = linear(shape.width, shape.vocabulary)
            if shape.tied:
                self.lm_head.weight = self.model.embed_tokens.weight
            for name, weight in self.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    # Each layer adds to the residual sum twice, so these start smaller (GPT-2).
                    nn.init.normal_(weight, std=0.02 / math.sqrt(2 * shape.layers))
                elif weight.ndim == 2:
                    nn.init.normal_(weight, std=0.02)

        def forward(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.lm_head(self.model(tokens))
            return logits

    def rotations(length: int, width: int, theta: float, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of the angle of each position and feature (arXiv:2104.09864)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        exponents = torch.arange(0, width, 2, device=x.device, dtype=dtype) / width
        positions = torch.arange(length, device=x.device, dtype=dtype)
        angles = torch.outer(positions, 1.0 / theta**exponents).repeat(1, 2)
        return angles.cos(), angles.sin()

    def rotate(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """Turn pairs of features (i, i + width / 2) by the angle of their position."""
        cosine, sine = turns
        first, second = x.chunk(2, dim=-1)
        return (x * cosine + torch.cat((-second, first), dim=-1) * sine).type_as(x)

    return Net()


def _check(shape: Shape) -> None:
    """Refuse sizes that do not fit each other."""
    if shape.width % (2 * shape.heads):
        raise RecipeError(
            f"width={shape.width} over heads={shape.heads} gives heads of "
            f"{shape.width / shape.heads:g} features, and rotary positions need an even number. "
            "Give a width that is a multiple of 2 x heads."
        )
    if shape.heads % shape.key_heads:
        raise RecipeError(
            f"heads={shape.heads} is not a multiple of key_heads={shape.key_heads}: each head of "
            "keys serves the same number of heads. Give a number of key heads that divides heads."
        )


def describe(shape: Shape, block: int) -> dict[str, Any]:
    """Return a model's config.json, by which transformers builds it as LlamaForCausalLM."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "head_dim": shape.width // shape.heads,
        "hidden_act": "silu",
        "max_position_embeddings": block,
        "rms_norm_eps": 1e-5,
        # transformers 4 reads the first of these two, and transformers 5 the second.
        "rope_theta": shape.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def build_data(
    tokens: Path | None, token_type: TokenType | None, block: int, vocabulary: int
) -> Data:
    """Return data of (tokens, targets), each of `block` tokens; targets are the next tokens.

    In a folder, files named val* are held out, as nanoGPT names them. Otherwise up to 256 blocks
    at the end are, a tenth at most.

    Raises:
        RecipeError: The files cannot be read, have too few tokens, or have other tokens.
    """
    if tokens is None:
        tokens, token_type = standard_library(), "uint16"
    stored_as = token_type or token_type_for(vocabulary)
    files = find_files(tokens)
    held_out = [file for file in files if tokens.is_dir() and file.name.startswith("val")]
    training = [file for file in files if file not in held_out]
    if not training:
        raise RecipeError(
            f"tokens={tokens} has only files named val*, which are held out. Add one to train on."
        )
    options: dict[str, Any] = {"block": block, "token_type": stored_as, "vocabulary": vocabulary}
    train = TokenFiles(training, **options)
    if held_out:
        return _nonempty(train, TokenFiles(held_out, **options), tokens)
    boundary = len(train) - min(_HELD_OUT, math.ceil(len(train) / 10))
    return _nonempty(train.cut(0, boundary), train.cut(boundary, len(train)), tokens)


def _nonempty(train: TokenFiles, evaluation: TokenFiles, tokens: Path) -> Data:
    """Return the two data sets.

    Raises:
        RecipeError: One of them has no sample.
    """
    for blocks, use in ((train, "to train on"), (evaluation, "to hold out")):
        if not len(blocks):
            raise RecipeError(
                f"tokens={tokens} has too few tokens {use}: {sum(train.sizes):,} in "
                f"{len(train.files)} files, and block={train.block} needs "
                f"{(train.block or 0) + 1:,} for each sample. Give more tokens, or a smaller "
                "block=."
            )
    return Data(train=train, evaluation=evaluation)


def find_files(tokens: Path) -> list[Path]:
    """Return the file, or the .bin files of a folder in the order of their names.

    Raises:
        RecipeError: There is none.
    """
    if not tokens.exists():
        raise RecipeError(
            f"tokens={tokens}: there is no such file or folder. Give a .bin file of tokens, which "
            "`write_tokens` of launcher.recipes.pretrain_lm writes, or a folder of such files."
        )
    files = sorted(tokens.glob("*.bin")) if tokens.is_dir() else [tokens]
    if not files:
        raise RecipeError(f"tokens={tokens}: the folder has no .bin file. Give one that has.")
    return files


def token_type_for(vocabulary: int) -> TokenType:
    """Return how tokens of a vocabulary are stored unless `token_type` says otherwise."""
    return "uint16" if vocabulary <= 1 << 16 else "uint32"


def write_tokens(
    documents: Iterable[Sequence[int]], path: Path, *, vocabulary: int, end: int | None = None
) -> int:
    """Write documents one after the other to a file that `tokens` can name.

    The file appears when it is complete.

    Args:
        documents: The token ids of each document; bytes are ids, too.
        path: The file to write, whose folder is made.
        vocabulary: Number of different tokens, which decides between 16 and 32 bits.
        end: Token that follows each document; None adds nothing.

    Returns:
        The number of tokens in the file.

    Raises:
        RecipeError: A token is outside the vocabulary.
    """
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with temporary.open("wb") as file:
            for document in documents:
                ids = list(document) + ([] if end is None else [end])
                if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
                    raise RecipeError(
                        f"A document has tokens from {min(ids)} to {max(ids)}, and the vocabulary "
                        f"has those from 0 to {vocabulary - 1}."
                    )
                file.write(np.array(ids, token_type_for(vocabulary)).tobytes())
                count += len(ids)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def standard_library() -> Path:
    """Return a file with the bytes of the running Python's library, in the user's cache.

    It is written when it is first needed.
    """
    import platform

    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(home) / "launcher/tokens" / f"python-{platform.python_version()}.bin"
    if not path.exists():
        write_tokens(read_documents(None), path, vocabulary=256, end=0)
    return path


if __name__ == "__main__":
    main(pretrain_lm)
