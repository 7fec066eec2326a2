"""Hypothesis profiles: the same examples in each test run, and new ones for an hour."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_COMMON = settings(
    deadline=None,  # harness.py limits the processor time of each command
    database=None,
    print_blob=True,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
    ],
)
settings.register_profile("tests", _COMMON, derandomize=True, max_examples=150)
settings.register_profile("fuzz", _COMMON, derandomize=False, max_examples=30_000)
settings.load_profile(os.environ.get("LAUNCHER_FUZZ_PROFILE", "tests"))
