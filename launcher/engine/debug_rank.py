"""A run in the process of its command, for debuggers: one rank that hides nothing.

The standard streams stay those of the command, so that pdb works. There is no watchdog, and nothing
is forked. An error is shown with the shapes of the tensors in the calls that led to it.
"""

from __future__ import annotations

import os
import pdb  # noqa: T100
import signal
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from launcher.engine.process_group import join
from launcher.engine.rank_process import keep_open
from launcher.engine.ranks.failures import fail
from launcher.engine.ranks.output import Output, open_output
from launcher.engine.run import train_rank
from launcher.environment.world import World
from launcher.planning.plan import Plan
from launcher.printable import is_recipe_file, printable, printable_line, traceback_of
from launcher.recipe.recipe import Recipe
from launcher.runs.job import OutputMode, RecipeSource, ReportWriter
from launcher.runs.rundir import RunDir
from launcher.signals import EXIT_BY_SIGNAL, StopRequest

_MAX_TENSORS = 24
"""Tensors that are shown of one call."""

_MAX_DEPTH = 3
"""Depth to which tensors are looked for in tuples, lists and dicts."""


def debug_rank(
    recipe: Recipe,
    plan: Plan,
    run_dir: RunDir,
    *,
    source: RecipeSource,
    output_mode: OutputMode,
    write_report: ReportWriter | None,
    post_mortem: bool,
) -> int:
    """Train as the only rank of a run, with anomaly detection; return the exit code.

    Ctrl-C raises KeyboardInterrupt wherever the run is, as in any program.

    Args:
        recipe: What to train.
        plan: Its plan for one rank.
        run_dir: The run folder.
        source: What the recipe is built from.
        output_mode: What the terminal shows.
        write_report: Writes the page that experiment trackers receive; None sends no page.
        post_mortem: Whether pdb opens where an error was raised.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(plan.threads_per_rank))
    world = World()
    backend, _ = join(recipe, plan, world, lambda: run_dir)
    keep_open(backend)
    output = open_output(
        run_dir.log(0),
        own_terminal=False,
        on_terminal=True,
        output_mode=output_mode,
        has_bar=False,
    )
    try:
        with torch.autograd.set_detect_anomaly(True):
            train_rank(
                recipe,
                plan,
                backend,
                run_dir,
                output,
                stop=StopRequest(),  # it listens to no signal; with it checkpoints are saved
                source=source,
                write_report=write_report,
            )
        backend.close()
    except BaseException as error:  # noqa: BLE001  # whatever the recipe's own code raises
        return _show(error, world, run_dir, output, post_mortem=post_mortem)
    return 0


def _show(
    error: BaseException, world: World, run_dir: RunDir, output: Output, *, post_mortem: bool
) -> int:
    """Record and show an error, with the tensors in its calls; open pdb there if asked to."""
    origin = _origin(error)
    if isinstance(error, KeyboardInterrupt):
        code: int = EXIT_BY_SIGNAL + signal.SIGINT
        print(traceback_of(error), end="", file=output.errors, flush=True)
    else:
        code = fail(error, world, run_dir, output=output, shows=True)
    if text := tensors_text(origin):
        print(f"\n{text}", file=output.errors, flush=True)
    if post_mortem and origin.__traceback__ is not None:
        print(f"\n{printable_line(f'{type(origin).__name__}: {origin}')}", file=output.errors)
        debugger = _PostMortem()
        debugger.reset()
        debugger.interaction(None, origin.__traceback__)
    return code


class _PostMortem(pdb.Pdb):
    """pdb in the calls that led to an error, at the innermost one in the recipe's code."""

    def get_stack(
        self, f: FrameType | None, t: TracebackType | None
    ) -> tuple[list[tuple[FrameType, int]], int]:
        stack, index = super().get_stack(f, t)
        places = [
            place
            for place, (frame, _) in enumerate(stack)
            if is_recipe_file(frame.f_code.co_filename)
        ]
        return stack, places[-1] if places else index


def _origin(error: BaseException) -> BaseException:
    """Return the innermost cause of an error that passed through the recipe's code, or the error.

    Errors of this package say which sample or function raised something; that has the calls.
    """
    origin, chain, seen = error, [error], {id(error)}
    for each in chain:
        if any(is_recipe_file(frame.f_code.co_filename) for frame, _ in _calls(each)):
            origin = each
        for cause in (each.__cause__, each.__context__):
            if cause is not None and id(cause) not in seen:
                seen.add(id(cause))
                chain.append(cause)
    return origin


def _calls(error: BaseException) -> list[tuple[FrameType, int]]:
    return list(traceback.walk_tb(error.__traceback__))


def tensors_text(error: BaseException) -> str:
    """Return shape, type and device of the tensors in the calls that led to an error.

    Shown are the calls in files that are not installed, as recipes are not, and the modules of
    torch that those called. Weights are shown of the module whose method was called.
    """
    calls = _calls(error)
    places = [i for i, (frame, _) in enumerate(calls) if is_recipe_file(frame.f_code.co_filename)]
    if not places:
        return ""
    parts = []
    for number, (frame, line) in enumerate(calls):
        is_module = isinstance(frame.f_locals.get("self"), nn.Module)
        if number not in places and not (number > places[-1] and is_module):
            continue
        found = dict(_tensors_of(frame.f_locals))
        if not found:
            continue
        name = Path(frame.f_code.co_filename).name
        parts.append(f"  {name}, line {line}, in {frame.f_code.co_name}")
        width = max(map(len, found))
        shown = list(found.items())[:_MAX_TENSORS]
        parts += [f"    {name:{width}}  {_described(tensor)}" for name, tensor in shown]
        if len(found) > len(shown):
            parts.append(f"    and {len(found) - len(shown)} more")
    return printable("\n".join(["tensors in these calls:", *parts])) if parts else ""


def _tensors_of(values: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors among the variables of a call, and in its containers, by their names."""
    for name, value in values.items():
        if name == "self" and isinstance(value, nn.Module):
            weights = (*value.named_parameters(recurse=False), *value.named_buffers(recurse=False))
            yield from ((f"self.{each}", tensor) for each, tensor in weights)
        else:
            yield from _tensors_in(name, value, _MAX_DEPTH)


def _tensors_in(name: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif depth and type(value) is dict:
        for key, each in value.items():
            yield from _tensors_in(f"{name}[{key!r}]", each, depth - 1)
    elif depth and isinstance(value, Sequence) and isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from _tensors_in(f"{name}[{index}]", each, depth - 1)


def _described(tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    gradient = ", requires_grad" if tensor.requires_grad else ""
    return f"{kind} {list(tensor.shape)} on {tensor.device}{gradient}"
