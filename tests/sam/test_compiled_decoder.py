"""torch.compile over the whole stabilised decoder: one graph, which serves any number of points."""

import pytest
import torch
from decoder_inputs import encoded
from tolerances import DECODER, assert_matches

from stable_sam_cuda import DeformableSampler
from stable_sam_cuda.modules import attention
from stable_sam_cuda.modules.attention import AttentionPath
from stable_sam_cuda.sam import plugin_of, stabilize
from stable_sam_cuda.sam.shared_decoder import SINGLE_MASK, decode

PATHS = {"sampled": ("auto", AttentionPath.SAMPLED), "fused": ("reference", AttentionPath.FUSED)}


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 2], ids=["last-block", "both-blocks"])
@pytest.mark.parametrize("path", PATHS)
@torch.no_grad()
def test_one_graph_serves_one_to_ten_points(sam, perturb, monkeypatch, path, blocks):
    stabilize(sam, perturb(DeformableSampler(blocks=blocks), scale=0.05))
    plugin_of(sam).backend, chosen = PATHS[path]
    monkeypatch.setattr(attention, "choose_path", lambda *arguments, **options: chosen)
    graphs = []

    def counted(module, inputs):
        graphs.append(module)
        return module

    def decode_all(image, sparse, dense):
        return decode(sam, image, sparse, dense, SINGLE_MASK)

    torch._dynamo.reset()
    compiled = torch.compile(decode_all, fullgraph=True, backend=counted)
    for points in range(1, 11):
        image, sparse, dense = encoded(sam, points, seed=points)
        torch._dynamo.mark_dynamic(sparse, 1)
        for name, found, expected in zip(
            ("logits", "scores"), compiled(image, sparse, dense), decode_all(image, sparse, dense), strict=True
        ):
            assert_matches(name, found, expected, DECODER[torch.float32])
    assert len(graphs) == 1
