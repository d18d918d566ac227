"""
Checks that the trainings of a wave are sent, judged and recorded once each: one story on a real Ray cluster of two
nodes, the rest without Ray.
"""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import LINE, SYNC, TRAIN, Agent, ask_no_torch, free_ports, new_repository, refused, replace, wait_for

import prepare
from harness import common
from harness.journal import read_journal
from night.record import recording
from night.rules import needed_on_cluster
from night.state import Checkout, Night
from night.steps import WAVE_RUN
from swarm import cluster, wave

# --------------------------------------
# Requests

PROXIES = {
    "none": ({}, "127.0.0.1"),
    "some": ({"NO_PROXY": "a.org"}, "a.org,127.0.0.1"),
    "lower case goes first": ({"no_proxy": "b.org", "NO_PROXY": "a.org"}, "b.org,127.0.0.1"),
}


@pytest.mark.cluster
@pytest.mark.parametrize("before, after", PROXIES.values(), ids=PROXIES)
def test_requests_take_no_proxy(before, after, monkeypatch):
    pytest.importorskip("ray", reason="needs the dependency group `cluster`")
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    environment = {"http_proxy": "http://127.0.0.1:1", cluster.ADDRESS: address, **before}
    monkeypatch.setattr(os, "environ", environment)
    assert re.search("does not answer: .*ray start --head`, then `export", refused(cluster.connect))
    assert environment["no_proxy"] == environment["NO_PROXY"] == after


@pytest.mark.cluster
def test_errors_of_the_cluster(monkeypatch):
    pytest.importorskip("ray", reason="needs the dependency group `cluster`")
    monkeypatch.setenv(cluster.ADDRESS, "http://a")
    words = "status code 500: Traceback (most recent call last):\n  File a\nValueError: too large\n."
    with pytest.raises(SystemExit, match="http://a does not answer: ValueError: too large; where"), cluster.asking():
        raise RuntimeError(words)


def test_the_cluster_has_to_be_named(monkeypatch):
    monkeypatch.delenv(cluster.ADDRESS, raising=False)
    assert "ray start --head`, then `export RAY_API_SERVER_ADDRESS=http" in refused(cluster.connect)
    monkeypatch.setenv(cluster.ADDRESS, "10.0.0.5")
    assert "must be like http" in refused(cluster.connect)


def node(ip, **resources):
    resources = {name.replace("kind_", cluster.KIND): amount for name, amount in resources.items()}
    return SimpleNamespace(node_ip=ip, resources_total=resources)


H100, H200 = node("a", CPU=16, GPU=8, kind_H100=1), node("b", CPU=16, GPU=8, kind_H200=1)
H20, LOGIN, SMALL = node("c", CPU=16, GPU=8, kind_H20=1), node("d", CPU=8), node("e", CPU=2)
ONE_CPU, ONE_GPU = {"entrypoint_num_cpus": 1}, {"entrypoint_num_gpus": 1}
ONE_H200 = ONE_GPU | {"entrypoint_resources": {"accelerator_type:H200": 0.001}}
SLOTS = {  # nodes, device of the night, what is wanted -> what a training takes, the nodes that are not used
    "CPUs": ([LOGIN, SMALL, node("f")], "cpu", {}, {"entrypoint_num_cpus": 2}, ""),
    "wanted": ([LOGIN, SMALL], "cpu", {"entrypoint_num_cpus": 8}, {"entrypoint_num_cpus": 8}, ""),
    "GPUs": ([LOGIN, H100], "NVIDIA H100 80GB HBM3", {}, ONE_GPU, ""),
    "two kinds": ([H100, H20, H200], "NVIDIA H200", {}, ONE_H200, "H200: a, c"),
    "two kinds, neither is known": ([H100, H20], "", {}, ONE_GPU, ""),
    "two kinds, CPUs are wanted": ([H100, H20], "NVIDIA H20", ONE_CPU, ONE_CPU, ""),
}


@pytest.mark.parametrize("name", SLOTS)
def test_what_a_training_takes(name, capsys):
    nodes, device, wanted, slot, others = SLOTS[name]
    assert cluster.choose_slot(nodes, device, wanted) == slot
    assert others in capsys.readouterr().out


END = {"exit": 0, "ended": None, "scored": {"val_bpb": 1.0}}
SCORED = f"RESULT {json.dumps(END)}"
ENDS = {  # exit code, log -> how it ended, what is saved of the log
    "scored": (0, f"Running\nval_bpb: 1\n\n{SCORED}\n", END, "Running\nval_bpb: 1\n"),
    "the training prints the word": (0, f"RESULT none\n{SCORED}", END, "RESULT none"),
    "no network": (1, "uv: no network\n", "its node was not ready: uv: no network", "uv: no network\n"),
    "no python": (127, "", "its node was not ready: no output", ""),
    "node": (None, None, "its node went: it died", None),
    "torn": (0, 'Running\n\nRESULT {"exit": 0, "sco', "its last line, the result, was torn", "Running\n"),
    "words after it": (0, f"Running\n{SCORED}\nError", END, "Running"),
    "ended by Ray": (-15, "Running\n", "its node went: it died", "Running\n"),
}


@pytest.mark.cluster
@pytest.mark.parametrize("name", ENDS)
def test_ends_of_jobs(name, tmp_path):
    pytest.importorskip("ray", reason="needs the dependency group `cluster`")
    code, log, end, saved = ENDS[name]
    client = SimpleNamespace(get_job_logs=lambda job: log)
    job = SimpleNamespace(submission_id="job", driver_exit_code=code, message="it died\nand more")
    if isinstance(end, str):
        end = {"exit": None, "lost": end}
    assert wave.read_end(client, job, tmp_path / "log") == end
    assert saved is None or (tmp_path / "log").read_text() == saved


# --------------------------------------
# A night whose trainings are scripts


class Sender(Agent):
    """A repository on the branch of a night, with its own home."""

    def __init__(self, folder, environment):
        super().__init__(folder, environment)
        self.home = Path(environment["AUTORESEARCH_HOME"])
        self.place = folder / ".git" / "autoresearch" / "night"

    def wave(self, *words, code=0):
        return self.python("swarm/wave.py", *words, code=code)

    def idea(self, name, *edits):
        """A commit in a worktree of its own: its hash."""
        assert f"next: edit wave/{name}/train.py; " in self.wave("new", name)
        self.edit(*edits, file=f"wave/{name}/train.py")
        assert WAVE_RUN in self.wave("commit", name, f"the {name} one; expect 0")
        return self.git("-C", f"wave/{name}", "rev-parse", "HEAD").strip()

    def states(self, commit):
        """State and seed of each of its runs."""
        return [f"{run['state']} {run['seed']}" for run in self.night()["runs"] if run["commit"] == commit]

    def jobs(self):
        return sorted(self.place.glob("jobs/*.json"))


@pytest.fixture
def sender(environment, prepared, tmp_path):
    replace(tmp_path / "bin" / "uv", (r"\A#!/bin/sh\n", SYNC))
    home = tmp_path / "home"
    shutil.copytree(prepare.HOME / prepared, home / prepared, ignore=lambda *_: ["journal.jsonl", "best.pt"])
    (home / "current").write_text(prepared)
    environment |= {"AUTORESEARCH_HOME": str(home), "http_proxy": "http://127.0.0.1:1"}  # there is none
    sender = Sender(new_repository(tmp_path / "a clone", environment), environment)
    (sender.folder / "train.py").write_text(TRAIN)
    (sender.folder / "pyproject.toml").write_text("")
    sender.edit(("^BASELINE_SEEDS = .*", "BASELINE_SEEDS = (1, 2)"), file="night/rules.py")
    ask_no_torch(sender.folder, LINE["device"])
    sender.git("add", "-A")
    sender.git("commit", "-qm", "scripts")
    environment[cluster.ADDRESS] = "http://127.0.0.1:1"
    sender.ledger("start", "night", "--until", "never")
    return sender


def test_worktrees(sender):
    kept = sender.head()
    assert f"wave/deeper is on the last keep, {kept}" in sender.wave("new", "deeper")
    assert "wave/deeper exists" in sender.wave("new", "deeper", code=1)
    assert "there is no wave/wider" in sender.wave("commit", "wider", "an idea", code=1)
    assert "wave/deeper/train.py has no changes" in sender.wave("commit", "deeper", "an idea", code=1)

    # only its train.py is committed, and sent
    sender.edit((r"\Z", "# deeper\n"), file="wave/deeper/train.py")
    (sender.folder / "wave" / "deeper" / "ledger.py").write_text("")
    sender.wave("commit", "deeper", "an idea")
    assert sender.git("-C", "wave/deeper", "show", "--format=%s", "--name-only") == "an idea\n\ntrain.py\n"
    assert "next: " + WAVE_RUN in sender.ledger()
    assert "an idea in a worktree needs a run" in sender.ledger()

    # what has changes stays; nothing is forgotten
    commit = sender.git("-C", "wave/deeper", "rev-parse", "HEAD").strip()
    sender.wave("new", "wider")
    assert "wave/deeper stays: it has changes" in sender.wave("clean")
    assert [path.name for path in (sender.folder / "wave").iterdir()] == ["deeper"]
    sender.git("-C", "wave/deeper", "checkout", "-q", "--", "ledger.py")
    sender.wave("clean")
    assert not list((sender.folder / "wave").iterdir())
    assert commit in sender.git("for-each-ref", "--format=%(objectname)", "refs/tries")
    assert WAVE_RUN in sender.ledger("run", code=1)  # this night trains on a cluster


def job_file(sender, commit, seed, **values):
    """As wave.py writes it before it sends a job, and `exit` when that has ended."""
    state = {"run": f"{commit[:7]}-{seed}-x", "commit": commit, "seed": seed, "role": "idea", "job": f"job-{seed}"}
    state |= {"benchmark": sender.night()["benchmark"], "host": "another", "folder": "/another", "log": "/gone"}
    (sender.place / "jobs").mkdir(exist_ok=True)
    path = sender.place / "jobs" / f"{state['run']}.json"
    path.write_text(json.dumps(state | values))
    return state | values


def scored_job(sender, commit, seed, score):
    """A job that has ended with a score, and its line in the journal, as collect() leaves them."""
    state = job_file(sender, commit, seed, exit=0)
    line = LINE | {"run": state["run"], "commit": commit, "seed": seed, "val_bpb": score}
    common.append_lines(sender.home / state["benchmark"] / "journal.jsonl", [line])


def test_jobs_are_recorded_by_any_command(sender, monkeypatch):
    """Also after the clone was moved; a score out of all range is a crash, and a file that was torn is none."""
    commit = sender.idea("wider", (r"\Z", "# wider\n"))

    # a job is out until then: of two `wave.py run` at once the other one may not have seen the result
    monkeypatch.setattr(common, "ROOT", sender.folder)
    monkeypatch.setenv(cluster.ADDRESS, "http://127.0.0.1:1")
    for is_needed in (True, False):
        with recording("night") as (night, _):
            assert (commit in [training.commit for training in needed_on_cluster(night)]) == is_needed
        if is_needed:
            scored_job(sender, commit, 1, 0.9)
    scored_job(sender, commit, 2, 2000.0)
    job_file(sender, commit, 3, exit=1)
    for number, content in enumerate((b"", b"{", b"[]", b"{}", b"\xff\xfe")):
        (sender.place / "jobs" / f"torn-{number}.json").write_bytes(content)
    assert sender.states(commit) == ["scored 1", "crash 2", "crash 3"]
    reasons = [run["reason"] for run in sender.night()["runs"]]
    assert reasons == ["", "val_bpb 2000 is out of range", "exit code 1:"]
    assert len(sender.jobs()) == 5 and len(sender.night()["runs"]) == 3


@pytest.mark.cluster
def test_a_job_that_never_began_is_sent_anew(sender):
    """Ray ends those that wait for fifteen minutes: that is no run."""
    pytest.importorskip("ray", reason="needs the dependency group `cluster`")
    commit = sender.idea("wider", (r"\Z", "# wider\n"))
    job_file(sender, commit, 1)
    ended = SimpleNamespace(is_terminal=lambda: True)
    job = SimpleNamespace(submission_id="job-1", status=ended, driver_node_id=None, driver_exit_code=None, message="")
    wave.collect(SimpleNamespace(list_jobs=lambda: [job]), sender.place)
    assert sender.jobs() == [] and sender.states(commit) == []


def test_what_is_not_decided_stays(sender):
    """Whichever commit of a worktree it is, and whoever's night."""
    first = sender.idea("chain", (r"\Z", "# first\n"))
    job_file(sender, first, 1)
    sender.edit((r"\Z", "# second\n"), file="wave/chain/train.py")
    sender.wave("commit", "chain", "on top")
    assert f"wave/chain stays: {first[:7]} is not decided yet" in sender.wave("clean")
    sender.git("checkout", "-q", "main")
    sender.ledger("start", "second", "--until", "never")
    sender.wave("clean")
    assert (sender.folder / "wave" / "chain").exists()

    # a worktree that git cannot read, as after the clone was moved
    sender.git("checkout", "-q", "autoresearch/night")
    scored_job(sender, first, 1, 0.9)
    pointer = sender.folder / "wave" / "chain" / ".git"
    content = pointer.read_text()
    pointer.write_text("gitdir: /gone\n")
    said = sender.ledger()
    assert "warning: wave/chain cannot be read, git rev-list: fatal: not a git repository" in said
    pointer.write_text(content)
    assert sender.night()["decisions"] == [] and sender.states(first) == ["scored 1"]


def test_an_idea_that_is_not_on_the_last_keep_is_named():
    night = Night(worktrees={"old": Checkout(("0" * 40, "1" * 40))})
    night.add({"kind": "decision", "commit": "2" * 40, "decision": "keep", "by": "hand"})
    words = "wave/old is not on the last keep, or changes more than train.py: make its idea in a new worktree"
    assert wave.problems_of_worktrees(night) == [words]


@pytest.mark.story
@pytest.mark.cluster
def test_a_wave(sender, ray):
    """
    Two ideas that are better, and a slip. The second node goes in mid-job, `wave.py run` is killed, Ray is started
    anew: nothing is lost or run twice.
    """
    start = sender.git("rev-parse", "HEAD").strip()
    good = sender.idea("good", ("^SCORE = .*", "SCORE = 0.9"))
    best = sender.idea("best", ("^SCORE = .*", "SCORE = 0.8"))
    slip = sender.idea("slip", ("^SCORE = .*", "SCORE = = 1"))
    one, two = ray.folder / "one", ray.folder / "two"
    for home in (one, two):
        home.mkdir()
        (home / "hold").touch()

    # on the first node the baseline holds on, whoever waits for it; two more trainings begin on the second
    head = ray.head("one")
    sender.wave("run", "--wait", "1")
    assert len(sender.jobs()) == 5 and "jobs are out, 5 of them" in sender.ledger()
    wait_for(lambda: trainings(one))
    node = ray.start(f"--address=127.0.0.1:{ray.port}", home="two", cpus=2)
    lost = wait_for(lambda: len(trainings(two)) == 2 and trainings(two))
    waiting = sender.start_line(WAVE_RUN)
    wait_for(lambda: "swarm/wave.py run" in subprocess.check_output(["ps", "-Ao", "args"], text=True))
    subprocess.run(["pkill", "-KILL", "-f", "swarm/wave.py run"], check=True)
    waiting.wait()

    # the second node goes, with all that runs there
    ray.kill(node)
    for run in lost:
        os.kill(run["pid"], signal.SIGKILL)
    while len(sender.night()["runs"]) < 2:
        sender.wave("run", "--wait", "60")
    for run in sender.night()["runs"]:
        assert run["state"] == "interrupted" and run["run"] in [other["run"] for other in lost]
    assert len(sender.jobs()) == 5

    # so does Ray, but its training holds on; another Ray that knows of nothing takes its place
    ray.kill(head)
    assert "ray start --head`, then `export" in sender.wave("run", code=1)
    ray.head("one", cpus=2)
    sender.wave("run", "--wait", "1", "--cpus", "1")
    (one / "hold").unlink()
    run_all(sender)
    scored = {
        commit: sorted(run for run in sender.states(commit) if "inter" not in run) for commit in (start, good, best)
    }
    assert scored[start] == ["scored 1", "scored 2"] and sender.states(slip)[-1] == "crash 1"
    assert scored[good] == scored[best] == ["scored 1", "scored 2", "scored 3"]

    # the best is kept, and the branch goes with it
    decisions = {decision["commit"]: decision for decision in sender.night()["decisions"]}
    decided = {commit: decision["decision"] for commit, decision in decisions.items()}
    assert decided == {slip: "discard", good: "discard", best: "keep"}
    assert decisions[good]["reason"].endswith(f"combine with {best[:7]}")
    assert "SyntaxError" in decisions[slip]["reason"]
    assert sender.git("rev-parse", "autoresearch/night", "HEAD").split() == [best, best]
    sender.wave("clean")
    assert not list((sender.folder / "wave").iterdir())

    # all final runs at once
    sender.ledger("until", "now")
    (one / "hold").touch()
    sender.wave("run", "--wait", "1")
    assert len(sender.jobs()) == 4
    (one / "hold").unlink()
    assert "the gain to report, on fresh seeds: +0.200000" in run_all(sender)
    journal = read_journal(sender.home / sender.night()["benchmark"])
    assert len(journal) == len({line["run"] for line in journal}) == 2 + 3 + 3 + 4
    assert {line["run"] for line in journal} == {run["run"] for run in sender.night()["runs"] if run["val_bpb"]}
    assert all(line["holdout_bpb"] == 1.5 for line in journal)

    # the node's benchmark was made by its first job, and is current nowhere; each run had files of its own
    assert not (one / "current").exists() and len(list(one.glob("venv-*"))) == 1
    assert len({line["folder"] for line in read_journal(one / sender.night()["benchmark"])}) == len(journal)


def trainings(home):
    """The trainings that go on on the node with this home."""
    states = [json.loads(path.read_text()) for path in home.glob("jobs/*/run.json")]
    return [state for state in states if "pid" in state]


def run_all(sender):
    """Run until something else comes next: what the last `run` printed."""
    for _ in range(20):
        output = sender.wave("run", "--wait", "60", "--cpus", "1")
        if f"next: {WAVE_RUN}" not in output:
            return output
    raise AssertionError(output)
