"""
What several modules use: the folders of the repository and of the benchmarks, git, and small helpers.

Nothing heavy is imported: ledger.py runs beside a training.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent  # of the repository
COMPILER = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")  # that torch calls, unless $CXX names another
CRASHED = "crashed: "  # begins the last line of a program that an error has ended
NOT_RECORDED, DEVICE_TAKEN = 74, 75  # exit codes of a training: no disk for its score (EX_IOERR), its device is taken
GIT_SECONDS = 20  # for signing and hooks

# Settings of git that a user may have changed, set to what this code expects
GIT_SETTINGS = {
    "log.showSignature": "false",
    "i18n.logOutputEncoding": "UTF-8",
    "color.diff": "false",
    "core.quotePath": "false",
    "core.abbrev": "7",
    "push.followTags": "false",
    "push.gpgSign": "false",
}
GIT_ENVIRONMENT = {
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_EDITOR": "true",
    "GIT_PAGER": "cat",
    "GIT_OPTIONAL_LOCKS": "0",  # a look must not be in the way of a commit
    "LC_ALL": "C",
}

# --------------------------------------
# Helpers


class OneLineParser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments, and takes no abbreviated ones."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def matching(pattern, advice):
    """A type of argparse: printable texts that match a pattern."""

    def check(text):
        if not text.isprintable() or not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(advice)
        return text

    return check


def run_command(main):
    """Run the main() of a program that prints lines. It ends quietly on Ctrl-C, or when its reader does (`| head`)."""
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot print a description shows ? in it
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        sys.exit(f"{sys.argv[0]}: {error}; fix that and run this again: what was recorded is kept")
    except KeyboardInterrupt:
        sys.exit(130)


def end_with_reason(kind, error, trace):
    """
    An error ends with its traceback and a last line that says why: torch's messages end with advice, or a table. Ctrl-C
    leaves no traceback; Python then ends by the signal, which shells call 130.
    """
    if issubclass(kind, KeyboardInterrupt):
        return
    sys.__excepthook__(kind, error, trace)

    # where in train.py: its deepest frame, or what torch.compile says of the code
    lines = [frame.lineno for frame in traceback.extract_tb(trace) if Path(frame.filename).name == "train.py"]
    lines += re.findall(r'train\.py", line (\d+)', str(error))
    place = "".join(f", train.py:{line}" for line in lines[-1:])
    print(f"{CRASHED}{cause_of(error)[:180]}{place}", file=sys.stderr)


def cause_of(error):
    """An exception on one line; where torch.compile has wrapped another one, that one."""
    # "Explanation: Dynamo failed to run ...: got RuntimeError('a and b must have same reduction dim')"
    met = re.search(r"\bgot (\w+)\((['\"])(.*?)\2\)", str(error))
    if met and type(error).__module__.startswith("torch._dynamo"):
        return f"{met[1]}: {met[3]}"
    error = getattr(error, "inner_exception", None) or error
    return f"{type(error).__name__}: {first_line(error)}"


sys.excepthook = end_with_reason  # of all our programs: Ctrl-C may come while they import


def now():
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def sha256(path):
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def first_line(error):
    """The first line of an exception's text, at most 200 characters."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def printable(text, length=None):
    """Anybody's text, or a path, on one line: blanks for white space, ? for what can't be printed."""
    line = re.sub(r"\s", " ", str(text)).strip()
    return "".join(letter if letter.isprintable() else "?" for letter in line[:length])


def write_atomically(path, content):
    # a name of this process's own: two may write at once
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def append_lines(path, lines):
    """
    Append dicts to a file of JSON lines, in one write that is on the disk when this returns. The caller holds a lock.
    """
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = "\n" + text  # the last line was torn, by a full disk
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


# --------------------------------------
# The home of benchmarks


def find_home():
    """The folder of all benchmarks: AUTORESEARCH_HOME or the default. Raises SystemExit if `~` can't be expanded."""
    home = os.path.expanduser(os.environ.get("AUTORESEARCH_HOME") or "~/.cache/autoresearch")
    if home.startswith("~"):  # left as it was: there is no such user, or this one has no home
        raise SystemExit(f"{home}: there is no such home folder; set AUTORESEARCH_HOME to a folder on a local disk")
    return Path(home).absolute()


def explain(error):
    """An OSError in words, with the way out."""
    return f"{error}; fix it, or set AUTORESEARCH_HOME to another folder on a local disk, and run this again"


# --------------------------------------
# git


class GitAnswer(NamedTuple):
    worked: bool
    output: str  # "" if it failed
    complaint: str  # the line that says why


def git(*words, folder=None, seconds=None, text=""):
    """
    Run git in `folder`, by default the repository, with GIT_SETTINGS instead of the user's. Returns a GitAnswer. `text`
    is the standard input.
    """
    seconds = seconds or GIT_SECONDS
    settings = []
    for name, value in GIT_SETTINGS.items():
        settings += ["-c", f"{name}={value}"]
    options = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    options |= dict(cwd=folder or ROOT, env=os.environ | GIT_ENVIRONMENT)
    try:
        process = subprocess.Popen(["git", *settings, *words], **options)
    except FileNotFoundError as error:  # of git, or of the folder
        return GitAnswer(False, "", f"git is not installed, or {error}")
    try:
        output, complaint = process.communicate(text.encode(), timeout=seconds)
    except subprocess.TimeoutExpired:
        end_group(process)
        return GitAnswer(False, "", f"no answer for {seconds} s, does it wait for a passphrase?")
    if process.returncode != 0:
        return GitAnswer(False, "", reason_of(complaint.decode(errors="replace")))
    return GitAnswer(True, output.decode(errors="replace").strip(), "")


def reason_of(complaint):
    """The line of git's words that says why it failed; hooks and transports write into them, too."""
    found = re.search(r"^ *(fatal:|error:|ERROR:|!).*", complaint, re.M)
    if found:
        return first_line(found[0])
    return first_line(complaint.strip() or "git gives no reason")


def call_git(*words, **options):
    """The output of git. Raises SystemExit, one line, if it fails."""
    answer = git(*words, **options)
    if not answer.worked:
        raise SystemExit(f"git {words[0]}: {answer.complaint}")
    return answer.output


def resolve(name):
    """The full hash of what a name means, "" if git does not know it or it means several things."""
    return git("rev-parse", "--verify", "-q", name).output


def end_group(process):
    """End a process that leads a session, with all that it has started. They get half a second to clean up."""
    for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        try:
            os.killpg(process.pid, number)
        except AttributeError:  # Windows
            process.terminate()
        except OSError:
            return  # all are gone
        time.sleep(0.5)
    process.poll()
