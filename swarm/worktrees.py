"""The commits of a wave, in git: a worktree wave/<name> for each idea, and what is sent of a commit."""

import contextlib
import shlex
import tempfile

from harness.journal import ROOT, first_line
from night.checks import run_git
from night.load import load_night
from night.worth import kept_commits
from swarm.cluster import COMMAND, WAVE

GIT_SECONDS = 120
SHORTEST = 7  # digits of a commit that stand for it


def new(name):
    """Make a worktree on the last keep, and say what comes next."""
    if (WAVE / name).exists():
        raise SystemExit(f"wave/{name} exists: edit it, or use another name")
    night, _, problems = load_night(ROOT)
    for problem in problems:
        print(f"warning: {problem}")
    kept = kept_commits(night)[-1]
    add(name, kept)
    print(f"wave/{name} is on the last keep, {kept}")
    print(f"next: edit wave/{name}/train.py")
    print(f"next: {commit_line(name)}")
    print(f"next: {COMMAND} submit {name}:1")


def add(name, commit):
    # git remembers a worktree that was removed by hand
    call_git("worktree", "prune")
    call_git("worktree", "add", "-q", "--detach", str(WAVE / name), commit)


def commit_line(name):
    return f"{COMMAND} commit {name} '<idea>; expect <gain>'"


def commit(name, message):
    """Commit the train.py of wave/<name>, and nothing else. Returns the commit. Raises SystemExit, in one line."""
    folder = str(WAVE / name)
    if not (WAVE / name / ".git").exists():
        raise SystemExit(f"there is no wave/{name}: {COMMAND} new {name}")
    if not call_git("-C", folder, "status", "--porcelain", "--", "train.py"):
        raise SystemExit(f"wave/{name}/train.py has no changes: nothing to commit")

    # only train.py: what else was edited there would not be judged
    call_git("-C", folder, "commit", "-q", "-m", message, "--", "train.py")
    return call_git("-C", folder, "rev-parse", "--short=7", "HEAD")


def remove_all():
    """Remove the worktrees that have no changes. Returns the others."""
    left = []
    for marker in sorted(WAVE.glob("*/.git")):
        folder = str(marker.parent)

        # its commit may never have been submitted, and no branch has it
        store(call_git("-C", folder, "rev-parse", "HEAD"))
        removed, _, _ = run_git(ROOT, "worktree", "remove", folder, seconds=GIT_SECONDS)
        if not removed:
            left.append(f"wave/{marker.parent.name}")
    return left


def store(commit):
    """Keep a commit as a try, so that git does not forget it."""
    call_git("update-ref", f"refs/tries/{commit[:7]}", commit)


def find_commit(name, start, known):
    """
    The commit that a name stands for: `base`, a worktree or a hash. Raises SystemExit if it is none of the known
    commits of the night, or if its train.py has changes that would not be sent.
    """
    # a worktree goes before a hash: its name may look like one
    if name == "base":
        commit = start
    elif (WAVE / name / ".git").exists():
        if call_git("-C", str(WAVE / name), "status", "--porcelain", "--", "train.py"):
            raise SystemExit(f"wave/{name}/train.py has changes, commit them: {commit_line(name)}")
        commit = call_git("-C", str(WAVE / name), "rev-parse", "HEAD")
    else:
        commit = next((full for full in known if len(name) >= SHORTEST and full.startswith(name)), None)
    if commit not in known:
        raise SystemExit(f"{name}: no worktree in wave/ and no commit of this night: {COMMAND} new {name}")
    return commit


@contextlib.contextmanager
def clone(commit):
    """A folder that has one stored commit, with its .git, and no other commit or file. It is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="wave-") as folder:
        # `git clone` takes branches, and this commit may be on none
        call_git("init", "-q", folder)
        call_git("-C", folder, "fetch", "-q", "--depth", "1", f"file://{ROOT}", f"refs/tries/{commit[:7]}")
        call_git("-C", folder, "checkout", "-q", "--detach", "FETCH_HEAD")
        yield folder


def call_git(*words):
    """The output of git. Raises SystemExit, one line, if it fails."""
    worked, output, complaint = run_git(ROOT, *words, seconds=GIT_SECONDS)
    if not worked:
        raise SystemExit(f"git {shlex.join(words)}: {first_line(complaint)}")
    return output
