"""The end of a run before its last step, because its evaluations no longer improve."""

from __future__ import annotations

from dataclasses import replace

from launcher.engine.data.prefetching import micro_batches
from launcher.engine.training.context import Listener, TrainContext, TrainOutcome
from launcher.engine.training.evaluation import evaluate
from launcher.recipe.evaluation_sets import metric_name


def evaluate_rest(context: TrainContext, outcome: TrainOutcome, listener: Listener) -> TrainOutcome:
    """Evaluate the sets that a run which has ended early did not evaluate last (collective).

    Every set is evaluated after the last step. What was read ahead is for further steps.
    """
    rest = tuple(
        each
        for each in context.sampler.evaluations
        if metric_name(each.name, "loss") not in outcome.evaluation
    )
    if not rest:
        return outcome
    batches = micro_batches(context.reader, context.sampler.evaluation(rest), context.plan)
    values = evaluate(replace(context, micro_batches=batches), outcome.step, rest)
    listener.on_evaluation(outcome.step, values)
    return replace(outcome, evaluation={**outcome.evaluation, **values})
