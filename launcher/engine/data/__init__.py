"""Samples: their order, how they are read, and the random state with which they are read.

sampler           the micro-batches that a rank takes, for the whole run
permutation       the order of samples in an epoch
seeds             seeds derived from a path of integers
randomness        the global random generators
recipe_data       the data that a recipe's function returns, and its streams
reader            reads micro-batches, in the rank or in DataLoader workers
micro_batch       what a reader returns for a request
data_calls        calls of data sets, collate and count functions
loader_workers    how DataLoader workers start, and what they can send
open_files        detects files whose position forked workers would share
fingerprint       describes samples in JSON, so that data sets can be compared
sample_files      the files that hold samples, for messages
shards            random access to samples in tar files
"""
