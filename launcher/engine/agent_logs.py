"""Tells the elastic agent to leave the ranks' output alone: each rank opens its own log."""

from __future__ import annotations

import tempfile

from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs


class NoLogs(LogsSpecs):
    """No redirects and no tees; only the error files that the agent insists on."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        none = dict.fromkeys(envs, "")
        self._folder = tempfile.TemporaryDirectory(prefix="launcher-")
        errors = {rank: f"{self._folder.name}/{rank}.json" for rank in envs}
        return LogsDest(
            stdouts=none,
            stderrs=dict(none),
            tee_stdouts={},
            tee_stderrs={},
            error_files=errors,
        )

    @property
    def root_log_dir(self) -> str:
        return ""
