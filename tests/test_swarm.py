"""
The shell lines of program_swarm.md, run as they stand: a wave of real trainings on a real Ray cluster of two nodes, and
scripted agents that share a bare repository.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path
from statistics import mean

import pytest
import torch
from conftest import SMALL, TEXT, WEAK, Agent, new_repository, shell_blocks, wait_for, weaken

import prepare
from harness.journal import read_journal

pytestmark = pytest.mark.cluster
WAVE = ["cluster", "worktree", "try", "submit", "collect", "rows", "keep"]
HUB = ["join", "exchange", "look", "say", "adopt"]
BOOKS = ["branch", "where", "commit", "row", "reset"]
LINES = shell_blocks("program_swarm.md", BOOKS + WAVE + HUB)
COLUMNS = ("commit", "val_bpb", "memory_gb", "status", "description")

# --------------------------------------
# A wave


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in sockets]


# The command `ray` without its server for clients, which on a busy machine gives up after 30 s and ends the whole node.
RAY = """
import ray._private.utils, sys
ray._private.utils.get_ray_client_dependency_error = lambda: "not needed"
from ray.scripts.scripts import main
sys.exit(main())
"""


@pytest.fixture
def cluster(environment, prepared):
    """Two nodes of one CPU, each with a home of its own, as two machines have. Yields the second one and its home."""
    pytest.importorskip("ray", reason="needs the dependency group `cluster`")
    (prepare.HOME / "current").write_text(prepared)
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets have short paths
    port, dashboard, *agents = free_ports(4)
    head = ["--head", f"--port={port}", f"--dashboard-port={dashboard}"]
    other = [f"--address=127.0.0.1:{port}", '--resources={"second": 1}']
    environment |= {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    nodes = []
    first, second = (head, prepare.HOME, tempfile.gettempdir()), (other, folder / "home", str(folder))
    for (words, home, locks), agent in zip((first, second), agents):
        command = [sys.executable, "-c", RAY, "start", *words, "--disable-usage-stats", "--block"]
        command += ["--node-ip-address=127.0.0.1", "--num-cpus=1", f"--temp-dir={folder}"]
        command += [f"--dashboard-agent-listen-port={agent}"]
        path = folder / f"node{len(nodes)}.log"
        with open(path, "w") as log:
            here = environment | {"AUTORESEARCH_HOME": str(home), "TMPDIR": locks}
            nodes.append(subprocess.Popen(command, env=here, stdout=log, stderr=log, start_new_session=True))
        wait_for(lambda path=path: "Ray runtime started" in path.read_text() or nodes[-1].poll() is not None, 150)
        assert nodes[-1].poll() is None, path.read_text()
    yield nodes[1], folder / "home"
    for node in reversed(nodes):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGTERM)
        node.wait(30)
    shutil.rmtree(folder, ignore_errors=True)


def test_a_wave(cluster, environment, tmp_path, prepared):
    """Three experiments, two at a time: the baseline, a crash, and a gain that loses its node and runs again."""
    second, second_home = cluster
    agent = Agent(new_repository(tmp_path / "clone", environment), environment, LINES)
    weaken(agent.folder)
    agent.edit(("^LATE_LIMIT = .*", "LATE_LIMIT = 99"), file="prepare.py")  # with two trainings any step may be late
    agent.git("commit", "-qam", "weak")
    agent.sh("cluster")
    agent.sh("branch", tag="wave")
    start = agent.head()
    ideas = {
        "slip": [(r"^def norm\(x\):", "def norm(x:")],
        "good": [
            *((rf"^({name} +)= 1e-6 \* ", r"\1= ") for name in WEAK),
            (r"^    clock.start\(\)", "    print('waiting', flush=True)\n    time.sleep(5)\n    clock.start()"),
        ],
    }
    tried = {"base": start}
    agent.sh("worktree", name="base")
    for name, edits in ideas.items():
        agent.sh("worktree", name=name)
        agent.edit(*edits, file=f"wave/{name}/train.py")
        agent.sh("try", name=name, idea=f"the {name} one", prediction="0")
        tried[name] = agent.git("-C", f"wave/{name}", "rev-parse", "--short=7", "HEAD").strip()
    with_arguments = {"tag": "wave", "limit": 60, "arguments": shlex.join(["--text", *TEXT, *SMALL])}
    slot = "--entrypoint-num-cpus 1"
    second_only = slot + """ --entrypoint-resources '{"second": 1}'"""
    agent.sh("submit", runs="good:1", slot=second_only, **with_arguments)
    submitted = agent.sh("submit", runs="base:1 slip:1", slot=slot, **with_arguments)
    assert submitted == "".join(f"wave-{tried[name]}-1 submitted\n" for name in ("base", "slip"))
    untried = re.findall(r"^no row yet:  (\w+)", agent.sh("where"), re.M)
    assert sorted(untried) == sorted(tried.values())

    def jobs():
        with urllib.request.urlopen(environment["RAY_API_SERVER_ADDRESS"] + "/api/jobs/") as answer:
            return {job["submission_id"]: job["status"] for job in json.load(answer) if job["submission_id"]}

    def log(job):
        with urllib.request.urlopen(environment["RAY_API_SERVER_ADDRESS"] + f"/api/jobs/{job}/logs") as answer:
            return json.load(answer)["logs"]

    good = f"wave-{tried['good']}-1"
    wait_for(lambda: jobs()[good] == "RUNNING" and "waiting" in log(good))
    assert (second_home / "current").read_text() == prepared  # prepared there by the job
    os.killpg(second.pid, signal.SIGKILL)
    wait_for(lambda: not {"PENDING", "RUNNING"} & set(jobs().values()))
    ended = dict(line.split(" ", 1) for line in agent.sh("collect", tag="wave").splitlines() if "wave-" in line)
    assert ended == {
        good: "lost",
        f"wave-{tried['base']}-1": "exit 0",
        f"wave-{tried['slip']}-1": "exit 1",
    }, "\n".join(path.read_text()[-500:] for path in agent.folder.glob("wave/*.log"))
    holder = prepare.DeviceLock(torch.device("cpu"))  # somebody else trains on the first node
    again = agent.sh("submit", runs="good:1 good:1-2", slot=slot, **with_arguments)
    assert f"{good} not submitted" in again and "already exists" in again  # the same id does not run twice
    wait_for(lambda: jobs()[good + "-2"] == "FAILED")
    holder.release()
    assert f"{good}-2 lost\n" in agent.sh("collect", tag="wave")
    agent.sh("submit", runs="good:1-3", slot=slot, **with_arguments)
    wait_for(lambda: jobs()[good + "-3"] == "SUCCEEDED")
    assert f"{good}-3 exit 0\n" in agent.sh("collect", tag="wave")
    assert "wave-" not in agent.sh("collect", tag="wave")
    assert "SyntaxError" in (agent.folder / "wave" / f"wave-{tried['slip']}-1.log").read_text()

    compared = re.findall(r"^wave: +(\w{7}) gains (\S+) in 1 runs: ", agent.sh("where"), re.M)
    gains = {commit: float(gain) for commit, gain in compared}
    agent.sh("rows")
    agent.sh("rows")  # once more adds nothing
    rows = {row[0]: row for row in agent.rows()[1:]}
    assert len(rows) == len(agent.rows()) - 1 == 3
    assert {name: rows[commit][3] for name, commit in tried.items()} == {
        "base": "keep",
        "slip": "crash",
        "good": "discard",  # for now: it is a first run
    }
    device = prepare.device_name(torch.device("cpu"))
    assert re.fullmatch(rf"baseline, seed 1, \d+ steps \[wave-{start}-1 on {device}\]", rows[start][4])
    assert re.fullmatch(rf"the good one; expect 0, seed 1, \d+ steps \[{good}-3 on {device}\]", rows[tried["good"]][4])
    assert rows[tried["slip"]][1:3] == ["0.000000", "0.0"] and rows[tried["slip"]][4].endswith("-1 on unknown]")
    scores = {name: float(rows[commit][1]) for name, commit in tried.items()}
    expected = {tried[name]: scores["base"] - scores[name] for name in ("base", "good")}
    assert gains == pytest.approx(expected, abs=2e-6)
    recorded = {
        (run["commit"][:7], f"{run['val_bpb']:.6f}", run["dirty"]) for run in read_journal(prepare.HOME / prepared)
    }
    assert recorded >= {(tried[name], rows[tried[name]][1], False) for name in ("base", "good")}

    agent.sh("keep", hash=tried["good"])
    for name in tried:
        agent.git("worktree", "remove", "--force", f"wave/{name}")
    assert agent.head() == tried["good"] and "no row yet:" not in agent.sh("where")
    assert agent.git("status", "--porcelain") == "" and len(agent.git("worktree", "list").splitlines()) == 1


def test_gains_of_a_wave(own, tmp_path, environment):
    """Against the last keep, of runs on its device and benchmark only; the runs after the first decide."""
    agent = Agent(
        new_repository(tmp_path / "clone", environment), environment | {"AUTORESEARCH_HOME": prepare.HOME}, LINES
    )
    (agent.folder / "wave").mkdir()
    agent.sh("branch", tag="my-night")
    kept = agent.head()

    def log(run, score, device="H100", benchmark=own.id):
        summary = f"val_bpb: {score}\nnum_steps: 90\npeak_vram_mb: 2048\ndevice: {device}\nbenchmark: {benchmark}\n"
        (agent.folder / "wave" / f"my-night-{run}.log").write_text(summary if score else "benchmark: x\nTraceback\n")

    log("aaaaaaa-1", 0.7)
    (agent.folder / "wave" / "what-I-saw.log").write_text("no run")
    assert f"wave:        no log has a score of {kept}, the baseline: submit it\n" in agent.sh("where")
    for run, score in {f"{kept}-1": 1.0, f"{kept}-2": 1.1, f"{kept}-3": 1.2, "aaaaaaa-2-2": 1.0}.items():
        log(run, score)
    for run, score in {"aaaaaaa-3": 1.02, "bbbbbbb-1": None, "bbbbbbb-2": 1.3, "eeeeeee-1": 0.9}.items():
        log(run, score)
    log("ccccccc-1", 0.1, device="A100")
    log("ddddddd-1", 0.1, benchmark="another")
    runs = {kept: [1.0, 1.1, 1.2], "aaaaaaa": [0.7, 1.0, 1.02], "bbbbbbb": [1.3], "eeeeeee": [0.9]}
    spread = [x - mean(runs[commit]) for commit in (kept, "aaaaaaa") for x in runs[commit]]
    floor = 2 * (sum(x * x for x in spread) / 4) ** 0.5
    text = agent.sh("where")
    assert re.findall(r"^wave: +(\w{7}) gains (\S+) in (\d) runs: (.*)", text, re.M) == [
        (kept, "0.000000", "3", "keep"),
        ("eeeeeee", "0.200000", "1", "promising, submit seeds 2 and 3"),
        ("aaaaaaa", "0.090000", "3", "keep" if floor / 2 < 0.09 else "discard"),
        ("bbbbbbb", "-0.200000", "1", "discard"),
    ]
    assert "my-night-ccccccc-1 ran on A100, not on H100: does not compare" in text
    agent.sh("rows")
    assert [row[:4] for row in agent.rows()[1:4]] == [[kept, f"{x:.6f}", "2.0", "keep"] for x in runs[kept]]
    assert {row[0]: row[1:4] for row in agent.rows()[4:] if row[3] == "crash"} == {
        "bbbbbbb": ["0.000000", "0.0", "crash"],
        "ddddddd": ["0.000000", "0.0", "crash"],
    }
    assert len(agent.rows()) == 1 + 3 + 3 + 2 + 1 + 1 and "row\t" not in agent.sh("where")

    # the baseline once more, to see drift, is not what is to beat
    for row in ("eeeeeee\t0.9\t2.0\tkeep\tseed 2", f"{kept}\t1.1\t2.0\tkeep\tbaseline, seed 1, once more"):
        with open(agent.folder / "results.tsv", "a") as ledger:
            ledger.write(row + "\n")
    log("fffffff-1", 0.85)
    assert re.search(r"^wave: +fffffff gains 0.050000 in 1 runs: ", agent.sh("where"), re.M)


# --------------------------------------
# The hub


class Scripted(Agent):
    """Tries what it is told to; the scores are made up, so no training runs."""

    def __init__(self, name, folder, environment, device="cpu x86_64 x2"):
        super().__init__(folder, environment, LINES)
        self.name, self.device, self.kept = name, device, self.head()
        self.me = {"tag": "test", "agent": name}

    def experiment(self, idea, score, status, repeat=False):
        """The books by hand, and the exchange."""
        if not repeat:
            self.edit((r"\Z", f"# {idea}\n"))
            self.sh("commit", idea=idea, prediction="0")
        commit, memory = self.head(), "1.0" if score else "0.0"
        row = {"commit": commit, "val_bpb": f"{score:.6f}", "memory_gb": memory, "status": status, "description": idea}
        self.sh("row", **row)
        if status == "keep":
            self.kept = commit
        else:
            self.sh("reset", commit=commit, kept=self.kept)
        self.exchange()
        return commit

    def exchange(self):
        self.sh("exchange", **self.me)


@pytest.fixture
def hub(own, tmp_path, environment):
    """A bare repository with a main branch; call it to get a new agent with a clone."""
    environment = environment | {"AUTORESEARCH_HOME": str(prepare.HOME)}
    bare = tmp_path / "hub.git"
    seed = new_repository(tmp_path / "main", environment)
    subprocess.run(["git", "commit", "-q", "--allow-empty", "-m", "second"], cwd=seed, env=environment, check=True)
    subprocess.run(["git", "clone", "-q", "--bare", seed, bare], check=True)

    def join(name, device="cpu x86_64 x2"):
        subprocess.run(["git", "clone", "-q", bare, tmp_path / name], check=True)
        agent = Scripted(name, tmp_path / name, environment, device)
        agent.sh("join", url=bare, **agent.me)
        agent.git("config", "autoresearch.device", device.replace(" ", "_"))
        return agent

    join.benchmark = own.id
    join.git = lambda *words: subprocess.check_output(["git", *words], cwd=bare, text=True).strip()
    return join


def published(hub):
    """Every result in the notes of the hub, as a dict of its keys and of the columns of its row."""
    lines = [line.split("\t") for line in hub.git("grep", "-h", "", "refs/notes/results").splitlines() if "\t" in line]
    results = [dict(word.split("=", 1) for word in keys.split()) | dict(zip(COLUMNS, row)) for keys, *row in lines]
    return sorted(results, key=lambda result: (result["agent"], int(result["row"])))


def frontier(results, benchmark, device):
    """What the status shall show of the hub, by brute force: (mean, runs, commit)."""
    scores = {}
    for result in results:
        if (result["benchmark"], result["device"]) == (benchmark, device) and float(result["val_bpb"]):
            scores.setdefault(result["commit"], []).append(float(result["val_bpb"]))
    kept = {r["commit"] for r in results if r["status"] == "keep"} & set(scores)
    best = sorted((sum(scores[c]) / len(scores[c]), len(scores[c]), c) for c in kept)
    return [(f"{mean:.6f}", str(runs), commit) for mean, runs, commit in best[:5]]


def shown(agent):
    return re.findall(r"^hub: +(\S+) in (\d+) runs, (\w{7}), ", agent.sh("where"), re.M)


def test_three_agents_share_a_hub(hub):
    """20 results each, pushed at once: none is lost or doubled, and every commit can be fetched."""
    agents = [hub("ada"), hub("bob"), hub("eve", "NVIDIA H100 80GB HBM3")]
    said = []

    def night(agent, start):
        agent.best = agent.experiment("baseline, seed 1", start, "keep", repeat=True)
        for n in range(2, 21):
            score = 0 if n % 7 == 0 else round(start + (-1) ** n * n / 1000, 6)
            status = "crash" if not score else "keep" if score < start else "discard"
            commit = agent.experiment(f"idea {n} of {agent.name}: a = b", score, status)
            agent.best = commit if status == "keep" else agent.best
            if n % 10 == 0:
                agent.sh("say", message=f"{n} done", **agent.me)
                said.append(f"agent=test/{agent.name} {n} done")

    threads = [threading.Thread(target=night, args=job) for job in zip(agents, (1.0, 1.01, 0.5))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for agent in agents * 2:  # what gave up after ten attempts, if any, and what others pushed last
        agent.exchange()

    results = published(hub)
    owners = [(result["agent"], int(result["row"])) for result in results]
    assert owners == [(f"test/{agent.name}", row) for agent in agents for row in range(1, 21)]
    for agent in agents:
        mine = {int(result["row"]): result for result in results if result["agent"] == f"test/{agent.name}"}
        for number, row in enumerate(agent.rows()[1:], 1):
            assert [mine[number][name] for name in COLUMNS] == row
            assert mine[number]["device"] == agent.device.replace(" ", "_")
        pushed = hub.git("rev-parse", "--short=7", f"autoresearch/test/{agent.name}")
        assert pushed == agent.best == agent.head()
    for result in results:
        assert hub.git("rev-parse", "--short=7", f"{result['commit']}^") == result["parent"]

    # what the agents see of it
    for agent in agents:
        assert (
            shown(agent) == frontier(results, hub.benchmark, agent.device.replace(" ", "_")) and len(shown(agent)) == 5
        )
    ada, bob, _ = agents
    on_top = ada.sh("look", word=f"parent={bob.best}").splitlines()
    assert len(on_top) == min(20, sum(result["parent"] == bob.best for result in results)) > 0
    assert len(ada.sh("look", word="IDEA 7 of").splitlines()) == 3
    latest = ada.sh("look", word=".").splitlines()
    assert len(latest) == 20 and latest == sorted(latest)
    lines = hub.git("grep", "-h", "^time", "refs/notes/results").splitlines()
    assert sorted(line.split(" ", 1)[1] for line in lines if "\t" not in line) == sorted(said)


def test_an_agent_comes_back_from_nothing(hub):
    ada = hub("ada")
    ada.experiment("baseline, seed 1", 1.0, "keep", repeat=True)
    ada.experiment("baseline, seed 2", 1.1, "keep", repeat=True)
    best = ada.experiment("deeper, expected -0.1", 0.9, "keep")
    lost = ada.experiment("a typo", 0, "crash")
    ledger = (ada.folder / "results.tsv").read_text()
    shutil.rmtree(ada.folder)

    ada = hub("ada")
    assert (ada.folder / "results.tsv").read_text() == ledger
    assert ada.head() == best and ada.git("branch", "--show-current").strip() == "autoresearch/test/ada"
    assert "a typo" in ada.git("log", "-1", "--format=%s", f"refs/tries/{lost}")
    ada.experiment("wider", 0.95, "discard")
    assert [result["row"] for result in published(hub)] == [str(n) for n in range(1, 6)]


def test_rows_of_a_wave_carry_the_device_of_their_node(hub):
    ada = hub("ada")
    commit = ada.head()
    with open(ada.folder / "results.tsv", "a") as ledger:
        ledger.write(f"{commit}\t0.9\t1.0\tkeep\tdeeper, 9 steps [test-{commit}-1 on NVIDIA A100 80GB]\n")
        ledger.write(f"{commit}\t0.9\t1.0\tkeep\tacts on [all]\n")
    ada.exchange()
    assert [result["device"] for result in published(hub)] == ["NVIDIA_A100_80GB", "cpu_x86_64_x2"]


def test_build_on_the_best_of_another(hub):
    ada, bob = hub("ada"), hub("bob")
    ada.experiment("baseline", 1.0, "keep", repeat=True)
    best = ada.experiment("deeper", 0.8, "keep")
    bob.experiment("baseline", 1.0, "keep", repeat=True)
    own = bob.experiment("wider", 0.9, "keep")
    assert shown(bob)[0][2] == best
    bob.sh("adopt", hash=best)
    assert bob.experiment("adopted from ada", 0.82, "keep", repeat=True) == best == bob.head()
    assert hub.git("rev-parse", "--short=7", "autoresearch/test/bob") == best
    assert hub.git("rev-parse", "--short=7", f"refs/tries/{own}") == own
    assert shown(bob)[0] == ("0.810000", "2", best)

    ada.exchange()
    ada.sh("adopt", hash=own)  # which is worse: back to the last keep
    ada.experiment("adopted from bob", 0.91, "discard", repeat=True)
    assert ada.head() == best


def test_without_network_nothing_is_lost(hub, tmp_path):
    ada = hub("ada")
    ada.experiment("baseline", 1.0, "keep", repeat=True)
    url = ada.git("remote", "get-url", "hub").strip()
    ada.git("remote", "set-url", "hub", str(tmp_path / "nowhere"))
    ada.environment = ada.environment | {"PATH": f"{tmp_path / 'fast'}:{ada.environment['PATH']}"}
    (tmp_path / "fast").mkdir()
    (tmp_path / "fast" / "sleep").write_text("#!/bin/sh\n")
    (tmp_path / "fast" / "sleep").chmod(0o755)
    commit = ada.experiment("deeper", 0.9, "keep")
    assert len(published(hub)) == 1
    ada.git("remote", "set-url", "hub", url)
    ada.exchange()
    assert [result["commit"] for result in published(hub)][1:] == [commit]
