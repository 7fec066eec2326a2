"""Entry point of `launcher`, `python -m launcher` and processes that run this file by its path.

`launcher.environment.program` explains why a path is used. Python puts the folder of a file that
it runs first on sys.path, where modules of this package could hide modules of Python. This file
removes its folder, imports the package that it belongs to, and puts the working folder first, as
`python -m` does.
"""

import os
import sys


def _import_this_package(folder: str) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("launcher", f"{folder}/__init__.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["launcher"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["launcher"])


def _prepare() -> None:
    folder = os.path.realpath(__file__).rpartition("/")[0]
    is_first = sys.path[:1] == [folder]  # not with `python -P`
    if is_first:
        del sys.path[0]
    if "launcher" not in sys.modules:
        _import_this_package(folder)
    if is_first:
        from pathlib import Path

        sys.path.insert(0, str(Path.cwd()))


def start() -> None:
    """Run the command line, or the part of a command that this process is started for."""
    if sys.argv[1:2] == ["--ssh-remote"]:
        from launcher.launch.ssh_remote import main as run_remote

        sys.exit(run_remote(*sys.argv[2:]))
    if sys.argv[1:2] == ["--ssh-remote-state"]:
        from launcher.launch.ssh_remote import state

        sys.exit(state(sys.argv[2]))
    if sys.argv[1:2] == ["--mirror-process"]:
        from launcher.mirrors.mirror_process import serve_mirror

        sys.exit(serve_mirror())
    from launcher.interrupted_start import end_when_interrupted

    end_when_interrupted()
    from launcher.cli import main

    if sys.argv[1:2] == ["--warm-server"]:
        from launcher.cli.warm_start import serve_commands

        main(serve_commands(*sys.argv[2:]), starts_warm=False)
    main()


if not __package__:  # run by its path, by Python or by multiprocessing
    _prepare()

if __name__ == "__main__":
    start()
