"""Samples: their order, how they are read, and the random state with which they are read.

sampler           the micro-batches that a rank takes, for the whole run
permutation       the order of samples in an epoch
seeds             seeds derived from a path of integers
randomness        the global random generators
reader            reads micro-batches, in the rank or in DataLoader workers
loader_workers    how DataLoader workers start, and what they can send
open_files        detects files whose position forked workers would share
fingerprint       describes samples in JSON, so that data sets can be compared
sample_files      the files that hold samples, for messages
shards            random access to samples in tar files
"""
