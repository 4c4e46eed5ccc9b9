"""The old names for several processes, as scripts of 2021 use them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import ROOT, TORCHRUN, clean_environment, mpiexec

from guided_diffusion import dist_util

SCRIPT_OF_2021 = """
import os, sys
import torch as th, torch.distributed as dist
from guided_diffusion import dist_util, logger
os.environ["CUDA_VISIBLE_DEVICES"] = "5"
dist_util.setup_dist()
dist_util.setup_dist()                                   # a second call changes nothing
assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
rank, size = dist.get_rank(), dist.get_world_size()
assert size == int(sys.argv[1]), size
assert dist_util.dev().type in ("cpu", "cuda")
comm = dist_util.MPI.COMM_WORLD
assert (comm.Get_rank(), comm.Get_size(), comm.rank, comm.size) == (rank, size, rank, size)
assert comm.bcast("word" if rank == 0 else None) == "word"
if rank == 0:                                            # the folk pattern that hung in 2021
    th.save({"w": th.arange(3.0)}, "weights.pt")
    assert dist_util.load_state_dict("weights.pt", map_location="cpu")["w"].tolist() == [0, 1, 2]
net = th.nn.Linear(2, 2)
with th.no_grad():
    net.weight.fill_(rank + 1.0)
dist_util.sync_params(net.parameters())
assert (net.weight == 1).all()
gathered = [th.zeros(1) for _ in range(size)]
dist.all_gather(gathered, th.full((1,), float(rank)))
assert [g.item() for g in gathered] == list(range(size))
logger.configure(dir="log")
logger.logkv("step", rank)
logger.dumpkvs()
if len(sys.argv) > 2 and rank == size - 1:
    raise RuntimeError("the reason")
dist.barrier()
print(f"fine {rank}", flush=True)
"""


def run(tmp_path, command, *args):
    (tmp_path / "script.py").write_text(SCRIPT_OF_2021)
    command, environ = [*command, "script.py", *args], clean_environment(PYTHONPATH=str(ROOT))
    return subprocess.run(command, cwd=tmp_path, env=environ, text=True, capture_output=True, timeout=150)


@pytest.mark.parametrize("launcher", ["alone", "torchrun", "mpiexec"])
def test_a_script_of_2021(tmp_path, launcher):
    command = {"alone": lambda: (), "torchrun": lambda: TORCHRUN, "mpiexec": mpiexec}[launcher]()
    command, size = [*command, sys.executable], 1 if launcher == "alone" else 2
    done = run(tmp_path, command, str(size))
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"fine {rank}" in done.stdout for rank in range(size))
    assert "terminate called" not in done.stderr
    files = sorted(path.name for path in (tmp_path / "log").iterdir())
    assert files == ["log-rank001.txt", "log.txt", "progress.csv"][-size - 1 :]


@pytest.mark.gpu
def test_a_group_of_one_on_a_gpu():
    code = (
        "import torch; from guided_diffusion import dist_util; dist_util.setup_dist(); "
        "torch.distributed.all_reduce(torch.ones(1, device=dist_util.dev())); print(torch.distributed.get_backend())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout.split()[-1] == "nccl", done.stderr


def test_a_dying_rank_ends_an_old_script_too(tmp_path):
    done = run(tmp_path, [*mpiexec(), sys.executable], "2", "die")
    assert done.returncode != 0 and "fine" not in done.stdout
    assert "[rank 1 of 2] RuntimeError: the reason" in done.stderr


@pytest.mark.parametrize("error", [ImportError, RuntimeError])
def test_mpi_without_a_library(monkeypatch, error):
    """mpi4py without libmpi raises RuntimeError, not ImportError; both mean: none."""

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "mpi4py":
                raise error("cannot load MPI library")

    for name in [name for name in sys.modules if name.split(".")[0] == "mpi4py"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "2")
    comm = dist_util.MPI.COMM_WORLD
    assert (comm.Get_rank(), comm.Get_size()) == (1, 2)
    with pytest.raises(RuntimeError, match="setup_dist"):
        comm.bcast(1)


def test_one_process_without_setup():
    comm = dist_util.MPI.COMM_WORLD
    assert (comm.Get_rank(), comm.Get_size(), comm.bcast(3), comm.gather(4), comm.allgather(5)) == (0, 1, 3, [4], [5])
    comm.Barrier()
    dist_util.sync_params([torch.zeros(1)])
    assert dist_util.dev().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert 0 < dist_util._find_free_port() < 65536


def test_pickles_that_run_code_are_refused_unless_asked_for(tmp_path):
    torch.save({"odd": Path("x")}, tmp_path / "odd.pt")
    with pytest.raises(Exception, match="[Ww]eights_only"):
        dist_util.load_state_dict(str(tmp_path / "odd.pt"))
    assert dist_util.load_state_dict(str(tmp_path / "odd.pt"), weights_only=False)["odd"] == Path("x")
