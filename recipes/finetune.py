"""Fine-tune a trained model: on other classes of clothing, or a language model on your own text.

`finetune` starts from the weights of `pretrain`, which was trained on five classes of
Fashion-MNIST, and learns the other five classes from few images. The pretrained layers learn more
slowly than the new head (`factor`), or not at all (`frozen=true`). `from_scratch` trains the same
net from random weights.

    launcher run finetune:pretrain --out runs/pretrained
    launcher run finetune pretrained=runs/pretrained/model.safetensors

`causal_lm` trains a language model that transformers loads from a folder on a folder of text, with
LoRA if `lora` gives the rank of its matrices. It needs `pip install transformers`, and peft for
LoRA. With `packed=true` a sample consists of whole documents that do not attend to each other. With
`four_bit=true`, the weights that LoRA adapts are kept in 4 bits (QLoRA), on CPUs too.
model.safetensors then holds the frozen weights and the LoRA matrices, under the names of peft:

    model = load_causal_lm(folder, lora=8, layers="all-linear", four_bit=False)
    model.load_state_dict(safetensors.torch.load_file("model.safetensors"), strict=False)
    model.merge_and_unload().save_pretrained("merged")

Verified on 1 and 2 CPU ranks. Held-out accuracy with 50 images of each class, means of 3 seeds:

    from scratch                                       88.8 %
    pretrained layers at 0.3 of the head's rate        92.1 %
    pretrained layers at the head's rate               92.0 %
    pretrained layers frozen                           91.9 %
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
"""Labels of the classes for pretraining and for fine-tuning."""

HEAD = "10."
"""Prefix of the names of the head's weights in `build_model` of fashion_mnist."""

_IGNORED = -100
"""Target of a token that the loss skips."""


def pretrain(*, data: Path = DATA) -> Recipe:
    """Five classes of Fashion-MNIST, to pretrain the weights for `finetune`.

    Args:
        data: Folder of Fashion-MNIST's four files.
    """
    return replace(
        fashion_mnist(data=data),
        name="pretrain",
        data=lambda: choose(data, FIRST, None),
        train_samples=30_000,
    )


def finetune(
    *,
    pretrained: Path = Path("runs/pretrained/model.safetensors"),
    data: Path = DATA,
    images: int = 50,
    factor: float = 0.3,
    frozen: bool = False,
) -> Recipe:
    """The other five classes from few images, starting from the weights of `pretrain`.

    Args:
        pretrained: The model.safetensors of a run of `pretrain`.
        data: Folder of Fashion-MNIST's four files.
        images: Training images of each class.
        factor: Factor of the learning rate of the layers below the head.
        frozen: Whether only the head is trained.
    """
    return replace(
        from_scratch(data=data, images=images),
        name="finetune",
        model=lambda: load_body(pretrained),
        optimizer=lambda model, lr: make_optimizer(model, lr, factor=0.0 if frozen else factor),
    )


def from_scratch(*, data: Path = DATA, images: int = 50) -> Recipe:
    """The other five classes from few images, starting from random weights.

    Args:
        data: Folder of Fashion-MNIST's four files.
        images: Training images of each class.
    """
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


def choose(folder: Path, classes: tuple[int, ...], limit: int | None) -> Data:
    """Return the images of some classes, with labels from 0.

    Args:
        folder: Folder of Fashion-MNIST.
        classes: Labels to select.
        limit: Number of training images of each class, the first ones; None takes all.
    """
    import torch
    from torch.utils.data import TensorDataset

    def select(split: TensorDataset, limit: int | None) -> TensorDataset:
        images, labels = split.tensors
        rows = torch.cat([(labels == label).nonzero().flatten()[:limit] for label in classes])
        new_labels = torch.tensor([classes.index(int(label)) for label in labels[rows]])
        return TensorDataset(images[rows], new_labels)

    fashion = build_fashion(folder)
    return Data(train=select(fashion.train, limit), evaluation=select(fashion.evaluation, None))


def load_body(pretrained: Path) -> nn.Module:
    """Return the net with pretrained layers below a new head.

    Raises:
        RecipeError: The file cannot be read, or its weights belong to another net.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model = build_model()
    try:
        trained = load_file(pretrained)
    except (OSError, SafetensorError) as error:
        raise RecipeError(
            f"pretrained={pretrained}: {error}. Train them with `launcher run finetune:pretrain "
            "--out runs/pretrained`, and give the path of their model.safetensors as pretrained=."
        ) from None
    body = {name: value for name, value in trained.items() if not name.startswith(HEAD)}
    try:
        missing, _ = model.load_state_dict(body, strict=False)
    except RuntimeError as error:
        raise RecipeError(f"pretrained={pretrained}: {error}") from None
    if any(not name.startswith(HEAD) for name in missing):
        raise RecipeError(
            f"pretrained={pretrained}: the file has no {', '.join(missing)}, which this net needs. "
            "Give the weights of finetune:pretrain."
        )
    return model


def make_optimizer(model: nn.Module, lr: float, *, factor: float) -> Optimizer:
    """Return SGD with learning rate `lr` for the head and `lr * factor` for the layers below.

    A factor of 0 freezes the weights of these layers; the statistics of their BatchNorm still
    follow the new images.
    """
    from torch.optim import SGD

    head: list[Tensor] = []
    body: list[Tensor] = []
    for name, weight in model.named_parameters():
        (head if name.removeprefix("module.").startswith(HEAD) else body).append(weight)
    groups: list[dict[str, Any]] = [{"params": head}, {"params": body, "lr": lr * factor}]
    return SGD(groups, lr=lr, momentum=0.9, nesterov=True)


def causal_lm(
    *,
    model: Path,
    data: Path,
    block: int = 256,
    packed: bool = False,
    lora: int = 0,
    lora_layers: str = "all-linear",
    four_bit: bool = False,
) -> Recipe:
    """A causal language model that transformers loads from a folder, on a folder of text.

    Args:
        model: Folder of a model of transformers, with its tokenizer.
        data: Folder of text files.
        block: Length of a training sample in tokens.
        packed: Whether samples are packed from documents that do not attend to each other;
            otherwise they are cut from all text in a row.
        lora: Rank of the LoRA matrices; 0 trains all weights.
        lora_layers: Names of the layers that get LoRA matrices, as peft reads them.
        four_bit: Whether the weights of these layers are kept in 4 bits (QLoRA).
    """
    return Recipe(
        name="causal_lm",
        model=lambda: load_causal_lm(model, lora, lora_layers, four_bit=four_bit),
        data=lambda: build_text(model, data, block, packed=packed),
        forward=call_causal_lm,
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


def load_causal_lm(folder: Path, lora: int, layers: str, *, four_bit: bool) -> nn.Module:
    """Return the language model in a folder, with LoRA matrices of rank `lora` unless it is 0.

    Raises:
        RecipeError: The model cannot be loaded, transformers or peft is not installed, or 4 bits
            are asked for without LoRA.
    """
    if four_bit and not lora:
        raise RecipeError(
            "four_bit=true freezes the weights of linear layers, and lora=0 adds nothing that "
            "could be trained. Give the rank of LoRA matrices, such as lora=8."
        )
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise RecipeError(
            "causal_lm needs transformers: run `python -m pip install transformers`."
        ) from None
    try:
        net: nn.Module = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise RecipeError(f"model={folder}: {error}") from None
    if not lora:
        return net
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise RecipeError(f"lora={lora} needs peft: run `python -m pip install peft`.") from None
    config = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules=layers, task_type="CAUSAL_LM")
    adapted: nn.Module = get_peft_model(net, config)
    if four_bit:
        keep_in_four_bits(adapted)
    return adapted


def keep_in_four_bits(adapted: nn.Module) -> None:
    """Keep the weights of linear layers in 4 bits where peft has added LoRA matrices to them.

    Raises:
        RecipeError: There is no such layer.
    """
    from torch import nn

    from launcher import four_bits

    found = [(module, getattr(module, "base_layer", None)) for module in adapted.modules()]
    linear = [(module, layer) for module, layer in found if isinstance(layer, nn.Linear)]
    if not linear:
        raise RecipeError(
            "four_bit=true keeps torch's linear layers in 4 bits, and LoRA adapts none in this "
            "model. Leave four_bit out."
        )
    for module, layer in linear:
        module.base_layer = four_bits(layer)


def call_causal_lm(net: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Return the logits of a batch of (tokens, targets), or also positions and documents."""
    from launcher import attention_mask

    tokens, _, *boundaries = batch
    if not boundaries:
        logits: Tensor = net(input_ids=tokens).logits
        return logits
    positions, documents = boundaries
    mask = attention_mask(documents)
    packed: Tensor = net(input_ids=tokens, position_ids=positions, attention_mask=mask).logits
    return packed


def build_text(model: Path, folder: Path, block: int, *, packed: bool = False) -> Data:
    """Return the text files of a folder as blocks of tokens, by the tokenizer of the model.

    Args:
        model: Folder of the tokenizer.
        folder: Folder of the text files.
        block: Tokens of a sample.
        packed: Whether the boundaries of documents are kept; a document is a file, or a piece of
            `block` tokens of a longer one.

    Raises:
        RecipeError: The text has too few tokens for one block.
    """
    import torch
    from torch.utils.data import TensorDataset
    from transformers import AutoTokenizer

    from launcher import Packed
    from launcher.recipes.gpt import read_documents

    tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = [text.decode(errors="replace") for text in read_documents(folder)]
    documents = [[*ids, *end] for ids in tokenizer(texts)["input_ids"]]
    if packed:
        return Data(train=Packed(documents, tokens=block, long="split"), collate=in_order)
    tokens = list(itertools.chain.from_iterable(documents))
    if len(tokens) <= block:
        raise RecipeError(
            f"data={folder} has {len(tokens):,} tokens, and block={block} needs at least "
            f"{block + 1:,}. Give more text, or a smaller block=."
        )
    blocks = torch.tensor(tokens).unfold(0, block + 1, block)
    return Data(train=TensorDataset(blocks[:, :-1], blocks[:, 1:]))


def in_order(samples: list[dict[str, Any]]) -> list[Tensor]:
    """Return (tokens, targets, positions, documents) of a batch of packed samples."""
    from torch.utils.data import default_collate

    batch = default_collate(samples)
    return [batch[name] for name in ("input_ids", "targets", "position_ids", "document_ids")]


def token_cross_entropy(logits: Tensor, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the sum of the cross-entropies in nats and the number of tokens.

    The number is a tensor: reading it would make the host wait for the GPU in every step.
    """
    from torch.nn.functional import cross_entropy

    flat, targets = logits.flatten(0, 1).float(), batch[1].flatten()
    total = cross_entropy(flat, targets, ignore_index=_IGNORED, reduction="sum")
    return total, (targets != _IGNORED).sum()


if __name__ == "__main__":
    main(finetune)
