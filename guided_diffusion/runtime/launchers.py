"""Which launcher started this process, and where do its processes meet?

Everything here reads an environment handed in, so that it can be tested as a table. Nothing is changed: in particular
`CUDA_VISIBLE_DEVICES` stays what the user or the cluster made it.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
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
    told_by: tuple[str, str] = field(default=("", ""), compare=False)
    """The variables that say rank and size."""


# Traces of an MPI launcher whose rank and size variables we do not know by name: worth asking MPI itself.
_MPI_TRACES = ("PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK", "PALS_RANKID", "ALPS_APP_PE", "MPI_LOCALRANKID")
_FIRST_SPEAKS_S = 10.0


def discover(environ: Mapping[str, str], *, ask_mpi: bool = True) -> Place:
    """Find this process's place: torchrun, Open MPI, MPICH/Hydra (PMI), Slurm, any other MPI through mpi4py, or alone.

    The MPI launchers are asked before Slurm, because `mpirun` inside a Slurm job starts its own daemons through `srun`: there the
    Slurm variables describe the daemon and not this process. `sbatch` and `salloc` shells are not job steps (`SLURM_STEP_ID` is
    missing), so a plain `python` in a batch script is alone, whatever `--ntasks` says.
    `ask_mpi=False` never imports mpi4py (importing it initialises MPI).
    """

    def number(name: str) -> int | None:
        """A variable's number; an empty one counts as none."""
        text = environ.get(name, "").strip()
        if text and not (text.isascii() and text.isdigit()):
            raise ValueError(
                f"the environment variable {name} is {text!r}, must be a whole number from 0: unset it to run alone"
            )
        return int(text) if text else None

    def place(launcher: str, rank: str, size: str, local_rank: str, local_size: str) -> Place | None:
        if not all(environ.get(name, "").strip() for name in (rank, size)):
            return None  # one without the other is of something else
        r, n = number(rank), number(size)
        assert r is not None and n is not None
        if not 0 <= r < n:
            raise ValueError(f"{rank}={r} and {size}={n} disagree; a rank is 0 to {size}-1: unset both to run alone")
        alone = n == 1
        local = (0, 1) if alone else (number(local_rank), number(local_size))
        return Place(r, n, *local, launcher, (rank, size))

    if found := place("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        return found
    ompi = "OMPI_COMM_WORLD_"
    if found := place("openmpi", ompi + "RANK", ompi + "SIZE", ompi + "LOCAL_RANK", ompi + "LOCAL_SIZE"):
        return found
    if found := place("mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"):
        same = environ.get("SLURM_PROCID") == environ.get("PMI_RANK")  # srun --mpi=pmi2 sets PMI_*, but not MPI_LOCAL*
        if found.local_rank is None and same:
            return replace(found, local_rank=number("SLURM_LOCALID"), local_size=None)
        return found
    if "SLURM_STEP_ID" in environ:
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
        if found := place("slurm", "SLURM_PROCID", size, "SLURM_LOCALID", ""):
            return found
    if (
        any(name in environ for name in _MPI_TRACES)
        and (comm := mpi_communicator()) is not None
        and comm.Get_size() > 1
    ):
        return Place(comm.Get_rank(), comm.Get_size(), None, None, "mpi4py")
    return Place()


def first_of_machine(environ: Mapping[str, str]) -> bool:
    """Whether no other process of the job on this machine is there to say what is wrong with a command line."""
    try:
        place = discover(environ, ask_mpi=False)
    except ValueError:
        return True
    return not (place.rank if place.local_rank is None else place.local_rank)


def leave_it_to_the_first(environ: Mapping[str, str]) -> bool:
    """Whether the first process of this machine says what is wrong with a command line, and this one need not.

    Others wait for some seconds, since the launcher may end the first once they leave. Then torchrun has ended them, or its variables are
    left over from another job and there is no first process: so they speak.
    """
    if first_of_machine(environ):
        return False
    time.sleep(_FIRST_SPEAKS_S)
    return discover(environ, ask_mpi=False).launcher != "torchrun"


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
    """Where rank 0 listens, if the environment alone says so: MASTER_ADDR and MASTER_PORT, or the Slurm node list and job id."""
    host, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if place.launcher == "slurm":
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or environ.get("SLURM_JOB_NODELIST")
        if not host and nodes:
            host = first_slurm_host(nodes)
        if not port:
            # Every task can compute it without talking: below the usual ephemeral range, other for each step of a job.
            job, step = environ.get("SLURM_JOB_ID", "0"), environ.get("SLURM_STEP_ID", "0")
            port = str(12000 + (int(re.sub(r"\D", "", job) or 0) * 31 + int(re.sub(r"\D", "", step) or 0)) % 20000)
    if host and port:
        return host, int(port)
    if host or port:
        raise ValueError(f"MASTER_ADDR={host!r} and MASTER_PORT={port!r}: set both or neither; several nodes need both")
    return None


def one_host(place: Place) -> bool:
    """True when the launcher says that all processes run on this host."""
    return place.local_size == place.size


def several_hosts_message(place: Place) -> str:
    """What to do when processes on several hosts have no agreed address."""
    return (
        f"{place.size} processes were started by {place.launcher}, not all on this host, and nothing says where they can meet. "
        "Either install mpi4py, or pass MASTER_ADDR (the name of the first host) and MASTER_PORT (any free port) to every process: "
        "`mpiexec -genv MASTER_ADDR node1 -genv MASTER_PORT 29500 ...` (MPICH), "
        "`mpirun -x MASTER_ADDR=node1 -x MASTER_PORT=29500 ...` (Open MPI); or start with torchrun or srun."
    )


def meeting_file(environ: Mapping[str, str]) -> Path:
    """The file in the temporary folder through which processes on one host agree on a port; its name belongs to this very job."""
    job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid")
    if not job:
        # All ranks on a host are children of one launcher process; its start time tells it from an earlier one of the same id.
        parent = os.getppid()
        try:
            started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
        except (OSError, IndexError):
            started = "0"
        job = f"{parent}-{started}"
    user = os.getuid() if hasattr(os, "getuid") else 0
    return Path(tempfile.gettempdir()) / f"guided_diffusion-{user}-{re.sub(r'[^A-Za-z0-9_.-]', '_', job)}.port"


def publish(path: Path, port: int) -> None:
    """Write `port` so that no reader sees half of it, replacing what an earlier job of the same name may have left."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(temporary, flags, 0o600), "w") as file:
        file.write(str(port))
    os.replace(temporary, path)


def read_published(path: Path, timeout_s: float) -> int:
    """Wait until rank 0 has published its port."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        with suppress(OSError, ValueError):
            # In a temporary folder that all users write, only a file of our own is to be believed.
            if not hasattr(os, "getuid") or path.stat().st_uid == os.getuid():
                return int(path.read_text())
        time.sleep(0.05)
    raise TimeoutError(
        f"rank 0 did not publish a port in {path} within {timeout_s:.0f} s. Did it fail to start? Are the processes on one host, "
        "with one temporary folder? Otherwise set MASTER_ADDR and MASTER_PORT for every process."
    )
