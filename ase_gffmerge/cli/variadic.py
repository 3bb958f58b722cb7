"""Options that take several values: ``--test A B`` as well as ``--test A --test B``."""

from collections.abc import Collection, Sequence
from typing import Any

from typer.core import TyperCommand


class VariadicCommand(TyperCommand):
    """A verb whose repeatable options may be followed by several values, once its arguments have come first."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the options, then parse as usual."""
        repeatable = {
            text for option in self.params if getattr(option, "multiple", False) for text in option.opts
        }
        return super().parse_args(ctx, spread(args, repeatable))


def spread(arguments: Sequence[str], repeatable: Collection[str]) -> list[str]:
    """Write an option of ``repeatable`` before each of its values; leaves a line that begins with an option alone."""
    if not arguments or arguments[0].startswith("-"):
        return list(arguments)
    result: list[str] = []
    option = None
    for argument in arguments:
        if argument.startswith("-"):
            option = argument if argument in repeatable else None
        elif option and result[-1] != option:
            result.append(option)
        result.append(argument)
    return result
