import contextlib
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from segment_anything import sam_model_registry

from stable_sam_cuda.sam import download, load_sam
from stable_sam_cuda.sam.download import RemoteCheckpoint, checkpoint_folder, find_or_download

CONTENT = bytes(range(256)) * 8192
FILE_NAME = "sam_vit_b_test.pth"


class Server:
    """A web server on this machine that answers every request with ``content``, cut after ``cut`` bytes."""

    def __init__(self):
        self.content, self.cut, self.status, self.requests = CONTENT, None, 200, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.path)
                self.send_response(outer.status)
                self.send_header("Content-Length", str(len(outer.content)))
                self.end_headers()
                # A reader that has seen enough hangs up.
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(outer.content[: outer.cut])

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def remote(content, sha256=None):
    return RemoteCheckpoint(FILE_NAME, len(content), sha256 or hashlib.sha256(content).hexdigest())


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = Server()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("STABLE_SAM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(download, "BASE_URL", server.url)
    monkeypatch.setitem(download.REMOTE_CHECKPOINTS, "vit_b", remote(CONTENT))
    yield server
    server.close()


def kept_files():
    return [path.name for path in checkpoint_folder().iterdir()]


def test_downloads_once_and_shows_progress(server, capsys):
    path = find_or_download("vit_b")
    assert path.read_bytes() == CONTENT
    assert kept_files() == [FILE_NAME]
    captured = capsys.readouterr()
    assert FILE_NAME in captured.err
    assert captured.out == ""
    assert find_or_download("vit_b") == path
    assert server.requests == ["/" + FILE_NAME]


def test_load_sam_uses_the_downloaded_file(server, sam, monkeypatch, tmp_path, build_small_sam):
    torch.save(sam.state_dict(), tmp_path / "sam.pth")
    server.content = (tmp_path / "sam.pth").read_bytes()
    monkeypatch.setitem(download.REMOTE_CHECKPOINTS, "vit_b", remote(server.content))
    monkeypatch.setitem(sam_model_registry, "vit_b", build_small_sam)
    loaded = load_sam("vit_b", device="cpu")
    assert torch.equal(loaded.mask_decoder.iou_token.weight, sam.mask_decoder.iou_token.weight)


def test_wrong_content_is_refused_and_not_kept(server):
    server.content = CONTENT[:-1] + b"!"
    with pytest.raises(ValueError, match=rf"checkpoint: expected {server.url}.* of SHA-256 .*; nothing was kept"):
        find_or_download("vit_b")
    assert kept_files() == []


def test_more_than_announced_is_refused_without_reading_on(server):
    server.content = CONTENT * 3
    with pytest.raises(ValueError, match=f"to be {len(CONTENT)} bytes"):
        find_or_download("vit_b")
    assert kept_files() == []


def test_a_cut_connection_is_named_and_can_be_tried_again(server):
    server.cut = 1_500_000
    with pytest.raises(ConnectionError, match=f"was cut after .* of {len(CONTENT)} bytes|could not be downloaded"):
        find_or_download("vit_b")
    assert kept_files() == []
    server.cut = None
    assert find_or_download("vit_b").read_bytes() == CONTENT


def test_an_error_page_is_named(server):
    server.status = 404
    with pytest.raises(ConnectionError, match=r"could not be downloaded .*404"):
        find_or_download("vit_b")
    assert kept_files() == []


def test_without_internet_the_message_says_what_to_do(server):
    server.http.server_close()
    with pytest.raises(ConnectionError) as caught:
        find_or_download("vit_b")
    message = str(caught.value)
    for part in (FILE_NAME, "could not be downloaded", "Give a local file as checkpoint", "STABLE_SAM_HOME"):
        assert part in message
    assert kept_files() == []


def test_a_file_of_another_size_is_not_taken_for_metas(server):
    path = checkpoint_folder() / FILE_NAME
    path.parent.mkdir()
    path.write_bytes(CONTENT[:100])
    with pytest.raises(ValueError, match=r"expected 2097152 bytes of Meta's vit_b, got 100 in .* \(delete the file"):
        find_or_download("vit_b")
    assert server.requests == []


def test_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("STABLE_SAM_HOME", str(tmp_path))
    assert checkpoint_folder() == tmp_path
    monkeypatch.delenv("STABLE_SAM_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checkpoint_folder() == tmp_path / ".cache" / "stable_sam_cuda"


def test_without_a_home_directory_the_variable_is_named(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("STABLE_SAM_HOME", raising=False)
    monkeypatch.setattr(download.Path, "home", home)
    with pytest.raises(FileNotFoundError, match=r"checkpoint: expected a folder .* set STABLE_SAM_HOME to a folder"):
        find_or_download("vit_b")
