"""
The Ray cluster of a wave: the one that RAY_API_SERVER_ADDRESS names, or one of this machine. Only public names of Ray.

Sections: Begin and end, Requests.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from harness.journal import ROOT, first_line
from harness.record import write_atomically

WAVE = ROOT / "wave"
CLUSTER = WAVE / "cluster.json"
COMMAND = "uv run --group cluster swarm/wave.py"
START_SECONDS, END_SECONDS = 180, 20  # that a cluster gets to answer, and to end by itself
MOST_NODES = 10_000  # that Ray lists

# Ray sends a folder whole, with .git, whatever .gitignore says, and ends at once when it is told to
SETTINGS = {
    "RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES": "",
    "RAY_RUNTIME_ENV_IGNORE_GITIGNORE": "1",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
}

# --------------------------------------
# Begin and end


def begin():
    """The cluster of this wave, as wave/cluster.json has it: {address, pid}, and {port, folder} if it began here."""
    named = os.environ.get("RAY_API_SERVER_ADDRESS")
    WAVE.mkdir(exist_ok=True)
    if CLUSTER.exists():
        cluster = read_cluster()
        with contextlib.suppress(SystemExit):
            living_nodes(cluster["address"])
            print("the cluster of this wave is running already")
            if named not in (None, cluster["address"]):
                print(f"RAY_API_SERVER_ADDRESS={named} is ignored: another cluster is open; end it: {COMMAND} stop")
            return cluster
    lock = take_lock()
    if lock is None:
        raise SystemExit(f"the cluster of this wave does not answer: wait for it, or end it: {COMMAND} stop")
    with lock:
        if not named:
            return begin_here(lock)
        cluster = {"address": named, "pid": None}
        living_nodes(named)
        write_atomically(CLUSTER, json.dumps(cluster) + "\n")
        return cluster


def take_lock():
    """
    The lock of this wave's cluster, an open file; None if it is taken. `ray start` inherits it, and the system frees it
    when that ends. So the pid in cluster.json is ours while the lock is taken, and means nothing when it is free.
    """
    lock = open(WAVE / "cluster.lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def begin_here(lock):
    """
    Start a cluster of this machine. It has ports and a folder of its own, so it meets no other cluster that runs here.
    """
    port, dashboard, agent, client = free_ports(4)
    address = f"http://127.0.0.1:{dashboard}"
    prepare_requests(address)
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets have short paths
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    command += [f"--temp-dir={folder}"]

    # jobs inherit what it has: they are not to find this cluster by an address
    environment = {name: value for name, value in os.environ.items() if name != "RAY_API_SERVER_ADDRESS"}
    with open(WAVE / "cluster.log", "w") as log:
        options = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True)
        process = subprocess.Popen(command, pass_fds=[lock.fileno()], **options)
    lock.close()  # only our copy: the one that ray inherited keeps it taken
    cluster = {"address": address, "pid": process.pid, "port": port, "folder": folder}
    write_atomically(CLUSTER, json.dumps(cluster) + "\n")

    # a busy machine takes its time
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(1)
        with contextlib.suppress(SystemExit):
            living_nodes(address)
            return cluster
    end()
    raise SystemExit("the cluster did not start, wave/cluster.log says why")


def free_ports(count):
    """Ports that are free on all interfaces."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("", 0))
        return [listener.getsockname()[1] for listener in sockets]


def end():
    """End the cluster of this wave if it has begun here, and forget it."""
    cluster = read_cluster()
    if cluster["pid"] is None:
        print(f"the cluster at {cluster['address']} was not started here, so it keeps running")
    else:
        end_group(cluster["pid"])
        shutil.rmtree(cluster["folder"], ignore_errors=True)
        print(f"the cluster at {cluster['address']} has ended")
    CLUSTER.unlink()


def end_group(pid):
    """End `ray start`, which ends its children. What is left of its group after END_SECONDS is killed."""
    if not is_taken():
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + END_SECONDS
        while is_taken() and time.monotonic() < deadline:
            time.sleep(0.2)
        os.killpg(pid, signal.SIGKILL)


def is_taken():
    lock = take_lock()
    if lock:
        lock.close()
    return lock is None


def read_cluster():
    try:
        return json.loads(CLUSTER.read_text())
    except FileNotFoundError:
        raise SystemExit(f"no wave here: {COMMAND} start") from None


# --------------------------------------
# Requests


def prepare_requests(address):
    """Let requests reach the cluster: past any proxy, with these settings. Raises SystemExit if it is no address."""
    host = urlsplit(address).hostname
    if not host:
        raise SystemExit(f"RAY_API_SERVER_ADDRESS must be like http://127.0.0.1:8265, not {address}")
    hosts = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if host not in hosts.split(","):
        hosts = f"{hosts},{host}".removeprefix(",")
    os.environ |= SETTINGS | {"no_proxy": hosts, "NO_PROXY": hosts}

    # Ray prefers it to the address that a call names
    os.environ["RAY_API_SERVER_ADDRESS"] = address


@contextlib.contextmanager
def asking(address):
    """For requests to the cluster: if one fails, SystemExit says so in one line."""
    prepare_requests(address)
    from ray.util.state.exception import RayStateApiException

    try:
        yield
    except (OSError, RuntimeError, RayStateApiException) as error:
        raise SystemExit(f"the cluster at {address} does not answer: {first_line(error)}") from None


def connect(address):
    """Ray's client for jobs."""
    with asking(address):
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(address)


def living_nodes(address):
    """The nodes, as Ray's state API describes them."""
    with asking(address):
        from ray.util.state import list_nodes

        nodes = list_nodes(address, limit=MOST_NODES)
    living = [node for node in nodes if node.state == "ALIVE"]
    if not living:
        raise SystemExit(f"the cluster at {address} has no living node")
    return living


def default_slot(nodes):
    """The resources of a training, for submit_job: one GPU where there are any, else all CPUs of the smallest node."""
    # a node without CPUs takes no training
    resources = [node.resources_total for node in nodes]
    if any(node.get("GPU") for node in resources):
        return {"entrypoint_num_gpus": 1}
    return {"entrypoint_num_cpus": min((node["CPU"] for node in resources if node.get("CPU")), default=1)}
