"""Short runs and checks that measure or inspect a recipe with the real training step.

trial          checks on a few samples before the first step of a run
data_identity  whether the data is the same on every rank, at every read, and after a resume
inspection     whether a recipe's steps would depend on the split over ranks (`launcher check`)
parity         comparison of two finished runs (`launcher prove`)
lr_trainings   short trainings at several learning rates (`launcher find lr`)
measuring      range test, gradient noise, micro-batch size and data loading (the finders)
profiling      a few steps under torch.profiler (`launcher profile`)
diagnostics    device, packages and communication of a rank (`launcher doctor`)
"""
