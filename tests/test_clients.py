"""
A night with the real Claude Code and the real Codex, whose model is scripted, and real runs of 3 seconds:

    npm install --no-save --prefix .clients @anthropic-ai/claude-code@2.1.331 @openai/codex@0.169.0
    uv run pytest -m clients

No account, no network. Every shell line comes from program.md, with its words filled in.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time

import pytest
from conftest import PROGRAM, ROOT, WEAK, new_repository, wait_for, weaken
from scripted_model import ScriptedModel

import ledger
import prepare
from harness.journal import read_journal

BIN = ROOT / ".clients" / "node_modules" / ".bin"
STATUS = "uv run prepare.py --status"
ROW = "<commit> <val_bpb> <memory_gb> <status>"
JUDGES = ("prepare.py", "program.md", "README.md", "pyproject.toml", ".claude/settings.json", ".codex/config.toml")

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not BIN.exists(), reason="the clients are not installed: see the first lines of this file"),
]


class Client:
    """One of the two, in a folder that it trusts and a home of its own."""

    def __init__(self, name, folder, home, environment):
        self.name, self.folder, self.home = name, folder, home
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
        if self.name == "claude":  # wants full paths
            steps = [
                s | {"edit": [str(self.folder / s["edit"][0]), *s["edit"][1:]]} if "edit" in s else s for s in steps
            ]
        model = ScriptedModel(steps, [self.folder / file for file in JUDGES])
        if self.name == "claude":
            trust = {"projects": {str(self.folder): {"hasTrustDialogAccepted": True}}, "hasCompletedOnboarding": True}
            (self.home / ".claude.json").write_text(json.dumps(trust))
            quiet = ("DISABLE_TELEMETRY", "DISABLE_ERROR_REPORTING", "DISABLE_AUTOUPDATER")
            quiet = dict.fromkeys((*quiet, "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC"), "1")
            environment = self.environment | quiet | {"ANTHROPIC_BASE_URL": model.url, "ANTHROPIC_API_KEY": "none"}
            command = [BIN / "claude", "-p", "Have a look at program.md"]
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
            environment, command = self.environment, [BIN / "codex", "exec", "--trust", "Have a look at program.md"]
        with open(self.home.parent / "log.txt", "a") as log:
            streams = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            process = subprocess.Popen(command, cwd=self.folder, env=environment, start_new_session=True, **streams)
            return process, model

    def git(self, *words):
        command = ["git", "-c", "user.name=Human", "-c", "user.email=human@example.org", *words]
        return subprocess.run(command, cwd=self.folder, check=True, capture_output=True, text=True).stdout

    def rows(self):
        return [line.split("\t") for line in (self.folder / "results.tsv").read_text().splitlines()]

    def play_well(self, steps):
        """Play steps that none may be refused; returns {name: what came back}."""
        came = self.play(steps)
        refused = {name: line["result"] for name, line in came.items() if line["error"] or "denied" in line["result"]}
        assert not refused and "unsupported" not in str(came)
        assert [step["name"] for step in steps] == list(came)
        return {name: line["result"] for name, line in came.items()}

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
    (prepare.HOME / "current").write_text(prepared)
    (prepare.HOME / prepared / "journal.jsonl").unlink(missing_ok=True)
    folder = new_repository(tmp_path / "clone", environment)
    for name in (".claude", ".codex", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("analysis.ipynb", "program_swarm.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    weaken(folder)
    for command in (["add", "-A"], ["commit", "-qm", "weak"]):
        subprocess.run(["git", *command], cwd=folder, env=environment, check=True)
    return Client(request.param, folder, tmp_path / "home", environment)


def bash(name, line, **words):
    for word, value in words.items():
        assert f"<{word}>" in line, f"{word} in {line}"
        line = line.replace(f"<{word}>", str(value))
    assert not re.search(r"<\w+>", line), line
    return {"name": name, "bash": line.strip(), "timeout": 120_000}


def run(name, seed, description):
    """Steps 4 to 6 of program.md."""
    row = PROGRAM["row"].replace(ROW, f"{{{{{name} status:write the row: (\\S+ \\S+ \\S+ \\S+)}}}}")
    return [
        bash(f"{name} run", PROGRAM["run"], seed=seed, limit=60),
        bash(f"{name} status", STATUS),
        bash(f"{name} row", row, description=description),
    ]


def idea(name, *edits):
    edits = [{"name": f"{name} edit {number}", "edit": ["train.py", *edit]} for number, edit in enumerate(edits)]
    return [*edits, bash(f"{name} commit", PROGRAM["commit"], idea=name, prediction="-0.01")]


def reset(name):
    before = f"{name} before reset"
    line = PROGRAM["reset"].replace("<commit>", f"{{{{{before}:refs/tries/(\\w+)}}}}")
    return [
        bash(before, STATUS),
        bash(f"{name} reset", line.replace("<kept>", f"{{{{{before}:reset to (\\w+)}}}}")),
    ]


def test_a_night(client):
    source = (ROOT / "train.py").read_text()
    rates = {name: re.search(rf"^{name} = (\S+)", source, re.M)[1] for name in WEAK}
    worse = [[f"{name} = {rate}", f"{name} = 0.0"] for name, rate in rates.items()]  # beyond all doubt
    read = {"name": "read", "read": str(client.folder / "train.py")}
    steps = [
        bash("look", PROGRAM["look"]),
        bash("branch", PROGRAM["branch"], tag="test"),
        bash("note", "echo 'backlog: rates' >> ideas.md"),
        bash("notes", "tail -n 40 ideas.md"),
        *run("base 1", 1, "baseline, seed 1"),
        *run("base 2", 2, "baseline, seed 2"),
        *run("base 3", 3, "baseline, seed 3"),
        read,
        *idea("rates up", *([f"{name} = 1e-6 * {rate}", f"{name} = {rate}"] for name, rate in rates.items())),
        *run("up 1", 1, "rates up, promising"),
        *run("up 2", 2, "rates up, seed 2"),
        *idea("no rate", *worse),
        *run("none", 1, "no rate"),
        *reset("none"),
        read | {"name": "read again"},
        *idea("slip", ["def norm(x):", "def norm(x:"]),
        *run("slip", 1, "a slip"),
        bash("tail", "tail -c 1500 run.log"),
        *reset("slip"),
        bash("fetch", "git cherry-pick -n refs/tries/{{slip before reset:refs/tries/(\\w+)}}"),
        bash("diff", "git diff HEAD"),
        bash("drop", "git checkout HEAD -- train.py"),
        bash("look up", "grep -i 'rate' results.tsv ideas.md"),
    ]
    client.play_well(steps)

    # the client dies in mid-run; another session goes on from what the status says
    steps = [read, *idea("again", *worse), *run("again", 1, "again")]
    (client.folder / "run.log").unlink()
    process, model = client.start(steps)
    log = client.folder / "run.log"
    wait_for(lambda: log.exists() and "compiling what is new" in log.read_text(), 300)
    kill(process)
    model.close()
    time.sleep(20)  # the training may outlive its client
    came = client.play_well([bash("where", PROGRAM["where"])])
    assert "autoresearch/test" in came["where"]
    row = bash(
        "row", PROGRAM["row"].replace(ROW, "{{status:write the row: (\\S+ \\S+ \\S+ \\S+)}}"), description="again"
    )
    finished = "next: write the row" in came["where"]
    assert finished or "next: run it with seed 1" in came["where"]
    client.play_well(
        [
            *([bash("status", STATUS), row] if finished else run("again", 1, "again")),
            *reset("again"),
            bash("to base", f"git checkout -q --detach {client.rows()[1][0]}"),
            *run("base 4", 4, "baseline, seed 4"),
            bash("back", "git checkout -q autoresearch/test"),
            *run("up 4", 4, "rates up, seed 4"),
            bash("end", STATUS),
        ]
    )
    rows = client.rows()[1:]
    assert [row[3] for row in rows] == [*["keep"] * 3, "discard", "keep", "discard", "crash", "discard", "keep", "keep"]
    assert {len(row) for row in rows} == {5}
    journal = read_journal(prepare.HOME / (prepare.HOME / "current").read_text())
    matched, unlisted = ledger.match_runs(ledger.read_ledger(client.folder / "results.tsv"), journal)
    assert len(matched) == 9 and not unlisted
    assert client.git("log", "--format=%h", "--abbrev=7", "main..HEAD").split() == [rows[4][0]]
    assert "Co-Authored-By" not in client.git("log", "--all", "--format=%B")
    assert len(client.git("for-each-ref", "refs/tries").splitlines()) == 3 and client.git("status", "--porcelain") == ""


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
    steps.append({"name": "tool", "edit": ["prepare.py", "SEED = 42", "SEED = 43"]})
    came = client.play(steps)
    assert len(came) == len(steps) and "this commit: " in came["allowed"]["result"]
    assert "unsupported" not in str(came)  # it is refused, not misspelt
    assert {name: line["changed"] for name, line in came.items() if line["changed"]} == {}
    assert client.git("rev-parse", "HEAD") == before
    assert client.git("diff", "--name-only", "HEAD") == client.git("remote") == ""
    assert not (client.folder / ".git/hooks/pre-commit").exists()
    assert (prepare.HOME / "current").read_text() == current and len(list(prepare.HOME.glob("*/benchmark.json"))) == 1
