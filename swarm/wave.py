"""
A wave: many experiments at once, on the Ray cluster that RAY_API_SERVER_ADDRESS names.

    uv run --group cluster swarm/wave.py new deeper               # a worktree on the last keep, for one idea
    uv run --group cluster swarm/wave.py commit deeper '<idea>'   # its train.py
    uv run --group cluster swarm/wave.py run                      # train all that the night needs; wait for a result
    uv run --group cluster swarm/wave.py clean                    # remove the worktrees that are done

The worktrees are in wave/. A job, one training of one commit, is out as long as it has a file in jobs/, beside the
night's record. Whatever ends `run`, another one goes on with the same jobs. cluster.py asks Ray,
job.py runs on the nodes.

Sections: Worktrees, Run, Jobs, Command line.
"""

import contextlib
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # Python has put swarm/ there

import ledger
from harness import common
from harness.common import OneLineParser, call_git, find_home, first_line, git, matching, run_command, write_atomically
from harness.journal import add_run
from night import runner
from night.record import read_jobs, recording
from night.rules import commits_of_wave, is_candidate, needed_on_cluster, short, view_of
from night.steps import WAVE_RUN, next_step
from swarm.cluster import asking, choose_slot, connect, list_jobs, living_nodes
from swarm.job import RESULT
from swarm.share import NAME

COMMAND = WAVE_RUN.removesuffix(" run")
WAIT_SECONDS = 540  # for a result; clients end a command that takes longer

# --------------------------------------
# Worktrees


def find_folder(name):
    return common.ROOT / "wave" / name


def new(name):
    """Make a worktree on the last keep, and say what comes next."""
    if find_folder(name).exists():
        raise SystemExit(f"wave/{name} exists: edit it, or use another name")
    night, _, _, problems = ledger.refresh()
    call_git("worktree", "prune")  # git remembers one that was removed by hand
    no_hooks = ("-c", "core.hooksPath=/dev/null")  # those of a checkout are for people
    call_git(*no_hooks, "worktree", "add", "-q", "--detach", str(find_folder(name)), night.last_keep)
    ledger.print_problems(problems)
    print(f"wave/{name} is on the last keep, {short(night.last_keep)}")
    print(f"next: edit wave/{name}/train.py; {commit_line(name)}")


def commit_line(name):
    return f"{COMMAND} commit {name} '<idea>; expect <gain>'"


def commit(name, message):
    """Commit the train.py of wave/<name>, and nothing else: what else was edited there would not be judged."""
    folder = find_folder(name)
    if not (folder / ".git").exists():
        raise SystemExit(f"there is no wave/{name}: {COMMAND} new {name}")
    if not call_git("status", "--porcelain", "--", "train.py", folder=folder):
        raise SystemExit(f"wave/{name}/train.py has no changes: nothing to commit")
    call_git("commit", "-q", "-m", message, "--", "train.py", folder=folder)
    print(f"{call_git('rev-parse', '--short=7', 'HEAD', folder=folder)} committed; next: {WAVE_RUN}")


def clean():
    """Remove the worktrees without changes, but not those with an undecided commit that has begun to run."""
    night, _, _, _ = ledger.refresh()
    for name, checkout in night.worktrees.items():
        begun = [commit for commit in checkout.line if commit in commits_of_wave(night) and is_begun(commit, night)]
        if begun:
            print(f"wave/{name} stays: {short(begun[0])} is not decided yet")
            continue

        # no branch has its commit, and it may never have run
        runner.store(checkout.line[-1])
        if checkout.changed or not git("worktree", "remove", str(find_folder(name))).worked:
            print(f"wave/{name} stays: it has changes")
    ledger.print_next(night)


def is_begun(commit, night):
    """Whether a commit has runs, or jobs that are out, and no decision."""
    attempt = night.attempt(commit)
    is_out = commit in [job["commit"] for job in night.out]
    return (bool(attempt.runs) or is_out) and attempt.verdict not in ("keep", "discard")


# --------------------------------------
# Run


def run(wait, slot):
    """Submit all that is needed, wait until a job ends, record and decide, submit what is needed now; say what next."""
    client = connect()
    night, place, _, _ = ledger.refresh()
    before = set(night.runs)
    collect(client, place)
    night = submit(client, slot)

    # what follows from a result is sent before this ends
    deadline = time.monotonic() + wait
    while night.out and set(night.runs) == before and time.monotonic() < deadline:
        time.sleep(1)
        collect(client, place)
        over = [job for job in read_jobs(place).values() if "exit" in job]
        if over or len(read_jobs(place)) < len(night.out):  # or another process has recorded one
            night = submit(client, slot)

    # what is new; another process may have recorded it
    night, _, journal, problems = ledger.refresh()
    for ended in [run for run in night.runs.values() if run.run not in before]:
        log = log_path(place, ended.run)
        ledger.print_run(ended, night, journal, runner.read_log(log))
        if ended.state == "crash":
            print(f"log: {log}")
    print_out(client, night)
    ledger.print_problems(problems + problems_of_worktrees(night))
    ledger.print_next(night)


def problems_of_worktrees(night):
    """What keeps an idea from being sent: [sentence]."""
    found = []
    for name, checkout in night.worktrees.items():
        head = checkout.line[-1]
        if checkout.changed:
            found.append(f"wave/{name}/train.py has changes: commit them, {commit_line(name)}")
        is_open = not night.attempt(head).verdict and head not in night.kept
        if is_open and not is_candidate(view_of(night, checkout)):
            found.append(
                f"wave/{name} is not on the last keep, or changes more than train.py: make its idea in a new worktree"
            )
    return found


def print_out(client, night):
    """What each job that is out does: Ray's word for it."""
    jobs = list_jobs(client)
    for state in night.out:
        if state["job"] in jobs:
            print(f"out: {short(state['commit'])} seed {state['seed']}, {jobs[state['job']].status.value.lower()}")


# --------------------------------------
# Jobs


def submit(client, slot):
    """Send all that the night needs and that is not out. Returns the night."""
    night, _, _, _ = ledger.refresh()

    # the branch goes with the keeps; where HEAD is an idea, `next:` says so
    if night.head in night.kept[:-1] and not night.changed:
        git("reset", "-q", "--keep", night.last_keep)
    with recording(night.tag) as (night, place):
        if next_step(night).kind != "tell":
            for training in needed_on_cluster(night):
                state = runner.new_state(night, place, training)
                name = f"{night.tag.replace('/', '-')}-{short(training.commit)}-{training.seed}"
                state |= {"training": name, "job": f"{name}-{state['run'][-8:]}"}
                (place / "jobs").mkdir(exist_ok=True)
                write_atomically(place / "jobs" / f"{state['run']}.json", json.dumps(state))
                night.out.append(state)

    # also those that the cluster has never got, or has forgotten
    there = list_jobs(client)
    missing = [state for state in night.out if state["job"] not in there]
    if missing:
        slot = choose_slot(living_nodes(), night.device, slot)
    for state in missing:
        send(client, night, state, slot)
    return night


def log_path(place, run):
    return place / "jobs" / f"{run}.log"


def send(client, night, state, slot):
    """Submit a job: the files of its commit."""
    runner.store(state["commit"])
    record = json.loads((find_home() / night.benchmark / "benchmark.json").read_text())
    arguments = ["--dataset", record["dataset"], *shlex.split(record.get("arguments", ""))]
    command = shlex.join(["python", "swarm/job.py", json.dumps({"state": state, "arguments": arguments})])
    with tempfile.TemporaryDirectory(prefix="wave-") as folder, asking():
        files = Path(folder, "files")
        runner.write_files(files, state["commit"])
        try:
            # the node's Python: where `uv run` has started Ray, Ray would make an environment for each commit
            environment = {"working_dir": str(files), "py_executable": "python"}
            client.submit_job(entrypoint=command, submission_id=state["job"], runtime_env=environment, **slot)
        except RuntimeError as error:
            if "already exists" in str(error):  # another `run` was faster
                return
            raise
    print(f"submitted: {short(state['commit'])} seed {state['seed']}, {state['role']}")


def collect(client, place):
    """Take the ends of the jobs that have one, into the journal and jobs/: from there the ledger records them."""
    jobs = list_jobs(client)
    for path, state in read_jobs(place).items():
        job = jobs.get(state["job"])
        if "exit" in state or job is None or not job.status.is_terminal():
            continue
        if not job.driver_node_id:  # it was on no node: Ray ends those that wait in its queue for fifteen minutes
            path.unlink(missing_ok=True)  # so it is sent anew
            continue
        log = log_path(place, state["run"])
        end = read_end(client, job, log)
        if end.get("scored"):
            add_run(find_home() / state["benchmark"], end["scored"])
        if end:
            write_atomically(path, json.dumps(state | end | {"log": str(log)}))


def read_end(client, job, path):
    """
    How a job has ended, as job.py has printed it: {exit, ended, scored}; {} while its node does not answer. A job that
    could not print it was lost. Its log is saved at `path`.
    """
    lost = {"exit": None, "lost": f"its node went: {first_line(job.message or 'no reason given')}"}
    if job.driver_exit_code is None:
        return lost
    try:
        with asking():
            log = client.get_job_logs(job.submission_id)
    except SystemExit:
        if job.driver_node_id in [node.node_id for node in living_nodes()]:
            return {}  # it will answer next time, or be dead
        return lost
    log, marker, result = log.rpartition(f"\n{RESULT}")
    path.write_text(log or result)
    if marker:
        with contextlib.suppress(ValueError):
            return json.JSONDecoder().raw_decode(result)[0]
        return {"exit": None, "lost": "its last line, the result, was torn"}
    if job.driver_exit_code < 0:  # Ray, or somebody else, has ended it
        return lost
    return {"exit": None, "lost": f"its node was not ready: {first_line(runner.last_line(result) or 'no output')}"}


# --------------------------------------
# Command line


def parse_arguments(arguments=None):
    name = matching(NAME, "take letters, digits, - and _")
    count = matching("[1-9][0-9]{0,8}", "must be a number from 1")
    parser = OneLineParser(description="Many experiments at once: see swarm/program.md.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="new | commit | run | clean")
    worktree = commands.add_parser("new", help="a worktree on the last keep")
    worktree.add_argument("name", type=name, help="of the idea: letters, digits, - and _")
    idea = commands.add_parser("commit", help="commit the train.py of a worktree")
    idea.add_argument("name", type=name)
    idea.add_argument("message", help="such as 'a deeper model; expect +0.002'")
    running = commands.add_parser("run", help="train all that is needed, wait for a result")
    running.add_argument("--wait", type=count, default=WAIT_SECONDS, metavar="SECONDS", help="default 540")
    size = running.add_mutually_exclusive_group()
    size.add_argument("--gpus", type=count, metavar="N", help="of each training; default 1, where the cluster has any")
    size.add_argument("--cpus", type=count, metavar="N", help="of each training; default all of the smallest node")
    commands.add_parser("clean", help="remove the worktrees that are done")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    if options.command == "new":
        new(options.name)
    elif options.command == "commit":
        commit(options.name, options.message)
    elif options.command == "run":
        slot = {"entrypoint_num_gpus": options.gpus, "entrypoint_num_cpus": options.cpus}
        run(int(options.wait), {name: int(amount) for name, amount in slot.items() if amount})
    else:
        clean()


if __name__ == "__main__":
    run_command(main)
