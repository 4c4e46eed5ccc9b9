"""`guided-diffusion data check` and `data pack` as a user types them."""

from __future__ import annotations

from guided_diffusion.cli import main as command
from guided_diffusion.data.listing import list_records


def main(words):
    return command.main(["data", *words])


def test_check_tells_classes_sizes_and_modes(write_pictures, capsys):
    root = write_pictures("cat/1.png", "cat/2.png", "dog/1.png")
    assert main(["check", str(root)]) == 0
    printed = capsys.readouterr()
    assert "3 images in" in printed.out
    assert "2 classes, from folders; 1 to 2 images per class" in printed.out
    assert "cat" in printed.out
    assert "3 different; width 12 to 14, height 9 to 11, shorter side 9 to 11" in printed.out
    assert "modes: RGB 3" in printed.out
    assert "unreadable: 0" in printed.out
    assert "3/3" in printed.err  # the progress bar


def test_check_names_unreadable_files_and_fails(write_pictures, capsys):
    root = write_pictures("1.png", "2.png", mode="L")
    (root / "3.png").write_bytes(b"nonsense")
    assert main(["check", str(root), "--quiet", "--labels", "none"]) == 1
    printed = capsys.readouterr()
    assert "labels: none" in printed.out
    assert "modes: L 2" in printed.out
    assert "unreadable: 1" in printed.out
    assert "3.png': not an image that PIL knows" in printed.out
    assert printed.err == ""


def test_pack_then_check(write_pictures, tmp_path, capsys):
    root = write_pictures("cat/1.png", "cat/2.png", "dog/1.png")
    out = str(tmp_path / "packed")
    assert main(["pack", str(root), out, "--size", "6x8", "--channels", "1"]) == 0
    assert list_records(out).stored_size == (6, 8)
    assert main(["check", out]) == 0
    assert "all 8x6 (width x height); center-crop" in capsys.readouterr().out
    shard = tmp_path / "packed" / "images-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-3])
    assert main(["check", out, "--quiet"]) == 1
    assert "changed since it was packed" in capsys.readouterr().out


def test_pack_may_leave_out_unreadable_files(write_pictures, tmp_path, capsys):
    root = write_pictures("1.png", "2.png")
    (root / "3.png").write_bytes(b"nonsense")
    assert main(["pack", str(root), str(tmp_path / "a"), "--size", "8", "--quiet"]) == 2
    assert "on_error='skip'" in capsys.readouterr().err
    assert main(["pack", str(root), str(tmp_path / "b"), "--size", "8", "--quiet", "--skip-unreadable"]) == 0
    assert "left out: cannot read image" in capsys.readouterr().out


def test_mistakes(capsys, tmp_path):
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert main(["chekc"]) == 2
    assert "must be one of check, pack" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "gone")]) == 2
    assert "no such folder or file" in capsys.readouterr().err
    assert main(["pack", "a", "b", "--size", "0x3"]) == 2
    assert "must be a side like 64" in capsys.readouterr().err
