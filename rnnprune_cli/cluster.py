"""The processes that train together: what TF_CONFIG says of them, and how they meet."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from rnnprune_cli.errors import RnnpruneError, UsageError
from rnnprune_cli.model import FineTune

EXAMPLE = (
    '{"cluster": {"worker": ["one:12345", "two:12345"]}, "task": {"type": "worker", "index": 0}}'
)
WAIT = 600.0
"""Seconds to wait for other workers."""


@dataclass(frozen=True)
class Worker:
    """One of the processes.

    Attributes:
        addresses: ``host:port`` of each; the first one is the chief's, which writes the results.
        index: Which of them this is.
    """

    addresses: tuple[str, ...]
    index: int

    def meet(self, progress: Callable[[str], None]) -> None:
        """Waits until every worker answers, with TensorFlow or here.

        TensorFlow waits by itself, but for ever, and so that no signal ends it but SIGKILL.

        Args:
            progress: Called with a short text at the beginning of each step.

        Raises:
            RnnpruneError: If one does not, or the own port is taken.
        """
        port = int(self.addresses[self.index].rpartition(":")[2])
        try:
            own = socket.create_server(("", port))
        except OSError as error:
            raise UsageError(
                f"TF_CONFIG gives this worker port {port}, which cannot be used:"
                f" {os.strerror(error.errno or 0)}",
                "give another one, in TF_CONFIG of all workers",
            ) from error
        end = time.monotonic() + WAIT
        with own:
            for number, address in enumerate(self.addresses):
                if number != self.index:
                    progress(f"waiting for worker {number} at {address}")
                    while not _answers(address):
                        if time.monotonic() > end:
                            raise RnnpruneError(
                                f"worker {number} at {address} does not answer",
                                "start rnnprune on all machines with the same command line, each"
                                " with its own index in TF_CONFIG",
                            )
                        time.sleep(0.1)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 5):
        return True
    return False


def worker() -> Worker:
    """Returns which worker this process is.

    Raises:
        UsageError: If TF_CONFIG does not say so.
    """
    text = os.environ.get("TF_CONFIG", "")
    if not text:
        raise UsageError(
            "--strategy multiworker needs the environment variable TF_CONFIG",
            f"on the first of two machines: TF_CONFIG='{EXAMPLE}'",
        )
    try:
        document = json.loads(text)
        cluster, task = document["cluster"], document["task"]
        unknown = set(cluster) - {"chief", "worker"}
        if unknown or not cluster:
            raise ValueError(f"workers are no '{min(unknown, default='')}'")
        jobs = [(job, k) for job in ("chief", "worker") for k in range(len(cluster.get(job, ())))]
        addresses = [str(cluster[job][k]) for job, k in jobs]
        for address in addresses:
            if not 0 < int(address.rpartition(":")[2]) < 1 << 16 or address.startswith(":"):
                raise ValueError(f"'{address}' is no host:port")
        return Worker(tuple(addresses), jobs.index((task["type"], int(task["index"]))))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"TF_CONFIG cannot be read: {error}", f"such as TF_CONFIG='{EXAMPLE}'"
        ) from error


def helps(options: FineTune) -> bool:
    """Tells whether this process only helps another one, which writes the results."""
    return options.strategy == "multiworker" and worker().index > 0
