"""What a run measures about itself while it trains, and where the measurements go.

meter              loss, gradient norm and timing of each step, read from the device in batches
rank_times         time, data wait and memory of each rank
noise_meter        the gradient noise scale
flops              the operations of a forward pass
metric_calls       calls of a recipe's metrics, whose errors say where they were called
metric_states      the states of a metric of torchmetrics, and their combination over ranks
collected_metrics  metrics over all predictions of an evaluation
recorder           metrics.jsonl, samples/ and the progress display
trackers           experiment trackers such as TensorBoard and W&B
"""
