"""The training loop, its construction from a recipe, and when it saves.

loop                the training step, evaluation, and the interfaces of callbacks and controllers
build               data, model and optimizer built from a recipe
initial_model       the recipe's model, built so that no rank needs memory for all of it
checkpoint_manager  when a run saves a checkpoint, and how it trains on meanwhile
evaluation          the weights of a run, evaluated without training
prediction          columns that the model of a run predicts for each sample
resume_point        the checkpoint that a run resumes from, and how its state is restored
"""
