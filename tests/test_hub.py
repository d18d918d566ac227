"""
Several agents share a real bare repository through swarm/hub.py. Their scores are made up: nothing trains here.
"""

import json
import math
import re
import shutil
import statistics
import subprocess
import threading
from collections import defaultdict

import pytest
from conftest import Agent, new_repository

from harness.journal import now
from night.rows import append_rows, read_rows
from swarm import hub as program
from swarm.notes import LONGEST_LINE, parse_line

CPU, GPU = "cpu x86_64 x2", "NVIDIA H100 80GB HBM3"


class Scripted(Agent):
    """An agent with a clone of its own, whose runs are lines in the journal and whose rows are written at once."""

    def __init__(self, name, folder, environment, device):
        super().__init__(folder, environment, {})
        self.name, self.device = f"test/{name}", device

    def hub(self, *words, code=0):
        """What `hub.py` prints; a failure is one line."""
        process = self.run("swarm/hub.py", *words)
        assert process.returncode == code, process.stderr
        if code:
            assert len(process.stderr.splitlines()) == 1, process.stderr
            return process.stderr
        assert process.stderr == ""
        return process.stdout

    def row(self, score, status, words, device="own"):
        """A row for HEAD, and the run that it is of, if that has a device."""
        device = self.device if device == "own" else device
        run = {"time": now(), "commit": self.git("rev-parse", "HEAD").strip(), "val_bpb": score, "device": device}
        run |= {"dirty": False, "seed": int((re.findall(r"seed (\d)", words) or [1])[-1])}
        if device and score:
            with open(self.home / "local" / "journal.jsonl", "a") as journal:
                journal.write(json.dumps(run) + "\n")
        memory = "2.5" if score else "0.0"
        append_rows(self.folder / "results.tsv", [(self.head(), f"{score:.6f}", memory, status, words)])

    def baseline(self, *scores):
        for seed, score in enumerate(scores, 1):
            self.row(score, "keep", f"baseline, seed {seed}")
        self.kept = self.head()

    def idea(self, words, score, status, second=None):
        """A commit with its row, or two; back at the last keep, if it is none. Returns its hash."""
        self.edit((r"\Z", f"# {words}\n"))
        self.git("commit", "-qm", words, "--", "train.py")
        commit = self.head()
        self.row(score, status, f"{words}, seed 1")
        if second:
            self.row(second, status, f"{words}, seed 2")
        if status == "keep":
            self.kept = commit
        else:
            self.git("reset", "-q", "--keep", self.kept)
        return commit

    def frontier(self, command=()):
        return re.findall(r"^  (\S+), runs (\d+), (\w{7}), (\S+): ", self.hub(*command), re.M)


@pytest.fixture
def hub(tmp_path, environment, monkeypatch):
    """A bare repository with a main branch; call it to get an agent that has joined from a clone of its own."""
    home, bare = tmp_path / "home", tmp_path / "hub.git"
    (home / "local").mkdir(parents=True)
    (home / "current").write_text("local")
    (home / "local" / "benchmark.json").write_text('{"id": "local", "settings": {"time_budget": 3}}')
    monkeypatch.setenv("AUTORESEARCH_HOME", str(home))
    environment = environment | {"AUTORESEARCH_HOME": str(home), "CXX": "git"}  # some program: nothing is compiled
    main = new_repository(tmp_path / "main", environment)
    subprocess.run(["git", "clone", "-q", "--bare", main, bare], check=True)

    def clone(name, device=CPU):
        folder = tmp_path / name
        subprocess.run(["git", "clone", "-q", bare, folder], check=True)
        agent = Scripted(name, folder, environment, device)
        agent.home, agent.words = home, ("join", str(bare), "--tag", "test", "--agent", name)
        return agent

    def join(name, device=CPU):
        agent = clone(name, device)
        agent.hub(*agent.words)
        return agent

    def git(*words, text=None):
        return subprocess.run(
            ["git", *words], cwd=bare, env=environment, check=True, capture_output=True, text=True, input=text
        ).stdout.strip()

    join.bare, join.clone, join.git = bare, clone, git
    return join


def published(hub):
    """The results in the notes of the hub, in the order of agents and rows; an honest agent writes nothing else."""
    lines = hub.git("grep", "-h", "", "refs/notes/results").split("\n")
    results = [json.loads(line) for line in lines if line]
    return sorted((line for line in results if "row" in line), key=lambda line: (line["agent"], line["row"]))


def best(results, device):
    """The frontier by brute force."""
    pools = defaultdict(list)
    for line in results:
        if line["device"] == device and line["val_bpb"]:
            pools[line["train"]].append(line)
    found = []
    for pool in pools.values():
        keeps = sorted(
            (line["time"], line["agent"], line["row"], line["commit"]) for line in pool if line["status"] == "keep"
        )
        if keeps:
            mean = statistics.fmean(line["val_bpb"] for line in pool)
            found.append((f"{mean:.6f}", str(len(pool)), keeps[0][3][:7], keeps[0][1]))
    return sorted(found)[:5]


# --------------------------------------
# Several agents


def test_three_agents_share_a_hub(hub):
    """20 rows each, sent at once: none is lost or doubled, every commit can be fetched, and devices keep apart."""
    agents = [hub("ada"), hub("bob"), hub("eve", GPU)]

    def night(agent, level):
        agent.baseline(level, level + 0.001, level - 0.002)
        for n in range(4, 21):
            score = 0 if n % 7 == 0 else round(level + (-1) ** n * n / 1000 + level * n / 1e5, 6)
            status = "crash" if not score else "keep" if score < level else "discard"
            agent.idea(f"idea {n} of {agent.name}", score, status)
            if n % 3 == 0:
                agent.hub("exchange")

    threads = [threading.Thread(target=night, args=job) for job in zip(agents, (1.0, 1.01, 0.5))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for agent in agents:
        agent.hub("exchange")

    # every row once, as it is in results.tsv
    results = published(hub)
    assert [(line["agent"], line["row"]) for line in results] == [
        (agent.name, number) for agent in agents for number in range(1, 21)
    ]
    for agent in agents:
        own = [line for line in results if line["agent"] == agent.name]
        for line, row in zip(own, read_rows(agent.folder / "results.tsv")[0]):
            score = None if math.isnan(row.val_bpb) else row.val_bpb
            assert (line["commit"][:7], line["val_bpb"], line["status"]) == (row.commit, score, row.status)
            assert line["description"] == row.description and line["memory_gb"] == row.memory_gb
            assert line["device"] == (agent.device if score else None)
        tip = hub.git("rev-parse", "--short=7", f"autoresearch/{agent.name}")
        assert tip == agent.head() == agent.kept

    # every commit is there, on top of its parent and with its train.py
    names = [[line["commit"], f"{line['commit']}^", f"{line['commit']}:train.py"] for line in results]
    known = hub.git("rev-parse", *sum(names, [])).split()
    said = [line[key] for line in results for key in ("commit", "parent", "train")]
    assert [full[:12] for full in known] == said
    reachable = set(hub.git("rev-list", "--all").split())
    assert reachable >= set(known[::3])

    # what each of them sees, with network and without
    for agent in agents[::-1]:
        agent.hub("exchange")
        assert agent.frontier() == agent.frontier(["exchange"]) == best(results, agent.device)
    assert len(best(results, CPU)) == len(best(results, GPU)) == 5
    parent = agents[1].kept
    for word in (f"parent={parent}", f"PARENT={hub.git('rev-parse', parent)}"):
        shown = agents[0].hub("look", word).splitlines()
        assert len(shown) == min(20, sum(line["parent"][:7] == parent for line in results)) > 0
    assert len(agents[0].hub("look", "IDEA", "7 of").splitlines()) == 3
    times = sorted(line["time"] for line in results)[-20:]
    assert [line[:16] for line in agents[0].hub("look").splitlines()] == [time[:16].replace("T", " ") for time in times]


def test_the_same_train_py_counts_as_one(hub):
    """The baseline of all agents is one line of the frontier, though each has a commit of its own."""
    ada, bob = hub("ada"), hub("bob")
    ada.baseline(1.0, 1.1)
    bob.baseline(1.2)
    assert ada.head() != bob.head()
    ada.hub("exchange")
    assert bob.frontier(["exchange"]) == [("1.100000", "3", ada.head(), "test/ada")]


def test_a_result_of_an_unknown_device_is_no_frontier(hub):
    ada = hub("ada")
    ada.row(0.5, "keep", "typed by hand", device=None)
    assert "unknown before the first run" in ada.hub("exchange")
    ada.row(1.0, "keep", "baseline, seed 1")
    assert ada.frontier(["exchange"]) == [("1.000000", "1", ada.head(), "test/ada")]
    assert re.search(r" 0\.500000 keep, \w{7} on \w{7}, unknown device: typed by hand", ada.hub("look"))


def test_what_is_said_is_seen_before_the_run(hub):
    ada, bob = hub("ada"), hub("bob")
    words = 'a head of "two" layers, größer: 100% \\n $(x)'
    assert ada.hub("say", words) == f"said: {words}\n"
    for word in ("TWO", "GRÖSSER".replace("SS", "ß"), '"two"', "\\n", ada.head()):
        assert f"test/ada says: {words}\n" in bob.hub("look", word)
    assert bob.hub("look", "a.head") == "nothing about a.head\n"


# --------------------------------------
# Lost, found


def test_a_night_comes_back_from_nothing(hub):
    ada = hub("ada")
    ada.baseline(1.0, 1.1)
    kept = ada.idea("deeper; expect +0.1", 0.9, "keep")
    lost = ada.idea("a typo", 0, "crash")
    ada.hub("exchange")
    ledger = (ada.folder / "results.tsv").read_text()
    state = json.loads((ada.folder / "night.json").read_text())
    shutil.rmtree(ada.folder)

    ada = hub.clone("ada")
    output = ada.hub(*ada.words, "--until", "40")
    assert "autoresearch/test/ada is back from the hub, until 40" in output and "rows: 4" in output
    assert (ada.folder / "results.tsv").read_text() == ledger
    assert json.loads((ada.folder / "night.json").read_text()) == state | {"until": "40"}
    assert ada.head() == kept and ada.git("branch", "--show-current").strip() == "autoresearch/test/ada"
    assert ada.git("log", "-1", "--format=%s", f"refs/tries/{lost}").strip() == "a typo"

    # the ledger alone was lost; then nothing was
    (ada.folder / "results.tsv").unlink()
    assert "is here already, until 40; the hub was fetched" in ada.hub(*ada.words)
    assert (ada.folder / "results.tsv").read_text() == ledger
    ada.hub(*ada.words)
    assert (ada.folder / "results.tsv").read_text() == ledger
    ada.kept = kept
    ada.idea("wider", 0.95, "discard")
    ada.hub("exchange")
    assert [line["row"] for line in published(hub)] == [1, 2, 3, 4, 5]


def test_rows_that_move_are_not_doubled(hub):
    """A ledger that was rebuilt from the journal lacks its crashes."""
    ada = hub("ada")
    ada.baseline(1.0, 1.0)
    ada.idea("a typo", 0, "crash")
    ada.idea("wider", 1.2, "discard")
    ada.hub("exchange")
    path = ada.folder / "results.tsv"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "crash" not in line))
    ada.idea("deeper", 1.1, "discard")
    ada.hub("exchange")
    assert [line["description"].split(",")[0] for line in published(hub)] == [
        "baseline",
        "baseline",
        "a typo",
        "wider",
        "deeper",
    ]


def test_without_network_nothing_is_lost(hub, tmp_path):
    ada = hub("ada")
    ada.baseline(1.0)
    ada.hub("exchange")
    hub.bare.rename(tmp_path / "away")
    commit = ada.idea("deeper", 0.9, "keep")
    output = ada.hub("exchange")
    assert re.match(r"the hub was not reached: fatal: .*; the next exchange sends it\nfrontier: ", output)
    assert ada.frontier()[0] == ("0.900000", "1", commit, "test/ada")
    assert "the hub was not reached: fatal: " in ada.hub("say", "hello?")
    assert "the hub was not reached: fatal: " in ada.hub(*ada.words)
    assert "test/ada says: hello?" in ada.hub("look", "hello")
    (tmp_path / "away").rename(hub.bare)
    assert "not reached" not in ada.hub("exchange")
    assert [line["commit"][:7] for line in published(hub)][1:] == [commit]
    assert "hello?" in hub("bob").hub("look")


def test_a_push_that_others_come_before_is_sent_again(hub, monkeypatch):
    ada, bob = hub("ada"), hub("bob")
    ada.baseline(1.0)
    bob.baseline(1.0)

    # while ada pushes, for the first time, bob does
    trap = ada.folder / ".git" / "hooks" / "pre-push"
    trap.parent.mkdir(exist_ok=True)
    bobs = f"cd '{bob.folder}' && PATH='{bob.environment['PATH']}' && unset GIT_DIR && uv run swarm/hub.py exchange"
    trap.write_text(f'#!/bin/sh\nrm "$0"\n({bobs}) > /dev/null 2>&1\n')
    trap.chmod(0o755)
    assert "not reached" not in ada.hub("exchange") and not trap.exists()
    assert [line["agent"] for line in published(hub)] == ["test/ada", "test/bob"]


def test_a_hub_that_takes_nothing_is_named(hub):
    ada = hub("ada")
    ada.baseline(1.0)
    refusal = hub.bare / "hooks" / "pre-receive"
    refusal.parent.mkdir(exist_ok=True)
    refusal.write_text("#!/bin/sh\nexit 1\n")
    refusal.chmod(0o755)
    assert re.match(r"the hub was not reached: ! .*pre-receive hook declined", ada.hub("exchange"))


# --------------------------------------
# Adopt


def test_build_on_the_best_of_another(hub):
    ada, bob = hub("ada"), hub("bob")
    ada.baseline(1.0, 1.001, 0.999)
    good = ada.idea("deeper; expect +0.1", 0.8, "keep", second=0.801)
    ada.hub("exchange")
    bob.baseline(1.0, 1.001, 0.999)
    output = bob.hub("exchange")
    assert "test/ada: deeper; expect +0.1, seed 1; ahead of your last keep by 0.199500\n" in output
    assert output.endswith(f"next: uv run swarm/hub.py adopt {good}\n")
    start = bob.head()
    bob.edit((r"\Z", "# not now\n"))
    assert "ahead" in bob.hub() and "next:" not in bob.hub()
    bob.git("checkout", "-q", "train.py")

    output = bob.hub("adopt", good)
    subject = f"adopted {good} from test/ada: deeper; expect +0.199500"
    assert bob.git("log", "-1", "--format=%s").strip() == output.splitlines()[0] == subject
    assert "train.py | 1 +" in output and output.endswith("next: AUTORESEARCH_SEED=1 uv run train.py > run.log 2>&1\n")
    assert bob.git("rev-parse", "--short=7", "HEAD^").strip() == start
    assert bob.git("diff", good, "--", "train.py") == "" and bob.git("status", "--porcelain") == ""
    assert "ahead" not in bob.hub()  # what is being tried is not proposed

    # its runs here are of the same pool; further ideas stand on top of it
    bob.row(0.81, "discard", "adopted, seed 1")
    bob.row(0.811, "keep", "adopted, seed 2")
    bob.kept = bob.head()
    assert bob.frontier(["exchange"])[0] == ("0.805500", "4", good, "test/ada")
    better = bob.idea("wider", 0.7, "keep", second=0.701)
    bob.hub("exchange")
    assert f"next: uv run swarm/hub.py adopt {better}" in ada.hub("exchange")
    ada.hub("adopt", better)
    assert ada.git("diff", better, "--", "train.py") == ""

    # what was tried here, and was worse, is decided
    ada.row(0.9, "discard", "adopted, seed 1")
    ada.git("reset", "-q", "--keep", ada.kept)
    assert "next:" not in ada.hub("exchange")


def edited(agent, hub):
    agent.edit((r"\Z", "# more\n"))
    return "", "no new idea starts now: commit it"


def on_another_branch(agent, hub):
    agent.git("checkout", "-q", "main")
    return "", "this is not the branch of the night; next: git checkout -q autoresearch/test/bob"


def behind(agent, hub):
    agent.idea("wider", 0.9, "keep", second=0.9)
    agent.git("reset", "-q", "--hard", "HEAD^")
    return "", "HEAD is not on top of the last keep"


def without_a_baseline(agent, hub):
    (agent.folder / "results.tsv").write_text("commit\tval_bpb\tmemory_gb\tstatus\tdescription\n")
    return "", "without a row|the baseline"


def unknown(agent, hub):
    return "f" * 12, "fffffffffffff* is no result here"


def no_result(agent, hub):
    return agent.git("rev-parse", "main").strip(), "is no result here"


def the_same(agent, hub):
    return agent.head(), "the same train.py as HEAD"


def a_link(agent, hub):
    """Another's train.py is a link to a file outside."""
    eve = hub("eve")
    (eve.folder / "train.py").unlink()
    (eve.folder / "train.py").symlink_to("/etc/hostname")
    eve.git("commit", "-qam", "a link")
    eve.row(0.1, "keep", "a link")
    eve.hub("exchange")
    agent.hub("exchange")
    return eve.head(), "has no train.py that is a file"


def a_hook_refuses(agent, hub):
    path = agent.folder / ".git" / "hooks" / "pre-commit"
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\necho error: never\nexit 1\n")
    path.chmod(0o755)
    return "", "git does not commit it: "


CASES = [edited, on_another_branch, behind, without_a_baseline, unknown, no_result, the_same, a_link, a_hook_refuses]


def test_adopt_refuses(hub):
    """Each with one line, and nothing is done."""
    ada, bob = hub("ada"), hub("bob")
    ada.baseline(1.0, 1.001, 0.999)
    bob.baseline(1.0, 1.001, 0.999)
    good = ada.idea("deeper", 0.8, "keep")
    ada.hub("exchange")
    bob.hub("exchange")
    start = bob.head()
    books = {path: path.read_text() for path in (bob.folder / "results.tsv", bob.home / "local" / "journal.jsonl")}
    for case in CASES:
        name, reason = case(bob, hub)
        before = [bob.git(*words) for words in (["rev-parse", "HEAD"], ["status", "--porcelain"], ["diff", "HEAD"])]
        assert re.search(reason, bob.hub("adopt", name or good, code=1)), case.__name__
        after = [bob.git(*words) for words in (["rev-parse", "HEAD"], ["status", "--porcelain"], ["diff", "HEAD"])]
        assert before == after, case.__name__
        bob.git("checkout", "-q", "-f", "autoresearch/test/bob")
        bob.git("reset", "-q", "--hard", start)
        for path, text in books.items():
            path.write_text(text)
    (bob.folder / ".git" / "hooks" / "pre-commit").unlink()
    bob.hub("adopt", good)


# --------------------------------------
# Joining


def test_join_refuses(hub, tmp_path):
    ada = hub.clone("ada")
    ada.edit((r"\Z", "# more\n"))
    assert "tracked files have changes" in ada.hub(*ada.words, code=1)
    ada.git("checkout", "train.py")
    assert "no hub here" in ada.hub("look", code=1)
    words = [str(tmp_path / "typo") if word == str(hub.bare) else word for word in ada.words]
    assert "the hub was not reached: fatal: " in ada.hub(*words, code=1)
    ada.hub(*ada.words)
    assert f"the hub of this clone is {hub.bare}" in ada.hub(*words, code=1)
    ada.baseline(1.0)
    other = ["bob" if word == "ada" else word for word in ada.words]
    assert "results.tsv has rows of another night" in ada.hub(*other, code=1)
    assert ada.git("branch", "--show-current").strip() == "autoresearch/test/ada"


JOIN = ["join", "url", "--tag", "t", "--agent", "a"]
WRONG = {
    "no such command": (["push"], "invalid choice"),
    "join without a name": (JOIN[:-2], "required: --agent"),
    "a tag with a slash": ([*JOIN[:3], "a/b", *JOIN[4:]], "argument --tag: take letters"),
    "an agent with spaces": ([*JOIN[:5], "a b"], "argument --agent: take letters"),
    "an agent that is a path": ([*JOIN[:5], ".."], "argument --agent: take letters"),
    "a url that is an option": (["join", "--", "--upload-pack=x", *JOIN[2:]], "must be a url|required"),
    "a short hash": (["adopt", "abc123"], "7 to 40 digits"),
    "a hash that is a name": (["adopt", "HEAD"], "7 to 40 digits"),
    "nothing said": (["say", " "], "must be one line"),
    "two lines said": (["say", "a\nb"], "must be one line"),
    "too much said": (["say", "a" * 501], "must be one line"),
    "a terminal's orders said": (["say", "a\x1b[2J"], "must be one line"),
}


@pytest.mark.parametrize("words, reason", WRONG.values(), ids=WRONG)
def test_wrong_arguments(words, reason, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.parse_arguments(words)
    output = capsys.readouterr().err
    assert stopped.value.code == 2 and re.search(reason, output) and output.count("\n") == 1


# --------------------------------------
# What others write

MESSAGE = {"time": "2026-11-28T01:02:03+00:00", "agent": "test/eve", "commit": "abcdef0", "say": "hello"}
RESULT = {key: value for key, value in MESSAGE.items() if key != "say"} | {
    "row": 1,
    "parent": "abcdef1",
    "train": "abcdef2",
    "benchmark": "local",
    "device": CPU,
    "val_bpb": 0.001,
    "memory_gb": 1,
    "status": "keep",
    "description": "the best ever",
}
GARBAGE = {
    "nothing": "",
    "torn": json.dumps(RESULT)[:-9],
    "a number": "7",
    "a list": "[{}]",
    "null": "null",
    "the old format": "time=2026 agent=test/eve row=1 parent=abcdef1\tabcdef0\t0.1\t1.0\tkeep\tx",
    "huge": json.dumps(MESSAGE | {"say": "a" * LONGEST_LINE}),
    "deep": "[" * (LONGEST_LINE - 1),
    "many digits": json.dumps(RESULT)[:-1] + ', "row": ' + "9" * 5000 + "}",
}
SPOILED = {
    "time": [None, 7, "yesterday", "٢026-11-28T01:02:03+00:00"],
    "agent": ["eve", "a/b/c", "../x", "a b/c", None],
    "commit": ["HEAD", "abc", "--help", "abcdef0\n", 7],
    "parent": [None, "HEAD^"],
    "train": [None, "", {}],
    "row": [0, -1, 1.5, "1", True, None, 10**400],
    "val_bpb": [0, -1, "0.5", True, None, math.nan, math.inf, 10**400, []],
    "memory_gb": [None, "1", -1, math.nan],
    "status": ["best", None, ["keep"], "crash"],
    "description": [None, 7],
    "benchmark": [None, 7, ""],
    "device": [7, ["cpu"], False],
}


def test_lines_that_are_results_and_messages():
    for line in (MESSAGE, RESULT, RESULT | {"device": None}, RESULT | {"status": "crash", "val_bpb": None}):
        assert parse_line(json.dumps(line)) == line


@pytest.mark.parametrize("text", GARBAGE.values(), ids=GARBAGE)
def test_lines_that_are_not(text):
    assert parse_line(text) is None


@pytest.mark.parametrize("key", SPOILED)
def test_lines_with_a_wrong_value(key):
    values = [value for value in SPOILED[key] if parse_line(json.dumps(RESULT | {key: value})) is not None]
    assert values == [] and parse_line(json.dumps({k: v for k, v in RESULT.items() if k != key})) is None


def test_lines_in_any_encoding_harm_nobody(hub):
    """Bytes, line ends and surrogates in a note of the hub: what is right beside them is still read, and kept."""
    ada = hub("ada")
    ada.baseline(1.0)
    ada.hub("exchange")
    strange = json.dumps(MESSAGE | {"say": "x\u2028y\ud800\x1b[2J\nz"})
    raw = json.dumps(MESSAGE | {"say": "raw\u2028 in"}, ensure_ascii=False)
    lines = [b"{\xff}", raw.encode(), strange.encode(), json.dumps(RESULT).encode()]
    lines += [text.encode() for text in GARBAGE.values()]

    # in the note that has her own lines, which are taken out; zeros in another one
    for commit, content in ((ada.kept, b"\n".join(lines)), ("main", b"\xff\xfe\0{")):
        (hub.bare / "note").write_bytes(content + b"\n")
        hub.git("notes", "--ref=results", "add", "-f", "-C", hub.git("hash-object", "-w", "note"), commit)
    ada.hub("say", "mine")
    ada.idea("deeper", 0.9, "keep")
    output = ada.hub("exchange")
    assert [line[:2] for line in re.findall(r"^  (\S+), runs (\d+), ", output, re.M)] == [
        ("0.001000", "1"),
        ("0.900000", "1"),
        ("1.000000", "1"),
    ]
    assert ada.hub("look", "2J").splitlines() == ["2026-11-28 01:02 test/eve says: x?y??[2J?z"]
    assert [line.split("says: ")[1] for line in ada.hub("look", "says").splitlines()] == [
        "raw? in",
        "x?y??[2J?z",
        "mine",
    ]
    assert hub("bob").hub("look", "deeper").count("\n") == 1
