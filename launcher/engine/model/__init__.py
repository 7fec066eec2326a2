"""Properties of models that depend on the split of a batch: BatchNorm, blocks, forward writes."""
