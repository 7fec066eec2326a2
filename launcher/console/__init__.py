"""Text for terminals.

- `explain`: the plan with its arithmetic, and how a resumed run differs from its first plan.
- `progress`: live progress of a run, as a bar, as plain lines or as JSON lines.
- `failure`: the report of a failed run.
- `findings_table`: the findings of `launcher check` and `launcher doctor`.
- `run_table`: the rows of `launcher runs`.
- `watch_screen`: the screen of `launcher watch`.
- `plots`: curves in the terminal and as PNG files.
- `tables`, `colours`: columns of text, and when to colour them.
- `echo`: output that must not fail because nobody reads it.
"""
