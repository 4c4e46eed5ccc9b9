"""Finding, checking, fetching and converting weights files."""

from __future__ import annotations

import hashlib
import http.server
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from inception_files import conv_specs

from evaluations import weights
from evaluations.weights import Published, load_inception, scope_names


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """An empty working directory and cache; nothing can be downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    broken = [known._replace(url="http://127.0.0.1:9/" + known.name) for known in weights.DOWNLOAD_ORDER]
    monkeypatch.setattr(weights, "DOWNLOAD_ORDER", tuple(broken))
    return tmp_path


def test_scopes_cover_the_94_convolutions_in_the_order_of_the_graph():
    names = scope_names()
    specs = conv_specs()
    assert list(names) == list(specs)
    assert len(set(names.values())) == len(specs) == 94
    state = weights.InceptionV3().state_dict()
    for scope, (height, width, channels_in, channels_out) in specs.items():
        assert state[f"{names[scope]}.conv.weight"].shape == (channels_out, channels_in, height, width), scope


@pytest.mark.parametrize(
    ("scope", "name"),
    [
        ("conv_4", "Conv2d_4a_3x3"),
        ("mixed_3/tower/conv_2", "Mixed_6a.branch3x3dbl_3"),
        ("mixed_6/conv", "Mixed_6d.branch1x1"),
        ("mixed_7/tower_1/conv_4", "Mixed_6e.branch7x7dbl_5"),
        ("mixed_8/tower_1/conv_3", "Mixed_7a.branch7x7x3_4"),
        ("mixed_10/tower_1/mixed/conv_1", "Mixed_7c.branch3x3dbl_3b"),
    ],
)
def test_names_of_the_published_file(scope, name):
    assert scope_names()[scope] == name


def test_graph_and_torch_file_give_the_same_network(plain_net, synthetic_pb, synthetic_constants):
    state = plain_net.state_dict()
    from_graph = weights.state_from_graph(synthetic_pb)
    assert state.keys() == from_graph.keys()
    assert all(torch.equal(state[name], value) for name, value in from_graph.items())
    kernel = synthetic_constants["mixed_6/tower/conv_1/conv2d_params"]
    assert np.array_equal(state["Mixed_6d.branch7x7_2.conv.weight"].numpy(), kernel.transpose(3, 2, 0, 1))


def test_unknown_weights_are_refused_or_marked(synthetic_pb):
    with pytest.raises(ValueError, match=r"not a published Inception weights file.*allow_other_weights"):
        load_inception(synthetic_pb)
    with pytest.warns(UserWarning, match="unknown Inception weights"):
        net = load_inception(synthetic_pb, folded=False, allow_unknown=True)
    assert not net.verified
    assert net.sha256 == hashlib.sha256(synthetic_pb.read_bytes()).hexdigest()
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_a_file_with_the_published_hash_is_verified(synthetic_pb, monkeypatch):
    data = synthetic_pb.read_bytes()
    known = weights.PUBLISHED[0]._replace(size=len(data), digest=hashlib.md5(data, usedforsecurity=False).hexdigest())
    monkeypatch.setattr(weights, "PUBLISHED", (known, *weights.PUBLISHED[1:]))
    assert weights.check_file(synthetic_pb)[1:] == (True, "")
    assert weights.check_file(synthetic_pb)[0] == hashlib.sha256(data).hexdigest()


def test_working_directory_comes_before_the_cache(nowhere):
    cached = nowhere / "cache" / "pt_inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir()
    cached.write_bytes(b"")
    assert weights.find_weights() == cached
    local = nowhere / "classify_image_graph_def.pb"
    local.write_bytes(b"")
    assert weights.find_weights() == local


def test_without_network_the_error_says_which_file_to_put_where(nowhere):
    with pytest.raises(ValueError, match="Put one of these files into") as caught:
        load_inception(progress=False)
    for text in (str(nowhere / "cache"), str(nowhere), "classify_image_graph_def.pb", weights.PUBLISHED[1].digest):
        assert text in str(caught.value)
    assert list((nowhere / "cache").glob("*")) == []
    with pytest.raises(ValueError, match=r"no Inception weights file 'absent.pb'"):
        load_inception("absent.pb")


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path/www on this machine."""
    root = tmp_path / "www"
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(root), **kwargs)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield root, f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def test_download_is_checked_and_whole_or_absent(server, tmp_path):
    root, address = server
    data = os.urandom(300_000)
    (root / "w.pth").write_bytes(data)
    good = Published("w.pth", f"{address}/w.pth", len(data), "sha256", hashlib.sha256(data).hexdigest())
    cache = tmp_path / "made" / "cache"
    assert weights.fetch(good, cache).read_bytes() == data
    for bad in (good._replace(digest="0" * 64), good._replace(size=1000), good._replace(size=len(data) + 1)):
        with pytest.raises((OSError, ValueError), match="came"):
            weights.fetch(bad._replace(name="bad.pth"), cache)
    with pytest.raises(OSError, match="404"):
        weights.fetch(good._replace(name="bad.pth", url=f"{address}/none"), cache)
    assert [path.name for path in cache.iterdir()] == ["w.pth"]


def test_find_weights_downloads_to_the_cache(server, nowhere, monkeypatch):
    root, address = server
    (root / "w").write_bytes(b"abc")
    known = weights.PUBLISHED[1]._replace(url=f"{address}/w", size=3, digest=hashlib.sha256(b"abc").hexdigest())
    monkeypatch.setattr(weights, "DOWNLOAD_ORDER", (weights.DOWNLOAD_ORDER[0], known))
    assert weights.find_weights() == nowhere / "cache" / known.name


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.filterwarnings("ignore:scores rest on unknown")
def test_pickles_are_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Bomb()}, "torch.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Bomb()))
    Path("renamed.pb").write_bytes(pickle.dumps(Bomb()))
    for name in ("torch.pth", "plain.pth", "renamed.pb"):
        with pytest.raises(ValueError, match=name):
            load_inception(name, allow_unknown=True)
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("ref.npz", lambda path: np.savez(path, np.zeros((2, 4, 4, 3), np.uint8))),
        ("model.pt", lambda path: torch.save({"time_embed.0.weight": torch.zeros(2)}, path)),
        ("nested.pth", lambda path: torch.save({"state_dict": {}}, path)),
        ("module.pth", lambda path: torch.save(torch.nn.Linear(1, 1), path)),
        ("graph.pb", lambda path: path.write_bytes(b"hello" * 9)),
    ],
)
def test_files_of_another_kind_are_told_in_one_line(name, save, tmp_path):
    save(tmp_path / name)
    with pytest.raises(
        ValueError, match=f"{name} is not a published Inception weights file.*Leave --weights out"
    ) as told:
        load_inception(tmp_path / name)
    assert "\n" not in str(told.value) and "Delete" not in str(told.value)
    with pytest.warns(UserWarning, match="unknown"), pytest.raises(ValueError, match=name) as told:
        load_inception(tmp_path / name, allow_unknown=True)
    assert "\n" not in str(told.value) and any(word in str(told.value) for word in ("2015 Inception", "GraphDef"))


@pytest.mark.filterwarnings("ignore:scores rest on unknown")
def test_wrong_contents_are_named(tmp_path, plain_net, monkeypatch):
    path = tmp_path / "w.pth"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        load_inception(path, allow_unknown=True)

    def attempt(change) -> str:
        state = dict(plain_net.state_dict())
        change(state)
        monkeypatch.setattr(weights, "_state_from_torch", lambda path: state)
        with pytest.raises(ValueError, match=r"w\.pth") as caught:
            load_inception(path, allow_unknown=True)
        return str(caught.value)

    nan = torch.full((1008,), float("nan"))
    assert "1 tensors are missing" in attempt(lambda state: state.pop("fc.bias"))
    assert "1 are unknown" in attempt(lambda state: state.update({"AuxLogits.fc.bias": torch.zeros(3)}))
    assert "expected (1008,)" in attempt(lambda state: state.update({"fc.bias": torch.zeros(1000)}))
    assert "not finite" in attempt(lambda state: state.update({"fc.bias": nan}))
    assert "not finite" in attempt(lambda state: state.update({"fc.bias": torch.zeros(1008, dtype=torch.int64)}))


def test_batch_counters_of_older_files_are_ignored(tmp_path, plain_net):
    state = {**plain_net.state_dict(), "Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="unknown Inception weights"):
        load_inception(tmp_path / "w.pth", allow_unknown=True, folded=False)


def test_another_graph_is_refused(synthetic_constants, monkeypatch):
    missing = {name: value for name, value in synthetic_constants.items() if name != "mixed_9/conv/conv2d_params"}
    monkeypatch.setattr(weights, "read_constants", lambda path: missing)
    with pytest.raises(ValueError, match="mixed_9/conv/conv2d_params"):
        weights.state_from_graph("graph.pb")
