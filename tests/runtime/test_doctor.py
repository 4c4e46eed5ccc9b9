"""The examination before a run: each finding, the table, the exit code, and the counted memory."""

from __future__ import annotations

import shutil

import pytest
import torch
from PIL import Image

from guided_diffusion.build import build_network
from guided_diffusion.cli import train
from guided_diffusion.cli.doctor import check_norms, main
from guided_diffusion.config import RunConfig
from guided_diffusion.models.architectures import ARCHITECTURES
from guided_diffusion.models.kernels import norm
from guided_diffusion.runtime import devices, doctor
from guided_diffusion.runtime.doctor import FAIL, OK, WARN, Finding, check_disk, format_bytes, report
from guided_diffusion.runtime.world import World
from guided_diffusion.training.checks import check_speed
from guided_diffusion.training.memory import StepPlan, kept_bytes, set_recompute
from guided_diffusion.weights.probe import forward_of

SMALL = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "8"}
TINY = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
TINY += "--device cpu --max_steps 20 --save_interval 10".split()


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(6):
        Image.new("RGB", (20, 24), (40 * k, 0, 0)).save(folder / f"{'cat' if k % 2 else 'dog'}_{k}.png")
    return folder


def lines_of(text):
    return {line.split()[1]: line for line in text.splitlines() if line.split()[0] in (OK, WARN, FAIL)}


def test_a_run_that_would_work(pictures, tmp_path, capsys):
    code = main([*TINY, *f"--data_dir {pictures} --batch_size 2 --out {tmp_path}/run --measure True".split()])
    lines = lines_of(capsys.readouterr().out)
    assert code == 0 and not any(line.startswith(FAIL) for line in lines.values())
    assert "6 images" in lines["data"] and "3.0 steps per epoch" in lines["batch"]
    assert "20 steps of 2 images take" in lines["speed"]
    assert "kept: 3" in lines["disk"] and not (tmp_path / "run").exists()  # a doctor changes nothing


@pytest.mark.parametrize(
    ("flags", "line", "words"),
    [
        (["--batch_size", "8"], "batch", "larger than the 6 images"),
        (["--data_dir", "/nowhere/at/all"], "data", "/nowhere/at/all"),
        (["--batch_size", "2", "--lr", "-1"], "flags", "--lr is -1.0"),
        (["--batch_size", "100000000"], "memory", "--microbatch"),
        (["--class_cond", "True", "--num_classes", "1"], "data", "--num_classes is 1, but"),
        (["--class_cond", "True", "--labels", "none"], "data", "needs labels"),
        (["--compile", "True"], "flags", "--compile on needs a C++ compiler"),
    ],
)
def test_what_would_fail_is_named(pictures, capsys, flags, line, words, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    code = main([*TINY, "--data_dir", str(pictures), *flags])
    lines = lines_of(capsys.readouterr().out)
    assert code == 1 and lines[line].startswith(FAIL) and words in lines[line]


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        (
            "classifier",
            "--image_size 32 --classifier_width 32 --classifier_depth 1 --classifier_attention_resolutions 8",
        ),
        ("super_resolution", "--large_size 16 --small_size 8 --num_channels 32 --channel_mult 1,2"),
    ],
)
def test_the_other_kinds(capsys, kind, sizes):
    assert main(["--kind", kind, "--device", "cpu", *sizes.split()]) == 0
    assert "million parameters" in capsys.readouterr().out


def configuration_seen(monkeypatch, argv, device="cpu"):
    """The configuration whose memory doctor predicts, on a pretended device."""
    from guided_diffusion.cli import doctor as command

    seen = []

    def note(config, net, world, images):
        seen.append(config)
        return Finding(FAIL, "memory", ""), StepPlan("none", images)

    monkeypatch.setattr(command, "_check_memory", note)
    kind = "classifier" if "classifier" in argv else "diffusion"
    world = World(device=torch.device(device))
    command._check_run(kind, train.flags(argv, kind, "doctor", start=command.DoctorFlags), world)
    return seen[0]


def test_the_configuration_is_that_of_train(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert configuration_seen(monkeypatch, TINY).train.precision != "bf16"
    assert configuration_seen(monkeypatch, TINY, "cuda").train.precision == "bf16"
    assert configuration_seen(monkeypatch, [*TINY, "--precision", "fp32"], "cuda").train.precision == "fp32"
    small = "--image_size 32 --classifier_width 32 --classifier_depth 1 --classifier_attention_resolutions 8"
    assert configuration_seen(monkeypatch, ["--kind", "classifier", *small.split()]).data.random_crop


def test_a_run_that_goes_on_is_examined_as_it_was_begun(pictures, tmp_path, capsys, monkeypatch):
    words = [*TINY, *"--max_steps 1 --save_interval 1 --sample_interval -1 --batch_size 2".split()]
    out = str(tmp_path / "run")
    assert train.main([*words, "--data_dir", str(pictures), "--out", out], "train", kind="diffusion") == 0
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "run").iterdir())
    config = configuration_seen(monkeypatch, ["--out", out])
    assert config.model.num_channels == 32 and config.train.batch_size == 2 and config.data.data_dir == str(pictures)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "run").iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--new_classes True", "--new_classes needs --resume_checkpoint FILE"),
        (
            "--resume_checkpoint gone.pt --resume_from ema --weights foo",
            "--resume_from is 'ema' and --weights is 'foo'",
        ),
        ("--resume_checkpoint gone.pt --resume_from ema --weights model", "give one of them"),
        ("--resume_checkpoint gone.pt --weights foo", "--weights is 'foo'"),
        ("--resume_checkpoint gone.pt --weights ema --resume_from ema", "gone.pt"),
    ],
)
def test_flags_of_a_start_that_contradict_each_other(flags, words, pictures, tmp_path, capsys):
    """`train` refuses them, `doctor` finds them."""
    flags = [*TINY, *flags.split(), "--data_dir", str(pictures), "--out", str(tmp_path / "run")]
    assert main(flags) == 1
    assert words in lines_of(capsys.readouterr().out)["flags"]
    with pytest.raises((ValueError, OSError), match=words):
        train.main(flags, "train", kind="diffusion")


def test_flags_of_train_that_change_no_finding_are_accepted(capsys):
    assert main([*TINY, "--progress", "False", "--timeout_s", "60", "--tensorboard", "False"]) == 0
    assert "million parameters" in capsys.readouterr().out


def test_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 0, 1000))
    folder = str(tmp_path / "not" / "yet")
    assert check_disk(folder, 100, 5).status == OK
    assert check_disk(folder, 950, 1).status == FAIL and "not even one" in check_disk(folder, 950, 1).text
    assert check_disk(folder, 100, 10).status == WARN
    assert "full after 10" in check_disk(folder, 100, None).text
    assert check_disk("gs://bucket/run", 100, None).status == OK


def test_a_faulty_device_is_found(monkeypatch):
    assert doctor.check_device(World()).status == WARN  # a CPU works, and is slow
    real = torch.Tensor.matmul
    calls = []
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (calls.append(1), real(a, b) + (len(calls) == 1))[1])
    assert doctor.check_device(World()).status == FAIL


def test_table_and_verdict():
    text = report([Finding(OK, "a", "fine"), Finding(WARN, "longer", "hm"), Finding(FAIL, "c", "no")])
    assert text.splitlines() == [
        "ok    a       fine",
        "warn  longer  hm",
        "fail  c       no",
        "1 to repair, 1 to look at",
    ]
    assert report([Finding(OK, "a", "fine")]).endswith("all well")
    sizes = [format_bytes(n) for n in (0, 1023, 1536, 5 << 30, 3 << 40)]
    assert sizes == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB", "3.0 TiB"]


def config_of(**flags):
    return RunConfig.from_flags("diffusion", {**SMALL, **flags})


def counted(device="cpu", recompute="none", **flags):
    config = config_of(**flags)
    with torch.device("meta"):
        net = build_network(config.model, config.diffusion)
    set_recompute(net, recompute)
    return kept_bytes(forward_of(config, net, torch.device(device)), net.parameters())


def test_counted_memory_is_what_autograd_keeps():
    """The same network with real numbers on the CPU keeps as much."""
    config = config_of()
    net = build_network(config.model, config.diffusion, seed=0)
    parameters = {p.data_ptr() for p in net.parameters()}
    sizes = {}
    alive = []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    x = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(x, torch.zeros(4))
    fixed, per_image = counted()
    assert fixed + 4 * per_image == pytest.approx(sum(sizes.values()), rel=0.01)


def test_a_gpu_without_triton_keeps_more_unless_norms_are_recomputed(monkeypatch):
    def on_a_gpu(triton, recompute):
        monkeypatch.setattr(norm, "available", lambda: triton)
        return counted("cuda", recompute)[1]

    assert on_a_gpu(True, "none") == counted()[1] < 0.8 * on_a_gpu(False, "none")
    # Fused, the last norm, which is not recomputed, keeps 2.4 % less; and 0.8 % are not counted, the statistics of all the others.
    assert 0.96 * on_a_gpu(False, "norms") < on_a_gpu(True, "norms") <= on_a_gpu(False, "norms")


@pytest.mark.parametrize(
    ("works", "installed", "status", "words"),
    [(True, True, OK, "fused"), (False, True, WARN, "does not run"), (False, False, WARN, "pip install triton")],
)
def test_norms_that_a_gpu_cannot_fuse_are_reported(works, installed, status, words, monkeypatch):
    monkeypatch.setattr(norm, "triton_kernels", lambda device, dtype: norm if works else None)
    monkeypatch.setattr(norm, "available", lambda: installed)
    (finding,) = check_norms(torch.device("cuda"), "bf16")
    assert finding.status == status and words in finding.text
    assert check_norms(torch.device("cpu"), "fp32") == []


def test_counted_memory_follows_resolution_precision_and_recomputing():
    small = counted()[1]
    large = counted(image_size=32, attention_resolutions="16")[1]
    assert 3.5 < large / small < 4.5  # pixels, not pixels squared: attention keeps no T x T matrix
    assert counted(precision="bf16")[1] < 0.65 * small
    assert counted(recompute="all")[1] < 0.4 * small
    assert counted(recompute="all")[1] < counted(recompute="norms")[1] < 0.7 * small


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        ("--batch_size 10", FAIL, "--recompute norms or --microbatch 8 would fit"),
        ("--batch_size 8 --recompute norms", OK, ""),
        ("--batch_size 16 --recompute auto", WARN, "--recompute auto will make it fit"),
        ("--batch_size 160 --recompute auto", WARN, "--microbatch auto will make it fit, 20 images at a time"),
        ("--batch_size 160 --recompute auto --microbatch -1", FAIL, "--microbatch"),
        ("--batch_size 160 --microbatch -1 --precision bf16", FAIL, "--microbatch"),
        ("--batch_size 17 --recompute auto --compile True", WARN, "--recompute auto will make it fit"),
        ("--batch_size 4 --recompute auto --memory_limit_gb 0.01", FAIL, "Not even one image fits"),
    ],
)
def test_what_makes_a_batch_fit_is_named(monkeypatch, capsys, flags, status, words):
    fixed, each = counted()
    config = config_of()
    state = 20 * sum(p.numel() for p in build_network(config.model, config.diffusion, seed=0).parameters())
    monkeypatch.setattr(devices, "available_memory", lambda device: state + fixed + 8.5 * each)
    code = main([*TINY, *flags.split()])
    line = lines_of(capsys.readouterr().out)["memory"]
    assert line.startswith(status) and words in line and code == (status == FAIL), line


class Plain(torch.nn.Module):
    """A network of a user, which recomputes nothing and computes in float32 only."""

    def __init__(self, in_channels, out_channels, **shape):
        super().__init__()
        self.conv = torch.nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x, time, y=None):
        return self.conv(x)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--batch_size 100000000", "--microbatch"),
        ("--batch_size 100000000 --recompute auto --microbatch -1", "--microbatch"),
        ("--recompute all", "Plain supports none only"),
        ("--precision bf16", "Plain cannot compute in bf16"),
    ],
)
def test_what_a_network_cannot_do_is_a_finding(monkeypatch, capsys, flags, words):
    monkeypatch.setitem(ARCHITECTURES, "plain", Plain)
    assert main(["--device", "cpu", "--image_size", "16", "--architecture", "plain", *flags.split()]) == 1
    lines = lines_of(capsys.readouterr().out)
    assert lines["memory"].startswith(FAIL) and words in lines["memory"] and "disk" in lines
    assert "--recompute norms" not in lines["memory"] and "--recompute all would" not in lines["memory"]


def test_a_network_too_large_for_the_device_is_a_finding():
    def make():
        raise torch.OutOfMemoryError("out of memory: weights")

    finding = check_speed(make, StepPlan("none", 4), torch.device("cpu"), last_step=1, own_batch=4)
    assert finding == Finding(FAIL, "speed", "4 images at a time: out of memory: weights")


TWO = "import sys\nfrom guided_diffusion.cli.doctor import main\nsys.exit(main(sys.argv[1:]))\n"


def test_two_processes_time_their_talk(launch):
    done = launch("mpiexec", TWO, *TINY)
    assert done.code == 0, done.text
    odd = launch("mpiexec", TWO, *TINY, "--global_batch_size", "3")
    assert odd.code == 1 and "--global_batch_size is 3; it must be a multiple of the 2 processes" in odd.text
    lines = lines_of(done.text)
    assert "2 processes by mpich over gloo" in lines["processes"] and "GB/s" in lines["processes"]
    assert done.text.count("million parameters") == 1 and "device 0" in done.text and "device 1" in done.text
