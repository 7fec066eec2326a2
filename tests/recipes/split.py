"""Small language models that tensor parallelism splits: GPT-shaped and Llama-shaped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launcher import Data, Recipe, adamw, main, one_cycle, sgd
from launcher.recipes.gpt import TENSOR_PARALLEL, build_model, count_tokens, cross_entropy

if TYPE_CHECKING:
    from torch import nn

TOKENS = 256


def split_gpt() -> Recipe:
    """The recipe gpt's model with 2 blocks; texts of several lengths, in batches of 12 and 4."""
    return Recipe(
        name="split_gpt",
        model=lambda: build_model(layers=2, width=24, heads=4),
        data=build_data,
        forward=lambda model, batch: model(batch[0]),
        tensor_parallel_plan=TENSOR_PARALLEL,
        loss=cross_entropy,
        metrics={"cross_entropy": cross_entropy},
        count=count_tokens,
        optimizer=sgd(momentum=0.9, weight_decay=0.01),
        schedule=one_cycle(),
        batch_size=12,
        lr=0.3,
        lr_batch_size=12,
        epochs=2,
        train_samples=40,
        max_grad_norm=0.5,
        in_memory=True,
        record_samples=True,
    )


def split_dropping() -> Recipe:
    """The same with dropout before the last norm, and after a norm in each block."""
    from dataclasses import replace

    return replace(split_gpt(), name="split_dropping", model=build_dropping)


def split_llama(*, tied: bool = False) -> Recipe:
    """A Llama of transformers with fewer key heads than query heads, by its own plan.

    Args:
        tied: Whether the embedding and the head share a weight.
    """
    from dataclasses import replace

    return replace(
        split_gpt(),
        name="split_llama",
        model=lambda: build_llama(tied=tied),
        forward=lambda model, batch: model(input_ids=batch[0], use_cache=False).logits,
        tensor_parallel_plan=None,
        optimizer=adamw(weight_decay=0.1, decay_1d=False),
        lr=0.003,
    )


def split_qwen() -> Recipe:
    """A Qwen of transformers, which has norms of queries and keys, with SGD."""
    from dataclasses import replace

    return replace(split_llama(), name="split_qwen", model=build_qwen, optimizer=sgd(), lr=0.3)


def build_qwen() -> nn.Module:
    """Return a Qwen of 2 layers with 24 features."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=TOKENS,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=16,
    )
    model: nn.Module = Qwen3ForCausalLM(config)
    return model


def split_partly() -> Recipe:
    """The Qwen with a plan that leaves out the norms of queries and keys."""
    from dataclasses import replace

    plan = {
        "model.layers.*.self_attn.q_proj": "colwise",
        "model.layers.*.self_attn.k_proj": "colwise",
        "model.layers.*.self_attn.v_proj": "colwise",
        "model.layers.*.self_attn.o_proj": "rowwise",
    }
    return replace(split_qwen(), name="split_partly", tensor_parallel_plan=plan)


def build_dropping() -> nn.Module:
    """Return the model of `split_gpt` with dropout."""
    from torch import nn

    model: Any = build_model(layers=2, width=24, heads=4)
    model.norm = nn.Sequential(nn.Dropout(0.2), model.norm)
    for block in model.blocks:
        block.norm_hidden = nn.Sequential(block.norm_hidden, nn.Dropout(0.1))
    return model  # type: ignore[no-any-return]


def build_llama(*, heads: int = 4, key_heads: int = 2, tied: bool = False) -> nn.Module:
    """Return a Llama of 2 layers with 24 features."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=6 * heads,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def build_data() -> Data:
    """Return 40 training texts and 7 held-out ones, of 9 tokens with some padding."""
    import torch
    from torch.utils.data import TensorDataset

    generator = torch.Generator().manual_seed(5)
    texts = torch.randint(0, TOKENS, (47, 10), generator=generator)
    texts[:, 1::2] = (texts[:, ::2] * 3 + 1) % TOKENS
    targets: Any = texts[:, 1:].clone()
    for index, row in enumerate(targets):
        row[2 + index % 8 :] = -100
    return Data(
        train=TensorDataset(texts[:40, :-1], targets[:40]),
        evaluation=TensorDataset(texts[40:, :-1], targets[40:]),
    )


if __name__ == "__main__":
    main(split_gpt)
