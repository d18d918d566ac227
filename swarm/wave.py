# ruff: noqa: E402
"""
A wave: many experiments at once, on the devices of a Ray cluster. `ledger.py add --wave` writes their rows.

    uv run --group cluster swarm/wave.py start                    # a cluster, here or in RAY_API_SERVER_ADDRESS
    uv run --group cluster swarm/wave.py new deeper               # a worktree on the last keep, for one idea
    uv run --group cluster swarm/wave.py commit deeper '<idea>'   # its train.py
    uv run --group cluster swarm/wave.py submit base:1 deeper:1   # one training for each pair NAME:SEED
    uv run --group cluster swarm/wave.py collect                  # wait until one has ended, fetch all that have
    uv run --group cluster swarm/wave.py stop                     # end the cluster, remove the worktrees

All state is in wave/: cluster.json, a worktree for each idea, and results/ with a JSON file and a log for each job. A
job is a clone of one commit, nothing else. cluster.py has the cluster, worktrees.py git, and job.py runs on the nodes.

Sections: Start and stop, Submit, Collect, Command line.
"""

import argparse
import json
import re
import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # Python has put swarm/ there

sys.exit("waves do not work at this commit: they move to the record of the night next")

from harness.journal import ROOT, now
from harness.record import write_atomically
from ledger import OneLineParser
from night.load import load_night, load_state, night_commits
from night.waves import must_run_again
from night.worth import new_runs
from swarm import cluster, worktrees
from swarm.cluster import COMMAND, WAVE, asking
from swarm.job import judge

RESULTS = WAVE / "results"
NAME = "[A-Za-z0-9_-]+"
SEEDS = ("1", "2", "3", "4", "5")  # that program.md names

# --------------------------------------
# Start and stop


def start():
    """Begin, or find, the cluster, and say what it has."""
    found = cluster.begin()
    nodes = cluster.living_nodes(found["address"])
    [(resource, amount)] = cluster.default_slot(nodes).items()
    print(f"cluster: {found['address']}, nodes: {len(nodes)}")
    print(f"a training takes {amount:g} {resource.removeprefix('entrypoint_num_')}")
    if found["pid"]:
        head = next(node.node_ip for node in nodes if node.is_head_node)
        print(f"another machine joins with: uv run --group cluster ray start --address={head}:{found['port']}")
    print(f"next: {COMMAND} new <name>")


def stop(force):
    """End the cluster if it began here, and remove the worktrees that have no changes."""
    out = [result["job"] for result in read_results() if result["state"] == "out"]
    if out and not force:
        raise SystemExit(f"not stopped: {len(out)} jobs are out, such as {out[0]}; collect them, or stop --force")
    cluster.end()
    for folder in worktrees.remove_all():
        print(f"{folder} stays, it has changes")


# --------------------------------------
# Submit


def submit(pairs, slot):
    """Send a training for each pair of a name and a seed, unless it is out or has run."""
    address = cluster.read_cluster()["address"]
    state, _ = load_state(ROOT / "night.json")
    night, record, _ = load_night(ROOT)

    # all names are known before anything is sent
    known = night_commits(state["commit"])
    runs = [(worktrees.find_commit(name, state["commit"], known), seed) for name, seed in pairs]
    client = cluster.connect(address)
    slot = slot or cluster.default_slot(cluster.living_nodes(address))
    with asking(address):
        there = {job.submission_id for job in client.list_jobs()}
    for commit, seed in runs:
        _, disturbed = new_runs(night, commit[:7])
        attempt, reason = next_attempt(commit, seed, read_results(), disturbed)
        if reason:
            print(f"{commit[:7]}:{seed} {reason}")
            continue
        job = f"{state['tag'].replace('/', '-')}-{commit[:7]}-{seed}-{attempt}"

        # where wave/ was lost the cluster may have it
        if job in there:
            print(f"{job} is on the cluster already")
        else:
            worktrees.store(commit)
            with worktrees.clone(commit) as folder, asking(address):
                command = entrypoint(record, seed)
                client.submit_job(entrypoint=command, submission_id=job, runtime_env={"working_dir": folder}, **slot)
            print(f"{job} submitted")
        result = {"job": job, "tag": state["tag"], "commit": commit, "seed": seed, "attempt": attempt}
        write_result(result | {"state": "out", "time": now()})
    print(f"next: {COMMAND} collect")


def entrypoint(record, seed):
    """The command line of a job. It prepares the benchmark of this record, with the arguments that made it here."""
    arguments = shlex.join(["--dataset", record["dataset"], *shlex.split(record.get("arguments", ""))])
    return shlex.join(["python", "swarm/job.py", record["id"], str(seed), arguments])


def next_attempt(commit, seed, results, disturbed):
    """The number of the next attempt, from 1, and why there is none: "" if there is one."""
    attempts = [result for result in results if result["commit"] == commit and result["seed"] == seed]
    if not attempts:
        return 1, ""
    last = max(attempts, key=lambda result: result["attempt"])
    if last["state"] == "out":
        return 0, f"is out already, as {last['job']}"
    if must_run_again(last, disturbed):
        return last["attempt"] + 1, ""
    return 0, f"has run already, as {last['job']}: {last['state']}"


# --------------------------------------
# Collect


def collect(wait):
    """Wait until a job has ended, for so many seconds at most, and write the results of all that have."""
    address = cluster.read_cluster()["address"]
    out = [result for result in read_results() if result["state"] == "out"]
    if not out:
        print("no job is out")
        print(f"next: {COMMAND} submit <name>:<seed>")
        return
    client = cluster.connect(address)
    deadline = time.monotonic() + wait
    while True:
        with asking(address):
            jobs = {job.submission_id: job for job in client.list_jobs()}
        ended = [result for result in out if result["job"] not in jobs or jobs[result["job"]].status.is_terminal()]
        if ended or time.monotonic() >= deadline:
            break
        time.sleep(1)

    # a line for each
    for result in out:
        if result in ended:
            result |= fetch(client, address, jobs.get(result["job"]))
            write_result(result)
            print(describe(result))
        else:
            print(f"{result['job']} {jobs[result['job']].status.value.lower()}")
    print("next: uv run ledger.py")


def fetch(client, address, job):
    """How a job has ended, see judge(). Its log is saved."""
    if job is None:
        return {"state": "lost", "reason": "the cluster does not know it any more"}
    log = ""
    if job.driver_exit_code is not None:
        with asking(address):
            try:
                log = client.get_job_logs(job.submission_id)
            except RuntimeError:
                # a node that lives will answer next time
                if job.driver_node_id in [node.node_id for node in cluster.living_nodes(address)]:
                    raise
                return {"state": "lost", "reason": "its log went with its node"}
    (RESULTS / f"{job.submission_id}.log").write_text(log)
    return judge(job.driver_exit_code, job.message or "", log)


def describe(result):
    """A line about a job that has ended."""
    if result["state"] == "scored":
        return f"{result['job']} scored, val_bpb {result['val_bpb']:.6f}"
    line = f"{result['job']} {result['state']}: {result['reason']}"
    if result["state"] == "lost":
        line += f"; send it again: {COMMAND} submit {result['commit'][:7]}:{result['seed']}"
    return line


def read_results():
    """The results of all jobs of this wave so far: a list of dicts."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def write_result(result):
    RESULTS.mkdir(exist_ok=True)
    write_atomically(RESULTS / f"{result['job']}.json", json.dumps(result) + "\n")


# --------------------------------------
# Command line


def worktree_name(text):
    if not re.fullmatch(NAME, text) or text in ("base", "results"):
        raise argparse.ArgumentTypeError(f"{text}: must be of letters, digits, - and _, but not base or results")
    return text


def pair(text):
    name, _, seed = text.rpartition(":")
    if not re.fullmatch(NAME, name) or seed not in SEEDS:
        raise argparse.ArgumentTypeError(f"{text}: must be like base:1, with a seed from 1 to 5")
    return name, int(seed)


def count(text):
    if not re.fullmatch("[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text}: must be a number from 1")
    return int(text)


def parse_arguments(arguments=None):
    parser = OneLineParser(description="Many experiments at once: see swarm/program.md.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="start | new | commit | submit ...")
    commands.add_parser("start", allow_abbrev=False, help="begin a cluster, or take the one in RAY_API_SERVER_ADDRESS")
    worktree = commands.add_parser("new", allow_abbrev=False, help="a worktree on the last keep")
    worktree.add_argument("name", type=worktree_name, help="of the idea: letters, digits, - and _")
    idea = commands.add_parser("commit", allow_abbrev=False, help="commit the train.py of a worktree")
    idea.add_argument("name", type=worktree_name)
    idea.add_argument("message", help="such as 'a deeper model; expect +0.002'")
    sending = commands.add_parser("submit", allow_abbrev=False, help="train, once for each pair")
    sending.add_argument("pairs", type=pair, nargs="+", metavar="NAME:SEED", help="base, a worktree or a commit")
    size = sending.add_mutually_exclusive_group()
    size.add_argument("--gpus", type=count, metavar="N", help="of each training; default 1, where the cluster has any")
    size.add_argument("--cpus", type=count, metavar="N", help="of each training; default all of the smallest node")
    collecting = commands.add_parser("collect", allow_abbrev=False, help="fetch what has ended")
    collecting.add_argument("--wait", type=int, default=540, metavar="SECONDS", help="for the first; default 540")
    stopping = commands.add_parser("stop", allow_abbrev=False, help="end the cluster, remove the worktrees")
    stopping.add_argument("--force", action="store_true", help="give up the jobs that are out")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    if options.command == "start":
        start()
    elif options.command == "new":
        worktrees.new(options.name)
    elif options.command == "commit":
        print(f"{worktrees.commit(options.name, options.message)}; next: {COMMAND} submit {options.name}:1")
    elif options.command == "submit":
        slot = {"entrypoint_num_gpus": options.gpus, "entrypoint_num_cpus": options.cpus}
        submit(options.pairs, {name: amount for name, amount in slot.items() if amount})
    elif options.command == "collect":
        collect(options.wait)
    else:
        stop(options.force)


if __name__ == "__main__":
    main()
