"""HTML pages of runs, of comparisons and of tuning.

- `run_page`, `comparison`, `tuning_page`: the pages of `launcher report` and `launcher tune`.
- `finder_sections`: sections that show what `launcher find` measured.
- `page`: pages, sections and tables as values, and how they become HTML (`page.html`).
- `figures`: plots, bars and timelines, drawn by plotly and described in text.
- `write`: writes `report.html` into a run folder.
"""
