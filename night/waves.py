"""The jobs of a wave (swarm/wave.py): their runs become rows by the same rule as the runs of this machine."""

import json

from night.steps import WAVE, Step, submit_step
from night.worth import (
    TRIES,
    is_given_up,
    kept_commits,
    new_runs,
    row_seeds,
    scores_of,
    seeds_of,
    verdict,
)

DECIDING_SEEDS = (2, 3)  # of a promising commit: there is room for both at once

# --------------------------------------
# Reading


def read_jobs(folder, known):
    """The jobs of a night: ([dict], in order of their attempts, [sentence] on what cannot be read)."""
    jobs, problems = [], []
    for path in sorted(folder.glob("wave/results/*.json")):
        try:
            job = json.loads(path.read_text())
            job["attempt"] = int(job["attempt"])
            job["seed"] = int(job["seed"])
            is_ours = job["commit"] in known
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{path.name} of the wave cannot be read ({error}): delete it, or send its job again")
            continue
        if is_ours:
            jobs.append(job)
    return sorted(jobs, key=lambda job: job["attempt"]), problems


def add_runs(runs, jobs, record, start):
    """
    Add the scored jobs to the runs of the journal; one that ran here is in it already. Returns a sentence for each
    that does not compare: scores belong to one benchmark and one kind of device, that of the baseline.
    """
    known = {(run["commit"], run["seed"], run.get("time")) for run in runs}
    problems = []
    scored = [job for job in jobs if job["state"] == "scored"]
    baseline = [run for run in [*runs, *scored] if run["commit"] == start]
    device = baseline[0].get("device") if baseline else None
    for job in scored:
        # a cluster on this machine writes the same journal
        if (job["commit"], job["seed"], job.get("time")) in known:
            continue
        if job.get("benchmark") != record["id"]:
            problems.append(f"job {job['job']} ran on the benchmark {job.get('benchmark')}: it does not count")
        elif device and job.get("device") != device:
            problems.append(f"job {job['job']} ran on {job.get('device')}, the baseline on {device}: it does not count")
        else:
            runs.append(job)
    runs.sort(key=lambda run: run.get("time", ""))
    return problems


# --------------------------------------
# What the jobs came to


def last_attempts(night):
    """The last attempt of each commit and seed: {(commit, seed): job}."""
    return {(job["commit"][:7], job["seed"]): job for job in night.jobs}


def unwritten(night):
    """
    What has no row yet, of commits with no job out: {commit: (runs that count, [(seed, reason)] of crashes)}. The
    baseline comes first.
    """
    attempts = last_attempts(night)
    waiting = {commit for (commit, _), job in attempts.items() if job["state"] == "out"}
    commits = dict.fromkeys(commit for commit, _ in attempts if commit not in waiting)
    results = {}
    for commit in sorted(commits, key=lambda commit: commit != night.start):
        runs, disturbed = new_runs(night, commit)
        crashed = [seed for index, seed in row_seeds(commit, night).items() if night.rows[index].status == "crash"]
        crashes = []
        for (other, seed), job in attempts.items():
            if other == commit and seed not in crashed:
                reason = failure(job, disturbed)
                crashes += [(seed, reason)] if reason else []
        if runs or crashes:
            results[commit] = (runs, crashes)
    return results


def failure(job, disturbed):
    """Why a job becomes a crash row; "" if it does not."""
    if job["state"] == "crash":
        return job.get("reason", "")[:160] or "no reason given"
    if job["attempt"] >= TRIES and must_run_again(job, disturbed):
        return f"lost or disturbed {TRIES} times"
    return ""


def must_run_again(job, disturbed):
    """Whether an attempt proves nothing: its node went, its device was taken, or it was disturbed."""
    # by its time: an earlier attempt with this seed may have been disturbed, and this one not
    runs = [(run["commit"], run["seed"], run.get("time")) for run in disturbed]
    is_disturbed = (job["commit"], job["seed"], job.get("time")) in runs
    return job["state"] == "lost" or (job["state"] == "scored" and is_disturbed)


def winner(night, results):
    """The commit of these results that is kept: the best of those that the rule keeps. None if it keeps none."""
    runs = [run for commit_runs, _ in results.values() for run in commit_runs]
    scores = scores_of(night.rows, runs)
    last_keep = kept_commits(night)[-1]
    winners = [commit for commit in results if commit in scores and verdict(commit, last_keep, scores) == "keep"]
    winners = [commit for commit in winners if commit not in kept_commits(night)]
    return min(winners, key=lambda commit: sum(scores[commit][1:]) / (len(scores[commit]) - 1), default=None)


# --------------------------------------
# What comes next


def with_a_wave(night):
    """Rows of its jobs that are missing, jobs that are out or prove nothing, and what is promising."""
    results = unwritten(night)
    if results:
        return Step("uv run ledger.py add --wave", f"commits of the wave without all rows: {', '.join(results)}")
    if not night.wave:
        return None
    attempts = last_attempts(night)

    # its devices are busy, so wait for the next result
    out = [job for job in attempts.values() if job["state"] == "out"]
    if out:
        return Step(f"{WAVE} collect", f"jobs that are out: {len(out)}")

    # a result that proves nothing is asked for once more
    again = []
    for (commit, seed), job in attempts.items():
        if job["attempt"] < TRIES and must_run_again(job, new_runs(night, commit)[1]):
            again.append((commit, seed))
    if again:
        return submit_step(again, "lost or disturbed jobs: send them again")
    promising = promising_runs(night, attempts)
    if promising:
        return submit_step(promising, "promising: the runs after the first decide")
    return None


def promising_runs(night, attempts):
    """The deciding runs that promising commits of the wave lack: [(commit, seed)]."""
    scores = scores_of(night.rows)
    kept = kept_commits(night)
    found = []
    for commit in dict.fromkeys(commit for commit, _ in attempts):
        if commit in kept or commit not in scores or is_given_up(commit, night):
            continue
        if verdict(commit, kept[-1], scores) == "promising":
            found += [(commit, seed) for seed in DECIDING_SEEDS if seed not in seeds_of(commit, night)]
    return found
