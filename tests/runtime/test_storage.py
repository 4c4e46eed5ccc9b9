"""Atomic writes under every interruption; walking; remote paths without a network."""

from __future__ import annotations

import builtins
import errno
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guided_diffusion.runtime import storage


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    root = Path(storage.__file__).parents[2]
    words = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(words, cwd=root, check=False, capture_output=True, text=True)


def test_a_write_appears_whole(tmp_path):
    target = tmp_path / "new" / "folder" / "a.bin"
    with storage.atomic_write(target) as file:
        file.write(b"12")
        assert not target.exists()
        file.write(b"34")
    assert target.read_bytes() == b"1234"
    assert os.listdir(target.parent) == ["a.bin"]
    storage.write_bytes_atomic(target, b"new")
    assert target.read_bytes() == b"new"
    assert storage.read_bytes(target) == target.read_bytes()


@pytest.mark.parametrize(
    "error", [RuntimeError("stop"), KeyboardInterrupt(), FileNotFoundError(2, "No such file", "/other")]
)
def test_an_error_inside_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "a").write_text("old")
    with pytest.raises(type(error)) as caught, storage.atomic_write(tmp_path / "a") as file:
        file.write(b"half")
        raise error
    assert caught.value is error  # neither swallowed nor dressed up: it is not about this file
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch, step):
    (tmp_path / "a").write_text("old")

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    if step != "write":
        monkeypatch.setattr(storage.os, step, full)
    complaint = "No space left on device .* MiB free in .*free some space"
    with pytest.raises(OSError, match=complaint) as caught, storage.atomic_write(tmp_path / "a") as file:
        if step == "write":
            full()
        file.write(b"x")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_really_full_device(tmp_path, monkeypatch):
    real = builtins.open
    full = lambda path, mode="r", **_: real("/dev/full", "wb") if mode == "xb" else real(path, mode)  # noqa: E731
    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(OSError, match="cannot write: No space left on device"):
        storage.write_bytes_atomic(tmp_path / "a", b"x" * 100_000)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_forbidden_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="choose a folder you may write to"):
            storage.write_bytes_atomic(tmp_path / "a", b"x")
    finally:
        tmp_path.chmod(0o700)


def test_no_permission_keeps_its_class_and_names_the_path(tmp_path, monkeypatch):
    def forbidden(path, *arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(builtins, "open", forbidden)
    with pytest.raises(
        PermissionError, match="cannot write: Permission denied; choose a folder you may write to"
    ) as caught:
        storage.write_bytes_atomic(tmp_path / "a", b"x")
    monkeypatch.undo()
    assert caught.value.filename == str(tmp_path / "a")
    monkeypatch.setattr(storage.os, "makedirs", forbidden)
    with pytest.raises(PermissionError, match="cannot make the folder: Permission denied"):
        storage.makedirs(tmp_path / "b")


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot make the folder"):
        storage.write_bytes_atomic(tmp_path / "file" / "a", b"x")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_in_the_middle_the_old_file_stands(tmp_path):
    (tmp_path / "a").write_text("old")
    program = f"""
        import os, signal
        from guided_diffusion.runtime import storage
        with storage.atomic_write({str(tmp_path / "a")!r}) as file:
            file.write(b"x" * 100_000)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run_python(program).returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "old"
    leftover = [name for name in os.listdir(tmp_path) if name != "a"]
    # Hidden: no reader takes it for a file of ours.
    assert all(name.startswith(".a.") and name.endswith(".tmp") for name in leftover)


def test_links_and_permissions_are_kept(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    storage.write_bytes_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    plain = tmp_path / "plain"
    plain.write_text("")
    assert (tmp_path / "real").stat().st_mode == plain.stat().st_mode  # the umask's, not a private temporary file's


def test_long_names(tmp_path):
    storage.write_bytes_atomic(tmp_path / ("n" * 255), b"x")
    assert os.listdir(tmp_path) == ["n" * 255]


@given(st.binary(max_size=3000))
def test_sha256(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "sha"
    storage.write_bytes_atomic(path, data)
    assert storage.sha256_of(path) == hashlib.sha256(data).hexdigest()
    assert storage.size(path) == len(data)


def test_walking_listing_and_removing(tmp_path):
    for name in ("b/2", "b/1", "a.x", "a/z", "c"):
        storage.write_bytes_atomic(tmp_path / name, b"")
    found = [os.path.relpath(path, tmp_path) for path in storage.walk_files(tmp_path)]
    assert found == ["a/z", "a.x", "b/1", "b/2", "c"]
    assert found == sorted(found, key=lambda path: path.split("/"))
    assert storage.listdir(tmp_path) == ["a", "a.x", "b", "c"]
    assert storage.isdir(tmp_path / "a")
    assert not storage.isdir(tmp_path / "c")
    storage.remove(tmp_path / "c")
    storage.remove(tmp_path / "c")
    assert not storage.exists(tmp_path / "c")
    with storage.open_file(tmp_path / "t", "w") as file:
        file.write("é")
    assert storage.open_file(tmp_path / "t", "r").read() == "é"


def test_local_files_need_no_blobfile(tmp_path):
    program = f"""
        import sys
        sys.modules["blobfile"] = None
        from guided_diffusion.runtime import storage
        storage.write_bytes_atomic({str(tmp_path / "a")!r}, b"x")
        assert list(storage.walk_files({str(tmp_path)!r}))
        try:
            storage.exists("gs://bucket/a")
        except ImportError as error:
            print(error)
    """
    assert (
        run_python(program).stdout.strip()
        == "'gs://bucket/a' is a remote path and needs blobfile: pip install blobfile"
    )


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A stand-in for blobfile that keeps gs://bucket/x in a local folder."""

    def local(path: str) -> str:
        return str(tmp_path / path.split("://")[1])

    def walk(top):
        for folder, folders, names in os.walk(local(top)):
            yield "gs://" + os.path.relpath(folder, tmp_path) + "/", folders, names

    def open_(path, mode):
        if "w" in mode:
            os.makedirs(os.path.dirname(local(path)), exist_ok=True)
        return open(local(path), mode)

    def copy(source, target, overwrite):
        assert overwrite
        with open_(target, "wb") as file:
            file.write(Path(source).read_bytes())

    module = SimpleNamespace(
        BlobFile=open_,
        exists=lambda path: os.path.exists(local(path)),
        isdir=lambda path: os.path.isdir(local(path)),
        listdir=lambda path: [name + "/" * os.path.isdir(f"{local(path)}/{name}") for name in os.listdir(local(path))],
        makedirs=lambda path: os.makedirs(local(path), exist_ok=True),
        remove=lambda path: os.remove(local(path)),
        stat=lambda path: SimpleNamespace(size=os.path.getsize(local(path))),
        join=lambda path, *parts: "/".join((path, *parts)),
        walk=walk,
        copy=copy,
    )
    monkeypatch.setitem(sys.modules, "blobfile", module)
    return "gs://bucket"


def test_remote_paths_go_through_blobfile(bucket):
    assert storage.is_remote(bucket)
    assert not storage.is_remote("/gs://")
    for name in ("b/2", "a.x", "a/z"):
        storage.write_bytes_atomic(storage.join(bucket, name), name.encode())
    assert list(storage.walk_files(bucket)) == [f"{bucket}/a/z", f"{bucket}/a.x", f"{bucket}/b/2"]
    assert storage.listdir(bucket) == ["a", "a.x", "b"]
    assert storage.read_bytes(f"{bucket}/b/2") == b"b/2"
    assert storage.size(f"{bucket}/b/2") == 3
    storage.makedirs(f"{bucket}/new")
    assert storage.isdir(f"{bucket}/new")
    storage.remove(f"{bucket}/a.x")
    storage.remove(f"{bucket}/a.x")
    assert not storage.exists(f"{bucket}/a.x")


def test_a_failed_remote_write_publishes_nothing(bucket):
    with pytest.raises(RuntimeError), storage.atomic_write(f"{bucket}/a") as file:
        file.write(b"half")
        raise RuntimeError
    assert not storage.exists(f"{bucket}/a")


def test_pictures_in_a_bucket_are_listed_and_read(bucket):
    import io

    from PIL import Image

    from guided_diffusion.data.listing import list_records
    from guided_diffusion.data.sources import open_source

    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (1, 2, 3)).save(buffer, "PNG")
    for name in ("x_2.png", "a/x_1.png"):
        storage.write_bytes_atomic(f"{bucket}/{name}", buffer.getvalue())
    records = list_records(bucket, labels="prefix")
    assert records.paths == (f"{bucket}/a/x_1.png", f"{bucket}/x_2.png")
    assert open_source("files", "").read(records.paths[0])[0, 0].tolist() == [1, 2, 3]


def test_an_unreachable_bucket_is_given_up(monkeypatch):
    """By itself blobfile tries again without end."""
    asked = []

    def create_context(**options):
        asked.append(options)
        return SimpleNamespace(exists=lambda path: True)

    monkeypatch.setitem(sys.modules, "blobfile", SimpleNamespace(create_context=create_context))
    assert storage.exists("gs://bucket/a") and storage.exists("gs://bucket/b")
    assert len(asked) == 1 and 1 <= asked[0]["retry_limit"] <= 20


def test_a_scheme_that_cannot_be_reached_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"s3://bucket/x: only gs://, az://, https:// and local paths"):
        storage.exists("s3://bucket/x")
    assert not storage.is_remote(tmp_path / "a:b")


def test_one_folder_has_many_spellings(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for other in ("run/", "./run", str(tmp_path / "run"), "link", "run/../run"):
        assert storage.same_folder("run", other)
    assert not storage.same_folder("run", "other") and not storage.same_folder("run", "gs://bucket/run")
    assert storage.same_folder("gs://bucket/run", "gs://bucket/run/")


@pytest.mark.parametrize(
    "added", [["--local_rank=0"], ["--local-rank=3"], ["--local_rank", "0"], ["--local-rank", "12"], []]
)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_local_rank_of_old_launchers_is_left_out(added: list[str], place: int) -> None:
    words = ["sample", "--seed", "7"]
    assert storage.command_words([*words[:place], *added, *words[place:]]) == words
    assert storage.command_words(["--local_rank", "train", "--local_ranks", "1"]) == ["train", "--local_ranks", "1"]


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", "/some/where")
    assert storage.cache_folder() == "/some/where"
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", "")
    assert storage.cache_folder() == os.path.expanduser("~/.cache/guided_diffusion")


def test_a_folder_is_held_by_one_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_LOCK_WAIT_S", 0.1)
    lock = storage.lock_folder(tmp_path / "new")
    with pytest.raises(ValueError, match=f"another job writes to {tmp_path}/new: process {os.getpid()} on .* since 20"):
        storage.lock_folder(tmp_path / "new")
    storage.lock_folder(tmp_path / "new", "other.lock").release()
    lock.release()
    lock.release()
    storage.lock_folder(tmp_path / "new").release()
    assert storage.lock_folder("gs://bucket/run") is None


def test_the_lock_of_a_killed_job_is_free_though_a_worker_outlives_it(tmp_path: Path) -> None:
    code = f"""
        import os, time
        from guided_diffusion.runtime import storage
        lock = storage.lock_folder({str(tmp_path)!r})
        if os.fork():
            os.kill(os.getpid(), 9)
        time.sleep(2)
    """
    run_python(code)
    assert (tmp_path / "run.lock").exists()
    storage.lock_folder(tmp_path).release()


@pytest.mark.parametrize("error", [NotImplementedError(), OSError(errno.ENOLCK, "no locks available")])
def test_a_file_system_without_locks_is_not_guarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    import filelock

    def acquire(self, timeout):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    assert storage.lock_folder(tmp_path) is None
