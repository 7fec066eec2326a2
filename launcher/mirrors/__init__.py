"""Run folders in object stores: mirrored while they are written, listed, and downloaded again.

    URL/run.yaml, metrics.jsonl, ...    the records of the run, named as in the folder
    URL/checkpoints/step-00000120/      a checkpoint, which exists once checkpoint.json does
    URL/objects.json                    the SHA-256 of every record, and who wrote them
    URL/mirror.lock                     the process that mirrors the run now

inventory           which files of a run folder are mirrored
object_index        objects.json
store_lock          mirror.lock: one process at a time writes below a URL
opened_url          takes a URL for a run, and refuses what could be wrong with it
stored_checkpoints  the checkpoints in a store
run_mirror          brings a URL up to date with a run folder
mirror_loop         when it does so, and what happens when the store fails
mirror_process      the process in which that happens, and what it is told
mirror_client       the process that starts it: the launcher of the run
run_download        downloads a run and verifies every digest
stored_runs         the runs below a URL
"""
