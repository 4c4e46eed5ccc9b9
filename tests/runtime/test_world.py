"""Finding one's place, meeting, collectives, and how a job ends: with real processes over gloo."""

from __future__ import annotations

import platform
import re
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from guided_diffusion.runtime import launchers
from guided_diffusion.runtime.devices import choose_device, shared_gpu
from guided_diffusion.runtime.launchers import Place, discover, first_slurm_host, known_address
from guided_diffusion.runtime.world import CollectiveError, World, session, start, stop

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "77",
}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, Place()),
        (TORCHRUN, Place(5, 8, 1, 4, "torchrun")),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Place(1, 2, None, None, "torchrun")),
        (OPENMPI, Place(3, 4, 1, 2, "openmpi")),
        (HYDRA, Place(1, 2, 1, 2, "mpich")),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Place(1, 2, None, None, "mpich")),
        (SRUN, Place(9, 16, 1, None, "slurm")),
        # srun --mpi=pmi2 sets both; the local rank is Slurm's
        ({**SRUN, "PMI_RANK": "9", "PMI_SIZE": "16"}, Place(9, 16, 1, None, "mpich")),
        # mpirun inside a Slurm job: the Slurm variables are those of the daemon that mpirun started
        ({**SRUN, **OPENMPI}, Place(3, 4, 1, 2, "openmpi")),
        ({**SRUN, **HYDRA}, Place(1, 2, 1, 2, "mpich")),
        ({**SRUN, **TORCHRUN}, Place(5, 8, 1, 4, "torchrun")),
        # a plain python in an sbatch script: there is a SLURM_PROCID, but no step
        ({"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, Place()),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, Place(0, 1, 0, 1, "mpich")),
        ({"MASTER_ADDR": "somewhere", "MASTER_PORT": "1"}, Place()),
    ],
)
def test_place_by_environment(environ, place):
    assert discover(environ) == place


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "", "WORLD_SIZE": ""},
        {"RANK": "", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": " "},
        {"WORLD_SIZE": "2"},
        {"RANK": "high"},
        {"PMI_RANK": "", "PMI_SIZE": "4"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": ""},
        {**SRUN, "SLURM_PROCID": ""},
    ],
)
def test_an_empty_or_a_missing_variable_means_alone(environ):
    assert discover(environ) == Place()


@pytest.mark.parametrize(
    ("name", "value", "environ"),
    [
        ("WORLD_SIZE", "two", {"RANK": "0"}),
        ("RANK", "-1", {"WORLD_SIZE": "2"}),
        ("LOCAL_RANK", "1.5", {"RANK": "0", "WORLD_SIZE": "2"}),
        ("PMI_SIZE", "²", {"PMI_RANK": "0"}),
        ("OMPI_COMM_WORLD_SIZE", "$N", {"OMPI_COMM_WORLD_RANK": "0"}),
        ("SLURM_STEP_NUM_TASKS", "4(x2)", SRUN),
    ],
)
def test_a_variable_that_is_no_number_is_named(name, value, environ):
    with pytest.raises(ValueError, match=f"{name} is {re.escape(repr(value))}.*unset"):
        discover({**environ, name: value})


@pytest.mark.parametrize(
    "environ", [{"RANK": "0", "WORLD_SIZE": "2"}, {**SRUN, "PMI_RANK": "9", "PMI_SIZE": "16"}, SRUN, OPENMPI]
)
def test_what_told_the_place_is_known(environ):
    place = discover(environ)
    assert [environ[name] for name in place.variables] == [str(place.rank), str(place.size)]


def test_contradicting_environment_is_refused():
    with pytest.raises(ValueError, match="RANK=2 and WORLD_SIZE=2"):
        discover({"RANK": "2", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu01", "gpu01"),
        ("gpu[03-06,9],login1", "gpu03"),
        ("a-b.cluster,c", "a-b.cluster"),
        ("node[7]", "node7"),
        ("n[001-128]-ib", "n001-ib"),
    ],
)
def test_first_slurm_host(nodes, first):
    assert first_slurm_host(nodes) == first


def test_slurm_steps_agree_on_an_address_without_talking():
    place = Place(9, 16, 1, None, "slurm")
    environ = {**SRUN, "SLURM_STEP_NODELIST": "gpu[03-06]"}
    host, port = known_address(place, environ)
    assert host == "gpu03" and 12000 <= port < 32000
    assert known_address(place, {**environ, "SLURM_STEP_ID": "1"}) != (host, port)
    assert known_address(place, {**environ, "MASTER_ADDR": "x", "MASTER_PORT": "5"}) == ("x", 5)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (SRUN, "no list of Slurm's nodes .* set MASTER_ADDR and MASTER_PORT"),
        ({**OPENMPI, "MASTER_ADDR": "node1"}, "MASTER_ADDR is 'node1' and MASTER_PORT is None; set both, or neither"),
        ({**TORCHRUN, "MASTER_PORT": "29500"}, "MASTER_ADDR is None and MASTER_PORT is '29500'; set both, or neither"),
    ],
)
def test_what_an_address_lacks_is_named(environ: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        known_address(discover(environ), environ)


def test_an_mpi_job_on_one_host_agrees_on_a_port_without_talking():
    here = {**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "job7"}
    addresses = [known_address(discover({**here, "OMPI_COMM_WORLD_RANK": r}), here) for r in "03"]
    assert addresses[0] == addresses[1] and addresses[0][0] == "127.0.0.1" and 12000 <= addresses[0][1] < 32000
    assert known_address(discover(here), {**here, "PMIX_NAMESPACE": "job8"}) != addresses[0]
    assert known_address(discover(OPENMPI), OPENMPI) is None  # several hosts


def test_without_an_address_it_is_said_what_to_set(monkeypatch):
    monkeypatch.setattr(launchers, "mpi_communicator", lambda: None)
    set_variables(monkeypatch, OPENMPI)
    with pytest.raises(ValueError, match="4 processes were started by openmpi.*mpi4py.*MASTER_ADDR.*MASTER_PORT"):
        start("cpu")


def set_variables(monkeypatch, environ):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)


def test_a_missing_process_is_named(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    here = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    set_variables(monkeypatch, SRUN | here)
    with pytest.raises(CollectiveError, match="no word from rank 1, 2"):
        start("cpu", timeout_s=1)


def test_one_process_makes_no_group_and_collectives_change_nothing(caplog):
    caplog.set_level("INFO", "guided_diffusion")
    world = start("cpu")
    assert (world.rank, world.size, world.backend, world.is_main) == (0, 1, None, True)
    assert not dist.is_initialized()
    assert caplog.text.count(platform.node()) == 1
    tensor = torch.arange(3.0)
    assert world.all_reduce_sum_(tensor) is tensor and world.all_gather_cat(tensor) is tensor
    assert world.broadcast_object("x") == "x" and world.all_gather_object(1) == [1]
    assert world.any_true(True) and not world.any_true(False)
    world.broadcast_(tensor)
    world.barrier()
    stop(world)
    with pytest.raises(RuntimeError, match="plain"), session("cpu"):
        raise RuntimeError("plain")


def test_a_process_group_made_elsewhere_is_used_and_left():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        world = start("cpu")
        assert (world.size, world.backend) == (1, "gloo")
        stop(world)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def row(rank, host, identity):
    return {"rank": str(rank), "host": host, "device": "cuda:0", "identity": identity}


def test_two_ranks_on_one_gpu_are_refused():
    problem = shared_gpu([row(0, "a", "GPU-1"), row(1, "b", "GPU-1"), row(2, "a", "GPU-1")])
    assert "ranks 0 and 2 on host a would share one GPU" in problem
    assert not shared_gpu([row(0, "a", "GPU-1"), row(1, "a", "GPU-2"), row(2, "b", "GPU-1")])
    assert not shared_gpu([row(0, "a", ""), row(1, "a", "")])  # CPU ranks may share


def test_device_choice(monkeypatch):
    assert choose_device("cpu", 3, 4) == torch.device("cpu")
    with pytest.raises(ValueError, match="device is 'cudda'; it must be"):
        choose_device("cudda", 0, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 0, 1) == torch.device("cpu")
    with pytest.raises(ValueError, match="sees no CUDA device"):
        choose_device("cuda", 0, 1)
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_device("auto", 3, 4) == torch.device("cuda:3") == taken[-1]
    assert choose_device("cuda:2", 0, 1) == torch.device("cuda:2")
    with pytest.raises(ValueError, match="process 4 of 5 .* has no GPU: 4 are visible"):
        choose_device("auto", 4, 5)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # srun --gpus-per-task=1
    assert choose_device("auto", 3, 4) == torch.device("cuda:0")


COLLECTIVES = """
import os, time, torch
from guided_diffusion.runtime import world as room
from guided_diffusion.runtime.world import session
visible = os.environ.get("CUDA_VISIBLE_DEVICES")
from guided_diffusion.runtime.log import setup_messages
setup_messages()
with session("cpu", timeout_s=90) as world:
    r = world.rank
    assert world.size == world.local_size == 2 and world.backend == "gloo"
    assert world.all_reduce_sum_(torch.tensor([r, 10])).tolist() == [1, 20]
    strided = torch.zeros(2, 3).t()
    world.all_reduce_sum_(strided.add_(1))
    assert (strided == 2).all()
    rows = world.all_gather_cat(torch.full((r + 1, 2), float(r)))
    assert rows.tolist() == [[0, 0], [1, 1], [1, 1]], rows
    assert world.all_gather_cat(torch.tensor([True] * r, dtype=torch.bool)).tolist() == [True]
    assert world.all_gather_cat(torch.zeros(0, 3)).shape == (0, 3)
    a, b, c = torch.full((2, 3), float(r)), torch.tensor(r), torch.tensor([bool(r)])
    w = torch.nn.Parameter(torch.full((2,), float(r)))
    for tensor in (a, b, w, c):
        world.broadcast_(tensor, src=1)
    assert (a == 1).all() and b == 1 and (w == 1).all() and c.all() and w.requires_grad
    assert world.broadcast_object({"rank": r}, src=1) == {"rank": 1}
    assert world.all_gather_object("ab"[r]) == ["a", "b"]
    assert world.any_true(r == 1) and not world.any_true(False)
    world.barrier()
    if "MASTER" in os.environ.get("TEST_SAY", ""):
        print(world)
leave = room.take_down
room.take_down = lambda: (time.sleep(0.0 if r else 0.3), leave())  # the first process is the last to leave
for n in range(3):  # one world after another, as `demo` has them
    with session("cpu", timeout_s=90) as world:
        assert world.all_gather_object(n) == [n, n]
assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible
assert not torch.distributed.is_initialized()
print(f"fine {r}\\n", end="")  # one write: the ranks share the pipe
"""


@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_collectives(launch, launcher):
    done = launch(launcher, COLLECTIVES)
    assert done.code == 0, done.text
    assert "fine 0" in done.text and "fine 1" in done.text
    assert done.text.count("rank  host") == 4  # once for each world


def test_slurm_environments_meet(environ):
    """A launcher that is not installed here, by its variables: processes meet by the node list."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        job = str(listener.getsockname()[1])  # any number: other test runs on this machine take another
    step = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": job, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    words = ["timeout", "150", sys.executable, "-c", COLLECTIVES]
    ranks = [environ | step | {"SLURM_PROCID": rank} for rank in "01"]
    jobs = [subprocess.Popen(words, env=each, text=True, stdout=-1, stderr=-2) for each in ranks]
    outputs = [job.communicate()[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs


DYING = """
import sys, time, torch
from guided_diffusion.runtime.world import session
with session("cpu", timeout_s=100) as world:
    world.context.step = 7
    if world.rank == int(sys.argv[1]):
        raise KeyError("the reason")
    if sys.argv[2] == "collective":
        world.barrier("wait for step 7")
    time.sleep(100)
"""


@pytest.mark.parametrize(
    ("launcher", "victim", "others"),
    [("torchrun", "1", "collective"), ("mpiexec", "1", "collective"), ("mpiexec", "0", "busy")],
)
def test_a_dying_rank_ends_the_job_within_seconds(launch, launcher, victim, others):
    done = launch(launcher, DYING, victim, others)
    assert done.code != 0
    assert done.seconds < 60  # most of it is `import torch`
    assert f"[rank {victim} of 2, step 7] KeyError: 'the reason'" in done.text
    assert "in <module>" in done.text and "Traceback" in done.text
    if launcher == "mpiexec":  # torchrun may kill the other rank before it has spoken
        assert others == "busy" or "wait for step 7 failed" in done.text
        assert f"ends because rank {victim} of 2, step 7 failed: KeyError" in done.text
    assert done.text.index("KeyError: 'the reason'") < (done.text + "ends because").index("ends because")


LATE = """
import time, torch
from guided_diffusion.runtime.world import session
with session("cpu", timeout_s=2) as world:
    world.context.step = 12
    if world.rank == 1:
        time.sleep(60)
    world.all_reduce_sum_(torch.zeros(1), name="mean of the losses")
"""


def test_a_collective_nobody_answers_names_rank_operation_and_step(launch):
    done = launch("mpiexec", LATE)
    assert done.code != 0 and done.seconds < 60
    assert "[rank 0 of 2, step 12] mean of the losses got no answer for 2 s" in done.text
    assert "[rank 1 of 2, step 12] ends because rank 0 of 2, step 12 failed" in done.text


def test_world_is_a_value():
    assert World() == World() and World().device == torch.device("cpu")
    with pytest.raises(AttributeError):
        World().rank = 1  # type: ignore[misc]
