"""What the plugin's router decides, read by a hook: the modules know nothing of it."""

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from stable_sam_cuda.modules.router import DynamicRouter


class RouterProbe:
    """alpha_1, the weight of the deformed features, of the last forward of a SAM's router, if it has one.

    It listens as long as it is used as a context.
    """

    def __init__(self, sam: Sam) -> None:
        self.last: Tensor | None = None
        self.routers = [module for module in sam.modules() if isinstance(module, DynamicRouter)]

    def __enter__(self) -> "RouterProbe":
        self.hooks = [router.register_forward_hook(self._hear) for router in self.routers]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _hear(self, router: nn.Module, inputs: tuple[Tensor, ...], alpha: Tensor) -> None:
        self.last = alpha.detach()[:, 0].float()

    def alpha(self, prompts: int, device: torch.device) -> Tensor:
        """alpha_1 (prompts,) of the last forward; zeros without a router."""
        return torch.zeros(prompts, device=device) if self.last is None else self.last
