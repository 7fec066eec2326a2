"""Calls of a recipe's data sets, collate and count functions, whose errors name the samples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch.utils.data import default_collate

from launcher.engine.backends.nested_tensors import describe_argument, describe_nested
from launcher.engine.data.sample_files import file_of
from launcher.engine.data.sampler import MicroBatchRequest
from launcher.errors import LauncherError, RecipeError, SampleError
from launcher.printable import (
    class_name,
    kind_of,
    printable_line,
    shortened,
    text_of,
    traceback_of,
)
from launcher.recipe.evaluation_sets import title_of
from launcher.recipe.function_checks import call_text, called_with


def call_for(
    name: str,
    request: MicroBatchRequest,
    function: Callable[[Any], Any],
    argument: Any,
    *,
    indices: list[int] | None = None,
    details: Callable[[], str] = str,
) -> Any:
    """Call a function of the recipe.

    Args:
        name: The name of the function, for error messages.
        request: The request that is being read.
        function: The function.
        argument: Its only argument.
        indices: The samples that the call concerns; None for all samples of the request.
        details: Returns what is added to the message.

    Raises:
        SampleError: The function raised an exception; the message names the samples.
    """
    try:
        return function(argument)
    except (LauncherError, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001  # the recipe's code may raise anything
        samples = request.indices if indices is None else indices
        shown = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
        calls = error.__traceback__.tb_next if error.__traceback__ is not None else None
        error.__traceback__ = calls  # without the call above
        raise SampleError(
            f"{name} raised {class_name(error)} for sample{'s' * (len(samples) > 1)} {shown} "
            f"(epoch {request.epoch}): {text_of(error, 2_000) or 'it has no text'}{details()}"
            + (f"\n\n{traceback_of(error).rstrip()}" if calls is not None else "")
        ) from None


def count_items(count: Callable[[Any], Any], request: MicroBatchRequest, batch: Any) -> int:
    """Return the number of items in a batch, as the recipe's count function counts them.

    Raises:
        SampleError: The function raised an exception.
        RecipeError: It returned something else than a whole number.
    """
    name, described = "The recipe's count function", functools.partial(describe_argument, batch)
    returned = call_for(
        name, request, count, batch, details=lambda: f"\n{call_text(name, batch=described())}"
    )
    try:
        number = int(returned)
        is_whole = number == returned and number >= 0
    except (TypeError, ValueError, OverflowError):
        is_whole = False
    if is_whole:
        return number
    found = describe_argument(returned)
    shown = f"{returned} ({found})" if isinstance(returned, (int, float)) else found
    raise RecipeError(
        f"{name} returned {shown}; expected the number of items that the loss counts in the batch, "
        f"a whole number of at least 0. {called_with(name, batch=described())}"
    )


def all_samples(samples: Any, request: MicroBatchRequest) -> list[Any]:
    """Return what `__getitems__` of a data set returned, as a list.

    Raises:
        SampleError: It is no list with a sample for each index.
    """
    is_list = isinstance(samples, Iterable)
    found = list(samples) if is_list else []
    if is_list and len(found) == len(request.indices):
        return found
    what = f"{len(found):,} samples" if is_list else kind_of(samples)
    raise SampleError(
        f"__getitems__ of the {request.split} data was called with {len(request.indices):,} "
        f"indices and returned {what}. It returns a list with one sample for each index, in order."
    )


def collated(
    collate: Callable[[list[Any]], Any] | None, request: MicroBatchRequest, samples: list[Any]
) -> Any:
    """Return the batch of the samples.

    Args:
        collate: The recipe's collate function; None joins equal shapes, as torch does by default.
        request: The request that is being read.
        samples: Its samples.

    Raises:
        SampleError: The samples cannot be joined; the message names two that differ.
    """
    if collate is not None:
        name = f"The collate function of the {title_of(request.split)} data"
        count = f"{len(samples):,} sample{'s' * (len(samples) > 1)}"

        def details() -> str:
            called = call_text("The collate function", samples=f"a list of {count}")
            return f"\n{_describe_samples(request, samples)}.\n{called}"

        return call_for(name, request, collate, samples, details=details)
    try:
        return default_collate(samples)
    except Exception as error:  # noqa: BLE001  # depends on the types of the samples
        split = "training" if request.split == "train" else title_of(request.split)
        reason = f"torch's default_collate raised {type(error).__name__}"
        raise SampleError(
            f"The {split} samples of a batch cannot be joined. "
            f"{_describe_samples(request, samples)}. Give Data(collate=...) a function that turns "
            "a list of samples into a batch, by padding for example, or make the samples alike "
            f"({reason}: {printable_line(text_of(error))})."
        ) from None


def _describe_samples(request: MicroBatchRequest, samples: list[Any]) -> str:
    """Describe the first sample of a request, and the first one that is built differently."""
    descriptions = [describe_nested(sample) for sample in samples]
    first, text = descriptions[0], f"Sample {request.indices[0]} is {descriptions[0]}"
    pairs = zip(request.indices, descriptions, strict=False)
    different = [(index, description) for index, description in pairs if description != first]
    if not different:
        return f"{text}, and so are the others" if len(samples) > 1 else text
    index, description = different[0]
    more = f", and {len(different) - 1} more differ from the first" if different[1:] else ""
    return f"{text}, but sample {index} is {description}{more}"


def shown_files(dataset: Any, indices: list[int]) -> str:
    """Return the files of samples for a message; empty if they are not known."""
    names = dict.fromkeys(file_of(dataset, index) for index in indices[:64])
    known = [printable_line(shortened(name, 300)) for name in names if name is not None]
    more = ", ..." if len(known) > 3 else ""
    return f" (in {', '.join(known[:3])}{more})" if known else ""
