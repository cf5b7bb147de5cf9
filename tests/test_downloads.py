"""Downloads: fetched once, checked, from the next mirror where one fails, never left in part. No
network but loopback."""

import hashlib
import threading

import pytest
from helpers import error_line
from network import GOOD, GOOD_SHA, no_network, server  # noqa: F401 (fixtures)

import data
from loaders import fetch


def test_download_good_is_fetched_once(server, tmp_path):
    """The bytes arrive whole, leave no other file behind, and a second call asks the server
    nothing."""
    path = tmp_path / "deep" / "file.bin"
    for _ in range(2):
        assert fetch.download(server.root + "/good", GOOD_SHA, path, timeout=5) == path
    assert path.read_bytes() == GOOD and server.hits == ["/good"]
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize(
    "page, says",
    [
        ("/cut", "333 of 70001 bytes"),
        ("/silent_cut", "sha256"),
        ("/wrong", "sha256"),
        ("/missing", "404"),
        ("/stall", "timed out"),
    ],
)
def test_download_failure_names_everything_and_leaves_nothing(server, tmp_path, page, says):
    """Truncation, wrong bytes, 404 and stall: one line with the reason, URL, hash and path; no file
    appears."""
    path = tmp_path / "file.bin"
    seconds = 0.3 if page == "/stall" else 60
    line = error_line(fetch.download, server.root + page, GOOD_SHA, path, timeout=seconds)
    assert says in line and server.root + page in line and GOOD_SHA in line and str(path) in line
    assert list(tmp_path.iterdir()) == []


def test_download_part_exists_only_while_fetching(server, tmp_path):
    """The bytes go to a .part file beside the target, and the target does not exist before they are
    all there."""
    path = tmp_path / "file.bin"
    seen = []
    t = threading.Thread(
        target=lambda: seen.append(
            error_line(fetch.download, server.root + "/stall", GOOD_SHA, path, timeout=60)
        )
    )
    t.start()
    names = set()
    while t.is_alive():
        names |= {p.name for p in tmp_path.iterdir()}
        if names:  # the server waits for this
            server.go_on.set()
        t.join(0.01)
    assert len(names) == 1 and names.pop().endswith(".part")
    assert len(seen) == 1 and "333 of 70001 bytes" in seen[0]
    assert list(tmp_path.iterdir()) == []


def test_download_mirrors_are_tried_in_order(server, tmp_path):
    """A 404 and a wrong file move on to the next URL; those after the good one are not asked; all
    failing are all named."""
    urls = [server.root + p for p in ("/missing", "/wrong", "/good", "/cut")]
    assert fetch.download(urls, GOOD_SHA, tmp_path / "a", timeout=5).read_bytes() == GOOD
    assert server.hits == ["/missing", "/wrong", "/good"]
    line = error_line(fetch.download, urls[:2], GOOD_SHA, tmp_path / "b", timeout=5)
    assert urls[0] in line and urls[1] in line


def test_download_offline_is_one_line(no_network, tmp_path):
    """Without a network the message names URL, hash and path; a file placed by hand is then taken
    as it is."""
    path = tmp_path / "file.bin"
    line = error_line(fetch.download, "http://127.0.0.1:9/x", GOOD_SHA, path, timeout=1)
    assert "http://127.0.0.1:9/x" in line and GOOD_SHA in line and str(path) in line and no_network
    path.write_bytes(GOOD)
    assert fetch.download("http://127.0.0.1:9/x", GOOD_SHA, path) == path


def test_download_wrong_file_is_named_and_kept(no_network, tmp_path):
    """A different file at the target is neither used nor overwritten, and no connection is
    tried."""
    path = tmp_path / "file.bin"
    path.write_bytes(GOOD[1:])
    line = error_line(fetch.download, "http://127.0.0.1:9/x", GOOD_SHA, path)
    assert str(path) in line and GOOD_SHA in line and hashlib.sha256(GOOD[1:]).hexdigest() in line
    assert path.read_bytes() == GOOD[1:] and not no_network


def test_pinned_hashes_are_well_formed():
    """Every pinned corpus has a sha256 of 64 hex digits and only https URLs."""
    for name, (file, sha256, urls) in data.PINNED.items():
        assert (
            len(sha256) == 64
            and int(sha256, 16)
            and file
            and urls
            and all(u.startswith("https://") for u in urls)
        ), name
