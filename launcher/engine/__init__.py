"""The processes that train. The only torch in the package is in this folder.

worker         entry points of ranks that the elastic agent starts
external       entry points of ranks that torchrun, accelerate, srun or a user starts
rank_process   what the process of every rank does: watchdog, diagnostics, exit
process_group  joining the group of ranks and agreeing on the plan
run            one rank's run, from its start or a checkpoint to the result
training/      the training loop, its construction from a recipe, checkpoints during a run
probes/        checks and measurements that use the training step
model/         changes to a model: BatchNorm, blocks, writes in forward
metrics/       measurements of steps and where they go
data/          which samples a rank takes, and how they are read
saving/        tensors of checkpoints and the final weights
backends/      local, Accelerate and DeepSpeed behind one interface
state/         state of model and optimizer as a checkpoint holds it
ranks/         rendezvous, watchdog, failures and output of a rank
"""
