"""Execute a notebook in a kernel of Jupyter, as its user would, and interrupt it where asked to.

python kernel.py NOTEBOOK.ipynb EXECUTED.ipynb [--interrupt]

With --interrupt the kernel is interrupted once, as soon as a cell shows a step of a run.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


class Client(NotebookClient):  # type: ignore[misc]  # mypy skips its imports
    """Keeps all that a display has shown, of which the outputs have only the last."""

    def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
        if msg["msg_type"] == "update_display_data":
            shown = cell.metadata.setdefault("shown", [])
            shown.append(msg["content"]["data"]["text/plain"])
        return super().process_message(msg, cell, cell_index)


async def execute(notebook: Path, executed: Path, *, interrupts: bool) -> None:
    """Execute all cells, also after an error, and write them with their outputs.

    What displays have shown on the way is in the metadata of their cells.
    """
    content = nbformat.read(notebook, as_version=4)
    client = Client(content, timeout=240, kernel_name="python3", force_raise_errors=True)
    async with client.async_setup_kernel():
        interrupter = asyncio.create_task(interrupt(client) if interrupts else asyncio.sleep(0))
        for index, cell in enumerate(content.cells):
            try:
                await client.async_execute_cell(cell, index)
            except CellExecutionError:
                continue  # the outputs have it
        interrupter.cancel()
    nbformat.write(content, executed)


async def interrupt(client: Client) -> None:
    """Interrupt the kernel while a run takes steps."""
    while not any(
        line.startswith("step ")
        for cell in client.nb.cells
        for line in cell.metadata.get("shown", [])
    ):
        await asyncio.sleep(0.02)
    await client.km.interrupt_kernel()


if __name__ == "__main__":
    folder = Path.cwd()
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        os.environ[variable] = str(folder / "jupyter")
    notebook, executed = map(Path, sys.argv[1:3])
    asyncio.run(execute(notebook, executed, interrupts="--interrupt" in sys.argv))
