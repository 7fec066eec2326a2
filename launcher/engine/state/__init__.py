"""The state of a training run besides its data: model, optimizer and loss scale.

training_state     weights and optimizer state under names that every strategy shares
module_state       buffers and extra state of modules
fragments          parts of tensors that ZeRO keeps on one rank
initial_values     the parts of tensors that a rank fills when a model is built
meta_tensors       gives tensors on the meta device memory
shared_memory      memory of tensors that another process can read
host_copies        copies on the host, from which a checkpoint is written
hyperparameters    makes the recipe's optimizer and writes the schedule into it
update_rules       whether an optimizer updates split weights as it updates whole ones
loss_scaler        dynamic loss scaling for fp16
compiled           names of tensors in models that torch.compile wraps
"""
