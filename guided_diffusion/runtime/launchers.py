"""Which launcher started this process, and where do its processes meet?

The environment variables are an argument, so that tests can pass their own. None is changed: in particular `CUDA_VISIBLE_DEVICES`
stays what the user or the cluster made it.
"""

from __future__ import annotations

import os
import re
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Place:
    """One process among `size`. `local_rank` and `local_size` are None where the launcher does not tell them."""

    rank: int = 0
    size: int = 1
    local_rank: int | None = 0
    local_size: int | None = 1
    launcher: str = "alone"
    variables: tuple[str, str] = field(default=("", ""), compare=False)
    """The names of the environment variables that gave rank and size."""


# The variables of rank, size, local rank and local size, in the order in which launchers are looked for.
_VARIABLES = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("openmpi", *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    ("mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
    ("slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ""),
)
# Signs of an MPI launcher: if no complete pair of rank and size was found, mpi4py is asked.
_MPI_TRACES = ("PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK", "PALS_RANKID", "ALPS_APP_PE", "MPI_LOCALRANKID")
_FIRST_REPORTS_S = 10.0  # how long the other processes wait


def discover(environ: Mapping[str, str]) -> Place:
    """Find this process's place: torchrun, Open MPI, MPICH/Hydra (PMI), Slurm, any other MPI through mpi4py, or alone.

    The MPI launchers are asked before Slurm, because `mpirun` inside a Slurm job starts its own daemons through `srun`: there the
    Slurm variables describe the daemon and not this process. `sbatch` and `salloc` shells are not job steps (`SLURM_STEP_ID` is
    missing), so a plain `python` in a batch script is alone, whatever `--ntasks` says.
    """

    def number(name: str) -> int | None:
        """A variable's number; an empty one counts as none."""
        text = environ.get(name, "").strip()
        if text and not (text.isascii() and text.isdigit()):
            raise ValueError(
                f"the environment variable {name} is {text!r}, must be a whole number from 0: unset it to run alone"
            )
        return int(text) if text else None

    for launcher, of_rank, of_size, of_local_rank, of_local_size in _VARIABLES:
        if not all(environ.get(name, "").strip() for name in (of_rank, of_size)):
            continue  # one without the other is of something else
        if launcher == "slurm" and "SLURM_STEP_ID" not in environ:
            continue
        rank, size = number(of_rank), number(of_size)
        assert rank is not None and size is not None
        if rank >= size:
            raise ValueError(
                f"{of_rank}={rank} and {of_size}={size} disagree; a rank is 0 to {of_size}-1: unset both to run alone"
            )
        local_rank, local_size = (0, 1) if size == 1 else (number(of_local_rank), number(of_local_size))
        if launcher == "mpich" and local_rank is None and environ.get("SLURM_PROCID") == environ["PMI_RANK"]:
            local_rank = number("SLURM_LOCALID")  # srun --mpi=pmi2 sets PMI_*, but not MPI_LOCAL*
        return Place(rank, size, local_rank, local_size, launcher, (of_rank, of_size))
    if any(name in environ for name in _MPI_TRACES):
        comm = mpi_communicator()
        if comm is not None and comm.Get_size() > 1:
            return Place(comm.Get_rank(), comm.Get_size(), None, None, "mpi4py")
    return Place()


def is_local_main(environ: Mapping[str, str]) -> bool:
    """Whether this is local rank 0 (rank 0 where the local rank is unknown): the process that reports errors of a command line."""
    try:
        place = discover(environ)
    except ValueError:
        return True
    return not (place.rank if place.local_rank is None else place.local_rank)


def wait_for_local_main(environ: Mapping[str, str]) -> bool:
    """Let local rank 0 report an error first; returns whether this process must not report it as well.

    Every other process waits for 10 s, since a launcher may end local rank 0 as soon as one process has left. torchrun would have ended
    this process meanwhile; if it has not, its variables are of an earlier job and there is no local rank 0: then this process reports.
    """
    if is_local_main(environ):
        return False
    time.sleep(_FIRST_REPORTS_S)
    return discover(environ).launcher != "torchrun"


def mpi_communicator() -> Any | None:
    """MPI's `COMM_WORLD` through mpi4py, or None. Without an MPI library mpi4py raises RuntimeError and not ImportError."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return None
    return MPI.COMM_WORLD


def first_slurm_host(nodelist: str) -> str:
    """The first host of a Slurm node list: `gpu[03-06,9],login1` -> `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodelist.strip())
    if not match:
        raise ValueError(f"cannot read the Slurm node list {nodelist!r}; set MASTER_ADDR and MASTER_PORT by hand")
    return "".join(part or "" for part in match.groups())


def known_address(place: Place, environ: Mapping[str, str]) -> tuple[str, int] | None:
    """The address of rank 0, where every process can work it out without communication.

    It comes from MASTER_ADDR and MASTER_PORT, from Slurm's node list and job id, or, if MPI has started all processes on this host, it
    is 127.0.0.1 and a port made from the job's name. (mpi4py is not used there: once MPI is initialised, `mpiexec` kills all processes
    when one fails, before they could print why.)
    """
    host, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if bool(host) != bool(port) and place.launcher != "slurm":
        raise ValueError(f"MASTER_ADDR is {host!r} and MASTER_PORT is {port!r}; set both, or neither")
    if place.launcher == "slurm":
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or environ.get("SLURM_JOB_NODELIST")
        if not host and nodes:
            host = first_slurm_host(nodes)
        if not host:
            raise ValueError(
                "the environment has no list of Slurm's nodes (SLURM_STEP_NODELIST); set MASTER_ADDR and MASTER_PORT"
            )
        port = port or _port_of(f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}")
    elif not host and place.launcher != "torchrun" and place.local_size == place.size:
        host, port = "127.0.0.1", _port_of(_mpi_job(environ))
    return (host, int(port)) if host and port else None


def _port_of(job: str) -> str:
    """A port below the usual ephemeral range, another one for almost every job."""
    return str(12000 + zlib.crc32(job.encode()) % 20000)


def _mpi_job(environ: Mapping[str, str]) -> str:
    """A name that the processes of an MPI job on this host share, and no other job has."""
    job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid")
    if job:
        return job
    # All ranks on a host are children of one launcher process; its start time tells it from an earlier one of the same id.
    parent = os.getppid()
    try:
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = ""
    return f"{parent}-{started}"
