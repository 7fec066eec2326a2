"""Optimizers with small states or of whole matrices, exact on any number of ranks.

named            makes the optimizers that recipes name
flat             updates each element alike, whatever holds it
rounding         stochastic rounding whose bits belong to elements
small_adamw      AdamW with states in bfloat16
small_sgd        SGD for weights in bfloat16
eight_bit        AdamW with states in 8 bits
schedule_free    AdamW that averages weights
muon             Muon for matrices
combined         optimizers of different weights, seen as one
matrices         matrices, and the elements of each that this rank has
exchanges        whole matrices of sharded weights, each computed on one rank
joint            the optimizers of several objectives, seen as one
taking_steps     takes the step of an optimizer, if the gradient is finite
"""
