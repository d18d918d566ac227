"""
What goes to a hub, and comes from it. Every agent has a ref of its own there, refs/results/<tag>/<agent>: a commit
whose tree holds its record.jsonl, as the ledger wrote it. So pushes never conflict, and nothing is merged: the records
of others are read as nights, from the refs that they were fetched to. Anybody may have written them.

Sections: Records, The remote, Join.
"""

import re

import ledger
from harness.common import call_git, git, resolve, write_atomically
from night.record import PREFIX, find_place, parse_night, recording
from night.rules import short

NETWORK_SECONDS = 300  # for a fetch or a push
NAME = "[A-Za-z0-9_-]{1,100}"
TOPS = ("refs", "refs/heads")  # where results and tries may go on a hub: some take branches alone
PLACES = ("refs/hub", "refs/remotes/hub")  # where these are fetched to
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
    for ref in list_refs("%(refname)", "results"):
        agent = ref.split("/results/", 1)[1]
        if re.fullmatch(f"{NAME}/{NAME}", agent):
            content = git("cat-file", "blob", f"{ref}:record.jsonl", seconds=NETWORK_SECONDS).output
            nights[agent] = parse_night(agent, content, lambda: UNKNOWN)
    return nights


def list_refs(form, name):
    """What was fetched of a name, such as results or tries/<tag>: [text], in a form of for-each-ref."""
    return git("for-each-ref", f"--format={form}", *(f"{place}/{name}" for place in PLACES)).output.split()


def find_record(tag):
    """The ref with the record of an agent as the hub has it; "" if it has none."""
    refs = [f"{place}/results/{tag}" for place in PLACES]
    return next((ref for ref in refs if resolve(ref)), "")


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
    return git(*fetch, seconds=NETWORK_SECONDS).complaint


def send(night, top=None):
    """
    Receive, then push this agent's branch, and its record and new tries below the ref `top`, by default the one that
    `join` has found. Returns why a fetch or push failed, "" if both worked.
    """
    top = top or git("config", "autoresearch.hubRefs").output or TOPS[0]
    tag, branch = night.tag, f"refs/heads/{PREFIX}{night.tag}"
    own = write_own(tag)
    reason = receive()
    theirs = find_record(tag)
    if theirs and not git("merge-base", "--is-ancestor", theirs, own).worked:
        raise SystemExit(f"another clone has sent results as {tag}: join from here under another name")

    # what of its tries is here, and not there
    here = set(git("for-each-ref", "--format=%(objectname)", "refs/tries").output.split())
    there = set(list_refs("%(objectname)", f"tries/{tag}"))
    tries = [f"{commit}:{top}/tries/{tag}/{short(commit)}" for commit in night.tries if commit in here - there]

    # the last keep, not HEAD: a push after a reset would have to be forced, which not every hub allows
    refs = (f"{own}:{top}/results/{tag}", f"{night.last_keep}:{branch}", *tries)
    answer = git("push", "-q", "--atomic", "hub", *refs, seconds=NETWORK_SECONDS)
    return reason or answer.complaint


# --------------------------------------
# Join


def join(url, tag, until):
    """Begin, bring back or go on with the night `tag`, <tag>/<agent>, that is shared on the hub at `url`."""
    known = git("config", "remote.hub.url").output
    if known and known != url:
        raise SystemExit(f"the hub of this clone is {known}: join another from a clone of its own")
    if not known:
        git("remote", "add", "hub", url)
    try:
        enter(tag, until, is_known=bool(known))
    except BaseException:
        if not known:
            git("remote", "remove", "hub")  # a url with a typo does not stay
        raise


def enter(tag, until, is_known):
    branch = f"{PREFIX}{tag}"
    is_here = resolve(f"refs/heads/{branch}") != ""
    reason = receive()
    if reason and not (is_here and is_known):
        raise SystemExit(f"the hub was not reached: {reason}")

    # three cases: the night is here already, it is only on the hub, or it is new
    if is_here:
        restore_record(tag)
        call_git("checkout", "-q", branch)
        print(f"{branch} is here already; the hub was {'not reached: ' + reason if reason else 'fetched'}")
    elif find_record(tag):
        refuse_other_files(branch)
        restore_record(tag)  # before the branch: whoever kills this, says it again
        call_git("checkout", "-q", "-b", branch, f"refs/remotes/hub/{branch}")
        print(f"{branch} is back from the hub")
    elif until is None:
        raise SystemExit(f"{tag} is new on this hub: say when it ends, with --until <when>")
    else:
        ledger.start(tag, until)
    night, _, _, _ = ledger.refresh()
    if not reason:
        try_to_send(night)
    print(f"it lasts until {ledger.end_in_words(night)}; runs: {len(night.runs)}")
    ledger.print_next(night)


def try_to_send(night):
    """Do what `exchange` will do: it tells which refs the hub takes, and what has to be allowed if it takes none."""
    reasons = []
    for top in TOPS:
        reason = send(night, top)
        if not reason:
            call_git("config", "autoresearch.hubRefs", top)
            return
        reasons.append(reason)
    if git("rev-parse", "--is-shallow-repository").output == "true":
        way_out = "this clone is shallow: git fetch --unshallow, and join again"
    else:
        heads = f"refs/heads/{PREFIX}*"
        way_out = (
            f"its owner has to allow pushes to {heads}, and to refs/results/* and refs/tries/*, or all refs/heads/*"
        )
    print(f"the hub does not take what exchange sends: {reasons[0]}; {way_out}")


def refuse_other_files(branch):
    """Raise SystemExit where the branch of a hub, which anybody may have made, has more than another train.py."""
    theirs = f"refs/remotes/hub/{branch}"
    if not resolve(theirs):
        raise SystemExit(f"the hub has results of {branch}, but not the branch: take another name")
    others = call_git("diff", "--name-only", "HEAD", theirs, "--", ":!train.py").splitlines()
    if others:
        raise SystemExit(
            f"{branch} on the hub differs from this clone in {others[0]}, and not in train.py alone; if it is yours: "
            f"git checkout -q -b {branch} {theirs}, and join again"
        )


def restore_record(tag):
    """If there is no record here, restore it and the tries from this agent's own ref, or from the hub's if newer."""
    theirs, own = find_record(tag), f"refs/results/{tag}"
    path = find_place(tag) / "record.jsonl"
    if path.exists() or not (theirs or resolve(own)):
        return
    if theirs and not git("merge-base", "--is-ancestor", theirs, own).worked:
        call_git("update-ref", own, theirs)
    call_git("fetch", "-q", ".", *(f"+{place}/tries/{tag}/*:refs/tries/*" for place in PLACES))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, call_git("cat-file", "blob", f"{own}:record.jsonl", seconds=NETWORK_SECONDS) + "\n")
