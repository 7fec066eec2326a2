"""Recipe functions that were typed into a notebook or at a prompt, on their way to the ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from launcher.errors import RunDirError
from launcher.recipe.resolve import Reference, check_importable, is_in_no_file
from launcher.runs.files import write_atomic
from launcher.runs.private_folder import private_folder
from launcher.runs.rundir import RunDir


@contextlib.contextmanager
def importable(reference: Reference, *, for_ranks: bool = False) -> Iterator[Reference]:
    """Yield a recipe that other processes can import for the duration of the context.

    A function that is in no file is written to a temporary folder.

    Args:
        reference: The recipe.
        for_ranks: Whether ranks import it, for which a function in a file has to be at its top
            level.

    Raises:
        RecipeError: Other processes could not import the function.
        RunDirError: No temporary folder can be made.
    """
    if not is_in_no_file(reference.function):
        if for_ranks:
            check_importable(reference)
        yield reference
        return
    from launcher.recipe import by_value

    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(private_folder())
        except OSError as error:
            raise RunDirError(
                f"The recipe {reference.name} is in no file, and no temporary folder can be made "
                f"for it: {error}. Set TMPDIR to a writable folder."
            ) from None
        location = by_value.write(reference.function, folder)
        yield replace(reference, location=location, folder=folder)


def keep_recipe(reference: Reference, run_dir: RunDir) -> Reference:
    """Copy the files of a recipe that is in no file of its own into the run folder.

    Returns:
        The recipe as the ranks, and later commands, find it; unchanged if it is in a file.

    Raises:
        RunDirError: The files cannot be written.
    """
    if reference.folder is None:
        return reference
    for file in reference.folder.iterdir():
        if file.name.startswith("recipe."):
            write_atomic(run_dir.path / file.name, file.read_bytes())
    location = str(run_dir.path / reference.recorded)
    return replace(reference, location=location, folder=None)
