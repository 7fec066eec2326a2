"""Reading and writing the safetensors files of checkpoints and of the final weights.

checkpoint_tensors    the tensors of a checkpoint, sharded over ranks
final_weights         the weights at the end of a run
"""
