"""Execute a notebook in a kernel of Jupyter, as its user would, and interrupt it where asked to.

python kernel.py NOTEBOOK.ipynb EXECUTED.ipynb [METRICS.jsonl]

The kernel is interrupted once, as soon as the file METRICS.jsonl has two lines.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


async def execute(notebook: Path, executed: Path, metrics: Path | None) -> None:
    """Execute all cells, also after an error, and write them with their outputs."""
    content = nbformat.read(notebook, as_version=4)
    client = NotebookClient(content, timeout=240, kernel_name="python3", force_raise_errors=True)
    async with client.async_setup_kernel():
        interrupter = asyncio.create_task(interrupt(client, metrics))
        for index, cell in enumerate(content.cells):
            try:
                await client.async_execute_cell(cell, index)
            except CellExecutionError:
                continue  # the outputs have it
        interrupter.cancel()
    nbformat.write(content, executed)


async def interrupt(client: NotebookClient, metrics: Path | None) -> None:
    """Interrupt the kernel while a run writes its metrics."""
    if metrics is None:
        return
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 1):
        await asyncio.sleep(0.02)
    await client.km.interrupt_kernel()


if __name__ == "__main__":
    folder = Path.cwd()
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        os.environ[variable] = str(folder / "jupyter")
    metrics = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    asyncio.run(execute(Path(sys.argv[1]), Path(sys.argv[2]), metrics))
