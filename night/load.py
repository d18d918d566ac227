"""load_night() reads a night from git, the journal and the files of its folder. ledger.py looks at nothing else."""

import json
import re
from datetime import datetime, timezone
from pathlib import Path

from harness.journal import find_home, git, now, read_journal
from night.checks import running_training
from night.rows import Row, append_rows, read_rows
from night.waves import add_runs, read_jobs
from night.worth import FINAL_SEEDS, Night, counting, discards_below

LOG_BYTES = 100_000  # of a log, at either end: a run may print what it likes

# The last line of a log that was cut off: no score and no error, so the run was killed and proves nothing
UNFINISHED = (
    r"(step \d|commit \w|CPU:|COMPILE:|DEVICE_BATCH_SIZE:|attention:|KeyboardInterrupt)"
    r"|.*compiling what is new|\S+ has no gradient"
)


def load_night(folder):
    """The night under way in this folder, its benchmark's record, and sentences on what could not be read."""
    state, problems = load_state(folder / "night.json")
    running = running_training()  # before the journal is read: what ends in between would be seen in neither
    record = load_record()
    start = state["commit"]
    known = night_commits(start)

    # rows name commits with any number of digits; a keep that git does not know could never be checked out
    rows, unread = read_rows(folder / "results.tsv")
    jobs, unread_jobs = read_jobs(folder, known)
    runs = night_runs(read_journal(find_home() / record["id"]), known)
    problems += unread + unread_jobs + add_runs(runs, jobs, record, start)
    short = {commit[:7] for commit in known}
    for index, row in enumerate(rows):
        row = row._replace(commit=whole(row.commit, known))
        rows[index] = row
        if row.status == "keep" and row.commit not in short:
            rows[index] = row._replace(status="discard")
            problems.append(f"results.tsv:{row.line}: {row.commit} is not a commit of this night, so it is not kept")

    night = Night(
        tag=state["tag"],
        until=state["until"],
        start=start[:7],
        head=(git("rev-parse", "HEAD") or "")[:7],
        branch=git("branch", "--show-current") or "",
        lineage=line_of("HEAD", start),
        subject=git("log", "-1", "--format=%s") or "",
        rows=rows,
        runs=runs,
        jobs=jobs,
        wave=(folder / "wave" / "cluster.json").exists(),
        log=fresh_log(folder),
        running=running,
        time=now(),
        **read_changes(folder),
    )
    if not (folder / "results.tsv").exists():
        problems.append("results.tsv was lost, and is rebuilt from the journal and git")
        rebuild(folder, night)
    for commit in discards_below(night):
        problems.append(f"HEAD is on top of {commit}, which was not kept: it contains that change, too")
    return night, record, problems


def night_commits(start):
    """The night's commits: on its branch, stored in refs/tries, or only in the reflog."""
    later = git("rev-list", "--all", "--reflog", "HEAD", "--ancestry-path", f"^{start}") or ""
    return [start, *later.split()]


def line_of(name, start):
    """The commits from the night's first to a branch or HEAD, oldest first; none if it does not descend from it."""
    lines = (git("rev-list", "--reverse", name, f"^{start}^@") or "").split()
    short = tuple(commit[:7] for commit in lines)
    if start[:7] not in short:
        return ()
    return short


def night_runs(journal, known):
    """The scored runs of these commits, oldest first. Older harnesses wrote fewer keys, or nulls."""
    runs = []
    for run in journal:
        run = {key: value for key, value in run.items() if value is not None}
        if run.get("commit") in known and run["val_bpb"] > 0:
            runs.append({"seed": 0} | run)
    return runs


def load_record():
    """benchmark.json of the current benchmark, not checked: a training does that."""
    home = find_home()
    try:
        return json.loads((home / (home / "current").read_text().strip() / "benchmark.json").read_text())
    except (OSError, ValueError):
        raise SystemExit('no benchmark prepared: run "uv run prepare.py" first') from None


def whole(commit, known):
    """Seven digits of a commit that was written with fewer; itself if git does not know it."""
    return next((full[:7] for full in known if full.startswith(commit)), commit)


# --------------------------------------
# night.json


def load_state(path):
    """
    What `start` has written, or what git knows of it where that is lost: ({tag, until, commit}, [sentence]).

    Raises SystemExit where no night is.
    """
    try:
        state = json.loads(path.read_text())
        commit = git("rev-parse", "--verify", "-q", f"{state['commit']}^{{commit}}")
        if commit:
            until, problems = checked_until(str(state["until"]))
            return {"tag": str(state["tag"]), "until": until, "commit": commit}, problems
    except (OSError, ValueError, KeyError, TypeError):
        pass

    # every night's first commit names it
    first = git("log", "-1", "--extended-regexp", "--grep=^autoresearch/[^ ]+: start$", "--format=%H %s") or ""
    if not first:
        raise SystemExit("no night here: see Set-up in program.md\nnext: uv run ledger.py start <tag> --until <when>")
    commit, subject = first.split(" ", 1)
    tag = subject.removeprefix("autoresearch/").removesuffix(": start")
    problem = "night.json is lost: the tag and the first commit are read from git, but the night has no end now"
    return {"tag": tag, "until": "never", "commit": commit}, [problem]


def checked_until(until):
    """The end of a night as next_step takes it, and what is wrong with it: somebody may have edited it."""
    if until == "never" or until.isdecimal():
        return until, []
    try:
        return in_utc(datetime.fromisoformat(until)), []
    except ValueError:
        return "never", [f"night.json: until {until} is neither a time nor a number, so the night has no end now"]


def made_at(commit):
    """When a commit was made, as `started` of night.json: every clone of a night has the same."""
    seconds = git("log", "-1", "--format=%ct", commit)
    return in_utc(datetime.fromtimestamp(int(seconds), timezone.utc))


def in_utc(moment):
    return moment.astimezone(timezone.utc).isoformat(timespec="seconds")


# --------------------------------------
# train.py and run.log


def read_changes(folder):
    """The differences from HEAD: whether train.py has any, or conflict markers, and another .py file that has."""
    changes = (git("status", "--porcelain", "--untracked-files=all", "--", "*.py") or "").splitlines()
    names = [line[2:].strip() for line in changes]  # not line[3:]: git() strips the first line's leading space
    source = read_text(folder / "train.py")
    return {
        "changed": "train.py" in names,
        "stray": next((name for name in names if name != "train.py"), ""),
        "conflict": bool(re.search(r"^(<{7}|>{7}) ", source, re.M)),
    }


def read_text(path):
    """The text of a file; "" if it is not there."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def fresh_log(folder):
    """read_log of run.log, if it is newer than the last row: an older one has its row, or is of another night."""
    log, ledger = folder / "run.log", folder / "results.tsv"
    if not log.exists():
        return {}
    written = log.stat().st_mtime_ns
    if ledger.exists() and ledger.stat().st_mtime_ns > written:
        return {}

    # a log that names no commit is of HEAD if HEAD has not moved since
    moves = folder / (git("rev-parse", "--git-path", "logs/HEAD") or ".git/logs/HEAD")
    if moves.exists() and moves.stat().st_mtime_ns > written:
        return read_log(log)
    return read_log(log, git("rev-parse", "HEAD") or "")


def read_log(path, head=""):
    """
    The run that a log is of: {commit, seed, reason}; {} if it names none, or found the device taken.

    The reason is the last line, "" if the run was scored or cut off. A run that crashed before it printed its commit,
    as with a syntax error, has seed 0 and the commit `head`.
    """
    content = path.read_bytes()
    # the two ends of a short log overlap, which does no harm
    text = (content[:LOG_BYTES] + b"\n" + content[-LOG_BYTES:]).decode(errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    if not lines or re.search(r"^another training is running", text, re.M):
        return {}
    reason = lines[-1][:160]
    if re.match(UNFINISHED, reason) or re.search(r"^val_bpb: ", text, re.M):
        reason = ""
    named = re.search(r"^commit ([0-9a-f]{7,40}), seed (\d+)", text, re.M)
    if named:
        return {"commit": named[1][:7], "seed": int(named[2]), "reason": reason}
    if head and reason:
        return {"commit": head[:7], "seed": 0, "reason": reason}
    return {}


def fallbacks(path="run.log"):
    """The lines of a log in which train.py reports a fallback, or a parameter without a gradient."""
    said = r"^(?:CPU|COMPILE|DEVICE_BATCH_SIZE): .*|^attention: \w+ not used.*|^\S+ has no gradient.*"
    return re.findall(said, read_text(path), re.M)


# --------------------------------------
# Rows of runs


def rebuild(folder, night):
    """Write results.tsv again: a row for each run, keep for what is on the branch, discard for the others."""
    lineage = line_of(f"refs/heads/autoresearch/{night.tag}", night.start) or (night.start,)
    for run in counting(night.runs, night.runs):
        commit = run["commit"][:7]

        # what the branch ends with may not be judged yet: `add` does that, of its runs
        if commit == lineage[-1] and commit != night.start:
            continue
        status = "keep" if commit in lineage else "discard"
        words = "baseline" if commit == night.start else git("log", "-1", "--format=%s", run["commit"])
        if run["seed"] in FINAL_SEEDS:
            words += ", final"
        night.rows.append(row_of(run, status, words))
    append_rows(folder / "results.tsv", [as_cells(row) for row in night.rows])


def row_of(run, status, words):
    memory = run.get("peak_memory_mb", 0) / 1024
    return Row(run["commit"][:7], run["val_bpb"], memory, status, f"{words}, seed {run['seed']}", 0)


def as_cells(row):
    """The cells that are written for a row: 5 texts."""
    if row.status == "crash":
        return row.commit, "0.000000", "0.0", "crash", row.description
    return row.commit, f"{row.val_bpb:.6f}", f"{row.memory_gb:.1f}", row.status, row.description
