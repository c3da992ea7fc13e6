"""What the plugin's router chose while prompts were answered: alpha_1, the share of the deformed features."""

from collections.abc import Iterator
from contextlib import contextmanager

from segment_anything.modeling import Sam
from torch import Tensor

from stable_sam_cuda.sam.stable_block import stable_blocks_of


class RouterRecord:
    """alpha_1 in the decoder's last block, of the prompts since the last `take`; ``blocks`` ask the router in turn."""

    def __init__(self, blocks: int = 1) -> None:
        self.blocks = blocks
        self._calls = 0
        self._batches: list[Tensor] = []

    def add(self, alpha: Tensor) -> None:
        """Alpha (B, 2) of B prompts, as the router returns it to one block after the other."""
        self._calls += 1
        if self._calls % self.blocks == 0:
            self._batches.append(alpha.detach()[:, 0].float())

    def take(self) -> float | None:
        """The mean alpha_1 of what was recorded, which is then forgotten; None where no router has run."""
        batches, self._batches = self._batches, []
        prompts = sum(len(batch) for batch in batches)
        return sum(batch.sum().item() for batch in batches) / prompts if prompts else None


@contextmanager
def recorded_routing(sam: Sam) -> Iterator[RouterRecord]:
    """Record the router of ``sam``'s plugin; of a plain SAM, or a plugin without router, nothing."""
    blocks = stable_blocks_of(sam)
    record = RouterRecord(max(1, len(blocks)))
    router = blocks[-1].plugin.router if blocks else None
    hook = None if router is None else router.register_forward_hook(lambda _module, _inputs, alpha: record.add(alpha))
    try:
        yield record
    finally:
        if hook is not None:
            hook.remove()
