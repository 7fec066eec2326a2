"""Words and values of other trainers, and what messages offer instead of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from examples import recipe

from launcher import OverrideError, RecipeError
from launcher.recipe.catalogue import CALLS, settings
from launcher.recipe.foreign_names import (
    _NAMES,
    _VALUES,
    hint_for_name,
    hint_for_unknown,
    hint_for_value,
)
from launcher.recipe.overrides import build, read_arguments
from launcher.recipe.resolve import reference_of, resolve


def example() -> Any:
    return recipe()


REFERENCE = reference_of(example)

WORDS = {
    "learning_rate=0.3": "lr=0.3",
    "learningRate=0.3": "lr=0.3",
    "model.learning_rate=0.3": "lr=0.3",
    "learing_rate=0.3": "lr=0.3",
    "per_device_train_batch_size=16": "micro_batch_size=16",
    "train_batch_size=64": " batch_size=64",
    "gradient_accumulation_steps=4": "micro_batch_size",
    "num_epochs=3": "epochs=3",
    "num_train_epochs=3": "epochs=3",
    "max_steps=100": "steps=100",
    "bf16=true": "precision=bf16",
    "fp16=true": "precision=fp16",
    "mixed_precision=fp16": "precision=fp16",
    "weight_decay=0.1": "weight_decay=0.1",
    "warmup_steps=50": "warmup(cosine(), steps=50)",
    "lr_scheduler_type=cosine": "schedule=cosine",
    "optim=adamw_torch": "optimizer=adamw",
    "random_seed=3": "seed=3",
    "gradient_clip_val=1": "max_grad_norm=1",
    "dataloader_num_workers=4": "num_workers=4",
    "gradient_checkpointing=true": "activation_checkpointing=true",
    "zero_stage=3": "strategy=zero3",
    "deepspeed=ds.json": "strategy=zero2",
    "devices=4": "-n",
    "output_dir=here": "--out here",
    "early_stopping=3": "stop_after=3",
    "report_to=wandb": "trackers=wandb",
    "save_total_limit=3": "keep_checkpoints=3",
    "dropout=0.1": "def mine(*, dropout: ... = ...)",
}


@pytest.mark.parametrize(("argument", "offered"), WORDS.items())
def test_words_of_other_trainers_are_known(argument: str, offered: str) -> None:
    """A word of another trainer is refused with the setting, the value and no other word."""
    with pytest.raises(OverrideError) as caught:
        build(REFERENCE, read_arguments([argument]))
    assert offered in str(caught.value)
    assert "Did you mean" not in str(caught.value)


VALUES = {
    "strategy=deepspeed": "strategy=zero2",
    "strategy=fsdp2": "strategy=fsdp",
    "strategy=ddp_find_unused_parameters_true": "strategy=ddp",
    "precision=bf16-mixed": "precision=bf16",
    "precision=16": "precision=fp16",
    "precision=transformer-engine-fp8": "precision=bf16 fp8=true",
    "device=gpu": "device=cuda",
    "schedule=CosineAnnealingLR(T_max=10)": "schedule=cosine",
    "schedule=linear_with_warmup": "schedule=warmup(linear())",
    "offload=true": "offload=cpu",
}


@pytest.mark.parametrize(("argument", "offered"), VALUES.items())
def test_values_of_other_trainers_are_known(argument: str, offered: str) -> None:
    """A value of another trainer is refused with the value to write instead."""
    with pytest.raises(OverrideError) as caught:
        build(REFERENCE, read_arguments([argument]))
    assert offered in str(caught.value)


def test_what_is_switched_off_is_left_out() -> None:
    """A switch of another trainer that is off needs no setting."""
    assert "Leave it out" in hint_for_name("fp16", "false")
    assert hint_for_name("mixed_precision", "no") == hint_for_name("mixed_precision", "fp32")


def test_options_are_known() -> None:
    """The same words are known as options, and unknown words give nothing."""
    assert "lr=0.1" in hint_for_name("--learning-rate", "0.1")
    assert "lr=..." in hint_for_unknown("--learing-rate", ["epochs"])
    assert hint_for_name("--zebra") == hint_for_unknown("--zebra", ["epochs"]) == ""
    assert hint_for_name("learning_rate", "x" * 1000 + "\x1b") == hint_for_name("learning_rate")


def test_the_table_is_consistent() -> None:
    """No word is listed twice or is a setting, and what is offered can be given."""
    words = [word for advice in _NAMES for word in advice.words.split()]
    assert len(words) == len(set(words))
    assert not set(words) & settings().keys()
    for setting, values in _VALUES.items():
        assert setting in settings()
        for value in values:
            build(REFERENCE, read_arguments([f"{setting}={value}"]))
    assert CALLS.keys() <= _VALUES.keys()


@pytest.mark.parametrize(
    ("argument", "offered"),
    [("learning_rate=0.1", "lr=..."), ("epoch=3", "epochs"), ("strategy='deepspeed'", "zero2")],
)
def test_they_are_known_in_python(argument: str, offered: str, tmp_path: Path) -> None:
    """`Recipe(learning_rate=0.1)` is refused with the field that is meant."""
    file = tmp_path / f"case_{offered.strip('.=')}.py"
    file.write_text(
        "from launcher import Recipe\n\n\n"
        f"def case() -> Recipe:\n    return Recipe(name='case', model=print, data=print, "
        f"loss=print, lr=0.1, batch_size=1, {argument})\n"
    )
    with pytest.raises(RecipeError) as caught:
        build(resolve(f"{file}:case"))
    assert offered in str(caught.value)


def test_a_second_mark_is_not_added() -> None:
    """A message that ends with a question mark gets no full stop."""
    with pytest.raises(OverrideError, match=r"Did you mean adamw\?$"):
        build(REFERENCE, read_arguments(["optimizer=adam"]))
    assert hint_for_value("optimizer", "unknown") == ""
