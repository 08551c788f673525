"""The machines of a run with several workers: who they are (TF_CONFIG), and that all came.

TensorFlow itself, once started, waits for its peers without an end and cannot be
interrupted. So the workers first meet over a plain socket at the chief's address, with a
deadline; only then it starts.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diagnostics.errors import InputError

VARIABLE = "TF_CONFIG"
EXAMPLE = (
    'TF_CONFIG=\'{"cluster": {"worker": ["host0:2222", "host1:2222"]}, '
    '"task": {"type": "worker", "index": 0}}\''
)
_JOBS = ("chief", "worker")
_ASK_AGAIN_SECONDS = 0.3
_LONGEST_GREETING = 65536


@dataclass(frozen=True)
class Cluster:
    """All workers of a run and which of them this process is.

    Attributes:
      addresses: 'host:port' of every worker, the chief's first.
      index: of this one.
      jobs: TensorFlow's jobs and how many tasks each has, in order.
    """

    addresses: tuple[str, ...]
    index: int
    jobs: Mapping[str, int]

    @property
    def leader(self) -> str:
        """The chief, as TensorFlow names it."""
        return f"/job:{next(iter(self.jobs))}/replica:0/task:0"

    def worker_of(self, job: str, task: int) -> int:
        """The number of a worker that TensorFlow names by its job and task."""
        return task + (self.jobs.get("chief", 0) if job == "worker" else 0)


def cluster_of(environment: Mapping[str, str]) -> Cluster:
    """The cluster that TF_CONFIG describes.

    Raises:
      InputError: it is missing, or not what TensorFlow understands; says what of it.
    """
    text = environment.get(VARIABLE, "")
    if not text:
        raise InputError(
            f"--strategy multiworker needs {VARIABLE} in the environment of every worker",
            f"As {EXAMPLE}, with another index on each",
        )
    try:
        config = json.loads(text)
        jobs = {job: list(config["cluster"][job]) for job in _JOBS if job in config["cluster"]}
        job, index = config["task"]["type"], int(config["task"]["index"])
        others = sorted(config["cluster"].keys() - set(_JOBS))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _wrong(f"it cannot be read ({type(error).__name__}: {error})") from error
    if others or not jobs:
        raise _wrong(f"its cluster has {', '.join(others) or 'nobody'}, not chief and worker")
    if job not in jobs or not 0 <= index < len(jobs[job]):
        raise _wrong(f"its task, {job} {index}, is none of its cluster")
    addresses = tuple(address for tasks in jobs.values() for address in tasks)
    for address in addresses:
        _host_and_port(address)
    if len(set(addresses)) < len(addresses):
        raise _wrong("an address of its cluster comes twice")
    first = 0 if job == next(iter(jobs)) else len(jobs["chief"])
    return Cluster(addresses, first + index, {job: len(tasks) for job, tasks in jobs.items()})


def meet(cluster: Cluster, seconds: float) -> None:
    """Waits until every worker has come.

    Raises:
      InputError: somebody did not come in time, or has another TF_CONFIG; says who.
    """
    deadline = time.monotonic() + seconds
    if len(cluster.addresses) == 1:
        return
    if cluster.index == 0:
        _receive_all(cluster, deadline, seconds)
    else:
        _greet_the_chief(cluster, deadline, seconds)


def _receive_all(cluster: Cluster, deadline: float, seconds: float) -> None:
    """The chief: waits for a greeting of every worker, then lets all of them go."""
    missing = set(range(1, len(cluster.addresses)))
    _, port = _host_and_port(cluster.addresses[0])
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(socket.create_server(("", port)))
        except OSError as error:
            raise InputError(
                f"the chief's port {port} cannot be opened: {error.strerror}",
                f"End what holds it, or name another port in the {VARIABLE} of every worker",
            ) from error
        came = []
        while missing:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                raise _nobody(cluster, sorted(missing), seconds) from None
            stack.enter_context(connection)
            worker = _greeted(connection, cluster)
            if worker is not None:
                missing.discard(worker)
                came.append(connection)
        for connection in came:
            with contextlib.suppress(OSError):  # one that asked twice has gone
                connection.sendall(b"go\n")


def _greeted(connection: socket.socket, cluster: Cluster) -> int | None:
    """Which worker has come; None for a stranger.

    Raises:
      InputError: its TF_CONFIG is another one.
    """
    connection.settimeout(5.0)
    try:
        said = json.loads(connection.makefile("r", encoding="utf-8").readline(_LONGEST_GREETING))
        worker, addresses = int(said["worker"]), tuple(said["addresses"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if addresses != cluster.addresses:
        raise _wrong(
            f"worker {worker} has another cluster, {', '.join(addresses)}, "
            f"than the chief, {', '.join(cluster.addresses)}"
        )
    return worker


def _greet_the_chief(cluster: Cluster, deadline: float, seconds: float) -> None:
    host, port = _host_and_port(cluster.addresses[0])
    greeting = json.dumps({"worker": cluster.index, "addresses": cluster.addresses}) + "\n"
    while time.monotonic() < deadline:
        left = max(0.01, deadline - time.monotonic())
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                connection.sendall(greeting.encode())
                if connection.recv(8) == b"go\n":
                    return
        except OSError:
            pass  # not there yet
        time.sleep(_ASK_AGAIN_SECONDS)
    raise _nobody(cluster, [0], seconds)


def _nobody(cluster: Cluster, missing: list[int], seconds: float) -> InputError:
    who = ", ".join(f"worker {one} ({cluster.addresses[one]})" for one in missing)
    return InputError(
        f"{who} did not come within {seconds:g} s",
        f"Start every worker of {VARIABLE}; VGGREPRO_START_SECONDS sets how long they wait",
    )


def _wrong(what: str) -> InputError:
    return InputError(f"{VARIABLE}: {what}", f"As {EXAMPLE}")


def _host_and_port(address: Any) -> tuple[str, int]:
    host, _, port = str(address).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise _wrong(f"address '{address}' is not host:port")
    return host.strip("[]"), int(port)
