"""The run folder, which is read and written only by the modules of this package.

rundir              the names of the files, and how files are written
run_record          run.yaml: what a run is
failure_record      failure.json: the first failure of a run
checkpoints         checkpoints/: list, verify, write and prune them
shard_files         the files of one rank in a checkpoint, and the program that writes them
part_exchange       sends such files to the node of a neighbour
quick_checkpoints   further checkpoints in a folder that each node has to itself
manifest            checkpoint.json: what a checkpoint holds, and the digests of its files
weight_choice       which weights of a run a command takes
resumption          whether a plan can resume a run, and what it changes
events, heartbeat   what happened to a run, and where each rank is
status, history     the state of a run, and everything that it recorded
ownership, locks    one process at a time writes into a run folder
process_owner       a process, told apart from every other one of every machine
mirror_record       mirror.json: the URL at which the run is kept as well
plan_recipe         builds and plans a recipe, and describes the run for run.yaml
job                 a run as it is handed to its ranks
run_result          what a run came to, for Python programs
evaluation_result   what evaluating its weights came to
prediction_files    predictions of ranks, merged into one file
provenance          versions, git state and command line of a run
redaction           keys and passwords, kept out of every file
cache               folders for measurements that later runs reuse
"""
