"""Problems that would end a night, each with its fix: `ledger.py start` lists them while the human is awake."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from filelock import FileLock, Timeout

from harness.journal import COMPILER, find_home, first_line, lock_folder

COMMIT_SECONDS = 20  # for signing and hooks
LOCK_SECONDS = 5  # for another process that looks at the same moment


def run_git(folder, *words, seconds=None):
    """Run git without a prompt: (whether it worked, what it prints, what it complains of)."""
    seconds = seconds or COMMIT_SECONDS
    environment = os.environ | {"GIT_TERMINAL_PROMPT": "0", "GIT_EDITOR": "true", "LC_ALL": "C"}
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        process = subprocess.Popen(["git", *words], cwd=folder, env=environment, start_new_session=True, **pipes)
    except FileNotFoundError:
        return False, "", "git is not installed"
    try:
        output, complaint = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        end(process)
        return False, "", f"no answer for {seconds} s, does it wait for a passphrase?"
    worked = process.returncode == 0
    return worked, output.decode(errors="replace").strip(), complaint.decode(errors="replace").strip()


def end(process):
    """End git with all that it has started. It gets half a second to remove its lock files."""
    for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        try:
            os.killpg(process.pid, number)
        except AttributeError:  # Windows
            process.terminate()
        except OSError:
            return  # all are gone
        time.sleep(0.5)
    process.poll()


def find_problems(folder, tag):
    """All that is wrong: a list of lines. Empty if the night can start."""
    return [*git_problems(folder, tag), *machine_problems(), *compiler_problems(folder)]


# --------------------------------------
# git


def git_problems(folder, tag):
    worked, top, complaint = run_git(folder, "rev-parse", "--show-toplevel")
    if "not installed" in complaint:
        return ["git is missing: install it"]

    # where git looks elsewhere, all further answers would be about another place
    if os.environ.get("GIT_DIR") or os.environ.get("GIT_WORK_TREE"):
        return ["GIT_DIR or GIT_WORK_TREE is set, so git looks elsewhere: unset GIT_DIR GIT_WORK_TREE"]
    if "dubious ownership" in complaint:
        return [f"git: another user owns this folder: git config --global --add safe.directory '{folder}'"]
    if not worked:
        return ["this is not a git repository: git clone it, or git init && git add -A && git commit -m start"]
    if Path(top).resolve() != Path(folder).resolve():
        return [
            f"this folder lies inside another repository, {top}, and resets would change that: move it out of there"
        ]
    if not run_git(folder, "rev-parse", "--verify", "-q", "HEAD")[0]:
        return [*identity_problems(folder), "nothing is committed here yet: git add -A && git commit -m start"]
    return [*branch_problems(folder, tag), *identity_problems(folder), *state_problems(folder)]


def branch_problems(folder, tag):
    found = []
    is_name = re.fullmatch(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?", tag)  # of a night on a hub: tag/agent
    if not is_name or not run_git(folder, "check-ref-format", "--branch", f"autoresearch/{tag}")[0]:
        found.append(f"'{tag}' can't name a branch: use letters, digits, - and _")
    elif run_git(folder, "rev-parse", "--verify", "-q", f"refs/heads/autoresearch/{tag}")[0]:
        found.append(f"this night exists: take another tag, or go on: git checkout autoresearch/{tag}")

    # git keeps branches as files: one of this name leaves no room for a folder
    for parent in sorted({"autoresearch", f"autoresearch/{tag}".rpartition("/")[0]}):
        if run_git(folder, "rev-parse", "--verify", "-q", f"refs/heads/{parent}")[0]:
            found.append(f"a branch `{parent}` is in the way: git branch -m {parent} old-{parent.replace('/', '-')}")
    return found


def identity_problems(folder):
    for name in ("AUTHOR", "COMMITTER"):
        if not run_git(folder, "var", f"GIT_{name}_IDENT")[0]:
            return ["git does not know who you are: git config user.name me && git config user.email me@localhost"]
    return []


def state_problems(folder):
    found = []
    lock = run_git(folder, "rev-parse", "--git-path", "index.lock")[1]
    if Path(folder, lock).exists():
        found.append(f"another git runs here, or one was killed: rm '{lock}'")

    # a run beside other changes could not be told from its commit
    changes = run_git(folder, "status", "--porcelain", "--untracked-files=no")[1].splitlines()
    if changes:
        found.append(f"uncommitted changes, such as {changes[0][2:].strip()}: git stash, or commit them")
    stray = run_git(folder, "ls-files", "--others", "--exclude-standard", "--", "*.py")[1].splitlines()
    if stray:
        found.append(f"git does not know {stray[0]}, so no run could be told from its commit: add or remove it")
    if run_git(folder, "ls-files", "--", "results.tsv")[1]:
        found.append("git tracks results.tsv: git rm --cached results.tsv, and commit that")
    return found


# --------------------------------------
# The machine


def machine_problems():
    """The benchmark's folder and the device."""
    try:
        home = find_home()
    except SystemExit as error:
        return [str(error)]
    found = []
    try:
        if not (home / "current").exists():
            found.append("no benchmark is prepared: uv run prepare.py")
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / "night.lock", timeout=LOCK_SECONDS):
            pass
    except Timeout:
        found.append(f"{home / 'night.lock'} is taken by another process: end it")
    except (OSError, NotImplementedError) as error:  # the latter where a file system has no locks
        found.append(f"{home}: {first_line(error)}: set AUTORESEARCH_HOME to a folder on a local disk")
    pid = running_training()
    if pid:
        found.append(f"another training runs on this machine: wait for it, or kill {pid}")
    return found


def compiler_problems(folder):
    """torch.compile wants a C++ compiler, unless train.py does without."""
    path = Path(folder, "train.py")
    source = path.read_text(errors="replace") if path.exists() else ""
    compiler = os.environ.get("CXX", COMPILER)
    if shutil.which(compiler) or re.search(r"^COMPILE = False", source, re.M):
        return []
    return [f"no C++ compiler, so training is slow: install {compiler}, or commit COMPILE = False in train.py"]


def running_training():
    """The pid of a training that holds the lock of a device of this machine; "" if there is none."""
    for path in sorted(lock_folder().glob("*.lock")):
        try:
            with FileLock(path, timeout=0, mode=0o666):
                continue
        except Timeout:
            holder = path.with_suffix(".pid")
            return holder.read_text().strip() if holder.exists() else "unknown"
        except OSError:
            continue  # a lock that can't be looked at holds nobody up
    return ""


# --------------------------------------
# The first commit


def first_commit(folder, tag):
    """
    Make the branch and its first commit, empty: signing and hooks are tried for real. Returns its hash.

    Raises SystemExit, with everything as it was before, if git refuses.
    """
    before = run_git(folder, "symbolic-ref", "-q", "HEAD")[1]
    commit = run_git(folder, "rev-parse", "HEAD")[1]
    branch = f"autoresearch/{tag}"
    worked, _, complaint = run_git(folder, "checkout", "-q", "-b", branch)
    if worked:
        worked, _, complaint = run_git(folder, "commit", "-q", "--allow-empty", "-m", f"{branch}: start")
    if worked:
        return run_git(folder, "rev-parse", "HEAD")[1]

    # back, without `checkout`, whose hook may be the one that refuses
    if before:
        run_git(folder, "symbolic-ref", "HEAD", before)
    else:
        run_git(folder, "update-ref", "--no-deref", "HEAD", commit)
    run_git(folder, "update-ref", "-d", f"refs/heads/{branch}")
    fix = "signing: git config commit.gpgsign false; a hook: git config core.hooksPath /dev/null"
    raise SystemExit(f"git refuses to commit ({first_line(complaint or 'no reason given')}); {fix}")
