"""
How a night comes to a hub, and comes back from it: `hub.py join`, which works the first time and every time.
"""

import json
import math

from harness.journal import ROOT
from ledger import parse_until, print_next, start
from night.checks import find_problems, run_git
from night.load import as_cells, load_night, load_state, made_at
from night.rows import Row, append_rows, read_rows
from swarm.notes import read_lines, reason_of, receive, resolve


def join(url, tag, until):
    """Begin, bring back or go on with the night `tag`, <tag>/<agent>, that is shared on the hub at `url`."""
    until = parse_until(until)
    state = find_state()
    is_here = state.get("tag") == tag
    if not is_here:
        refuse_unready(tag)
    reason = connect(url)

    # three cases: the night is here already, it is new, or it is only on the hub
    branch = f"autoresearch/{tag}"
    if is_here:
        outcome = f"not reached: {reason}" if reason else "fetched"
        print(f"{branch} is here already, until {state['until']}; the hub was {outcome}")
    elif reason:
        raise SystemExit(f"the hub was not reached: {reason}")
    elif not resolve(f"refs/remotes/hub/{branch}"):
        start(ROOT, tag, until)
        return
    else:
        come_back(tag, until)
    restore_rows(tag)
    print_next(load_night(ROOT)[0])


def find_state():
    """The night that is here, from night.json or git: {tag, until, commit}; {} if there is none."""
    try:
        return load_state(ROOT / "night.json")[0]
    except SystemExit:
        return {}


def refuse_unready(tag):
    """Raise SystemExit where another night is, or where none could start."""
    if read_rows(ROOT / "results.tsv")[0]:
        raise SystemExit("results.tsv has rows of another night: join from a clone of its own")
    problems = find_problems(ROOT, tag)
    if problems:
        raise SystemExit("\n".join(f"- {problem}" for problem in problems))


def connect(url):
    """Make the remote and fetch it. Returns why it was not reached, "" if it was."""
    known = run_git(ROOT, "remote", "get-url", "hub")[1]
    if known and known != url:
        raise SystemExit(f"the hub of this clone is {known}: join another from a clone of its own")
    if known:
        return receive()

    # a url with a typo does not stay
    run_git(ROOT, "remote", "add", "hub", url)
    reason = receive()
    if reason:
        run_git(ROOT, "remote", "remove", "hub")
    return reason


def come_back(tag, until):
    """Check out the branch that the hub has, and write night.json from it."""
    branch = f"autoresearch/{tag}"
    theirs = f"refs/remotes/hub/{branch}"

    # every night's first commit names it
    first = run_git(ROOT, "log", "-1", f"--grep=^{branch}: start$", "--format=%H", theirs)[1]
    if not first:
        raise SystemExit(f"{branch} on the hub is not a night: use another name")
    worked, _, complaint = run_git(ROOT, "checkout", "-q", "-b", branch, theirs)
    if not worked:
        raise SystemExit(f"git refuses to check out {branch}: {reason_of(complaint)}")
    state = {"tag": tag, "until": until, "started": made_at(first), "commit": first}
    (ROOT / "night.json").write_text(json.dumps(state) + "\n")

    # the tries by the names that program.md gives them
    run_git(ROOT, "fetch", "-q", ".", f"+refs/hub/tries/{tag}/*:refs/tries/*")
    print(f"{branch} is back from the hub, until {until}")


def restore_rows(tag):
    """Write results.tsv from the notes of this agent, if it has no rows."""
    path = ROOT / "results.tsv"
    own, _ = read_lines(tag)
    if not own or read_rows(path)[0]:
        return

    # as the ledger had them, but with commits cut to seven digits
    rows = []
    for line in own:
        score = line["val_bpb"] or math.nan
        rows.append(Row(line["commit"][:7], score, line["memory_gb"], line["status"], line["description"], 0))
    append_rows(path, [as_cells(row) for row in rows])
    print(f"results.tsv is back from the hub, rows: {len(rows)}")
