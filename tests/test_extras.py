"""The command for a missing package is one that works for how this package was installed."""

import json
import sys
from importlib import metadata

import pytest

from stable_sam_cuda.extras import missing_extra

REQUIRED = [
    "torch>=2.11",
    'peft; extra == "train"',
    'cv <5; extra == "train"',
    'stable_sam_cuda[train]; extra == "study"',
]
REQUIRED += ['matplotlib; extra == "study"']
BY_NAME = "pip install peft 'cv <5'"


class Installed:
    requires = REQUIRED

    def __init__(self, origin):
        self.origin = origin

    def read_text(self, name):
        assert name == "direct_url.json"
        return self.origin if self.origin is None or isinstance(self.origin, str) else json.dumps(self.origin)


@pytest.fixture
def command(monkeypatch):
    def tell(origin, extra="train"):
        monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
        monkeypatch.setattr(metadata, "distribution", lambda name: Installed(origin))
        text = missing_extra("faster-coco-eval", extra)
        assert text.startswith("the package faster-coco-eval is needed and not installed: ") and "\n" not in text
        return text.split(": ", 1)[1]

    return tell


def test_a_folder_that_is_still_there_is_named(command, tmp_path):
    folder = tmp_path / "my clone"
    folder.mkdir()
    url = folder.as_uri()
    assert "%20" in url
    assert command({"url": url, "dir_info": {}}) == f"pip install '{folder}[train]'"
    assert command({"url": url, "dir_info": {"editable": True}}) == f"pip install -e '{folder}[train]'"


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (
            {"url": "https://a.example/b.git", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}},
            "pip install 'stable_sam_cuda[train] @ git+https://a.example/b.git@c0ffee'",
        ),
        (
            {"url": "https://a.example/b.whl", "archive_info": {}},
            "pip install 'stable_sam_cuda[train] @ https://a.example/b.whl'",
        ),
        (None, BY_NAME),
        ({"url": "file:///no/such/folder", "dir_info": {}}, BY_NAME),
        ({"url": "file:///no/such/file.whl", "archive_info": {}}, BY_NAME),
    ],
    ids=["version-control", "url", "index", "folder-gone", "wheel-gone"],
)
def test_elsewhere_the_url_or_else_the_packages_by_name(command, origin, expected):
    assert command(origin) == expected


def test_an_extra_that_names_another_is_followed(command):
    assert command(None, "study") == BY_NAME + " matplotlib"


def test_outside_the_active_environment_the_interpreter_is_named(command, monkeypatch):
    command(None)
    monkeypatch.setenv("VIRTUAL_ENV", "/another")
    assert missing_extra("peft").endswith(f"{sys.executable} -m pip install peft 'cv <5'")


@pytest.mark.parametrize(
    "fault", ["not JSON", metadata.PackageNotFoundError("stable_sam_cuda")], ids=["broken", "none"]
)
def test_without_a_record_the_sources_are_meant(fault, monkeypatch):
    def distribution(name):
        if isinstance(fault, Exception):
            raise fault
        return Installed(fault)

    monkeypatch.setattr(metadata, "distribution", distribution)
    assert missing_extra("peft").endswith("pip install '.[train]' in the folder of the sources")
