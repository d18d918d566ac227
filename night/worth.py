"""A night: its rows and runs, which belong together, and what they are worth. No file is read here, and no git."""

import math
import re
import statistics
from dataclasses import dataclass, field

from harness.journal import SLOW_FLAG

PROMISING = 1 / 4  # of the noise floor: what a first run must gain to be repeated ...
KEEP = 1 / 2  # ... and what the runs after it must gain
FINAL_SEEDS = (4, 5)  # that selected nothing: they tell what the night has gained
TRIES = 3  # of a run that is disturbed; then it is a crash
SLOW_RUN = 0.5  # of the most steps that a run of the same commit has made
DROPPED = r", dropped, seed \d+$"  # how the description ends of what was added with --discard
EXACT, ROUNDED = 1e-6, 6e-4  # how far the score of a row may be from its run's; some hands write three digits


@dataclass
class Night:
    """All that next_step looks at. Commits have seven digits, but those of runs and jobs are whole."""

    tag: str = "test"
    until: str = "never"  # a time (ISO, in UTC), a number of rows, or never
    start: str = "0000000"  # the night's first commit, whose train.py is the baseline
    head: str = "0000000"
    branch: str = "autoresearch/test"  # "" if HEAD is detached
    lineage: tuple = ("0000000",)  # commits from the first to HEAD, oldest first
    subject: str = ""  # of HEAD
    rows: list = field(default_factory=list)  # of results.tsv
    runs: list = field(default_factory=list)  # of the journal, of this night's commits: dicts, oldest first
    log: dict = field(default_factory=dict)  # of run.log, if it is newer than the last row: see read_log
    jobs: list = field(default_factory=list)  # of its waves, in order of their attempts: see waves.read_jobs
    wave: bool = False  # a cluster is open: runs are sent to it
    running: str = ""  # the pid of a training that holds a device
    changed: bool = False  # train.py differs from HEAD
    stray: str = ""  # another .py file that differs, or that git does not know: runs beside it are "dirty"
    conflict: bool = False  # train.py has conflict markers, in HEAD or in the folder
    time: str = ""  # now

    @property
    def end(self):
        """When it ends, in words."""
        if self.until.isdecimal():
            return f"{self.until} rows"
        return self.until


def is_over(night):
    """Whether no new idea may start."""
    if night.until == "never":
        return False
    if night.until.isdecimal():
        return len([row for row in night.rows if not is_final(row)]) >= int(night.until)
    return night.time >= night.until


def ends_night(run, night):
    """Whether a run is one of the last, for the gain to report."""
    return is_over(night) and run["seed"] in FINAL_SEEDS


def is_final(row):
    """Whether a row is of such a run."""
    return re.search(r", final, seed \d+$", row.description) is not None


def is_given_up(commit, night):
    """Whether it has crashed, or its first run was added with --discard."""
    own = [row for row in night.rows if row.commit == commit]
    return any(row.status == "crash" or re.search(DROPPED, row.description) for row in own)


# --------------------------------------
# Rows and runs


def pair(rows, runs):
    """The run of each row: ({index of the row: run}, runs without a row)."""
    pairs = {}
    left = list(runs)

    # exact ones first, so that no rounded score takes the run of another row
    for distance in (EXACT, ROUNDED):
        for index, row in enumerate(rows):
            if index in pairs:
                continue
            for run in left:
                if run["commit"][:7] == row.commit and abs(run["val_bpb"] - row.val_bpb) < distance:
                    pairs[index] = run
                    left.remove(run)
                    break
    return pairs, left


def is_disturbed(run, runs):
    """Whether something else took its time: slow steps, or half the steps of another run of this commit."""
    most = max(other.get("steps", 0) for other in runs if other["commit"] == run["commit"])
    return run.get("slow_steps_percent", 0) > SLOW_FLAG or run.get("steps", 0) < SLOW_RUN * most


def counting(runs, others):
    """The runs that are neither dirty nor disturbed; `others` are the runs to compare their steps with."""
    return [run for run in runs if run.get("dirty") is not True and not is_disturbed(run, others)]


def new_runs(night, commit=None):
    """Runs of HEAD, or of this commit, that have no row: those that count, and those that were disturbed."""
    _, left = pair(night.rows, night.runs)
    own = [run for run in left if run["commit"][:7] == (commit or night.head) and run.get("dirty") is not True]
    counted = counting(own, night.runs)
    return counted, [run for run in own if run not in counted]


def row_seeds(commit, night):
    """The seed of each row of a commit: {index of the row: seed}. Rows that name none get the first that are free."""
    pairs, _ = pair(night.rows, night.runs)
    seeds = {}
    for index, row in enumerate(night.rows):
        named = re.findall(r"\bseed (\d+)\b", row.description)
        if row.commit != commit:
            continue
        if index in pairs:
            seeds[index] = pairs[index]["seed"]
        elif named:
            seeds[index] = int(named[-1])
        else:
            seeds[index] = None  # written by hand

    # rows typed by hand without a seed are assumed to have used seeds in order
    for index, seed in seeds.items():
        if seed is None:
            seeds[index] = first_free(seeds.values())
    return seeds


def first_free(seeds):
    """The lowest seed from 1 that is not among these."""
    taken = set(seeds)
    return next(seed for seed in range(1, len(taken) + 2) if seed not in taken)


def seeds_of(commit, night):
    """The seeds with which a commit has a row, crashes included, or a run that counts."""
    counted, _ = new_runs(night, commit)
    return [*row_seeds(commit, night).values(), *(run["seed"] for run in counted)]


def disturbed_tries(night):
    """HEAD's last disturbed run: (its seed, how often that was disturbed since its last row)."""
    _, disturbed = new_runs(night)
    if not disturbed:
        return 0, 0
    seed = disturbed[-1]["seed"]
    own = [run for run in night.runs if run["commit"][:7] == night.head and run["seed"] == seed]
    pairs, _ = pair(night.rows, night.runs)

    # a row, of whatever status, ends the count
    tries = 0
    for run in own:
        if run in pairs.values():
            tries = 0
        elif run in disturbed:
            tries += 1

    # a crash row of this seed stands for TRIES of them
    rows = [night.rows[index] for index, other in row_seeds(night.head, night).items() if other == seed]
    return seed, max(0, tries - TRIES * sum(row.status == "crash" for row in rows))


# --------------------------------------
# Worth: gains are positive where val_bpb has fallen


def scores_of(rows, runs=()):
    """The scores of every commit, in order, of rows and of runs that have none: {commit: [val_bpb]}."""
    scores = {}
    for row in rows:
        if not math.isnan(row.val_bpb):
            scores.setdefault(row.commit, []).append(row.val_bpb)
    for run in runs:
        scores.setdefault(run["commit"][:7], []).append(run["val_bpb"])
    return scores


def noise_floor(scores, without=None):
    """
    Twice the standard deviation between runs of one commit, pooled over all commits but the one that is judged; NaN if
    none ran twice.
    """
    pooled = [runs for commit, runs in scores.items() if commit != without]
    repeats = sum(len(runs) - 1 for runs in pooled)
    if repeats == 0:
        return math.nan
    squares = sum(statistics.pvariance(runs) * len(runs) for runs in pooled)
    return 2 * math.sqrt(squares / repeats)


def gain(commit, last_keep, scores):
    """How far a commit is below the last keep, by the runs that decide: all but its first, if it has more than one."""
    runs = scores[commit]
    if len(runs) > 1 and commit != last_keep:
        runs = runs[1:]
    return statistics.fmean(scores[last_keep]) - statistics.fmean(runs)


def verdict(commit, last_keep, scores):
    """The judgement of a commit by its runs and those of the last keep: keep, discard or promising."""
    if last_keep not in scores:
        return "discard"

    # without a repeated run there is no floor yet: any gain will do
    floor = noise_floor(scores, without=commit)
    if math.isnan(floor):
        floor = 0.0
    gained = gain(commit, last_keep, scores)
    if len(scores[commit]) == 1:
        return "promising" if gained > PROMISING * floor else "discard"
    return "keep" if gained > KEEP * floor else "discard"


def kept_commits(night):
    """The commits that were kept, in the order of their first row; the baseline comes first."""
    kept = [row.commit for row in night.rows if row.status == "keep" and not math.isnan(row.val_bpb)]
    return list(dict.fromkeys([night.start, *kept]))


def discards_below(night):
    """The commits below HEAD, down to what was kept, that were scored and not kept: somebody forgot to go back."""
    kept = kept_commits(night)
    scores = scores_of(night.rows)
    found = []
    for commit in night.lineage:
        if commit in kept:
            found.clear()
        elif commit in scores and commit != night.head:
            found.append(commit)
    return found


def confirmed_gain(night):
    """The gain of the last keep over the baseline with the seeds that selected nothing; NaN until both have run."""
    means = []
    for commit in (night.start, kept_commits(night)[-1]):
        seeds = row_seeds(commit, night)
        scores = [night.rows[index].val_bpb for index, seed in seeds.items() if seed in FINAL_SEEDS]
        scores = [score for score in scores if not math.isnan(score)]

        # its final runs have crashed, or are still to come
        if not scores:
            return math.nan
        means.append(statistics.fmean(scores))
    return means[0] - means[1]
