"""What several verbs' options share, and options of several words that may be repeated, which typer itself has not."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from typer import Context
from typer.core import TyperCommand

NO_PLUGIN = "none"


def join_words(arguments: Sequence[str], word_counts: Mapping[str, int]) -> list[str]:
    """``--box 1 2 3 4`` becomes ``--box="1 2 3 4"``, for every option in ``word_counts``.

    Words are taken up to the option's count or to the next long option; too few are left for the option's own
    parser to complain about. Everything after ``--`` is left alone.
    """
    joined: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            return [*joined, argument, *rest]
        if argument not in word_counts:
            joined.append(argument)
            continue
        words: list[str] = []
        while rest and len(words) < word_counts[argument] and not rest[0].startswith("--"):
            words.append(rest.pop(0))
        joined.append(f"{argument}={' '.join(words)}")
    return joined


class PromptCommand(TyperCommand):
    """Command whose ``--box`` takes four words and ``--point`` two, each as one string value."""

    word_counts: ClassVar[Mapping[str, int]] = {"--box": 4, "--point": 2}

    # Commands get typer's public Context; their base class declares its parent, which typer keeps private.
    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:  # type: ignore[override]
        return super().parse_args(ctx, join_words(args, self.word_counts))
