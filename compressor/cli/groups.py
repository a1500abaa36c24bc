"""Groups of commands: what each is in whole sentences, and the nearest one to a misspelt name."""

import click

from compressor.errors import InputError, nearest

WIDEST = 200
"""Characters of what a list says of a command, before it is wrapped."""


class Group(click.Group):
    """A group whose list of commands is wrapped, where click cuts it."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, one.get_short_help_str(WIDEST)) for name, one in found if one is not None]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, known = args[0], self.list_commands(ctx)
        # Whoever completes a line goes through here, too, and wants no error.
        if name not in known and not name.startswith("-") and not ctx.resilient_parsing:
            raise InputError(
                f"no such command: {ctx.command_path} {name}", hint=nearest(name, known)
            )
        return super().resolve_command(ctx, args)


def usage(error: click.ClickException) -> str:
    """What is wrong with what was typed, and where its options are listed."""
    context = getattr(error, "ctx", None)
    message = error.format_message()
    if isinstance(error, click.NoSuchOption) and context is not None:
        known = [name for param in context.command.params for name in param.opts]
        longer = [name for name in known if name.startswith(error.option_name)]
        if longer:
            message = f"No such option {error.option_name!r}. Did you mean {longer[0]!r}?"
    return message + (f" (see {context.command_path} --help)" if context is not None else "")
