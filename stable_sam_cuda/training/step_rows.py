"""What a training step measures: a row (1, loss, IoU, alpha_1) a picture, means over its objects; zeros without any."""

import torch
from torch import Tensor


def sum_of(rows: Tensor) -> Tensor:
    """Rows added one after the other, so that the sum has the same bits wherever they came from."""
    totals = torch.zeros_like(rows[0])
    for row in rows:
        totals += row
    return totals


def alpha_by_kind(rows: Tensor, kinds: list[str]) -> dict[str, float]:
    """alpha_1 by prompt kind, the mean over its pictures; kinds without an object have none."""
    found = {}
    for kind in dict.fromkeys(kinds):
        pictures, _, _, alpha = sum_of(rows[[index for index, own in enumerate(kinds) if own == kind]]).tolist()
        if pictures:
            found[kind] = alpha / pictures
    return found
