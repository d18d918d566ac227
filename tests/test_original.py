"""Checks README's "Coming from the original": a train.py of that shape runs here after its edits, and not before."""

import re

import pytest
from conftest import ROOT, run

import prepare
from harness.journal import read_journal

# Takes no minute
EAGER = "import functools, torch; torch.compile = functools.partial(torch.compile, backend='eager')\n"

# Ours, in that shape: names, seed, free steps and calls of CUDA as there
ORIGINAL = """
import time
import torch
import torch.nn as nn
import torch.nn.functional as F
from prepare import MAX_SEQ_LEN, TIME_BUDGET, Tokenizer, make_dataloader, evaluate_bpb

torch.manual_seed(42)
torch.cuda.manual_seed(42)
device = torch.device("cuda")
autocast_ctx = torch.amp.autocast(device_type="cuda", dtype=torch.bfloat16)
tokenizer = Tokenizer.from_directory()
vocab_size = tokenizer.get_vocab_size()

class GPT(nn.Sequential):
    def forward(self, idx, targets=None, reduction="mean"):
        logits = super().forward(idx).float()
        if targets is None:
            return logits
        return F.cross_entropy(logits.view(-1, vocab_size), targets.view(-1), reduction=reduction)

model = GPT(nn.Embedding(vocab_size, 32), nn.Linear(32, vocab_size)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
model = torch.compile(model, dynamic=False)
train_loader = make_dataloader(tokenizer, 8, MAX_SEQ_LEN, "train")
x, y, epoch = next(train_loader)
total_training_time = 0.0
step = 0
while True:
    torch.cuda.synchronize()
    t0 = time.time()
    with autocast_ctx:
        loss = model(x, y)
    loss.backward()
    x, y, epoch = next(train_loader)
    optimizer.param_groups[0]["lr"] = 0.01 * (1 - min(total_training_time / TIME_BUDGET, 1.0))
    optimizer.step()
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    if step > 10:
        total_training_time += time.time() - t0
    step += 1
    if step > 10 and total_training_time >= TIME_BUDGET:
        break
model.eval()
with autocast_ctx:
    val_bpb = evaluate_bpb(model, tokenizer, 8)
print(f"val_bpb: {val_bpb:.6f}")
"""
COMPILE = """clock = TrainingClock(benchmark, device)
begun = copy.deepcopy(model.state_dict())
for _ in range(2):
    x, y = torch.randint(vocab_size, (2, 8, benchmark.max_seq_len), device=device)
    with autocast_ctx:
        model(x, y).backward()
    optimizer.step()
    model.zero_grad(set_to_none=True)
model.eval()
with autocast_ctx, torch.no_grad():
    model(x)
model.train()
model.load_state_dict(begun)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
clock.start()
train_loader = make_dataloader(benchmark, "train", 8, device)"""
EDITS = {  # row by row
    "from prepare import .*": "import copy\n"
    "from prepare import TrainingClock, evaluate_bpb, load_benchmark, make_dataloader, runtime, synchronize\n"
    "benchmark = load_benchmark()",
    r"torch.manual_seed\(42\)\ntorch.cuda.manual_seed\(42\)": "torch.manual_seed(benchmark.seed)",
    r'torch.device\("cuda"\)': "runtime.choose_device()",
    'device_type="cuda"': "device_type=device.type",
    r"tokenizer = Tokenizer.from_directory\(\)\n.*": "vocab_size = benchmark.vocab_size",
    "train_loader = .*": COMPILE,
    r"min\(total_training_time / TIME_BUDGET, 1.0\)": "clock.progress",
    r"    torch.cuda.synchronize\(\)\n    t0.*\n": "",
    r"    torch.cuda.synchronize\(\)\n    if step > 10:\n.*": "    clock.tick()",
    r"step > 10 and total_training_time >= TIME_BUDGET:\n": "clock.progress >= 1:\n",
    r"model.eval\(\)\n(?=with autocast_ctx:\n    val)": "clock.stop()\nmodel.eval()\n",
    r"evaluate_bpb\(.*\)": "evaluate_bpb(model, benchmark, 8, clock)",
}


def test_it_runs_after_the_edits_of_the_readme_and_says_before_what_is_missing(own):
    """Every second counts, nothing is compiled while the clock runs, steps are seen, and seeds differ."""
    environment = {"AUTORESEARCH_HOME": str(prepare.HOME), "PYTHONPATH": str(ROOT)}
    assert "cannot import name 'MAX_SEQ_LEN'" in run("-c", EAGER + ORIGINAL, **environment).stderr
    source = ORIGINAL
    for old, new in EDITS.items():
        source, count = re.subn(old, lambda match, new=new: new, source)
        assert count == 1, old
    for seed in ("1", "2"):
        process = run("-c", EAGER + source, **environment, AUTORESEARCH_SEED=seed)
        assert process.returncode == 0, process.stderr
    first, second = read_journal(own.path)
    assert second["val_bpb"] == pytest.approx(float(process.stdout.split()[-1]), abs=1e-6)
    assert first["val_bpb"] != second["val_bpb"] and max(first["val_bpb"], second["val_bpb"]) < 6
    assert first["recompiled"] == 0 and first["steps"] > 10 and first["training_seconds"] < 1.1 * first["time_budget"]
