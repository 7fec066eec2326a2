"""HTML pages of runs, comparisons and tuning."""
