"""Names of devices: what they stand for here, and which are refused."""

import pytest
import torch

from stable_sam_cuda.devices import own_device, pick_device


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:²", "cpu:0", "", "CPU"])
def test_a_name_of_no_device_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected auto, cpu, cuda or cuda:N"):
        pick_device(name)


@pytest.mark.parametrize(("devices", "said"), [(0, "torch sees none"), (2, "torch sees 2")], ids=["none", "two"])
def test_a_device_that_is_not_there_is_refused(devices: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    with pytest.raises(ValueError, match=said):
        pick_device("cuda:2")


@pytest.mark.parametrize(("there", "kind"), [(True, "cuda"), (False, "cpu")], ids=["with CUDA", "without CUDA"])
def test_auto_is_cuda_where_torch_has_it(there: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert pick_device("auto") == torch.device(kind)


@pytest.mark.parametrize(
    ("name", "own"), [("cuda", "cuda:1"), ("auto", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")]
)
def test_a_process_of_torchrun_has_a_gpu_of_its_own(name: str, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert own_device(name) == name
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device(name) == own
