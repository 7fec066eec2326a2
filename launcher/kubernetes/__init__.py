"""Kubernetes jobs; this room imports no torch and no client library.

`cluster` reads site profiles. `pod` describes one node of a run, `manifests` wraps it into a Job, a
JobSet or a TrainJob. `kubectl` runs the command, `job_pods` reads the state of a job and its pods,
and `kubernetes_scheduler` puts them together.
"""
