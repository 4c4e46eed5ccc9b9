"""Which of how many processes this is: from the environment alone, without torch, so that it is told at once."""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

from guided_diffusion.runtime import launchers


class World(NamedTuple):
    """Which of how many processes this is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def world_from_environment() -> World:
    """What torchrun, Open MPI, MPICH/Intel MPI or srun say about this process; one process without them."""
    place = launchers.discover(os.environ, ask_mpi=False)
    return World(place.rank, place.size, place.rank if place.local_rank is None else place.local_rank)


def tell_of_others() -> None:
    """One line on stderr when other processes are expected: variables of a cluster or a shell may reach a process that is alone."""
    place = launchers.discover(os.environ, ask_mpi=False)
    if place.size == 1:
        return
    rank, size = place.told_by
    then = f"it waits for the shares of {place.size - 1} more" if place.rank == 0 else "process 0 prints the scores"
    print(
        f"process {place.rank} of {place.size}, as {rank}={place.rank} and {size}={place.size} say: {then}. "
        f"To run alone, unset {rank} and {size}",
        file=sys.stderr,
        flush=True,
    )
