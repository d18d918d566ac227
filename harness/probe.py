"""The probe: does a model see later tokens or other rows?"""

import importlib
import math

import numpy as np


class Lazy:
    """A module that is imported when it is first used: --status, beside a training, must not take 4 s for torch."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, attribute):
        return getattr(importlib.import_module(self.name), attribute)


torch = Lazy("torch")

PROBE_CUTS = 256  # futures that the probe replaces, or T / 4 if that is more
PROBE_CONTROLS = 4  # times that it changes other rows only
PROBE_REPEATS = 4  # a leak moves logits every time, chance does not
PROBE_NOISE = 1e-4  # rounding may move logits by this share of their standard deviation ...
PROBE_MARGIN = 3  # ... and by so many times what was seen without a new future
MOVED_SHARE = 0.05  # but if they move by more than this without one, at more than ...
MOVED_POSITIONS = 0.01  # ... this share of the positions, it is no rounding


def predict(model, inputs, vocab_size):
    """
    The model's logits, float32 [B, T, V]. It gets a copy of the inputs: their storage holds the targets too.

    Not under no_grad: a compiled model would need other graphs than in training, which takes longer than it saves.
    """
    logits = model(inputs.clone())
    shape = (*inputs.shape, vocab_size)
    if not torch.is_tensor(logits) or logits.shape != shape:
        got = tuple(logits.shape) if torch.is_tensor(logits) else type(logits).__name__
        raise ValueError(f"not scored: model(inputs) must return logits of shape {shape}, not {got}")
    return logits.detach().float()


def check_causality(model, rows, batch_size, vocab_size, device):
    """
    The probe: a logit may depend on its own token and on earlier ones of its row, and on nothing else.

    Many times, the tokens of each row after a cut of its own are replaced; logits before the cut must not move.
    Rounding may move them (in a mixture of experts, say, other tokens change the order of sums): by how much is seen
    when nothing changes and when only other rows do. A suspect is tried again, with the same future and other rows
    around it, against controls: a leak moves it every time, chance does not. Raises RuntimeError naming the first
    position.
    """
    generator = torch.Generator()  # of its own: train.py seeds torch's
    generator.seed()

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    def predict_below_largest(ids):
        """Relative to the largest logit and not below -50, or logits masked with -1e9 would dominate the deviation."""
        logits = predict(model, ids.to(device), vocab_size)
        return ((row - row.amax(dim=-1, keepdim=True)).clamp(min=-50) for row in logits)  # row by row, for the memory

    def movement(ids):
        """By how much logits moved, in standard deviations: [B, T]."""
        rows = zip(predict_below_largest(ids), before)
        return torch.stack([(new - old).abs().amax(dim=-1) / old.std() for new, old in rows]).cpu()

    def altered(kept):
        """Other tokens wherever the mask [B, T] does not keep them."""
        return torch.where(kept, ids, (ids + draw(1, vocab_size, B, T)) % vocab_size)

    def choose(candidates):
        """Some of the candidate rows, a mask [B]: at most half of all rows, or one. A mask [B, 1]."""
        ranks = torch.rand(B, generator=generator) * candidates
        return ((ranks >= ranks.sort().values[-max(1, B // 2)]) & candidates)[:, None]

    def control(chosen, others):
        """How far do the chosen rows move when only the others change?"""
        nonlocal noise
        noise = torch.maximum(noise, movement(torch.where(chosen, ids, others)).where(chosen, 0))
        moved = (noise > MOVED_SHARE).nonzero()
        if len(moved) > MOVED_POSITIONS * noise.numel():
            raise RuntimeError(
                f"the model sees other rows: logits at position {int(moved[0, 1])} changed when only other rows of the "
                "batch changed"
            )

    index = torch.randperm(len(rows), generator=generator).numpy()
    ids = read(rows, np.resize(index, batch_size))[:, :-1].clone()
    B, T = ids.shape
    positions, nothing = torch.arange(T), torch.zeros(B, T, dtype=torch.bool)
    bos, starts = int(ids[0, 0]), draw(1, max(2, T - 1), B)
    ids[torch.arange(B), starts] = bos  # a document starts in each row

    before = list(predict_below_largest(ids))
    noise = movement(ids)
    if (noise > MOVED_SHARE).float().mean() > MOVED_POSITIONS:
        raise RuntimeError("the model gives two answers to the same input: is dropout on, or does it draw at random?")
    for _ in range(PROBE_CONTROLS):
        control(choose(nothing[:, 0] == 0), altered(nothing))

    shape = -(-max(PROBE_CUTS, T // 4) // B), B
    share = (torch.arange(math.prod(shape)) + torch.rand(math.prod(shape), generator=generator)) / math.prod(shape)
    cuts = 1 + ((T - 1) * share).long().view(shape)
    kinds = (torch.randperm(math.prod(shape), generator=generator) % 8).view(shape)
    chunks = 2 ** draw(5, 9, *shape)  # 32 to 256 tokens, whose border may be off by one
    borders = chunks * (1 + draw(0, 2**30, *shape) % (T // chunks).clamp(min=1)) + draw(-1, 2, *shape)
    cuts = torch.where(kinds < 2, borders, cuts)
    rarest = ids.where(ids < bos, 0).argmax(dim=1)  # the highest id: cut just before it and just after
    cuts = torch.where(kinds == 2, rarest + draw(0, 2, *shape), cuts)
    cuts = torch.where(kinds == 3, starts + draw(0, 2, *shape), cuts)
    cuts[0, 0] = T - 1  # the last token alone
    for cut in cuts.clamp(1, T - 1):
        kept = positions < cut[:, None]
        changed = altered(kept)
        leaks = kept & (movement(changed) > PROBE_NOISE + PROBE_MARGIN * noise)
        for _ in range(PROBE_REPEATS):
            if not leaks.any():
                break
            suspects, others = choose(leaks.any(dim=1)), altered(nothing)
            control(suspects, others)
            changed = altered(kept) if B == 1 else changed  # without other rows another future is all that can differ
            moved = movement(torch.where(suspects, changed, others))
            leaks &= suspects & (moved > PROBE_NOISE + PROBE_MARGIN * noise)
        if leaks.any():
            raise RuntimeError(
                f"the model sees the future: logits at position {int(leaks.nonzero()[0, 1])} changed when only later "
                "tokens changed"
            )


def read(rows, index):
    """A copy of the rows at `index`, an array: int64 [B, T + 1]."""
    return torch.from_numpy(rows[index].astype(np.int64))
