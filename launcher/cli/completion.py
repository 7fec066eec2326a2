"""`launcher completion`: what a shell needs to complete commands, recipes and settings."""

from __future__ import annotations

import click

_VARIABLE = "_LAUNCHER_COMPLETE"
_SHELLS = ("bash", "zsh", "fish")


@click.command(short_help="A script with which a shell completes what is typed.")
@click.argument("shell", type=click.Choice(_SHELLS))
def command(shell: str) -> None:
    """Print the script with which SHELL completes commands, recipes, settings and run folders.

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
    if shell == "bash":  # a value follows `lr=`, without a space
        script = script.replace(
            "    return 0\n",
            "    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace\n    return 0\n",
        )
    click.echo(script)
