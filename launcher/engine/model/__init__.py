"""Parts of a model that distributed training handles specially.

batch_norm        BatchNorm statistics when a batch is split over ranks
sync_batch_norm   BatchNorm over the micro-batches of all ranks
blocks            repeated layers, which are sharded, compiled and recomputed as units
forward_writes    weights and buffers that a forward pass modifies
"""
