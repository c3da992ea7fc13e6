"""Pictures with masks, as the verbs that take ``--data`` use them: what is broken is said and left out."""

from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from stable_sam_cuda.training.dataset import check_samples
from stable_sam_cuda.training.samples import Sample


def usable_samples(samples: Sequence[Sample], console: Console) -> list[Sample]:
    """The samples that can be loaded; a line on the console for each of the others, and their number.

    Raises:
        ValueError: none is left.
    """
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("checking", total=len(samples))
        good, broken = check_samples(samples, lambda count: progress.advance(task, count))
    for name, reason in broken:
        console.print(f"skipped {name}: {reason}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if broken:
        console.print(f"{len(broken)} of {len(samples)} pictures skipped", style="yellow", highlight=False)
    if not good:
        name, reason = broken[0]
        raise ValueError(
            f"data: expected pictures with masks, got {len(broken)} broken ones; the first, {name}: {reason}"
        )
    return good
