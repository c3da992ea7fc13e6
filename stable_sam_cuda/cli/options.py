"""What several verbs' options share, and options of several words that may be repeated, which typer itself has not."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import typer
from typer import Context
from typer.core import TyperCommand

NO_PLUGIN = "none"
# typer brings its own copy of click, older ones use the package: this is the class of either.
UsageError: Any = typer.BadParameter.__bases__[0]
TYPED_WORDS = "stable_sam_cuda.words"  # key of a context's meta


def join_words(arguments: Sequence[str], number_counts: Mapping[str, int]) -> list[str]:
    """``--box 1 2 3 4`` and ``--box 1,2,3,4`` become one ``--box=...``, for every option in ``number_counts``.

    Words are taken up to the option's count of numbers or to the next long option; too few are left for the option's
    own parser to complain about, and so is a label behind a point's two numbers. Everything after ``--`` is left alone.
    """
    joined: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            return [*joined, argument, *rest]
        if argument not in number_counts:
            joined.append(argument)
            continue
        words: list[str] = []
        count = 0
        while rest and count < number_counts[argument] and not rest[0].startswith("--"):
            words.append(rest.pop(0))
            count += len(re.findall(r"[^\s,]+", words[-1]))
        if argument == "--point" and rest and re.fullmatch(r":?[01]|:.*", rest[0]):
            words.append(rest.pop(0))
        joined.append(f"{argument}={' '.join(words)}")
    return joined


class VerbCommand(TyperCommand):
    """Command that takes no empty text where a name is expected, as an unset variable of a shell script gives it."""

    number_counts: ClassVar[
        Mapping[str, int]
    ] = {}  # option -> how many numbers it takes; its parser tells what is wrong

    # Commands get typer's public Context; their base class declares its parent, which typer keeps private.
    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:  # type: ignore[override]
        words = ctx.meta[TYPED_WORDS] = list(args)  # the parser uses args up
        may_be_empty = set(self.number_counts) | {
            one for param in self.params if param.default == "" for one in param.opts
        }
        names = {one for param in self.params for one in param.opts if one.startswith("-")}
        before = ""
        for argument in words:
            if argument == "--":
                break
            option, equals, value = argument.partition("=")
            if (equals and not value and option in names) or not argument:
                option = option if equals else (before if before in names else "PHOTO")
                if option not in may_be_empty:
                    raise typer.BadParameter(f"{option}: expected a value, got an empty one", ctx)
            before = argument
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            wrong = getattr(error, "option_name", None)
            if wrong and any(os.path.exists(one) and one.startswith(wrong) for one in words):
                message = f"{wrong}: expected an option; a file of that name is ./{wrong}"
                raise typer.BadParameter(message, ctx) from error
            raise


class PromptCommand(VerbCommand):
    """Command whose ``--box`` takes four numbers and ``--point`` two, each as one string value."""

    number_counts: ClassVar[Mapping[str, int]] = {"--box": 4, "--point": 2}

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:  # type: ignore[override]
        return super().parse_args(ctx, join_words(args, self.number_counts))
