"""Two machines, as in docs/parallel.md: two of torchrun's agents, in network namespaces where those can be made."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from alexnet_ext.training import runs
from alexnet_ext.training.log import METRICS, read_metrics
from tests.parallel.test_ranks import OPTIONS, once
from tests.support import ROOT
from tests.training.test_runs import striped

ENTER = ("nsenter", "--user", "--preserve-credentials", "--net")
ADDRESSES = ("10.77.0.1", "10.77.0.2")


class Node:
    """What a command on a machine begins with, the machine's address, and the name of its network's interface."""

    def __init__(self, prefix: tuple[str, ...], address: str, interface: str) -> None:
        self.prefix, self.address, self.interface = prefix, address, interface


def waiting(*prefix: str) -> subprocess.Popen[bytes]:
    """A process that holds namespaces open, once it is in them."""
    process = subprocess.Popen([*prefix, "sh", "-c", "echo; exec sleep 600"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    """Two machines with a cable between them; this machine twice where the system allows no namespaces."""
    tools = all(map(shutil.which, ("unshare", "nsenter", "ip")))
    if (
        not tools
        or subprocess.run(["unshare", "-rn", "ip", "link", "add", "n0", "type", "veth"], check=False).returncode
    ):
        yield [Node((), "localhost", "lo")] * 2
        return
    first = waiting("unshare", "--map-root-user", "--net")
    into = (*ENTER, "--target", str(first.pid))
    second = waiting(*into, "unshare", "--net")
    prefixes = (into, (*ENTER, "--target", str(second.pid)))
    try:
        subprocess.run(
            [*into, "ip", "link", "add", "n0", "type", "veth", "peer", "n1", "netns", str(second.pid)], check=True
        )
        for number, prefix in enumerate(prefixes):
            for words in (f"addr add {ADDRESSES[number]}/24 dev n{number}", f"link set n{number} up", "link set lo up"):
                subprocess.run([*prefix, "ip", *words.split()], check=True)
        yield [Node(prefix, ADDRESSES[number], f"n{number}") for number, prefix in enumerate(prefixes)]
    finally:
        for process in (first, second):
            process.kill()
            process.wait()


def workers(agent: subprocess.Popen[str]) -> list[int]:
    """The processes that an agent has started to train."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"alexnet_ext" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def end_workers(agent: subprocess.Popen[str]) -> None:
    """They do not end with an agent that is killed."""
    with contextlib.suppress(OSError):
        for process in workers(agent):
            os.kill(process, signal.SIGKILL)


def test_two_nodes_train_one_network_and_go_on_after_a_kill(nodes: list[Node], tmp_path: Path) -> None:
    data, out = striped(tmp_path / "data", 24, 3), tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = [*OPTIONS, "--steps", "10", "--save-every", "2", "--resume", "auto", "--out", str(out)]
    options.remove("--quiet")
    agents: list[subprocess.Popen[str]] = []
    with contextlib.ExitStack() as stack:
        for number, node in enumerate(nodes):
            # A namespace has this machine's name: which of them is the endpoint, torch cannot see by it.
            torchrun = f"""--nnodes 2 --nproc-per-node 1 --max-restarts 2 --rdzv-backend c10d --rdzv-id two
                --rdzv-endpoint {nodes[0].address}:{port} --rdzv-conf is_host={1 - number}
                --local-addr {node.address} -m alexnet_ext train {data}"""
            command = [*node.prefix, sys.executable, "-m", "torch.distributed.run", *torchrun.split(), *options]
            stream = stack.enter_context((tmp_path / f"node{number}").open("w"))
            environment = {**os.environ, "GLOO_SOCKET_IFNAME": node.interface, "OMP_NUM_THREADS": "1"}
            agents.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=stream, stderr=subprocess.STDOUT)
            )
            stack.callback(agents[-1].kill)
            stack.callback(end_workers, agents[-1])
        once(out / METRICS, '"step": 4')
        (process,) = workers(agents[1])
        os.kill(process, signal.SIGKILL)
        until = time.monotonic() + 180
        codes = [agent.wait(until - time.monotonic()) for agent in agents]
    texts = "".join((tmp_path / f"node{number}").read_text() for number in range(2))
    assert codes == [0, 0], texts
    assert "going on from step" in texts
    assert json.loads((out / runs.RESULT).read_text())["steps"] == 10
    steps = [line["step"] for line in read_metrics(out / METRICS) if line["kind"] == "train"]
    assert steps == list(range(1, 11))
