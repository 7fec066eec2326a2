"""Text for terminals: the plan explained, progress, failures, tables and curves."""
