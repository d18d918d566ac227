"""README's "Coming from the original": a train.py in the shape of karpathy/autoresearch runs here after five edits."""

import re

import pytest
from conftest import new_repository, run

import prepare
from harness.journal import flags, read_journal

# Ours, in that shape: constants and loader by their names there, time added up, the model called for a loss
ORIGINAL = """
import time
import torch
import torch.nn as nn
import torch.nn.functional as F
from prepare import MAX_SEQ_LEN, TIME_BUDGET, Tokenizer, make_dataloader, evaluate_bpb

DEVICE_BATCH_SIZE = 8
device = torch.device("cpu")
torch.manual_seed(42)
tokenizer = Tokenizer.from_directory()
vocab_size = tokenizer.get_vocab_size()


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, 32)
        self.lm_head = nn.Linear(32, vocab_size, bias=False)

    def forward(self, idx, targets=None, reduction="mean"):
        logits = self.lm_head(self.wte(idx)).float()
        if targets is None:
            return logits
        return F.cross_entropy(logits.view(-1, vocab_size), targets.view(-1), reduction=reduction)


model = GPT()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
train_loader = make_dataloader(tokenizer, DEVICE_BATCH_SIZE, MAX_SEQ_LEN, "train")
x, y, epoch = next(train_loader)
total_training_time = 0.0
step = 0
while True:
    t0 = time.time()
    loss = model(x, y)
    loss.backward()
    x, y, epoch = next(train_loader)
    progress = min(total_training_time / TIME_BUDGET, 1.0)
    optimizer.param_groups[0]["lr"] = 0.01 * (1 - progress)
    optimizer.step()
    model.zero_grad(set_to_none=True)
    total_training_time += time.time() - t0
    step += 1
    if total_training_time >= TIME_BUDGET:
        break
model.eval()
val_bpb = evaluate_bpb(model, tokenizer, DEVICE_BATCH_SIZE)
print(f"val_bpb: {val_bpb:.6f}")
"""

EDITS = {
    "from prepare import .*": "from prepare import TrainingClock, evaluate_bpb, load_benchmark, make_dataloader",
    r"tokenizer = Tokenizer.from_directory\(\)\n.*": "benchmark = load_benchmark()\nvocab_size = benchmark.vocab_size",
    r"train_loader = .*": "clock = TrainingClock(benchmark, device)\nclock.start()\n"
    'train_loader = make_dataloader(benchmark, "train", DEVICE_BATCH_SIZE, device)',
    r"min\(total_training_time / TIME_BUDGET, 1.0\)": "clock.progress",
    r"total_training_time >= TIME_BUDGET:\n        break": "clock.progress >= 1:\n        break\nclock.stop()",
    r"evaluate_bpb\(.*\)": "evaluate_bpb(model, benchmark, DEVICE_BATCH_SIZE, clock)",
}


@pytest.fixture
def folder(prepared, environment, tmp_path):
    (prepare.HOME / "current").write_text(prepared)
    (prepare.HOME / prepared / "journal.jsonl").unlink(missing_ok=True)
    return new_repository(tmp_path / "clone", environment)


def test_it_runs_after_the_edits_of_the_readme(folder, environment):
    source = ORIGINAL
    for old, new in EDITS.items():
        source, count = re.subn(old, lambda match, new=new: new, source)
        assert count == 1, old
    (folder / "train.py").write_text(source)
    environment["AUTORESEARCH_HOME"] = str(prepare.HOME)
    process = run("train.py", cwd=folder, **environment)
    assert process.returncode == 0, process.stderr
    score = float(re.search(r"val_bpb: (\S+)", process.stdout)[1])
    [recorded] = read_journal(prepare.load_benchmark().path)
    assert recorded["val_bpb"] == pytest.approx(score, abs=1e-6) and 0 < score < 6
    assert flags(recorded) == ["uncommitted changes, .py files that git does not know, or no git at all"]


def test_as_it_was_it_says_what_is_missing(folder, environment):
    (folder / "train.py").write_text(ORIGINAL)
    process = run("train.py", cwd=folder, **environment)
    assert process.returncode == 1 and "cannot import name 'MAX_SEQ_LEN'" in process.stderr
