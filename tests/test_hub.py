"""
Finds what loses, doubles, mixes up or believes too much of what agents share through swarm/hub.py, on a real bare
repository. Their scores are made up: nothing trains here.
"""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.skip("hubs move to the record of the night next", allow_module_level=True)

from conftest import Agent, new_repository

from harness.journal import now
from night.rows import append_rows
from swarm.hub import parse_arguments
from swarm.notes import LONGEST_LINE, parse_line

CPU, GPU = "cpu x86_64 x2", "NVIDIA H100 80GB HBM3"
NOT_REACHED = "the hub was not reached: "


@pytest.fixture
def hub(tmp_path, environment, monkeypatch):
    """A bare repository with a main branch, and a home with a benchmark for those who join."""
    home = tmp_path / "home"
    (home / "local").mkdir(parents=True)
    (home / "current").write_text("local")
    (home / "local" / "benchmark.json").write_text('{"id": "local", "settings": {"time_budget": 3}}')
    monkeypatch.setenv("AUTORESEARCH_HOME", str(home))
    environment = environment | {"AUTORESEARCH_HOME": str(home), "CXX": "git"}  # some program: nothing is compiled
    main = new_repository(tmp_path / "main", environment)
    subprocess.run(["git", "clone", "-q", "--bare", main, tmp_path / "hub.git"], check=True)
    return Agent(tmp_path / "hub.git", environment, {})


class Member(Agent):
    """An agent with a clone of the hub, whose runs are lines in the journal and whose rows are written at once."""

    def __init__(self, hub, name, device=CPU):
        super().__init__(hub.folder.parent / name, hub.environment, {})
        hub.git("clone", "-q", ".", str(self.folder))
        self.name, self.device = f"test/{name}", device
        self.ledger = self.folder / "results.tsv"
        self.journal = Path(hub.environment["AUTORESEARCH_HOME"], "local", "journal.jsonl")
        self.joining = ["join", str(hub.folder), "--tag", "test", "--agent", name]

    def hub(self, *words, code=0):
        """What `hub.py` prints; a failure, of code 1, is one line."""
        process = self.run("swarm/hub.py", *words)
        assert (process.returncode, len(process.stderr.splitlines())) == (code, code), process.stderr
        return process.stdout + process.stderr

    def git(self, *words):
        return super().git(*words).strip()

    def add(self, status, description, *scores):
        """Rows for HEAD, with seeds from 1, and the runs that they are of."""
        commit = self.git("rev-parse", "HEAD")
        for seed, score in enumerate(scores, 1):
            run = {"time": now(), "commit": commit, "seed": seed, "val_bpb": score, "dirty": False}
            if score:
                with open(self.journal, "a") as journal:
                    journal.write(json.dumps(run | {"device": self.device}) + "\n")
            memory = "2.5" if score else "0.0"
            append_rows(self.ledger, [(commit[:7], f"{score:.6f}", memory, status, f"{description}, seed {seed}")])
        if status == "keep":
            self.kept = commit[:7]

    def idea(self, description, status, *scores):
        """A commit with its rows; back at the last keep, if it is none. Returns its hash."""
        self.edit((r"\Z", f"# {description}\n"))
        self.git("commit", "-qm", description, "--", "train.py")
        commit = self.head()
        self.add(status, description, *scores)
        self.git("reset", "-q", "--keep", self.kept)
        return commit

    def frontier(self, *command):
        return re.findall(r"^  (\S+), runs (\d+), (\w{7}), (\S+): ", self.hub(*command), re.M)


def join(hub, name, device=CPU):
    agent = Member(hub, name, device)
    agent.hub(*agent.joining)
    return agent


def published(hub):
    """The results in the notes of the hub, in the order of agents and rows; an honest agent writes nothing else."""
    lines = map(json.loads, hub.git("grep", "-h", "{", "refs/notes/results").splitlines())
    return sorted((line for line in lines if "row" in line), key=lambda line: (line["agent"], line["row"]))


def add_hook(repository, name, script):
    hook = repository / "hooks" / name
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\n{script}\n")
    hook.chmod(0o755)
    return hook


# --------------------------------------
# Several agents


def test_three_agents_share_a_hub(hub):
    """Rows sent at once: none is lost or doubled, every commit can be fetched, devices keep apart, baselines don't."""
    agents = [join(hub, "ada"), join(hub, "bob"), join(hub, "eve", GPU)]

    def work(agent, level):
        agent.add("keep", "baseline", level, level + 0.001, level - 0.002)
        for number in (1, 2, 3):
            agent.idea(f"idea {number} of {agent.name}", "keep", level - number / 1000)
            agent.idea(f"another one; {number}", "discard", level + number / 1000)
            agent.idea(f"a typo; {number}", "crash", 0)
            agent.hub("exchange")

    with ThreadPoolExecutor() as pool:
        list(pool.map(work, agents, (1.0, 1.02, 0.5)))

    # every row once
    results = published(hub)
    assert [line["row"] for line in results] == [*range(1, 13)] * 3
    assert [line["agent"] for line in results[::12]] == [agent.name for agent in agents]

    # every commit is there, on top of its parent and with its train.py
    names = [[line["commit"], f"{line['commit']}^", f"{line['commit']}:train.py"] for line in results]
    known = hub.git("rev-parse", *sum(names, [])).split()
    assert [full[:12] for full in known] == [line[key] for line in results for key in ("commit", "parent", "train")]
    assert set(hub.git("rev-list", "--all").split()) >= set(known[::3])
    for agent in agents:
        assert hub.git("rev-parse", "--short=7", f"autoresearch/{agent.name}").strip() == agent.head() == agent.kept

    # what each of them sees, with network and without; the untouched train.py is one, whoever ran it
    on_cpus = [("0.997000", "1"), ("0.998000", "1"), ("0.999000", "1"), ("1.009667", "6"), ("1.017000", "1")]
    on_gpu = [("0.497000", "1"), ("0.498000", "1"), ("0.499000", "1"), ("0.499667", "3")]
    for agent, frontier in zip(agents, (on_cpus, on_cpus, on_gpu)):
        agent.hub("exchange")
        assert [line[:2] for line in agent.frontier()] == [line[:2] for line in agent.frontier("exchange")] == frontier
    parent = hub.git("rev-parse", agents[1].kept).strip()
    children = [line for line in results if parent.startswith(line["parent"])]
    assert len(agents[0].hub("look", f"PARENT={parent}").splitlines()) == len(children) > 0
    assert len(agents[0].hub("look", "IDEA", "2 of").splitlines()) == 3
    agents[0].hub("say", "the latest")
    shown = agents[0].hub("look").splitlines()
    assert len(shown) == 20 and shown[-1].endswith("test/ada says: the latest")


def test_a_result_of_an_unknown_device_is_no_frontier(hub):
    ada = join(hub, "ada", device=None)
    ada.add("keep", "an old run", 0.5)
    assert "unknown before the first run" in ada.hub("exchange")
    ada.device = CPU
    ada.add("keep", "baseline", 1.0)
    assert ada.frontier("exchange") == [("1.000000", "1", ada.head(), "test/ada")]
    assert re.search(r" 0\.500000 keep, \w{7} on \w{7}, unknown device: an old run", ada.hub("look"))


def test_what_is_said_is_seen_before_the_run(hub):
    ada, bob = join(hub, "ada"), join(hub, "bob")
    words = 'A head of "two" layers, größer: 100% \\n $(x)'
    assert ada.hub("say", words) == f"noted: {words}\n"
    for word in ("A HEAD", "GRÖßER", '"two"', "\\n", ada.head()):
        assert f"test/ada says: {words}\n" in bob.hub("look", word)
    assert bob.hub("look", "a.head") == "nothing about a.head\n"


def test_a_night_comes_back_from_nothing(hub):
    ada = join(hub, "ada")
    ada.add("keep", "baseline", 1.0, 1.1)
    kept = ada.idea("deeper; expect +0.1", "keep", 0.9)
    lost = ada.idea("a typo", "crash", 0)
    ada.hub("exchange")
    rows, state = ada.ledger.read_text(), json.loads((ada.folder / "night.json").read_text())
    shutil.rmtree(ada.folder)

    ada = Member(hub, "ada")
    output = ada.hub(*ada.joining, "--until", "40")
    assert "autoresearch/test/ada is back from the hub, until 40" in output and "rows: 4" in output
    assert json.loads((ada.folder / "night.json").read_text()) == state | {"until": "40"}
    assert ada.head() == kept and ada.git("branch", "--show-current") == "autoresearch/test/ada"
    assert ada.git("log", "-1", "--format=%s", f"refs/tries/{lost}") == "a typo"
    assert ada.ledger.read_text() == rows

    # the ledger alone was lost; then nothing was
    ada.ledger.unlink()
    for _ in range(2):
        assert "is here already, until 40; the hub was fetched" in ada.hub(*ada.joining)
        assert ada.ledger.read_text() == rows

    # rows that move are not doubled: a ledger that was rebuilt from the journal lacks its crashes
    ada.ledger.write_text("".join(line for line in rows.splitlines(True) if "crash" not in line))
    ada.kept = kept
    ada.idea("wider", "discard", 0.95)
    ada.hub("exchange")
    ideas = ["baseline", "baseline", "deeper; expect +0.1", "a typo", "wider"]
    assert [line["description"].split(",")[0] for line in published(hub)] == ideas


def test_without_network_nothing_is_lost(hub, tmp_path):
    ada = join(hub, "ada")
    ada.add("keep", "baseline", 1.0)
    ada.hub("exchange")
    hub.folder.rename(tmp_path / "away")
    commit = ada.idea("deeper", "keep", 0.9)
    output = ada.hub("exchange")
    assert re.match(rf"{NOT_REACHED}fatal: .*; the next exchange sends it\nfrontier: ", output)
    assert ada.frontier()[0] == ("0.900000", "1", commit, "test/ada")
    for words in (["say", "hello?"], ada.joining):
        assert f"{NOT_REACHED}fatal: " in ada.hub(*words)
    assert "test/ada says: hello?" in ada.hub("look", "hello")
    (tmp_path / "away").rename(hub.folder)
    assert NOT_REACHED not in ada.hub("exchange")
    assert [line["commit"][:7] for line in published(hub)][1:] == [commit]
    assert "hello?" in join(hub, "bob").hub("look")


def test_a_push_that_others_come_before_is_sent_again(hub):
    ada, bob = join(hub, "ada"), join(hub, "bob")
    for agent in (ada, bob):
        agent.add("keep", "baseline", 1.0)

    # while ada pushes, for the first time, bob does
    exchange = shlex.join(["env", "-u", "GIT_DIR", sys.executable, "swarm/hub.py", "exchange"])
    trap = add_hook(ada.folder / ".git", "pre-push", f'rm "$0"\ncd {bob.folder} && {exchange} > /dev/null 2>&1')
    assert NOT_REACHED not in ada.hub("exchange") and not trap.exists()
    assert [line["agent"] for line in published(hub)] == ["test/ada", "test/bob"]

    # a hub that takes nothing is named
    add_hook(hub.folder, "pre-receive", "exit 1")
    assert re.match(rf"{NOT_REACHED}! .*pre-receive hook declined", ada.hub("say", "hello?"))


@pytest.fixture
def two(hub):
    """Ada, who has shared a good idea, and Bob, who has seen it: both agents and the hash."""
    ada, bob = join(hub, "ada"), join(hub, "bob")
    for agent in (ada, bob):
        agent.add("keep", "baseline", 1.0, 1.001, 0.999)
    good = ada.idea("deeper; expect +0.1", "keep", 0.8, 0.801)
    ada.hub("exchange")
    output = bob.hub("exchange")
    assert "test/ada: deeper; expect +0.1, seed 1; ahead of your last keep by 0.199500\n" in output
    assert output.endswith(f"next: uv run swarm/hub.py adopt {good}\n")
    return ada, bob, good


def test_build_on_the_best_of_another(two):
    ada, bob, good = two
    start = bob.head()
    output = bob.hub("adopt", good)
    subject = f"adopted {good} from test/ada: deeper; expect +0.199500"
    assert bob.git("log", "-1", "--format=%s") == output.splitlines()[0] == subject
    assert "train.py | 1 +" in output and output.endswith("next: AUTORESEARCH_SEED=1 uv run train.py > run.log 2>&1\n")
    assert bob.git("rev-parse", "--short=7", "HEAD^") == start
    assert bob.git("diff", good, "--", "train.py") == bob.git("status", "--porcelain") == ""
    assert "ahead" not in bob.hub()  # what is being tried is not proposed

    # its runs here are of the same pool; further ideas stand on top of it
    bob.add("discard", "adopted", 0.81)
    bob.add("keep", "adopted", 0.811)
    assert bob.frontier("exchange")[0] == ("0.805500", "4", good, "test/ada")
    better = bob.idea("wider", "keep", 0.7, 0.701)
    bob.hub("exchange")
    assert f"next: uv run swarm/hub.py adopt {better}" in ada.hub("exchange")
    ada.hub("adopt", better)
    assert ada.git("diff", better, "--", "train.py") == ""

    # what was tried here, and was worse, is decided
    ada.add("discard", "adopted", 0.9)
    ada.git("reset", "-q", "--keep", ada.kept)
    assert "next:" not in ada.hub("exchange")


def test_adopt_refuses(two):
    """Each with one line, and nothing is done."""
    ada, bob, good = two
    (ada.folder / "train.py").unlink()
    (ada.folder / "train.py").symlink_to("/etc/hostname")
    ada.git("commit", "-qam", "a link to a file outside")
    ada.add("keep", "a link", 0.7)
    ada.hub("exchange")
    bob.hub("exchange")
    start = bob.head()

    def refuses(name, reason):
        before = bob.git("status", "--porcelain")
        assert re.search(reason, bob.hub("adopt", name, code=1))
        assert (bob.head(), bob.git("status", "--porcelain")) == (start, before)

    refuses("f" * 12, "f names no result here")
    refuses(bob.git("rev-parse", "main"), "names no result here")
    refuses(start, "the same train.py as HEAD")
    refuses(ada.head(), "is not a file")
    hook = add_hook(bob.folder / ".git", "pre-commit", "echo error: never\nexit 1")
    refuses(good, "git refuses to commit it: error: never")
    hook.unlink()
    bob.edit((r"\Z", "# not now\n"))
    refuses(good, "no new idea starts now: commit it")
    assert "ahead" in bob.hub() and "next:" not in bob.hub()
    bob.git("checkout", "-q", "train.py")
    bob.hub("adopt", good)


def test_join_refuses(hub):
    ada = Member(hub, "ada")
    ada.edit((r"\Z", "# more\n"))
    assert "uncommitted changes" in ada.hub(*ada.joining, code=1)
    ada.git("checkout", "train.py")
    assert "no hub here" in ada.hub("look", code=1)
    elsewhere = ["join", f"{hub.folder}-typo", *ada.joining[2:]]
    assert f"{NOT_REACHED}fatal: " in ada.hub(*elsewhere, code=1)
    ada.hub(*ada.joining)
    assert f"the hub of this clone is {hub.folder}" in ada.hub(*elsewhere, code=1)
    ada.add("keep", "baseline", 1.0)
    assert "results.tsv has rows of another night" in ada.hub(*ada.joining[:-1], "bob", code=1)
    assert ada.git("branch", "--show-current") == "autoresearch/test/ada"


WRONG = {
    "invalid choice": ["push"],
    "required: --agent": ["join url --tag t"],
    "argument --tag: take letters": ["join url --tag a/b --agent a"],
    "argument --agent: take letters": ["join url --tag t --agent 'a b'", "join url --tag t --agent .."],
    "must be a url|required": ["join -- --upload-pack=x --tag t --agent a"],
    "7 to 40 digits": ["adopt abc123", "adopt HEAD"],
    "must be one line": ["say ' '", "say 'a\nb'", f"say {'a' * 501}", "say 'orders to a terminal: \x1b[2J'"],
}


@pytest.mark.parametrize("reason", WRONG)
def test_wrong_arguments(reason, capsys):
    for line in WRONG[reason]:
        with pytest.raises(SystemExit) as stopped:
            parse_arguments(shlex.split(line))
        output = capsys.readouterr().err
        assert stopped.value.code == 2 and re.search(reason, output) and output.count("\n") == 1


# --------------------------------------
# What others write

MESSAGE = {"time": "2026-11-28T01:02:03+00:00", "agent": "test/eve", "commit": "abcdef0"}
RESULT = MESSAGE | {"row": 1, "parent": "abcdef1", "train": "abcdef2", "benchmark": "local", "device": CPU}
RESULT |= {"val_bpb": 0.001, "memory_gb": 1, "status": "keep", "description": "the best ever"}
MESSAGE["say"] = "hello"
GARBAGE = ["", "7", "[{}]", "null", "time=2026 agent=test/eve row=1\tabcdef0\t0.1\t1.0\tkeep\tthe old format"]
GARBAGE += ["[" * (LONGEST_LINE - 1), json.dumps(MESSAGE | {"say": "a" * LONGEST_LINE})]
GARBAGE += [json.dumps(RESULT)[:-9], json.dumps(RESULT)[:-1] + ', "row": ' + "9" * 5000 + "}"]
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


def test_only_results_and_messages_are_read():
    for line in (MESSAGE, RESULT, RESULT | {"device": None}, RESULT | {"status": "crash", "val_bpb": None}):
        assert parse_line(json.dumps(line)) == line
    wrong = [RESULT | {key: value} for key, values in SPOILED.items() for value in values]
    for key in SPOILED:
        wrong.append(dict(RESULT))
        del wrong[-1][key]
    texts = GARBAGE + [json.dumps(line) for line in wrong]
    assert [text for text in texts if parse_line(text)] == []


def test_lines_in_any_encoding_harm_nobody(hub):
    """Bytes, line ends and surrogates in a note of the hub: what is right beside them is still read, and kept."""
    ada = join(hub, "ada")
    ada.add("keep", "baseline", 1.0)
    ada.hub("exchange")
    strange = json.dumps(MESSAGE | {"say": "x\u2028y\ud800\x1b[2J\nz"})
    raw = json.dumps(MESSAGE | {"say": "raw\u2028 in"}, ensure_ascii=False)
    other = json.dumps(RESULT | {"row": 2, "train": "abcdef3", "benchmark": "another"})
    lines = [text.encode() for text in (strange, json.dumps(RESULT), other, *GARBAGE)]

    # in the note that has her own lines, which are taken out; zeros in another one
    notes = {ada.kept: b"\n".join([b"{\xff}", *lines]), "main": raw.encode() + b"\n\xff\xfe\0{"}
    for commit, content in notes.items():
        (hub.folder / "note").write_bytes(content + b"\n")
        hub.git("notes", "--ref=results", "add", "-f", "-C", hub.git("hash-object", "-w", "note").strip(), commit)
    ada.hub("say", "mine")
    ada.idea("deeper", "keep", 0.9)
    assert [line[0] for line in ada.frontier("exchange")] == ["0.001000", "0.900000", "1.000000"]
    assert ada.hub("look", "2J").splitlines() == ["2026-11-28 01:02 test/eve says: x?y??[2J?z"]
    assert re.findall("says: (.*)", ada.hub("look", "says")) == ["raw? in", "x?y??[2J?z", "mine"]
    assert join(hub, "bob").hub("look", "deeper").count("\n") == 1
