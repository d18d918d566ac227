"""
Requests to the Ray cluster that the human has started and named in RAY_API_SERVER_ADDRESS. Only public names of Ray.
"""

import contextlib
import logging
import os
from urllib.parse import urlsplit

from harness.common import first_line

ADDRESS = "RAY_API_SERVER_ADDRESS"
START = f"`uv run --group cluster ray start --head`, then `export {ADDRESS}=http://127.0.0.1:8265`"
MOST_NODES = 10_000  # that Ray lists
KIND = "accelerator_type:"  # begins the resource with which Ray names the GPUs of a node


def connect():
    """Ray's client for jobs. Requests go past any proxy. Raises SystemExit where no cluster is named, or answers."""
    # explicitly, so that nobody's jobs land on a stranger's cluster
    address = os.environ.get(ADDRESS)
    if not address:
        raise SystemExit(f"no cluster is named: before the night, the human runs {START}")
    host = urlsplit(address).hostname
    if not host:
        raise SystemExit(f"{ADDRESS} must be like http://127.0.0.1:8265, not {address}")

    # a proxy of the user's does not know the cluster's network
    hosts = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if host not in hosts.split(","):
        hosts = f"{hosts},{host}".removeprefix(",")
    os.environ |= {"no_proxy": hosts, "NO_PROXY": hosts}
    os.environ["RAY_RUNTIME_ENV_IGNORE_GITIGNORE"] = "1"  # git may track what it is told to ignore
    with asking():
        from ray.job_submission import JobSubmissionClient

        client = JobSubmissionClient(address)
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.WARNING)  # no lines about uploads
    return client


@contextlib.contextmanager
def asking():
    """For requests to the cluster: if one fails, SystemExit says so in one line."""
    from ray.util.state.exception import RayStateApiException

    try:
        yield
    except (OSError, RuntimeError, RayStateApiException) as error:
        # Ray may send the traceback of its own process: its last line says why
        words = str(error).rstrip(". \n")
        if "Traceback" in words:
            words = words.rpartition("\n")[2]
        reason = f"the cluster at {os.environ[ADDRESS]} does not answer: {first_line(words)}"
        raise SystemExit(f"{reason}; where it has ended, the human runs {START}") from None


def list_jobs(client):
    """All jobs of the cluster, by name."""
    with asking():
        return {job.submission_id: job for job in client.list_jobs()}


def living_nodes():
    """The nodes, as Ray's state API describes them."""
    with asking():
        from ray.util.state import list_nodes

        nodes = list_nodes(os.environ[ADDRESS], limit=MOST_NODES)
    return [node for node in nodes if node.state == "ALIVE"]


def choose_slot(nodes, device, wanted):
    """
    The resources of a training, for submit_job: those that are wanted, else one GPU where there are any, else all CPUs
    of the smallest node. Of several kinds of GPU it takes the night's, if Ray's names for them tell it.
    """
    slot = dict(wanted)
    with_gpus = [node for node in nodes if node.resources_total.get("GPU")]
    if not wanted and with_gpus:
        slot["entrypoint_num_gpus"] = 1
    elif not wanted:
        # a node without CPUs takes no training
        cpus = [node.resources_total["CPU"] for node in nodes if node.resources_total.get("CPU")]
        slot["entrypoint_num_cpus"] = min(cpus, default=1)

    # GPUs of several kinds
    kinds = {name for node in with_gpus for name in node.resources_total if name.startswith(KIND)}
    fitting = [kind for kind in kinds if kind.removeprefix(KIND) in device]
    others = []
    if fitting and "entrypoint_num_gpus" in slot:
        kind = max(fitting, key=len)  # H200, not H20
        others = [node.node_ip for node in with_gpus if kind not in node.resources_total]
    if others:
        slot["entrypoint_resources"] = {kind: 0.001}
        print(f"not used, their GPUs are no {kind.removeprefix(KIND)}: {', '.join(others)}")
    return slot
