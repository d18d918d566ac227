"""Finds what README's "Coming from the original" forgets: a train.py of that shape runs here after its edits."""

import re

import pytest
from conftest import ROOT, run

import prepare
from harness.journal import read_journal

# Ours, in that shape: constants and loader by their names there, time added up, the model called for a loss
ORIGINAL = """
import time
import torch
import torch.nn as nn
import torch.nn.functional as F
from prepare import MAX_SEQ_LEN, TIME_BUDGET, Tokenizer, make_dataloader, evaluate_bpb

device = torch.device("cpu")
tokenizer = Tokenizer.from_directory()
vocab_size = tokenizer.get_vocab_size()

class GPT(nn.Sequential):
    def forward(self, idx, targets=None, reduction="mean"):
        logits = super().forward(idx).float()
        if targets is None:
            return logits
        return F.cross_entropy(logits.view(-1, vocab_size), targets.view(-1), reduction=reduction)

model = GPT(nn.Embedding(vocab_size, 32), nn.Linear(32, vocab_size))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
train_loader = make_dataloader(tokenizer, 8, MAX_SEQ_LEN, "train")
x, y, epoch = next(train_loader)
total_training_time = 0.0
while True:
    t0 = time.time()
    loss = model(x, y)
    loss.backward()
    x, y, epoch = next(train_loader)
    optimizer.param_groups[0]["lr"] = 0.01 * (1 - min(total_training_time / TIME_BUDGET, 1.0))
    optimizer.step()
    model.zero_grad(set_to_none=True)
    total_training_time += time.time() - t0
    if total_training_time >= TIME_BUDGET:
        break
val_bpb = evaluate_bpb(model, tokenizer, 8)
print(f"val_bpb: {val_bpb:.6f}")
"""
EDITS = {
    "from prepare import .*": "from prepare import TrainingClock, evaluate_bpb, load_benchmark, make_dataloader",
    r"tokenizer = Tokenizer.from_directory\(\)\n.*": "benchmark = load_benchmark()\nvocab_size = benchmark.vocab_size",
    "train_loader = .*": "clock = TrainingClock(benchmark, device)\nclock.start()\n"
    'train_loader = make_dataloader(benchmark, "train", 8, device)',
    r"min\(total_training_time / TIME_BUDGET, 1.0\)": "clock.progress",
    r"total_training_time >= TIME_BUDGET:\n        break": "clock.progress >= 1:\n        break\nclock.stop()",
    r"evaluate_bpb\(.*\)": "evaluate_bpb(model, benchmark, 8, clock)",
}


def test_it_runs_after_the_edits_of_the_readme_and_says_before_what_is_missing(own):
    environment = {"AUTORESEARCH_HOME": str(prepare.HOME), "PYTHONPATH": str(ROOT)}
    assert "cannot import name 'MAX_SEQ_LEN'" in run("-c", ORIGINAL, **environment).stderr
    source = ORIGINAL
    for old, new in EDITS.items():
        source, count = re.subn(old, lambda match, new=new: new, source)
        assert count == 1, old
    process = run("-c", source, **environment)
    assert process.returncode == 0, process.stderr
    [recorded] = read_journal(own.path)
    assert recorded["val_bpb"] == pytest.approx(float(process.stdout.split()[1]), abs=1e-6) and recorded["val_bpb"] < 6
