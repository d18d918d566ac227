"""
Nights in repositories as users have them: a configuration that changes what git prints, SHA-256, no reflogs, hooks that
print. Real git; the trainings are scripts.
"""

import re
import subprocess
import sys

from conftest import LINE, TRAIN, ask_no_torch, new_repository
from test_runner import Clone

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
"""


def begin(folder, home, environment):
    """A repository with a night, in this environment."""
    environment = environment | {"AUTORESEARCH_HOME": str(home), "CXX": sys.executable}
    clone = Clone(new_repository(folder, environment), environment, home)
    ask_no_torch(clone.folder, LINE["device"])
    (clone.folder / "train.py").write_text(TRAIN)
    clone.git("commit", "-qam", "größer")
    clone.started = clone.ledger("start", "test", "--until", "8")
    return clone


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


def test_no_configuration_and_no_kind_of_hash_changes_what_is_read(own, environment, tmp_path):
    key, hooks = tmp_path / "key", tmp_path / "hooks"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    hooks.mkdir()
    for name in ("post-checkout", "post-commit", "reference-transaction"):
        (hooks / name).write_text("#!/bin/sh\necho noise\necho noise >&2\n")
        (hooks / name).chmod(0o755)
    config = tmp_path / "wrong"
    config.write_text(CONFIG.format(key=key, hooks=hooks))
    settings = {"GIT_CONFIG_GLOBAL": str(config), "GIT_EXTERNAL_DIFF": "false", "GIT_DEFAULT_HASH": "sha256"}
    settings["LANG"] = "de_DE.UTF-8"
    wrong = begin(tmp_path / "wrong clone", own.path.parent, environment | settings)
    assert "SIGNATURE" in wrong.git("cat-file", "commit", "HEAD")
    assert play(wrong) == play(begin(tmp_path / "plain clone", own.path.parent, environment))
    assert {len(run["commit"]) for run in wrong.runs()} == {64}
