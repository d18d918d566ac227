"""
What goes to a hub, and comes from it. Every agent has a ref of its own there, refs/results/<tag>/<agent>: a commit
whose tree holds its record.jsonl, as the ledger wrote it. So nobody's push comes before another's, and nothing is
merged: the records of others are read where they were fetched to, as nights. Anybody may have written them.

Sections: Records, The remote, Join.
"""

import re

import ledger
from harness.common import call_git, git, resolve, write_atomically
from night.checks import find_problems
from night.record import PREFIX, find_place, find_tag, parse_night, recording
from night.rules import short

NETWORK_SECONDS = 300  # for a fetch or a push
NAME = "[A-Za-z0-9_-]{1,100}"
FETCHED = (
    "+refs/heads/*:refs/remotes/hub/*",
    "+refs/tries/*:refs/hub/tries/*",
    "+refs/results/*:refs/hub/results/*",
)
UNKNOWN = {"until": "never", "commit": "0" * 40, "benchmark": "", "device": ""}  # a night whose first line is garbage

# --------------------------------------
# Records


def read_agents():
    """The nights of all agents, as they were fetched: {"<tag>/<agent>": Night}. A line counts for the ref it is in."""
    nights = {}
    for ref in git("for-each-ref", "--format=%(refname)", "refs/hub/results").output.split():
        agent = ref.removeprefix("refs/hub/results/")
        if re.fullmatch(f"{NAME}/{NAME}", agent):
            content = git("cat-file", "blob", f"{ref}:record.jsonl", seconds=NETWORK_SECONDS).output
            nights[agent] = parse_night(agent, content, lambda: UNKNOWN)
    return nights


def write_own(tag):
    """Commit the record to this agent's own ref, if it has grown since. Returns the ref."""
    ref = f"refs/results/{tag}"
    with recording(tag) as (_, place):
        blob = call_git("hash-object", "-w", "--no-filters", str(place / "record.jsonl"))
    if resolve(f"{ref}:record.jsonl") != blob:
        tree = call_git("mktree", text=f"100644 blob {blob}\trecord.jsonl\n")
        parent = resolve(ref)
        parents = ["-p", parent] if parent else []
        call_git("update-ref", ref, call_git("commit-tree", tree, *parents, "-m", f"record of {tag}"))
    return ref


# --------------------------------------
# The remote


def receive():
    """Fetch what others have shared. Returns why the hub was not reached, "" if it was."""
    if not git("remote", "get-url", "hub").worked:
        raise SystemExit("no hub here: uv run swarm/hub.py join <url> --tag <tag> --agent <agent> --until <when>")
    fetch = ("fetch", "-q", "--prune", "--no-tags", "--no-recurse-submodules", "hub", *FETCHED)
    answer = git(*fetch, seconds=NETWORK_SECONDS)
    if not answer.worked:
        return answer.complaint
    return ""


def send(night):
    """Receive, then push this agent's record, branch and new tries. Returns why that did not work, "" if it did."""
    tag, branch = night.tag, f"refs/heads/{PREFIX}{night.tag}"
    own = write_own(tag)
    reason = receive()
    if reason:
        return reason
    theirs = resolve(f"refs/hub/results/{tag}")
    if theirs and not git("merge-base", "--is-ancestor", theirs, own).worked:
        raise SystemExit(f"another clone has sent results as {tag}: join from here under another name")

    # what of its tries is here, and not there
    here = set(git("for-each-ref", "--format=%(objectname)", "refs/tries").output.split())
    there = set(git("for-each-ref", "--format=%(objectname)", f"refs/hub/tries/{tag}").output.split())
    tries = [f"{commit}:refs/tries/{tag}/{short(commit)}" for commit in night.tries if commit in here - there]
    answer = git("push", "-q", "hub", f"{own}:{own}", f"+{branch}:{branch}", *tries, seconds=NETWORK_SECONDS)
    if not answer.worked:
        return answer.complaint
    return ""


# --------------------------------------
# Join


def join(url, tag, until):
    """Begin, bring back or go on with the night `tag`, <tag>/<agent>, that is shared on the hub at `url`."""
    branch = f"{PREFIX}{tag}"
    is_here = resolve(f"refs/heads/{branch}") != ""
    if not is_here:
        problems, _ = find_problems(tag)
        if problems:
            raise SystemExit("\n".join(f"- {problem}" for problem in problems))
    reason = connect(url)

    # three cases: the night is here already, it is only on the hub, or it is new
    if is_here:
        check_out(branch, branch)
        print(f"{branch} is here already; the hub was {'not reached: ' + reason if reason else 'fetched'}")
    elif reason:
        raise SystemExit(f"the hub was not reached: {reason}")
    elif resolve(f"refs/hub/results/{tag}"):
        check_out(branch, "-b", branch, f"refs/remotes/hub/{branch}")
        call_git("fetch", "-q", ".", f"+refs/hub/tries/{tag}/*:refs/tries/*")
        print(f"{branch} is back from the hub")
    elif until is None:
        raise SystemExit(f"{tag} is new on this hub: say when it ends, with --until <when>")
    else:
        ledger.start(tag, until)
        return
    restore_record(tag)
    night, _, _, _ = ledger.load()
    print(f"it lasts until {ledger.end_in_words(night)}; runs: {len(night.runs)}")
    ledger.print_next(night)


def check_out(branch, *words):
    """Check out a branch. Raises SystemExit if git refuses."""
    answer = git("checkout", "-q", *words)
    if not answer.worked:
        raise SystemExit(f"git refuses to check out {branch}: {answer.complaint}")


def connect(url):
    """Make the remote and fetch it. Returns why it was not reached, "" if it was."""
    known = git("remote", "get-url", "hub").output
    if known and known != url:
        raise SystemExit(f"the hub of this clone is {known}: join another from a clone of its own")
    if known:
        return receive()

    # a url with a typo does not stay
    git("remote", "add", "hub", url)
    reason = receive()
    if reason:
        git("remote", "remove", "hub")
    return reason


def restore_record(tag):
    """The record as the hub has it, if there is none here."""
    theirs = f"refs/hub/results/{tag}"
    path = find_place(tag) / "record.jsonl"
    if path.exists() or not resolve(theirs):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, call_git("cat-file", "blob", f"{theirs}:record.jsonl", seconds=NETWORK_SECONDS) + "\n")
    call_git("update-ref", f"refs/results/{tag}", theirs)


def own_tag():
    """The tag of the night that is checked out. Raises SystemExit if it is on no hub."""
    tag = find_tag()
    if "/" not in tag:
        raise SystemExit(f"the night {tag} is on no hub: join one from a clone of its own")
    return tag
