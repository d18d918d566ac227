"""Problems that would end a night, each with its fix: `ledger.py start` lists them while the human is awake."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from harness import common
from harness.common import COMPILER, call_git, find_home, first_line, git, resolve
from night.record import find_place

LOCK_SECONDS = 5  # for another process that looks at the same moment

# torch is asked in a process of its own: nothing heavy is imported here
ASK_DEVICE = """
import json
from harness import machine, runtime
device = runtime.choose_device()
print(json.dumps([machine.device_name(device), device.type, machine.why_no_gpu()]))
"""


def find_problems(tag):
    """All that is wrong, and the name of the device: ([sentence], text). The night can start if there is nothing."""
    device, hidden = find_device()
    return [*git_problems(tag), *home_problems(), *hidden, *compiler_problems()], device


# --------------------------------------
# git


def git_problems(tag):
    worked, top, complaint = git("rev-parse", "--show-toplevel")
    if "not installed" in complaint:
        return ["git is missing: install it"]

    # where git looks elsewhere, all further answers would be about another place
    if os.environ.get("GIT_DIR") or os.environ.get("GIT_WORK_TREE"):
        return ["GIT_DIR or GIT_WORK_TREE is set, so git looks elsewhere: unset GIT_DIR GIT_WORK_TREE"]
    if "dubious ownership" in complaint:
        return [f"git: another user owns this folder: git config --global --add safe.directory '{common.ROOT}'"]
    if not worked:
        return ["this is not a git repository: git clone it, or git init && git add -A && git commit -m start"]
    if Path(top).resolve() != common.ROOT.resolve():
        return [
            f"this folder lies inside another repository, {top}, and resets would change that: move it out of there"
        ]
    if not resolve("HEAD"):
        return [*identity_problems(), "nothing is committed here yet: git add -A && git commit -m start"]
    return [*branch_problems(tag), *identity_problems(), *state_problems()]


def branch_problems(tag):
    found = []
    is_name = re.fullmatch(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?", tag)  # of a night on a hub: tag/agent
    if not is_name or not git("check-ref-format", "--branch", f"autoresearch/{tag}").worked:
        found.append(f"'{tag}' can't name a branch: use letters, digits, - and _")
    elif resolve(f"refs/heads/autoresearch/{tag}"):
        found.append(f"this night exists: take another tag, or go on: git checkout autoresearch/{tag}")
    elif (find_place(tag) / "record.jsonl").exists():
        found.append(f"the night {tag} was here, and its branch is gone: take another tag")

    # git keeps branches as files: one of this name leaves no room for a folder
    for parent in sorted({"autoresearch", f"autoresearch/{tag}".rpartition("/")[0]}):
        if resolve(f"refs/heads/{parent}"):
            found.append(f"a branch `{parent}` is in the way: git branch -m {parent} old-{parent.replace('/', '-')}")
    return found


def identity_problems():
    for name in ("AUTHOR", "COMMITTER"):
        if not git("var", f"GIT_{name}_IDENT").worked:
            return ["git does not know who you are: git config user.name me && git config user.email me@localhost"]
    return []


def state_problems():
    found = []
    lock = git("rev-parse", "--git-path", "index.lock").output
    if Path(common.ROOT, lock).exists():
        found.append(f"another git runs here, or one was killed: rm '{lock}'")

    # runs are made of commits, so none would have these
    changes = git("status", "--porcelain", "--untracked-files=no").output.splitlines()
    if changes:
        found.append(f"uncommitted changes, such as {changes[0][2:].strip()}: git stash, or commit them")
    if git("ls-files", "--", "results.tsv").output:
        found.append("git tracks results.tsv: git rm --cached results.tsv, and commit that")
    return found


# --------------------------------------
# The machine


def home_problems():
    """The benchmark's folder."""
    try:
        home = find_home()
    except SystemExit as error:
        return [str(error)]
    found = []
    try:
        current = home / "current"
        if not current.exists() or not (home / current.read_text().strip() / "benchmark.json").exists():
            found.append("no benchmark is prepared: uv run prepare.py")
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / "night.lock", timeout=LOCK_SECONDS):
            pass
    except (OSError, NotImplementedError) as error:  # the latter where a file system has no locks
        found.append(f"{home}: {first_line(error)}: set AUTORESEARCH_HOME to a folder on a local disk")
    return found


def find_device():
    """The device that a training would take, and why it is not the GPU of this machine: (name, [sentence])."""
    command = [sys.executable, "-c", ASK_DEVICE]
    asked = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, errors="replace")
    if asked.returncode != 0:
        error = (asked.stderr.splitlines() or ["no reason given"])[-1]
        return "", [f"torch does not tell the device: {first_line(error)}"]
    device, kind, hidden = json.loads(asked.stdout.splitlines()[-1])

    # on a cluster other machines train
    if kind == "cpu" and os.environ.get("RAY_API_SERVER_ADDRESS"):
        return "", []

    # an empty CUDA_VISIBLE_DEVICES is the user's own choice
    if kind != "cuda" and hidden and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        return device, [f"{hidden}; to train on the CPU all the same: export CUDA_VISIBLE_DEVICES="]
    return device, []


def compiler_problems():
    """torch.compile wants a C++ compiler, unless train.py does without."""
    path = Path(common.ROOT, "train.py")
    source = path.read_text(errors="replace") if path.exists() else ""
    compiler = os.environ.get("CXX", COMPILER)
    if shutil.which(compiler) or re.search(r"^COMPILE = False", source, re.M):
        return []
    return [f"no C++ compiler, so training is slow: install {compiler}, or commit COMPILE = False in train.py"]


# --------------------------------------
# The first commit


def first_commit(tag, words):
    """
    Make the branch and its first commit, empty, with these words. Signing and hooks are tried for real, with an edit of
    train.py, too, which is taken back.

    Raises SystemExit, with everything as it was before, if git refuses.
    """
    before = git("symbolic-ref", "-q", "HEAD").output
    commit = git("rev-parse", "HEAD").output
    branch = f"autoresearch/{tag}"
    try:
        call_git("checkout", "-q", "-b", branch)
        call_git("commit", "-q", "--allow-empty", "-m", f"{branch}: start\n\n{words}")
        try_commit()
    except SystemExit as refusal:
        take_back(branch, before, commit)
        signing, hooks = "git config commit.gpgsign false", "git config core.hooksPath /dev/null"
        ways_out = f"to do without signing: {signing}; without hooks: {hooks}"
        raise SystemExit(f"git refuses to commit ({refusal}); {ways_out}") from None
    except BaseException:  # Ctrl-C, say
        take_back(branch, before, commit)
        raise


def take_back(branch, before, commit):
    """Without `checkout`, whose hook may be the one that refuses."""
    if before:
        git("symbolic-ref", "HEAD", before)
    else:
        git("update-ref", "--no-deref", "HEAD", commit)
    git("update-ref", "-d", f"refs/heads/{branch}")


def try_commit():
    """Commit an edit of train.py, as the agent will, and take it back. Raises SystemExit if git refuses."""
    path = common.ROOT / "train.py"
    content, commit = path.read_bytes(), git("rev-parse", "HEAD").output
    try:
        path.write_bytes(content + b"\n# a trial\n")
        call_git("commit", "-q", "-m", "a trial; expect +0.000", "--", "train.py")
    finally:
        path.write_bytes(content)
        git("reset", "-q", commit)
