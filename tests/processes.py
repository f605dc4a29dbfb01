"""Two processes of one data-parallel group, started as ``torchrun`` starts them, and stopped when neither goes on."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
from torch import distributed
from torch._C._distributed_c10d import FileStore

#: A group that used less processor time than this (in seconds) for so long (in seconds of the clock) is stuck: on the
#: busiest machine a process that has something to do gets more.
WORK, PATIENCE = 1.0, 300.0


def join_group(folder: Path) -> int:
    """Become one of the processes that :func:`run_together` started; the rank of this one."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    gc.freeze()  # a trainer searches for garbage whenever it begins; what was imported is none
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # A file, because a port that was free a moment ago may be another's by now.
    store = FileStore(str(folder / "rendezvous"), size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    return rank


def run_together(module: str, folder: Path, size: int = 2) -> Path:
    """Run ``python -m module folder`` in ``size`` processes; ``folder``, once all of them ended well.

    What they said is in the error of one that did not: where every thread stood, if they got stuck.
    """
    logs = [folder / f"log-{rank}.txt" for rank in range(size)]
    group = [_start(module, folder, rank, size, log) for rank, log in enumerate(logs)]
    try:
        stuck = not _wait(group)
        if stuck:
            for process in group:
                process.send_signal(signal.SIGUSR1)
            time.sleep(2)  # for their stacks to be written
    finally:
        for process in group:
            process.kill()
            process.wait()
    said = "\n".join(f"rank {rank}:\n{log.read_text(errors='replace')[-6000:]}" for rank, log in enumerate(logs))
    assert not stuck, f"{module}: no process went on\n{said}"
    assert [process.returncode for process in group] == [0] * size, said
    return folder


def _start(module: str, folder: Path, rank: int, size: int, log: Path) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if "lo" in (name for _, name in socket.if_nameindex()) else {}
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "OMP_NUM_THREADS": 1}
    variables = {**os.environ, **loopback, "PYTHONPATH": paths, **{name: str(value) for name, value in own.items()}}
    with log.open("wb") as out:
        return subprocess.Popen([sys.executable, "-m", module, str(folder)], env=variables, stdout=out, stderr=out)


def _wait(group: list[subprocess.Popen[bytes]]) -> bool:
    """Wait until all ended, or one ended badly. False when they stopped working before that."""
    worked, since = 0.0, time.monotonic()
    while any(process.poll() is None for process in group) and not any(process.poll() for process in group):
        time.sleep(0.2)
        now = sum(_seconds(process.pid) for process in group)
        if now > worked + WORK:
            worked, since = now, time.monotonic()
        elif time.monotonic() > since + PATIENCE:
            return False
    return True


def _seconds(pid: int) -> float:
    """Processor time of a process so far."""
    try:
        spent = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(spent.user + spent.system)
