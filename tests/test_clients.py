"""
A night with the real Claude Code and the real Codex, whose model is scripted, and real runs of 3 seconds:

    npm install --no-save --prefix .clients @anthropic-ai/claude-code@2.1.332 @openai/codex@0.171.0
    uv run pytest -m clients

No account, no network. The scripted model does what `uv run ledger.py` says.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, new_repository, replace, wait_for, weaken

import prepare
from harness.journal import read_journal
from tools.scripted_model import ScriptedModel

BIN = ROOT / ".clients" / "node_modules" / ".bin"
STATUS = "uv run ledger.py"
JUDGES = ("prepare.py", "program.md", "README.md", "pyproject.toml", ".claude/settings.json", ".codex/config.toml")

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not BIN.exists(), reason="the clients are not installed: see the first lines of this file"),
]


class Client:
    """One of the two, in a folder that it trusts and a home of its own."""

    def __init__(self, name, folder, home, environment):
        self.name, self.folder, self.home = name, folder, home
        self.human = environment | {"AUTORESEARCH_HOME": str(prepare.HOME)}
        kept = ("PATH", "AUTORESEARCH_HOME", "GIT_CONFIG_GLOBAL", "TORCHDYNAMO_DISABLE")
        self.environment = {name: environment[name] for name in kept} | {
            "HOME": str(home),
            "TERM": "dumb",
            "KEY": "none",
        }
        self.environment["TMPDIR"] = str(home.parent / "tmp")
        (home.parent / "tmp").mkdir()
        (home / ".cache").mkdir(parents=True)
        (home / ".cache" / "autoresearch").symlink_to(environment["AUTORESEARCH_HOME"])

    def start(self, steps):
        """Start a session that plays these steps; returns the process and its model."""
        model = ScriptedModel(steps, [self.folder / file for file in JUDGES])
        if self.name == "claude":
            trust = {"projects": {str(self.folder): {"hasTrustDialogAccepted": True}}, "hasCompletedOnboarding": True}
            (self.home / ".claude.json").write_text(json.dumps(trust))
            quiet = ("DISABLE_TELEMETRY", "DISABLE_ERROR_REPORTING", "DISABLE_AUTOUPDATER")
            quiet = dict.fromkeys((*quiet, "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC"), "1")
            environment = self.environment | quiet | {"ANTHROPIC_BASE_URL": model.url, "ANTHROPIC_API_KEY": "none"}
            command = [BIN / "claude", "-p", "Read program.md and go on."]
        else:
            (self.home / ".codex").mkdir(exist_ok=True)
            (self.home / ".codex" / "config.toml").write_text(
                f'''model = "gpt-5" # whose tools the script knows
model_provider = "scripted"
[model_providers.scripted]
name = "scripted"
base_url = "{model.url}/v1"
wire_api = "responses"
env_key = "KEY"
'''
            )
            environment, command = self.environment, [BIN / "codex", "exec", "--trust", "Read program.md and go on."]
        with open(self.home.parent / "log.txt", "a") as log:
            streams = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            process = subprocess.Popen(command, cwd=self.folder, env=environment, start_new_session=True, **streams)
            return process, model

    def ledger(self, *words, check=True):
        """As the human runs it."""
        command = [sys.executable, "ledger.py", *words]
        return subprocess.run(command, cwd=self.folder, env=self.human, check=check, capture_output=True, text=True)

    def git(self, *words):
        command = ["git", "-c", "user.name=Human", "-c", "user.email=human@example.org", *words]
        return subprocess.run(command, cwd=self.folder, check=True, capture_output=True, text=True).stdout

    def rows(self):
        return [line.split("\t") for line in (self.folder / "results.tsv").read_text().splitlines()]

    def path(self, name):
        """As its tools want it: Claude Code's in full."""
        return str(self.folder / name) if self.name == "claude" else name

    def play(self, steps, seconds=900):
        """Play these steps to the end; returns what came back, by the names of the steps."""
        process, model = self.start(steps)
        try:
            process.wait(seconds)
        finally:
            kill(process)
            model.close()
        return model.came


def kill(process):
    """With its children: Codex is a launcher and a program."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(params=["claude", "codex"])
def client(request, prepared, tmp_path, environment):
    replace(
        tmp_path / "bin" / "uv",
        (r"\A#!/bin/sh\n", '#!/bin/sh\n[ "$1" = sync ] && exec mkdir -p "$UV_PROJECT_ENVIRONMENT"\n'),
    )
    environment["PATH"] += f":{Path(sys.executable).parent}"  # where Ray's jobs find python
    (prepare.HOME / "current").write_text(prepared)
    (prepare.HOME / prepared / "journal.jsonl").unlink(missing_ok=True)
    folder = new_repository(tmp_path / "clone", environment)
    for name in (".claude", ".codex", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("analysis.ipynb", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    weaken(folder)

    # however busy the machine is, every run has as many steps
    replace(folder / "prepare.py", ("^LATE_LIMIT = .*", "LATE_LIMIT = 99"))
    replace(folder / "train.py", (r"^    while 2 \* clock\.elapsed.*", "    while step < 40:"))
    for command in (["add", "-A"], ["commit", "-qm", "weak"]):
        subprocess.run(["git", *command], cwd=folder, env=environment, check=True)
    return Client(request.param, folder, tmp_path / "home", environment)


def bash(name, line):
    return {"name": name, "bash": line, "timeout": 120_000}


# --------------------------------------
# A night that cannot stop early: the loop of README around a client that ends, fails and is killed


class Researcher:
    """
    Plays the model. It knows nothing but what `uv run ledger.py` says, does the command after `next:`, and where it is
    its turn tries the next of its edits. It ends its turn after `runs` trainings, or when the night is over.
    """

    def __init__(self, path, edits, runs=99):
        self.path = path  # of train.py
        self.edits = edits  # shared by all sessions: what was tried is not tried again
        self.runs = runs

    def __call__(self, came):
        results = [line["result"] for line in came.values() if "next: " in line["result"]]
        if not came or not results or "next: " not in list(came.values())[-1]["result"]:
            return self.after(came)
        command = re.search(r"^next: (.*)", results[-1], re.M)[1]
        if command.startswith("# the night is over") or self.count(came) >= self.runs:
            return None
        if command.startswith("#"):
            return self.try_something(came)
        return bash(f"{len(came)} {command[:40]}", command)

    def after(self, came):
        """Look where the night stands, or commit what was edited."""
        if came and " edit" in list(came)[-1]:
            idea = self.edits.pop(0)[0]
            return bash(f"{len(came)} commit", f"git commit -q -m '{idea}; expect +0.01' -- train.py")
        return bash(f"{len(came)} status", "uv run ledger.py")

    def try_something(self, came):
        _, old, new = self.edits[0]
        read = [name for name in came if name.endswith(f"read {old}")]
        if not read:
            return {"name": f"{len(came)} read {old}", "read": self.path}
        return {"name": f"{len(came)} edit", "edit": [self.path, old, new]}

    def count(self, came):
        return sum("uv run train.py" in name for name in came)


def test_the_night_goes_on(client):
    """
    The client ends its turn after two runs; it has no money left, three times; it is killed in mid-run; then a last
    session knows nothing but the prompt. Nothing is run twice, no row is lost, and the loop ends by itself.
    """
    source = (client.folder / "train.py").read_text()
    rates = re.search(r"^MATRIX_LR = .*\n(^\w+_LR = .*\n)*", source, re.M)[0]  # which weaken() has made too low
    edits = [("rates up", rates, rates.replace("1e-6 * ", "")), ("no change", "ADAM_EPS = ", "ADAM_EPS = 1 * ")]
    log = client.folder / "run.log"
    client.ledger("start", "test", "--until", "5")
    sessions = 0
    while client.ledger("open", check=False).returncode == 0:
        sessions += 1
        process, model = client.start(Researcher(client.path("train.py"), edits, runs=2 if sessions == 1 else 99))
        model.is_out = sessions in (2, 3, 4)
        if sessions == 5:
            log.unlink()
            wait_for(lambda: log.exists() and "compiling" in log.read_text(), 300)
        else:
            process.wait(900)
        kill(process)
        model.close()
        refused = {name: line["result"] for name, line in model.came.items() if line["error"]}
        assert not refused and "denied" not in str(model.came) and "unsupported" not in str(model.came)
        assert sessions < 9, "the night does not end"
    assert sessions == 6

    # every run has its row, none was run twice, and all ended on fresh seeds
    rows = client.rows()[1:]
    journal = [run for run in read_journal(prepare.HOME / (prepare.HOME / "current").read_text())]
    assert len(rows) == len(journal) == len({(run["commit"], run["seed"]) for run in journal})
    assert [row[4].rpartition(", seed ")[2] for row in rows][-4:] == ["4", "4", "5", "5"]
    assert "the gain to report" in client.ledger().stdout
    assert client.git("status", "--porcelain") == ""
    assert "Co-Authored-By" not in client.git("log", "--all", "--format=%B")


# --------------------------------------
# swarm/program.md under the same permissions


def lines(*steps):
    """Steps that run these lines, by their place."""
    return [bash(f"{number} {line[:50]}", line) for number, line in enumerate(steps)]


def outputs(came):
    """What each line printed. None was refused."""
    assert "denied" not in str(came) and "unsupported" not in str(came)
    assert not [name for name, line in came.items() if line["error"]], came
    return [line["result"] for line in came.values()]


def test_a_hub(client, tmp_path):
    """An agent joins, runs its baseline, tells what it will try, and shares its row."""
    bare = tmp_path / "hub.git"
    client.git("clone", "-q", "--bare", ".", str(bare))
    train = "AUTORESEARCH_SEED=1 uv run train.py > run.log 2>&1"
    came = client.play(
        lines(
            f"uv run swarm/hub.py join {bare} --tag night --agent ada --until 9",
            train,
            "uv run ledger.py add baseline",
            "uv run swarm/hub.py say 'rates up'",
            "uv run swarm/hub.py exchange",
            "uv run swarm/hub.py look rates",
        )
    )
    printed = outputs(came)
    assert len(printed) == 6 and "next: " + train in printed[0]
    assert "night/ada says: rates up" in printed[5]
    shared = client.git("-C", str(bare), "grep", "-h", "", "refs/notes/results")
    assert f'"val_bpb": {float(client.rows()[1][1])}' in shared and '"say": "rates up"' in shared
    assert client.git("-C", str(bare), "branch", "--list", "autoresearch/night/ada") != ""


def test_a_wave(client):
    """The baseline and an idea in a worktree, sent to a cluster of this machine."""
    pytest.importorskip("ray", reason="needs the dependency group `cluster`")
    wave = "uv run --group cluster swarm/wave.py"
    client.ledger("start", "night", "--until", "9")
    path = client.path("wave/deeper/train.py")
    came = client.play(
        [
            *lines(f"{wave} start", f"{wave} new deeper"),
            {"name": "read", "read": path},
            {"name": "edit", "edit": [path, "COMPILE = True  # torch.compile", "COMPILE = True"]},
        ]
        + lines(
            f"{wave} commit deeper 'no change; expect +0.000'",
            f"{wave} submit base:1 deeper:1",
            f"{wave} collect",
            f"{wave} collect --wait 100",
            "uv run ledger.py add --wave",
            "uv run ledger.py",
            f"{wave} stop",
        )
    )
    printed = outputs(came)
    assert [row[3] for row in client.rows()[1:]] == ["keep", "discard"]
    assert "no change; expect +0.000, seed 1" in client.rows()[2][4]
    assert f"next: {wave} submit" in printed[-2] and "has ended" in printed[-1]
    assert client.git("status", "--porcelain") == ""


# --------------------------------------
# What is forbidden

FORBIDDEN = {
    "sed": "sed -i 's/LATE_LIMIT = 1.1/LATE_LIMIT = 9.9/' prepare.py",
    "python": "python3 -c \"open('prepare.py', 'a').write('#')\"",
    "uv python": "uv run python -c \"open('prepare.py', 'a').write('#')\"",
    "awk": 'awk \'BEGIN { print "#" >> "prepare.py" }\'',
    "git log": "git log -1 --output=prepare.py",
    "git diff": "git diff --output=prepare.py HEAD",
    "sort": "sort -o prepare.py prepare.py",
    "redirect": "echo x >> prepare.py",
    "printf": "printf x > program.md",
    "copy": "cp train.py prepare.py",
    "move": "mv train.py prepare.py",
    "tee": "echo x | tee -a README.md",
    "settings": "echo '{}' > .claude/settings.json",
    "configuration": "echo '' > .codex/config.toml",
    "checkout": "git checkout -q old -- prepare.py",
    "hard reset": "git reset -q --hard old",
    "push": "git push -q origin HEAD",
    "remote": "git remote add hub https://example.org/x",
    "package": "uv add einops",
    "pip": "pip install einops",
    "prepare": "uv run prepare.py",
    "longer": "uv run prepare.py --time-budget 900",
    "hook": "echo 'exit 0' > .git/hooks/pre-commit",
}


def test_forbidden_calls(client):
    """Each is denied, or changes nothing that judges. The steps go on after each."""
    older = client.folder / "prepare.py"
    older.write_text(older.read_text() + "# another\n")
    for words in (["commit", "-qam", "old"], ["tag", "old"], ["revert", "--no-edit", "HEAD"]):
        client.git(*words)
    client.git("checkout", "-q", "-b", "autoresearch/test")
    before, current = client.git("rev-parse", "HEAD"), (prepare.HOME / "current").read_text()
    steps = [bash("allowed", STATUS)]  # the tools are there
    steps += [{"name": name, "bash": line, "timeout": 60_000} for name, line in FORBIDDEN.items()]
    steps.append({"name": "read", "read": str(client.folder / "prepare.py")})
    steps.append({"name": "tool", "edit": [client.path("prepare.py"), "SEED = 42", "SEED = 43"]})
    came = client.play(steps)
    assert len(came) == len(steps) and "no night here" in came["allowed"]["result"]
    assert "unsupported" not in str(came)  # it is refused, not misspelt
    assert {name: line["changed"] for name, line in came.items() if line["changed"]} == {}
    assert client.git("rev-parse", "HEAD") == before
    assert client.git("diff", "--name-only", "HEAD") == client.git("remote") == ""
    assert not (client.folder / ".git/hooks/pre-commit").exists()
    assert (prepare.HOME / "current").read_text() == current and len(list(prepare.HOME.glob("*/benchmark.json"))) == 1
