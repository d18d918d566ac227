"""
Checks that what agents share through swarm/hub.py is not lost, doubled or mixed up, and not believed too much, on a
real bare repository. Their scores are made up: nothing trains here.
"""

import json
import math
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import Agent, add_benchmark, ask_no_torch, new_repository

from harness.common import append_lines, now
from night.record import LONGEST_LINE, parse_night
from swarm.share import UNKNOWN

CPU, GPU = "cpu x86_64 x2", "NVIDIA H100 80GB HBM3"
NOT_REACHED, PARTLY = "the hub was not reached: ", "not all was exchanged: "


@pytest.fixture
def hub(tmp_path, environment, monkeypatch):
    """A bare repository with a main branch, and a home with a benchmark for those who join."""
    home = tmp_path / "home"
    add_benchmark(home, "local")
    monkeypatch.setenv("AUTORESEARCH_HOME", str(home))
    environment = environment | {"AUTORESEARCH_HOME": str(home), "CXX": "git"}  # some program: nothing is compiled
    (tmp_path / "gitconfig").write_text((tmp_path / "gitconfig").read_text() + "[color]\ndiff = always\n")
    main = new_repository(tmp_path / "main", environment)
    ask_no_torch(main, CPU)
    Agent(main, environment).git("commit", "-qam", "torch is not asked")
    Agent(main, environment).git("clone", "-q", "--bare", ".", "../hub.git")
    return Agent(tmp_path / "hub.git", environment)


class Member(Agent):
    """An agent with a clone of the hub, whose runs are lines that it writes into its record."""

    def __init__(self, hub, name, device=CPU, folder=None):
        super().__init__(hub.folder.parent / (folder or name), hub.environment)
        hub.git("clone", "-q", ".", str(self.folder))
        self.name, self.device = f"test/{name}", device
        self.record = self.folder / ".git" / "autoresearch" / "test" / name / "record.jsonl"
        self.joining = ["join", str(hub.folder), "--tag", "test", "--agent", name]

    def join(self):
        output = self.hub(*self.joining, "--until", "never")
        self.kept = self.start = self.head()
        lines = self.record.read_text().replace(json.loads(self.record.read_text())["device"], self.device)
        self.record.write_text(lines)
        return output

    def hub(self, *words, code=0):
        """What `hub.py` prints; a failure, of code 1, is one line."""
        process = self.run("swarm/hub.py", *words)
        assert (process.returncode, len(process.stderr.splitlines())) == (code, code), process.stderr
        return process.stdout + process.stderr

    def git(self, *words):
        return super().git(*words).strip()

    def write(self, *lines):
        append_lines(self.record, lines)

    def add(self, status, description, *scores):
        """Runs of HEAD, with seeds from 1, and a decision."""
        commit, parent, train = self.git("rev-parse", "HEAD", "HEAD^", "HEAD:train.py").split()
        self.git("update-ref", f"refs/tries/{commit[:7]}", commit)
        for seed, score in enumerate(scores, 1):
            line = {"kind": "run", "run": f"{commit[:7]}-{score}", "time": now(), "commit": commit}
            line |= {"parent": parent, "train": train, "seed": seed, "device": self.device, "benchmark": "local"}
            line |= {"role": "baseline" if commit.startswith(self.start) else "idea", "description": description}
            ended = {"state": "scored", "val_bpb": score, "memory_gb": 2.5} if score else {"state": "crash"}
            self.write(line | ended)
        if not commit.startswith(self.start):
            self.write({"kind": "decision", "commit": commit, "decision": status, "by": "hand"})
        if status == "keep":
            self.kept = commit[:7]

    def idea(self, description, status, *scores):
        """A commit with its runs; back at the last keep, if it is none. Returns its hash."""
        self.edit((r"\Z", f"# {description}\n"))
        self.git("commit", "-qm", description, "--", "train.py")
        commit = self.head()
        self.add(status, description, *scores)
        self.git("reset", "-q", "--keep", self.kept)
        return commit

    def frontier(self, *command):
        return re.findall(r"^  (\S+), runs (\d+), (\w{7}), (\S+): ", self.hub(*command), re.M)


def join(hub, name, *scores, device=CPU):
    """A new agent, whose baseline has these scores."""
    agent = Member(hub, name, device)
    agent.join()
    agent.add("keep", "baseline", *scores)
    return agent


def published(hub, agent, top="refs"):
    """The runs in the record of an agent on the hub."""
    lines = [json.loads(line) for line in hub.git("show", f"{top}/results/{agent}:record.jsonl").splitlines()]
    return [line for line in lines if line["kind"] == "run"]


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
    agents = [join(hub, "ada"), join(hub, "bob"), join(hub, "eve", device=GPU)]

    def work(agent, level):
        agent.add("keep", "baseline", level, level + 0.001, level - 0.002)
        for number in (1, 2, 3):
            agent.idea(f"idea {number} of {agent.name}", "keep", level - number / 1000)
            agent.idea(f"another one; {number}", "discard", level + number / 1000)
            agent.idea(f"a typo; {number}", "crash", 0)
            agent.hub("exchange")

    with ThreadPoolExecutor() as pool:
        list(pool.map(work, agents, (1.0, 1.02, 0.5)))

    # the record of each is there as it is, and every commit, on top of its parent and with its train.py
    results = [line for agent in agents for line in published(hub, agent.name)]
    assert len(results) == 36
    for agent in agents:
        assert hub.git("show", f"refs/results/{agent.name}:record.jsonl") == agent.record.read_text()
    names = [[line["commit"], f"{line['commit']}^", f"{line['commit']}:train.py"] for line in results]
    known = hub.git("rev-parse", *sum(names, [])).split()
    assert known == [line[key] for line in results for key in ("commit", "parent", "train")]
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


def test_what_is_said_is_seen_before_the_run(hub):
    ada, bob = join(hub, "ada"), join(hub, "bob")
    assert ada.hub("look") == "nothing yet\n"
    words = 'A head of "two" layers, größer: 100% \\n $(x)'
    assert ada.hub("say", words) == f"noted: {words}\n"
    for word in ("A HEAD", "GRÖßER", '"two"', "\\n", ada.head()):
        assert f"test/ada says: {words}\n" in bob.hub("look", word)
    assert bob.hub("look", "a.head") == "nothing about a.head\n"


HEADS_ONLY = 'while read old new ref; do case $ref in refs/heads/*) ;; *) echo "no $ref" >&2; exit 1 ;; esac; done'


@pytest.mark.parametrize("top", ["refs", "refs/heads"])
def test_a_night_comes_back_from_nothing(hub, top):
    """With its crashes, hand decisions, messages and end; also from a hub that takes branches only."""
    if top == "refs/heads":
        add_hook(hub.folder, "pre-receive", HEADS_ONLY)
    ada = join(hub, "ada", 1.0, 1.1)
    kept = ada.idea("deeper; expect +0.1", "keep", 0.9)
    lost = ada.idea("a typo", "crash", 0)
    ada.ledger("until", "40")
    ada.hub("say", "wider next")
    record, rows, status = ada.record.read_text(), ada.rows(), ada.ledger()
    assert "until 40 rows" in status and len(rows) == 5
    shutil.rmtree(ada.folder)

    ada = Member(hub, "ada")
    output = ada.hub(*ada.joining, "--until", "7")
    assert "autoresearch/test/ada is back from the hub\nit lasts until 40 rows; runs: 4\n" in output
    assert ada.record.read_text() == record and ada.rows() == rows and ada.ledger() == status
    assert ada.head() == kept and ada.git("branch", "--show-current") == "autoresearch/test/ada"
    assert ada.git("log", "-1", "--format=%s", f"refs/tries/{lost}") == "a typo"

    # the record alone was lost; then nothing was; then another branch was checked out
    ada.record.unlink()
    for _ in range(2):
        assert "is here already; the hub was fetched\nit lasts until 40 rows; runs: 4\n" in ada.hub(*ada.joining)
        assert ada.record.read_text() == record
        ada.git("checkout", "-q", "main")
    ada.hub(*ada.joining)

    # it goes on from there
    ada.kept, ada.start = kept, ""
    ada.idea("wider", "discard", 0.95)
    ada.hub("exchange")
    ideas = ["baseline", "baseline", "deeper; expect +0.1", "a typo", "wider"]
    assert [line["description"] for line in published(hub, "test/ada", top)] == ideas

    # and others find all of it
    bob = join(hub, "bob", 1.0, 1.001, 0.999)
    assert bob.frontier("exchange")[0] == ("0.900000", "1", kept, "test/ada")
    assert bob.git("log", "-1", "--format=%s", lost) == "a typo"


def test_join_that_was_killed_is_said_again(hub, tmp_path):
    """Between any two of its steps: the record comes before the branch."""
    ada = join(hub, "ada", 1.0)
    ada.hub("exchange")
    record = ada.record.read_text()
    real = "real = share.call_git; "
    checkout = "lambda *words, **options: os._exit(9) if words[0] == 'checkout' else real(*words, **options)"
    steps = {"restore_record": "", "call_git": checkout, "try_to_send": ""}
    for number, (step, kill) in enumerate(steps.items()):
        again = Member(hub, "ada", folder=f"again-{number}")
        code = f"import swarm.share as share, os; {real}share.{step} = {kill or 'lambda *words: os._exit(9)'}\n"
        code += f"share.join({str(hub.folder)!r}, 'test/ada', None)"
        assert again.run("-c", code).returncode == 9
        again.run("ledger.py")  # a look by somebody else, wherever this clone has come to
        assert "lasts until never; runs: 1" in again.hub(*again.joining)
        assert again.record.read_text() == record
        again.hub("exchange")


def test_a_name_that_somebody_took_brings_no_code(hub):
    ada = join(hub, "ada", 1.0)
    ada.edit((r"\Z", "# not yours\n"), file="prepare.py")
    ada.git("commit", "-qam", "a harness of another's")
    ada.record.write_text(ada.record.read_text().replace(ada.git("rev-parse", "HEAD^"), ada.git("rev-parse", "HEAD")))
    ada.hub("exchange")
    new = Member(hub, "ada", folder="new")
    assert "differs from this clone in prepare.py, and not in train.py alone" in new.hub(*new.joining, code=1)
    assert new.git("branch", "--show-current") == "main"


def test_one_bad_ref_on_the_hub_stops_nobody_from_sending(hub):
    ada = join(hub, "ada")

    # its path just fits there, and not in a clone
    room = 4095 - len(f"{hub.folder}/refs/heads/.lock")
    parts = ["x" * 200] * (room // 201)
    rest = "x" * (room - 201 * len(parts) - 2)
    hub.git("update-ref", f"refs/heads/{'/'.join(filter(None, [*parts, rest]))}", "main")
    ada.add("keep", "baseline", 1.0)
    assert PARTLY in ada.hub("exchange")
    assert len(published(hub, "test/ada")) == 1


def test_a_hub_that_takes_no_branch_back(hub):
    """As `git init --bare --shared` makes them: an exchange on an idea, and one after the reset."""
    hub.git("config", "receive.denyNonFastForwards", "true")
    ada = join(hub, "ada", 1.0)
    ada.edit((r"\Z", "# an idea\n"))
    ada.git("commit", "-qam", "an idea")
    ada.add("discard", "an idea", 1.1)
    ada.hub("exchange")
    ada.git("reset", "-q", "--keep", ada.kept)
    ada.idea("deeper", "keep", 0.9)
    assert PARTLY not in ada.hub("exchange")
    assert hub.git("rev-parse", "--short=7", "autoresearch/test/ada").strip() == ada.kept


def test_two_clones_with_one_name(hub):
    """The second one finds the night of the first; when both go on, nobody's results are overwritten."""
    first = join(hub, "ada", 1.0)
    first.hub("exchange")
    second = Member(hub, "ada2")
    second.joining, second.name = first.joining, first.name
    second.kept = second.start = first.start
    second.record = second.folder / ".git" / "autoresearch" / "test" / "ada" / "record.jsonl"
    assert "is back from the hub" in second.hub(*second.joining)
    for agent in (first, second):
        agent.idea(f"of {agent.folder.name}", "discard", 1.1)
    first.hub("exchange")
    said = second.hub("exchange", code=1)
    assert "another clone has sent results as test/ada: join from here under another name" in said
    assert [line["description"] for line in published(hub, "test/ada")] == ["baseline", "of ada"]


def test_two_agents_in_worktrees_of_one_repository(hub):
    ada = join(hub, "ada")
    ada.git("worktree", "add", "-q", "--detach", str(hub.folder.parent / "bob"), "main")
    bob = object.__new__(Member)
    vars(bob).update(vars(ada) | {"folder": hub.folder.parent / "bob", "name": "test/bob"})
    bob.record = ada.record.parent.with_name("bob") / "record.jsonl"
    bob.joining = [*ada.joining[:-1], "bob"]
    bob.join()
    for agent in (ada, bob):
        agent.add("keep", "baseline", 1.0)
        agent.hub("exchange")
    assert [len(published(hub, agent.name)) for agent in (ada, bob)] == [1, 1]
    assert ada.frontier("exchange") == bob.frontier() and ada.frontier()[0][:2] == ("1.000000", "2")


def test_without_network_nothing_is_lost(hub, tmp_path):
    ada = join(hub, "ada", 1.0)
    ada.hub("exchange")
    hub.folder.rename(tmp_path / "away")
    commit = ada.idea("deeper", "keep", 0.9)
    output = ada.hub("exchange")
    assert re.match(rf"{PARTLY}fatal: .*; the next exchange goes on\nfrontier: ", output)
    assert ada.frontier()[0] == ("0.900000", "1", commit, "test/ada")
    assert f"{PARTLY}fatal: " in ada.hub("say", "hello?")
    assert f"{NOT_REACHED}fatal: " in ada.hub(*ada.joining)
    assert "test/ada says: hello?" in ada.hub("look", "hello")
    (tmp_path / "away").rename(hub.folder)
    record = ada.record.read_text()
    ada.record.unlink()  # what was not sent yet comes back, too: the own ref has it
    ada.hub(*ada.joining)
    assert ada.record.read_text() == record and PARTLY not in ada.hub("exchange")
    assert [line["commit"][:7] for line in published(hub, "test/ada")][1:] == [commit]
    assert "hello?" in join(hub, "bob").hub("look")


def test_what_is_proposed_can_be_adopted(hub):
    """Not what nobody has, nor what is another train.py than it says."""
    ada, eve = join(hub, "ada"), join(hub, "eve")
    for agent in (ada, eve):
        agent.add("keep", "baseline", 1.0, 1.001, 0.999)
    good = eve.idea("deeper", "keep", 0.9)
    commit, train = eve.git("rev-parse", good, "main:program.md").split()
    for number, (name, blob) in enumerate((("e" * 40, "d" * 40), (commit, train))):
        lie = {"run": f"lie-{number}", "commit": name, "train": blob, "role": "idea", "val_bpb": 0.1}
        eve.write(RESULT | lie, {"kind": "decision", "commit": name, "decision": "keep", "by": "hand"})
    eve.hub("exchange")
    output = ada.hub("exchange")
    assert f"next: uv run swarm/hub.py adopt {good}" in output and output.count("ahead of your last keep") == 1


@pytest.fixture
def two(hub):
    """Ada, who has shared a good idea, and Bob, who has seen it: both agents and the hash."""
    ada, bob = (join(hub, name, 1.0, 1.001, 0.999) for name in ("ada", "bob"))
    good = ada.idea("deeper; expect +0.1", "keep", 0.8, 0.801)
    ada.hub("exchange")
    output = bob.hub("exchange")
    assert "test/ada: deeper; expect +0.1; ahead of your last keep by 0.199500\n" in output
    assert output.endswith(f"next: uv run swarm/hub.py adopt {good}\n")
    return ada, bob, good


def test_build_on_the_best_of_another(two):
    ada, bob, good = two
    start = bob.head()
    output = bob.hub("adopt", good)
    subject = f"adopted {good} from test/ada: deeper; expect +0.199500"
    assert bob.git("log", "-1", "--format=%s") == output.splitlines()[0] == subject
    assert "train.py | 1 +" in output and output.endswith("next: uv run ledger.py run\n")
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

    refuses("f" * 12, "f names no run here")
    refuses(bob.git("rev-parse", "main"), "names no run here")
    refuses(start, "the same train.py as HEAD")
    refuses(ada.head(), "is not a file")
    hook = add_hook(bob.folder / ".git", "pre-commit", "echo error: never\nexit 1")
    refuses(good, "git refuses to commit it: error: never")
    hook.unlink()
    bob.edit((r"\Z", "# not now\n"))
    refuses(good, "no new idea starts now: ")
    assert "ahead" in bob.hub() and "next:" not in bob.hub()
    bob.git("checkout", "-q", "train.py")
    bob.hub("adopt", good)


def test_a_hub_that_takes_nothing_says_so_when_one_joins(hub):
    add_hook(hub.folder, "pre-receive", "exit 1")
    ada = Member(hub, "ada")
    output = ada.join()
    assert re.search(r"the hub does not take what exchange sends: ! .*declined.*; its owner has to allow", output)
    assert output.count("next: uv run ledger.py run") == 1
    assert re.match(rf"{PARTLY}! .*pre-receive hook declined", ada.hub("say", "hello?"))


def test_a_shallow_clone_is_told_how_to_join(hub):
    ada = Member(hub, "ada")
    shutil.rmtree(ada.folder)
    hub.git("config", "receive.shallowUpdate", "false")
    main = hub.folder.parent / "main"
    hub.git("clone", "-q", "--depth", "1", f"file://{main}", str(ada.folder))
    bare = hub.folder.parent / "empty.git"
    hub.git("init", "-q", "--bare", str(bare))
    ada.joining[1] = str(bare)
    assert "this clone is shallow: git fetch --unshallow, and join again" in ada.join()
    ada.git("fetch", "-q", "--unshallow")
    assert "does not take" not in ada.hub(*ada.joining)
    assert PARTLY not in ada.hub("exchange")


def test_a_hub_with_hashes_of_64_digits(request, environment):
    environment["GIT_DEFAULT_HASH"] = "sha256"
    test_build_on_the_best_of_another(request.getfixturevalue("two"))
    assert len(request.getfixturevalue("two")[0].git("rev-parse", "HEAD")) == 64


def test_join_refuses(hub):
    ada = Member(hub, "ada")
    ada.edit((r"\Z", "# more\n"))
    assert "uncommitted changes" in ada.hub(*ada.joining, "--until", "9", code=1)
    ada.git("checkout", "train.py")
    assert "no hub here" in ada.hub("look", code=1)
    elsewhere = ["join", f"{hub.folder}-typo", *ada.joining[2:]]
    assert f"{NOT_REACHED}fatal: " in ada.hub(*elsewhere, code=1)
    assert "say when it ends, with --until" in ada.hub(*ada.joining, code=1)
    ada.join()
    assert f"the hub of this clone is {hub.folder}" in ada.hub(*elsewhere, code=1)
    assert ada.git("branch", "--show-current") == "autoresearch/test/ada"
    ada.git("checkout", "-q", "main")
    assert ada.run("ledger.py", "start", "alone", "--until", "never").returncode == 0
    assert "alone is on no hub: join one" in ada.hub("exchange", code=1)


# --------------------------------------
# What others write

EVE = "e" * 40
START = {"kind": "start", "until": "never", "commit": EVE, "benchmark": "local", "device": CPU}
MESSAGE = {"kind": "say", "time": "2026-11-28T01:02:03+00:00", "message": "hello", "commit": EVE}
RESULT = {"kind": "run", "time": "2026-11-28T01:02:03+00:00", "run": "x", "commit": EVE, "parent": "d" * 40}
RESULT |= {"role": "baseline", "seed": 1, "train": "c" * 40, "benchmark": "local", "device": CPU}
RESULT |= {"state": "scored", "val_bpb": 0.001, "memory_gb": 1, "description": "the best ever"}
GARBAGE = ["", "7", "[{}]", "null", "commit\tval_bpb", "[" * (LONGEST_LINE - 1), "9" * 5000]
GARBAGE += [json.dumps(MESSAGE | {"message": "a" * 1_000_000}), json.dumps(RESULT)[:-9]]
GARBAGE += [json.dumps(RESULT)[:-1] + ', "seed": ' + "9" * 5000 + "}"]
SPOILED = {
    "commit": ["HEAD", "abc", "--help", f"{EVE}\n", 7, None],
    "parent": [None, "HEAD^"],
    "train": [None, "x", {}],
    "run": [None, 7, []],
    "seed": ["1", 1.5, None],
    "role": ["best", None],
    "state": ["best", None, ["scored"]],
    "val_bpb": [0, -1, "0.5", None, math.nan, math.inf, 10**400, []],
    "memory_gb": ["1", None, math.nan, 10**400],
    "description": [None, 7],
    "benchmark": [None, 7],
    "device": [7, ["cpu"], None],
    "time": [None, 7],
}


def test_what_others_say_is_on_one_line_and_of_this_world():
    night = parse(json.dumps(START | {"device": "x\x1b[2J\ny"}), json.dumps(RESULT | {"reason": "no\nnext: rm\x07"}))
    assert night.device == "x?[2J y" and next(iter(night.runs.values())).reason == "no next: rm?"
    for until in ("9" * 5000, "soon", ""):
        assert parse(json.dumps(START | {"until": until})).until == "never"


def parse(*lines):
    return parse_night("test/eve", "".join(f"{line}\n" for line in lines), lambda: UNKNOWN)


def test_only_runs_and_messages_are_read():
    night = parse(*map(json.dumps, (START, RESULT, MESSAGE, {"kind": "of a later version"})))
    assert (len(night.runs), len(night.messages), night.unreadable) == (1, 1, 0)
    wrong = [RESULT | {key: value} for key, values in SPOILED.items() for value in values]
    texts = [json.dumps(line) for line in wrong] + GARBAGE[1:]
    for text in texts:
        night = parse(json.dumps(START), text)
        assert (len(night.runs), night.unreadable) == (0, 1), text[:200]
    for first in (*GARBAGE[1:], json.dumps(START | {"commit": "x"}), json.dumps(START | {"benchmark": []})):
        assert parse(first).benchmark == ""


def test_records_in_any_state_harm_nobody(hub):
    """Bytes, line ends and surrogates in the records of others: what is right beside them is still read."""
    ada = join(hub, "ada", 1.0)
    ada.hub("exchange")
    strange = json.dumps(MESSAGE | {"message": "x\u2028y\ud800\x1b[2J\nz"})
    raw = json.dumps(MESSAGE | {"message": "raw\u2028 in"}, ensure_ascii=False)
    mine = json.dumps(RESULT | {"run": "y", "agent": "test/ada", "description": "in another's name", "val_bpb": 0.5})
    lines = [text.encode() for text in (json.dumps(START), strange, json.dumps(RESULT), mine, *GARBAGE)]
    records = {"eve": b"\n".join([*lines, b"{\xff}"]), "mallory": raw.encode() + b"\n\xff\xfe\0{\n" + raw.encode()}
    for name, content in records.items():
        (hub.folder / "strange").write_bytes(content)
        blob = hub.git("hash-object", "-w", "--no-filters", "strange").strip()
        tree = hub.git("mktree", input=f"100644 blob {blob}\trecord.jsonl\n").strip()
        hub.git("update-ref", f"refs/results/test/{name}", hub.git("commit-tree", tree, "-m", name).strip())
    hub.git("update-ref", "refs/results/test/noise", "main")
    hub.git("update-ref", "refs/results/too/many/names", "main")
    ada.hub("say", "mine")
    ada.idea("deeper", "keep", 0.9)
    expected = [("0.250500", "2", "test/eve"), ("0.900000", "1", "test/ada"), ("1.000000", "1", "test/ada")]
    output = ada.hub("exchange")
    assert re.findall(r"^  (\S+), runs (\d+), \w{7}, (\S+):", output, re.M) == expected
    assert re.search(r"^\d+ lines in the records of others cannot be read, and do not count$", output, re.M)
    assert ada.hub("look", "2J").splitlines() == ["2026-11-28 01:02 test/eve says: x y??[2J z"]
    assert "test/eve 0.500000 keep, eeeeeee on ddddddd, cpu x86_64 x2: in another's name" in ada.hub("look", "another")
    assert sorted(re.findall("says: (.*)", ada.hub("look", "says"))) == ["mine", "raw  in", "x y??[2J z"]
    assert join(hub, "bob").hub("look", "deeper").count("\n") == 1
