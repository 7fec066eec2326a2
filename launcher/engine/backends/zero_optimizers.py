"""The modules that DeepSpeed imports with the first ZeRO optimizer of a process.

DeepSpeed asks there whether the optimizer is its own Muon, whose import prepares torch.compile and
takes longer than all else that a rank does before its first step. Ranks that are forked from a
process that has imported this module find it imported.
"""

from __future__ import annotations

import contextlib
import importlib

with contextlib.suppress(ImportError):  # DeepSpeed before 0.18 has no Muon
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
