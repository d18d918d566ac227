"""
Nights in repositories as users have them: a configuration that changes what git prints, SHA-256, no reflogs, hooks,
worktrees. Real git; the trainings are scripts.
"""

import json
import re
import subprocess
import sys

import pytest
from conftest import ask_no_torch, new_repository
from test_runner import TRAIN, Clone

CONFIG = """
[user]
name = Agent
email = agent@example.org
signingKey = {key}
[gpg]
format = ssh
[commit]
gpgSign = true
template = {key}.pub
verbose = true
[log]
showSignature = true
date = relative
decorate = full
showRoot = false
mailmap = false
[format]
pretty = oneline
[color]
ui = always
diff = always
status = always
branch = always
[core]
quotePath = true
abbrev = 40
pager = false
autocrlf = input
hooksPath = {hooks}
logAllRefUpdates = false
[diff]
external = false
noprefix = true
mnemonicPrefix = true
[status]
short = true
branch = true
showUntrackedFiles = no
[column]
ui = always
[i18n]
logOutputEncoding = latin1
[push]
followTags = true
gpgSign = if-asked
"""


@pytest.fixture
def begin(tmp_path, own, environment):
    """A function that makes a repository with a night, in this environment."""
    environment |= {"AUTORESEARCH_HOME": str(own.path.parent), "CXX": sys.executable}

    def begin(name, **changes):
        clone = Clone(new_repository(tmp_path / name, environment | changes), environment | changes, own.path.parent)
        ask_no_torch(clone.folder, "cpu test")
        (clone.folder / "train.py").write_text(TRAIN)
        clone.git("commit", "-qam", "größer")
        clone.started = clone.ledger("start", "test", "--until", "8")
        clone.scores_next()
        return clone

    return begin


def play(clone):
    """A night from its baseline to its first final run: what all commands print, with hashes and times replaced."""
    clone.scores_next()
    printed = [clone.started, *(clone.ledger("run") for _ in range(3))]
    clone.idea(TRAIN, "# größer\n")
    clone.git("commit", "-q", "--amend", "-m", "größer")
    clone.scores_next(val_bpb=0.9)
    printed += [clone.ledger("run") for _ in range(3)]
    clone.idea("raise ValueError('größer')")
    printed.append(clone.ledger("run"))
    (clone.folder / "prüfung.py").write_text("")
    clone.git("add", "prüfung.py")
    clone.git("commit", "-q", "-m", "another file")
    printed.append(clone.ledger())
    clone.git("reset", "-q", "--keep", "HEAD^")
    clone.git("reset", "-q", "--keep", "HEAD^")
    printed += [clone.ledger(), clone.ledger("until", "now"), clone.ledger("run")]
    names = {}
    text = "\n".join(printed)
    text = re.sub(
        r"[0-9a-f]{7,64}\b", lambda found: names.setdefault(found[0], f"<{len(names)}, {len(found[0])}>"), text
    )
    assert "HEAD changes prüfung.py" in text and "größer, seed 1" in text
    return re.sub(r"\d{4}-\d\d-\d\dT[\d:+]+", "<time>", text)


def test_no_configuration_and_no_kind_of_hash_changes_what_is_read(begin, tmp_path):
    key, hooks = tmp_path / "key", tmp_path / "hooks"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    hooks.mkdir()
    for name in ("post-checkout", "post-commit", "reference-transaction"):
        (hooks / name).write_text("#!/bin/sh\necho noise\necho noise >&2\n")
        (hooks / name).chmod(0o755)
    config = tmp_path / "wrong"
    config.write_text(CONFIG.format(key=key, hooks=hooks))
    settings = {"GIT_CONFIG_GLOBAL": str(config), "GIT_EXTERNAL_DIFF": "false", "GIT_DEFAULT_HASH": "sha256"}
    wrong = begin("wrong clone", LANG="de_DE.UTF-8", **settings)
    assert "SIGNATURE" in wrong.git("cat-file", "commit", "HEAD")
    assert play(wrong) == play(begin("plain clone"))
    assert {len(run["commit"]) for run in wrong.runs()} == {64}


def test_a_night_that_is_checked_out_elsewhere(begin):
    """As clients do, which make worktrees of their own."""
    clone = begin("clone")
    clone.git("worktree", "add", "-q", "-b", "work", ".claude/worktrees/work")
    record = clone.record.read_text()
    elsewhere = Clone(clone.folder / ".claude" / "worktrees" / "work", clone.environment, clone.home)
    for words in ((), ("run",), ("until", "now"), ("--json",), ("keep",)):
        said = elsewhere.ledger(*words, code=1)
        assert said == f"no night on work: autoresearch/test is checked out in {clone.folder}, work there\n"
    assert "work there" in elsewhere.ledger("open", code=1)
    assert clone.record.read_text() == record and not (elsewhere.folder / "results.tsv").exists()


def hook(clone, name, text):
    path = clone.folder / ".git" / "hooks" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


PYTHON_FILES = 'for name in $(git diff --cached --name-only -- "*.py"); do echo "$name: not formatted"; exit 1; done'
RULE = "grep -q '^[A-Z]' \"$1\" || { echo 'a message begins with a capital letter' >&2; exit 1; }"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [("pre-commit", PYTHON_FILES, "train.py: not formatted"), ("commit-msg", RULE, "a capital letter")],
)
def test_a_hook_that_refuses_ideas_is_found_at_the_start(begin, name, text, words):
    clone = begin("clone")
    clone.git("checkout", "-q", "main")
    hook(clone, name, text)
    before = clone.git("rev-parse", "HEAD"), (clone.folder / "train.py").read_bytes()
    said = clone.ledger("start", "second", "--until", "8", code=1)
    assert words in said and "core.hooksPath" in said
    assert (clone.git("rev-parse", "HEAD"), (clone.folder / "train.py").read_bytes()) == before
    assert clone.git("branch", "--show-current") == "main\n"
    assert clone.git("status", "--porcelain") == clone.git("branch", "--list", "autoresearch/second") == ""


def test_the_same_train_py_under_a_new_commit_is_named(begin):
    clone = begin("clone")
    for _ in range(3):
        clone.ledger("run")
    idea = clone.idea(TRAIN, "raise ValueError('no')")
    clone.ledger("run")
    clone.git("reset", "-q", "--keep", "HEAD^")
    assert "has run before" not in clone.ledger()
    clone.idea(TRAIN, "raise ValueError('no')")
    clone.git("commit", "-q", "--amend", "-m", "the same")
    assert f"warning: this train.py has run before, as {idea}: discard\n" in clone.ledger()


def test_results_that_are_a_link_are_written_where_they_are(begin, tmp_path):
    clone = begin("clone")
    (tmp_path / "synced.tsv").write_text((clone.folder / "results.tsv").read_text())
    (clone.folder / "results.tsv").unlink()
    (clone.folder / "results.tsv").symlink_to(tmp_path / "synced.tsv")
    clone.ledger("run")
    assert (clone.folder / "results.tsv").is_symlink()
    assert "baseline, seed 1" in (tmp_path / "synced.tsv").read_text()
    assert json.loads(clone.ledger("--json"))["problems"] == []
