"""Files of trained methods: what comes out of a file is what went in, and what does not fit is refused."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stable_sam_cuda.sam import plugin_of
from stable_sam_cuda.sam.lite import new_sam_lite
from stable_sam_cuda.training.methods import METHODS, install_method, load_method, method_file_name, save_method


def fresh_sam():
    torch.manual_seed(0)
    return new_sam_lite("lite0", 64)


def trained(method, tmp_path):
    """A SAM whose method's parameters are no longer those it began with, and its file."""
    sam = fresh_sam()
    parameters = install_method(sam, method)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn_like(parameter))
    path = tmp_path / method_file_name(method)
    save_method(sam, method, parameters, path, method=method, pictures=7)
    return sam, path


@pytest.mark.parametrize("method", sorted(METHODS))
def test_any_method_comes_back_into_a_fresh_sam(method, tmp_path):
    sam, path = trained(method, tmp_path)
    other = fresh_sam()
    record = load_method(other, path)
    assert (record.method, record.base_model) == (method, "sam_lite")
    assert record.training == {"method": method, "pictures": 7}
    expected, found = sam.state_dict(), other.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_names_of_shipped_plugins_are_taken_too():
    sam = fresh_sam()
    assert load_method(sam, "auto").method == "stable"
    assert plugin_of(sam) is not None


def rewritten(path, **changes):
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | changes
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model": "vit_h"}, "expected weights trained on sam_lite, got .*pt.safetensors, trained on vit_h"),
        ({"method": "prayer"}, "expected one of the methods"),
        ({"method": "dt"}, "does not fit method dt on this model"),
        ({"training": "{"}, "expected metadata that describe a method"),
        ({"format_version": "9"}, "expected format_version 1"),
        ({"format": "other"}, "expected a file of format"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_files_that_do_not_fit_are_refused(changes, message, tmp_path):
    _, path = trained("pt", tmp_path)
    rewritten(path, **changes)
    with pytest.raises(ValueError, match=message):
        load_method(fresh_sam(), path)


def test_truncated_missing_and_not_finite_files_are_refused(tmp_path):
    sam, path = trained("pt", tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="expected a whole"):
        load_method(fresh_sam(), path)
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        load_method(fresh_sam(), tmp_path / "no.safetensors")
    parameters = {name: value for name, value in sam.named_parameters() if value.requires_grad}
    with torch.no_grad():
        next(iter(parameters.values())).fill_(torch.nan)
    with pytest.raises(ValueError, match="expected finite weights"):
        save_method(sam, "pt", parameters, path)
