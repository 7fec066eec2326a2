"""The run folder, read and written only here: records, checkpoints, events and ownership."""
