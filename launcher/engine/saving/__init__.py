"""Reading and writing the safetensors files of checkpoints, and of initial and final weights.

checkpoint_tensors    the tensors of a checkpoint, sharded over ranks
shard_writer          the process that writes a rank's shards
weight_sources        the weights of a run as evaluations see them
stored_weights        initial weights from files
final_weights         the weights at the end of a run
"""
