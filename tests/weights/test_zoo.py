"""The released models by name: lists, downloads from a server on this machine, and what is said when something is wrong."""

from __future__ import annotations

import hashlib
import http.server
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import TWINS, filled, layouts, meta_shapes

from guided_diffusion.cli.main import main
from guided_diffusion.config import flatten
from guided_diffusion.weights import identify
from guided_diffusion.weights import released as presets
from guided_diffusion.weights.later import LATER

NAME = "256x256_diffusion_uncond"


class Server:
    """Serves one folder on 127.0.0.1; `cut` sends only so many bytes of what it announced."""

    def __init__(self, folder: Path) -> None:
        self.cut: int | None = None
        self.asked: list[str] = []
        server = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                super().do_GET()

            def copyfile(self, source: Any, outputfile: Any) -> None:
                outputfile.write(source.read()[: server.cut])

            def log_message(self, *_: Any) -> None:
                return None

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self._http.server_port}/"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server with a small twin in the place of the released file, whose layout is entered as the released one."""
    (tmp_path / "www").mkdir()
    torch.save(filled(*TWINS[NAME]).net.state_dict(), tmp_path / "www" / f"{NAME}.pt")
    monkeypatch.setitem(identify.SIGNATURES, identify.signature(meta_shapes(*TWINS[NAME])), (NAME,))
    found = Server(tmp_path / "www")
    monkeypatch.setattr(presets, "BASE_URL", found.url)
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    yield found
    found.close()


def test_a_download_is_checked_and_kept(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "get", NAME]) == 0
    told = capsys.readouterr()
    kept = tmp_path / "cache" / f"{NAME}.pt"
    assert kept.read_bytes() == (tmp_path / "www" / f"{NAME}.pt").read_bytes()
    assert hashlib.sha256(kept.read_bytes()).hexdigest() in told.out and str(kept) in told.out
    assert f"{NAME}.pt" in told.err and "100%" in told.err  # the progress bar
    assert main(["zoo", "get", f"{NAME}.pt"]) == 0
    assert server.asked == [f"/{NAME}.pt"]  # the second time from the cache
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_another_file_under_that_name_is_not_kept(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(filled(*TWINS["128x128_diffusion"]).net.state_dict(), tmp_path / "www" / f"{NAME}.pt")
    assert main(["zoo", "get", NAME]) == 2
    assert f"does not have the names and shapes of {NAME}.pt" in capsys.readouterr().err
    (tmp_path / "www" / f"{NAME}.pt").write_bytes(b"<html>please log in</html>")
    assert main(["zoo", "get", NAME]) == 2
    assert "web page" in capsys.readouterr().err
    assert not list((tmp_path / "cache").iterdir())


def test_a_broken_connection_says_where_to_place_the_file(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.cut = 5000
    assert main(["zoo", "get", NAME]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "5000 of" in told or "IncompleteRead" in told
    assert f"place it at {tmp_path}/cache/{NAME}.pt" in told
    assert not list((tmp_path / "cache").iterdir())


def test_a_missing_file_and_no_network(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "www" / f"{NAME}.pt").unlink()
    assert main(["zoo", "get", NAME]) == 2
    assert "404" in capsys.readouterr().err
    with socket.socket() as free:  # nobody listens there
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(presets, "BASE_URL", f"http://127.0.0.1:{free.getsockname()[1]}/")
    assert main(["zoo", "get", NAME]) == 2
    told = capsys.readouterr().err
    assert "cannot download" in told and "Bring the file from a machine that can, and place it at" in told
    # Who placed it there needs no network.
    torch.save({}, tmp_path / "cache" / f"{NAME}.pt")
    assert main(["zoo", "get", NAME]) == 0


def test_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo"]) == 0
    table = capsys.readouterr().out
    for name, preset in presets.PRESETS.items():
        assert name in table and preset.url.startswith("https://openaipublic.blob.core.windows.net/diffusion/jul-2021/")
    row = next(line for line in table.splitlines() if line.startswith("256x256_diffusion ") and " 1 " in line)
    assert row.split()[-4:] == ["4.59", "5.25", "0.82", "0.52"] and "256x256_classifier" in row
    assert main(["zoo", "show", "128x128_diffusion"]) == 0
    card = capsys.readouterr().out
    assert "--num_heads 4" in card and "FID 2.97" in card and "scale 0.5" in card


def test_results_of_two_stages_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" 3.94   6.14  0.83  0.53")]
    assert row.startswith("64_256_upsampler") and "64x64_classifier" in row and "250 + 250" in row
    assert main(["zoo", "show", "128_512_upsampler"]) == 0
    card = capsys.readouterr().out
    assert (
        "DDIM, ddim25 steps, of images by 128x128_diffusion, 250 steps, 128x128_classifier at scale 0.5: FID 4.11"
        in card
    )


def test_what_was_published_later(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "later"]) == 0
    told = capsys.readouterr().out
    for name, later in LATER.items():
        assert name in told and later.source in told and later.caveat in told
        preset = presets.PRESETS[later.model]
        assert later.expected["fid"] > 0 and (later.before is None or later.before > later.expected["fid"])
        assert not later.guided or preset.classifier
        words = later.flags.split()
        assert all(word.startswith("--") for word in words[::2])
        # What was published in 2021 for as many steps is the paper's figure.
        published = {recipe.expected.fid for recipe in preset.recipes if recipe.expected}
        assert "--timestep_respacing 250" not in later.flags or later.before in published
    assert LATER["imagenet64-churn"].expected["fid"] == 1.55 and not LATER["imagenet64-churn"].guided


def test_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "get", "imagenet"]) == 2
    assert "there are 64x64_diffusion" in capsys.readouterr().err
    assert main(["zoo", "show"]) == 2
    assert "zoo show needs a name" in capsys.readouterr().err
    for action in ("list", "later"):
        assert main(["zoo", action, "64x64_diffusion"]) == 2
        assert f"zoo {action} takes no name" in capsys.readouterr().err


def test_there_are_fifteen_and_each_has_an_address() -> None:
    assert len(presets.PRESETS) == 15
    assert all(p.url.startswith("https://") and p.url.endswith(f"/{p.name}.pt") for p in presets.PRESETS.values())
    assert {p.classifier for p in presets.PRESETS.values()} - {""} <= set(presets.PRESETS)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_flags_are_the_recorded_ones(name: str) -> None:
    preset = presets.PRESETS[name]
    recorded = layouts()[name]
    ours = flatten({"model": preset.model.to_dict(), "diffusion": preset.diffusion.to_dict()})
    assert recorded["kind"] == preset.kind
    differing = {k: (v, ours[k]) for k, v in recorded["flags"].items() if ours[k] != v}
    differing.pop("use_fp16", None)  # arithmetic is a choice of the one who samples
    assert differing == {}


def test_unknown_name_lists_the_names() -> None:
    assert presets.get("lsun_cat.pt") is presets.PRESETS["lsun_cat"]
    with pytest.raises(ValueError, match="lsun_cow.*lsun_bedroom"):
        presets.get("lsun_cow")


def test_best_figures_stand_first() -> None:
    """The paper's main result for each size, by which a reproduction is judged."""
    best = {name: presets.get(name).recipes[0] for name in ("128x128_diffusion", "256x256_diffusion")}
    assert best["128x128_diffusion"].scale == 0.5 and best["128x128_diffusion"].expected.fid == 2.97
    assert best["256x256_diffusion"].scale == 1.0 and best["256x256_diffusion"].expected.fid == 4.59
