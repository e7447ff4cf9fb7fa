"""Fashion-MNIST: the small set inside the package, the full one in its usual places, and its download."""

import gzip
import importlib.util
import shutil
import socket
import struct
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from robustlayers.core.errors import UserError
from robustlayers.data import fashion, fetch, idx, load

ROOT = Path(__file__).parents[2]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def message(function, *args, **options):
    with pytest.raises(UserError) as error:
        function(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder of four tiny IDX files that pass for Fashion-MNIST, and no other place where it could be found."""
    source, digests = tmp_path / "source", {}
    source.mkdir()
    for name in fashion.DIGESTS:
        shape = (3, 8, 8) if "images" in name else (3,)
        array = np.random.default_rng(len(digests)).integers(0, 10, shape, dtype=np.uint8)
        content = struct.pack(f">{1 + len(shape)}I", 0x0800 + len(shape), *shape) + array.tobytes()
        (source / f"{name}.gz").write_bytes(gzip.compress(content))
        digests[name] = idx.content_digest(content)
    monkeypatch.setattr(fashion, "DIGESTS", digests)
    monkeypatch.setattr(fashion, "_DEBIAN", tmp_path / "no-package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ROBUSTLAYERS_DATA", raising=False)
    return source


@pytest.fixture
def server(tiny):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):  # pyright: ignore[reportIncompatibleMethodOverride]
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tiny))) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


class TestMini:
    def test_balance_order_and_content(self):
        started = time.perf_counter()
        data = load("fashion-mnist-mini")
        assert time.perf_counter() - started < 1
        assert (len(data.train), len(data.test), data.train.shape) == (10_000, 2_000, (1, 28, 28))
        assert torch.equal(data.train.labels, torch.arange(10_000) % 10)
        assert torch.equal(data.test.labels, torch.arange(2_000) % 10)
        assert data.digest == "2c1b9459c6f5bb35cdd7cb7587c7dc4bcaec86e496cc5c10d5a7762ac8f42495"
        assert data.classes[:2] == ("T-shirt/top", "Trouser")
        assert data.train.images.flatten(1).unique(dim=0).shape[0] > 9_990

    def test_a_damaged_file_is_refused(self, tmp_path, monkeypatch):
        folder = tmp_path / "assets"
        folder.mkdir()
        monkeypatch.setattr(fashion.resources, "files", lambda package: tmp_path)
        assert "not readable" in message(load, "fashion-mnist-mini")
        (folder / fashion.MINI).write_bytes(b"PK")
        assert "fashion-mnist-mini.npz: damaged: its SHA-256" in message(load, "fashion-mnist-mini")

    def test_the_license_lies_beside_it(self):
        text = (Path(fashion.__file__).parent / "assets" / "LICENSE.fashion-mnist.txt").read_text()
        assert "The MIT License" in text
        assert "2017 Zalando SE" in text

    def test_the_tool_that_made_it_makes_it_again(self, tmp_path, monkeypatch):
        path = ROOT / "tools" / "make_fashion_mnist_mini.py"
        if not DEBIAN.is_dir() or not path.is_file():
            pytest.skip("needs Debian's dataset-fashion-mnist and the folder tools")
        spec = importlib.util.spec_from_file_location("make_mini", path)
        assert spec is not None
        assert spec.loader is not None
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        mini, full = load("fashion-mnist-mini"), load("fashion-mnist", root=DEBIAN)
        for part, ours, theirs in (("train", mini.train, full.train), ("test", mini.test, full.test)):
            index = torch.from_numpy(tool.chosen(theirs.labels.numpy(), part))
            assert len(index.unique()) == len(ours)
            assert torch.equal(theirs.take(index).images, ours.images)


class TestFull:
    def test_the_published_files(self):
        if not DEBIAN.is_dir():
            pytest.skip("needs Debian's dataset-fashion-mnist")
        data = load("fashion-mnist", root=DEBIAN)
        assert data.train.labels.bincount().tolist() == [6_000] * 10
        assert data.test.labels.bincount().tolist() == [1_000] * 10
        assert data.train.labels[:5].tolist() == [9, 0, 0, 3, 0]
        assert (data.train.images.double().mean() / 255).item() == pytest.approx(0.2860, abs=1e-4)
        assert (data.train.images.double().std() / 255).item() == pytest.approx(0.3530, abs=1e-4)

    def test_each_usual_place_is_searched(self, tiny, tmp_path, monkeypatch):
        assert load("fashion-mnist", root=tiny).name == "fashion-mnist"
        named = tmp_path / "named" / "fashion-mnist"
        shutil.copytree(tiny, named)
        assert len(load("fashion-mnist", root=named.parent).train) == 3
        monkeypatch.setenv("ROBUSTLAYERS_DATA", str(named.parent))
        assert len(load("fashion-mnist").train) == 3
        monkeypatch.delenv("ROBUSTLAYERS_DATA")
        shutil.copytree(tiny, tmp_path / "cache" / "robustlayers" / "fashion-mnist")
        assert load("fashion-mnist").classes == fashion.CLASSES

    def test_absence_says_how_to_get_it(self, tiny):
        text = message(load, "fashion-mnist")
        for way in ("robustlayers data fetch fashion-mnist", "dataset-fashion-mnist", "ROBUSTLAYERS_DATA"):
            assert way in text

    def test_other_files_of_the_same_name_are_not_taken_for_it(self, tiny):
        path = tiny / "t10k-labels-idx1-ubyte.gz"
        content = bytearray(gzip.decompress(path.read_bytes()))
        content[-1] ^= 1
        path.write_bytes(gzip.compress(content))
        assert "t10k-labels-idx1-ubyte.gz: not the file of Fashion-MNIST" in message(load, "fashion-mnist", root=tiny)


class TestFetch:
    def test_a_download_makes_it_loadable(self, tiny, server):
        folder = fetch("fashion-mnist", source=server)
        assert folder == fashion.cache_folder("fashion-mnist")
        assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.gz" for name in fashion.DIGESTS)
        assert load("fashion-mnist").digest == load("fashion-mnist", root=tiny).digest

    @pytest.mark.parametrize("address", [str, lambda path: path.as_uri()])
    def test_a_local_folder_is_a_source_too(self, tiny, tmp_path, address):
        assert fetch("fashion-mnist", tmp_path / "to", source=address(tiny)) == tmp_path / "to"
        assert len(list((tmp_path / "to").iterdir())) == 4

    def test_whole_files_are_kept_and_damaged_ones_replaced(self, tiny, tmp_path):
        to = tmp_path / "to"
        fetch("fashion-mnist", to, source=str(tiny))
        first, second, *rest = sorted(to.iterdir())
        second.write_bytes(second.read_bytes()[:-3])
        (tiny / first.name).unlink()
        fetch("fashion-mnist", to, source=str(tiny))
        assert second.read_bytes() == (tiny / second.name).read_bytes()
        assert first.is_file()
        assert len(rest) == 2

    @pytest.mark.parametrize(
        "damage",
        [lambda b: b[:-9], lambda b: b"<html>moved</html>", lambda b: gzip.compress(b"other")],
        ids=["truncated", "page", "other"],
    )
    def test_a_wrong_file_is_refused_and_nothing_is_left(self, tiny, tmp_path, server, damage):
        path = tiny / "train-images-idx3-ubyte.gz"
        path.write_bytes(damage(path.read_bytes()))
        to = tmp_path / "to"
        text = message(fetch, "fashion-mnist", to, source=server)
        assert "train-images-idx3-ubyte.gz: not the file of fashion-mnist" in text
        assert not to.exists()

    def test_a_file_that_is_not_there(self, tiny, tmp_path, server):
        (tiny / "train-labels-idx1-ubyte.gz").unlink()
        text = message(fetch, "fashion-mnist", tmp_path / "to", source=server)
        assert "train-labels-idx1-ubyte.gz: cannot be downloaded" in text
        assert [path.name for path in (tmp_path / "to").iterdir()] == ["train-images-idx3-ubyte.gz"]

    def test_no_network_is_one_clear_line(self, tiny, tmp_path):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            address = f"http://127.0.0.1:{unused.getsockname()[1]}/"
            text = message(fetch, "fashion-mnist", tmp_path / "to", source=address)
        assert "cannot be downloaded" in text
        assert not (tmp_path / "to").exists()

    @pytest.mark.parametrize(
        ("name", "source", "expected"),
        [
            ("fashion-mnst", None, "unknown data set to fetch 'fashion-mnst'; nearest: fashion-mnist"),
            ("fashion-mnist", "ftp://example.org/", "allowed: an address with http, https or file, or a folder"),
        ],
    )
    def test_unknown_names_and_addresses_are_refused(self, tiny, name, source, expected):
        assert expected in message(fetch, name, source=source)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("fashion-mnist-mni", "unknown data set 'fashion-mnist-mni'; nearest: fashion-mnist-mini"),
        ("folder:here", "unknown data set 'folder:here'"),
        ("idx:", "nothing after the colon; write idx:FOLDER"),
        ("npz", "unknown data set 'npz'"),
    ],
)
def test_unknown_specs_are_refused(spec, expected):
    assert expected in message(load, spec)
