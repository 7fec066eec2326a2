"""What a run measures about itself while it trains, and where the measurements go.

meter        loss, gradient norm and timing of each step, read from the device in batches
rank_times   time, data wait and memory of each rank
noise_meter  the gradient noise scale
flops        the operations of a forward pass
recorder     metrics.jsonl, samples/ and the progress display
trackers     experiment trackers such as TensorBoard and W&B
"""
