"""Take a trained model to another task: other classes of clothing, or a language model of your own.

`finetune` begins with the weights of `pretrain`, which knows five kinds of Fashion-MNIST, and
learns the other five from few images: the layers that were trained learn slower than the new head
(`factor`), or not at all (`frozen=true`). `from_scratch` is the same without the weights.

    launcher run finetune:pretrain --out runs/pretrained
    launcher run finetune weights=runs/pretrained/model.safetensors

`causal_lm` trains a model that transformers can load from a folder, on text, with LoRA where `lora`
gives its rank: `pip install transformers`, and peft for LoRA.

Verified on 1 and 2 CPU ranks. With 50 images of each class, held-out accuracy, means of 3 seeds:

    from scratch                                 88.8 %
    trained layers at 0.3 of the head's rate     92.1 %
    at the same rate                             92.0 %
    frozen                                       91.9 %
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import Data, Recipe, RecipeError, adamw, cosine, main, warmup
from launcher.recipes.fashion_mnist import DATA, accuracy, build_model, cross_entropy, fashion_mnist
from launcher.recipes.fashion_mnist import build_data as build_fashion

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.utils.data import TensorDataset

FIRST, OTHERS = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)
"""Classes that are trained on first, and that are learned later."""

HEAD = "10."
"""The names of the head's weights begin with this, in `build_model` of fashion_mnist."""

_IGNORED = -100
"""The target of a token that the loss leaves out."""


def pretrain(*, data: Path = DATA) -> Recipe:
    """Five kinds of Fashion-MNIST, for `finetune` to begin with."""
    return replace(
        fashion_mnist(data=data),
        name="pretrain",
        data=lambda: choose(data, FIRST, None),
        train_samples=30_000,
    )


def finetune(
    *,
    weights: Path = Path("runs/pretrained/model.safetensors"),
    data: Path = DATA,
    images: int = 50,
    factor: float = 0.3,
    frozen: bool = False,
) -> Recipe:
    """The other five kinds, from few images, with the weights of `pretrain`."""
    return replace(
        from_scratch(data=data, images=images),
        name="finetune",
        model=lambda: load_body(weights),
        optimizer=lambda model, lr: make_optimizer(model, lr, factor=0.0 if frozen else factor),
    )


def from_scratch(*, data: Path = DATA, images: int = 50) -> Recipe:
    """The other five kinds, from few images, with nothing learned before."""
    return replace(
        fashion_mnist(data=data),
        name="from_scratch",
        data=lambda: choose(data, OTHERS, images),
        loss=cross_entropy,
        metrics={"accuracy": accuracy},
        batch_size=25,
        lr=0.05,
        lr_batch_size=25,
        epochs=20,
        evaluate_every=10_000,
        train_samples=images * len(OTHERS),
    )


def choose(folder: Path, classes: tuple[int, ...], most: int | None) -> Data:
    """Return the images of some classes, numbered from 0; the first `most` of each to train on."""
    import torch
    from torch.utils.data import TensorDataset

    def of(split: TensorDataset, most: int | None) -> TensorDataset:
        images, labels = split.tensors
        chosen = torch.cat([(labels == each).nonzero().flatten()[:most] for each in classes])
        numbered = torch.tensor([classes.index(int(label)) for label in labels[chosen]])
        return TensorDataset(images[chosen], numbered)

    whole = build_fashion(folder)
    return Data(train=of(whole.train, most), evaluation=of(whole.evaluation, None))


def load_body(weights: Path) -> nn.Module:
    """Return the net with trained layers below a new head.

    Raises:
        RecipeError: There are no such weights, or they are another net's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model = build_model()
    try:
        trained = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise RecipeError(
            f"weights={weights}: {error}. `launcher run finetune:pretrain --out runs/pretrained` "
            "trains some; weights= names them."
        ) from None
    body = {name: value for name, value in trained.items() if not name.startswith(HEAD)}
    try:
        missing, _ = model.load_state_dict(body, strict=False)
    except RuntimeError as error:
        raise RecipeError(f"weights={weights}: {error}") from None
    if any(not name.startswith(HEAD) for name in missing):
        raise RecipeError(f"weights={weights}: not of this net: no {', '.join(missing)} in it.")
    return model


def make_optimizer(model: nn.Module, lr: float, *, factor: float) -> Optimizer:
    """Return SGD that trains the head at `lr` and the layers below at `factor` of it.

    With a factor of 0 they are not trained; their BatchNorm still follows the new images.
    """
    from torch.optim import SGD

    head: list[Tensor] = []
    body: list[Tensor] = []
    for name, weight in model.named_parameters():
        (head if name.removeprefix("module.").startswith(HEAD) else body).append(weight)
    groups: list[dict[str, Any]] = [{"params": head}, {"params": body, "lr": lr * factor}]
    return SGD(groups, lr=lr, momentum=0.9, nesterov=True)


def causal_lm(
    *, model: Path, data: Path, block: int = 256, lora: int = 0, lora_layers: str = "all-linear"
) -> Recipe:
    """A causal language model from a folder of transformers', on a folder of text."""
    return Recipe(
        name="causal_lm",
        model=lambda: load_causal_lm(model, lora, lora_layers),
        data=lambda: build_text(model, data, block),
        forward=lambda net, batch: net(input_ids=batch[0]).logits,
        loss=token_cross_entropy,
        count=lambda batch: int((batch[1] != _IGNORED).sum()),
        optimizer=adamw(weight_decay=0.1, decay_1d=False),
        schedule=warmup(cosine(final_factor=0.1), fraction=0.05),
        batch_size=16,
        lr=2e-5 if not lora else 2e-4,
        lr_batch_size=16,
        lr_rule="sqrt",
        steps=200,
        max_grad_norm=1.0,
        in_memory=True,
    )


def load_causal_lm(folder: Path, lora: int, layers: str) -> nn.Module:
    """Return the model of a folder, and with LoRA's small matrices if their rank is given.

    Raises:
        RecipeError: It cannot be loaded, or what loads it is not installed.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise RecipeError("causal_lm needs `python -m pip install transformers`.") from None
    try:
        net: nn.Module = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise RecipeError(f"model={folder}: {error}") from None
    if not lora:
        return net
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise RecipeError("lora= needs `python -m pip install peft`.") from None
    config = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules=layers, task_type="CAUSAL_LM")
    adapted: nn.Module = get_peft_model(net, config)
    return adapted


def build_text(model: Path, folder: Path, block: int) -> Data:
    """Return the tokens of a folder's texts in blocks, by the tokenizer of the model's folder."""
    import torch
    from torch.utils.data import TensorDataset
    from transformers import AutoTokenizer

    from launcher.recipes.gpt import read_documents

    tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = [text.decode(errors="replace") for text in read_documents(folder)]
    tokens = [each for ids in tokenizer(texts)["input_ids"] for each in (*ids, *end)]
    if len(tokens) <= block:
        raise RecipeError(f"data={folder} has {len(tokens):,} tokens; block={block} needs more.")
    blocks = torch.tensor(tokens).unfold(0, block + 1, block)
    return Data(train=TensorDataset(blocks[:, :-1], blocks[:, 1:]))


def token_cross_entropy(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Return the sum of the cross-entropies, and the tokens."""
    from torch.nn.functional import cross_entropy

    flat, targets = logits.flatten(0, 1).float(), batch[1].flatten()
    total = cross_entropy(flat, targets, ignore_index=_IGNORED, reduction="sum")
    return total, int((targets != _IGNORED).sum())


if __name__ == "__main__":
    main(finetune)
