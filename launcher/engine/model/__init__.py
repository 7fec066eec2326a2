"""Parts of a model that distributed training handles specially.

averages          the average of the weights over the steps
batch_norm        BatchNorm statistics when a batch is split over ranks
sync_batch_norm   BatchNorm over the micro-batches of all ranks
blocks            repeated layers, which are sharded, compiled and recomputed as units
fp8               linear layers that multiply in fp8
four_bits         linear layers whose frozen weights are kept in 4 bits
forward_writes    weights and buffers that a forward pass modifies
lazy              initialises lazy layers
deferred          builds a model without values, which are computed later
recording         the operations of a model function, recorded on the meta device
apparent_device   lets tensors on the meta device look as if they were on the CPU
generator_states  what a model function does to random generators between its draws
replay            computes recorded operations, one tensor at a time
"""
