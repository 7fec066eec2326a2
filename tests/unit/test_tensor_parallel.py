"""Tensor parallelism in a plan: data ranks, samples and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from examples import NODE

from launcher import PlanError, Recipe, RecipeError, make_plan
from launcher.console.explain import explain, summarize
from launcher.engine.backends.parallel_plan import find_styles
from launcher.engine.data.sampler import EvaluationSchedule, Sampler
from launcher.planning.plan import Plan
from launcher.recipes.gpt import TENSOR_PARALLEL, build_model

MACHINE = replace(NODE, num_gpus=8)


def recipe(**changes: Any) -> Recipe:
    """Return a recipe of batches of 20 samples under FSDP, with `changes`."""
    base = Recipe(
        name="split",
        model=lambda: None,
        data=lambda: None,  # type: ignore[arg-type, return-value]
        loss=lambda outputs, batch: (outputs, len(batch)),
        batch_size=20,
        lr=0.1,
        lr_batch_size=20,
        steps=3,
        train_samples=60,
        strategy="fsdp",
        tensor_parallel=2,
    )
    return replace(base, **changes)


def plan(nodes: int = 1, nproc: int = 8, **changes: Any) -> Plan:
    """Return the plan of `recipe(**changes)`."""
    return make_plan(recipe(**changes), MACHINE, nodes=nodes, nproc_per_node=nproc)


def test_samples_are_those_of_the_data_ranks() -> None:
    """The batch, its shares, the accumulation and the learning rate are those of data ranks."""
    split, plain = plan(nodes=2), plan(nproc=8, tensor_parallel=1)
    assert (split.world_size, split.data_ranks) == (16, 8)
    assert split.samples_per_rank[::2] == split.samples_per_rank[1::2] == plain.samples_per_rank
    assert split.samples_per_node == (12, 8)
    same = ("batch_size", "micro_batch_size", "accumulation_steps", "lr", "total_steps")
    assert [getattr(split, name) for name in same] == [getattr(plain, name) for name in same]
    micro = plan(nproc=4, micro_batch_size=4)
    assert (micro.data_ranks, micro.accumulation_steps, micro.micro_batch_size) == (2, 3, 4)


def test_a_batch_per_gpu_counts_all_gpus() -> None:
    """A batch that grows with the GPUs does not depend on tensor_parallel."""
    sizes = [
        plan(batch_size=None, batch_size_per_gpu=2, tensor_parallel=size).batch_size
        for size in (1, 2, 8)
    ]
    assert sizes == [16, 16, 16]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_data_ranks_take_each_sample_once(size: int) -> None:
    """In every step the data ranks take the samples that one rank takes, in the same order."""
    split = plan(tensor_parallel=size, micro_batch_size=2)
    held_out = (EvaluationSchedule(samples=7),)
    samplers = [
        Sampler(plan=split, rank=rank, train_samples=60, evaluations=held_out)
        for rank in range(split.data_ranks)
    ]
    requests = [list(sampler.requests()) for sampler in samplers]
    taken: dict[str, list[int]] = {"train": [], "evaluation": []}
    for of_rank in requests:
        for request in of_rank:
            taken[request.split] += request.indices if request.has_weight else []
    assert sorted(taken["train"]) == list(range(60))
    assert sorted(taken["evaluation"]) == list(range(7))
    assert len({len(of_rank) for of_rank in requests}) == 1


def test_the_plan_says_what_the_ranks_are() -> None:
    """The text of a plan has the data ranks, the group and that a group reads samples together."""
    text = " ".join(explain(plan()).split())
    assert "8 = 1 node x 8 GPUs = 4 data ranks x 2 tensor-parallel, FSDP over NCCL" in text
    assert "20 = 4 data ranks x 5 samples x 1 accumulation step" in text
    assert "4 data ranks x 5 samples" in summarize(plan())
    assert "read the same samples" in text


def test_a_plan_is_read_back() -> None:
    """A plan with groups survives its file, and one whose groups cross nodes is refused."""
    values = plan(nodes=2).to_dict()
    assert Plan.from_dict(values) == plan(nodes=2)
    assert plan().agreement()["tensor_parallel"] == 2
    with pytest.raises(Exception, match="tensor_parallel"):
        Plan.from_dict(values | {"tensor_parallel": 3})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tensor_parallel": 3}, "1, 2, 4 or 8"),
        ({"tensor_parallel": 16}, "1, 2, 4 or 8"),
        ({"strategy": "ddp"}, "strategy=ddp"),
        ({"strategy": "zero3"}, "strategy=zero3"),
        ({"virtual_ranks": 8}, "virtual_ranks=8"),
        ({"sync_batchnorm": True}, "sync_batchnorm=true"),
        ({"batch_size": 3, "lr_batch_size": 3}, "4 data ranks"),
        ({"noise_scale": True}, "noise_scale=true"),
    ],
)
def test_what_cannot_be_split_is_refused(changes: dict[str, Any], named: str) -> None:
    """Sizes, strategies and settings that contradict tensor_parallel are refused by name."""
    with pytest.raises(PlanError) as error:
        plan(**changes)
    assert named in str(error.value)


def test_groups_stay_on_a_node() -> None:
    """A size that divides all ranks but not those of a node is refused."""
    assert plan(nodes=2, nproc=4, tensor_parallel=4).data_ranks == 2
    with pytest.raises(PlanError, match="a node has 4 ranks"):
        plan(nodes=2, nproc=4, tensor_parallel=8)


@pytest.mark.parametrize("given", [{"head": "colum"}, {1: "colwise"}, {}, "colwise"])
def test_a_plan_of_unknown_styles_is_refused(given: Any) -> None:
    """A tensor-parallel plan maps names of modules to known styles."""
    with pytest.raises(RecipeError, match="tensor_parallel_plan"):
        recipe(tensor_parallel_plan=given)


def on_meta(build: Any, **arguments: Any) -> Any:
    """Return a model whose weights have shapes and no values."""
    import torch

    with torch.device("meta"):
        return build(**arguments)


def llama(heads: int, key_heads: int) -> Any:
    """Return a Llama with 6 features per head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=6 * heads,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
    )
    return on_meta(LlamaForCausalLM, config=config)


def test_the_plan_of_a_transformers_model_is_found() -> None:
    """Without a plan in the recipe, that of the outermost transformers model is taken."""
    pytest.importorskip("transformers", minversion="5.0")  # older plans have no lm_head
    from torch import nn

    model = llama(4, 2)
    styles = find_styles(model, None, 2)
    assert styles["model.layers.1.self_attn.q_proj"] == "colwise"
    assert styles["model.layers.0.mlp.down_proj"] == "rowwise"
    assert styles["lm_head"] in ("colwise_gather_output", "colwise_rep")
    inside = find_styles(nn.Sequential(model), None, 2)
    assert inside == {f"0.{name}": style for name, style in styles.items()}


def test_patterns_name_modules() -> None:
    """A * stands for one part of a name, and a plan of the recipe replaces the model's."""
    gpt = on_meta(build_model, layers=3, width=24, heads=4)
    styles = find_styles(gpt, TENSOR_PARALLEL, 4)
    assert [name for name in styles if name.endswith("qkv")] == [
        f"blocks.{number}.qkv" for number in range(3)
    ]
    assert styles["blocks.2.hidden.2"] == "rowwise"
    assert len(styles) == 2 + 4 * 3


@pytest.mark.parametrize(
    ("plan", "size", "named"),
    [
        (None, 2, "the recipe does not say how"),
        ({"blocks.*.qvk": "colwise"}, 2, "blocks.*.qvk"),
        ({"blocks.*.norm_hidden": "colwise"}, 2, "blocks.0.norm_hidden"),
        ({"head": "embedding_rowwise"}, 2, "is for Embedding"),
        ({"norm": "replicate"}, 2, "splits no module"),
        ({"blocks.*.hidden.0": "colwise"}, 5, "96 outputs of blocks.0.hidden.0"),
        ({"blocks.*.hidden.2": "rowwise"}, 5, "96 inputs of blocks.0.hidden.2"),
        ({"bytes": "embedding_rowwise"}, 3, "256 rows of bytes"),
        ({"blocks.*.qkv": "colwise"}, 3, "4 (heads)"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused(plan: Any, size: int, named: str) -> None:
    """The error names the module, and the number that the size does not divide."""
    gpt = on_meta(build_model, layers=2, width=24, heads=4)
    with pytest.raises(RecipeError) as error:
        find_styles(gpt, plan, size)
    assert named in str(error.value)
    assert f"tensor_parallel={size}" in str(error.value)


def test_heads_of_transformers_are_counted() -> None:
    """A Llama with 2 key heads cannot be split over 4 ranks, although its widths can."""
    with pytest.raises(RecipeError, match=r"has 2 \(num_key_value_heads\)"):
        find_styles(llama(8, 2), None, 4)


def test_styles_of_experts_are_refused() -> None:
    """A style of a transformers plan that launcher does not implement is refused by name."""
    pytest.importorskip("transformers", minversion="5.0")  # older plans have no experts
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 16),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_hidden_layers"), 2),
    )
    with pytest.raises(RecipeError, match="does not implement"):
        find_styles(on_meta(MixtralForCausalLM, config=config), None, 2)
