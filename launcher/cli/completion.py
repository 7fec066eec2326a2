"""`launcher completion`: print the completion script of a shell."""

from __future__ import annotations

import click

from launcher.console.echo import echo

_VARIABLE = "_LAUNCHER_COMPLETE"
_SHELLS = ("bash", "zsh", "fish")


@click.command(short_help="Print a shell completion script.")
@click.argument("shell", type=click.Choice(_SHELLS))
def command(shell: str) -> None:
    """Print a script that lets SHELL complete commands, recipes, settings and run folders.

    \b
    eval "$(launcher completion bash)"                in ~/.bashrc
    eval "$(launcher completion zsh)"                 in ~/.zshrc
    launcher completion fish | source                 in ~/.config/fish/config.fish
    """
    from click.shell_completion import get_completion_class

    from launcher.cli import group

    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(group, {}, "launcher", _VARIABLE).source()
    if shell == "bash":  # the value follows `lr=` without a space
        script = script.replace(
            "    return 0\n",
            "    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace\n    return 0\n",
        )
    echo(script, exact=True)
