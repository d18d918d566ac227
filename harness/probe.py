"""
The probe: a logit may depend on its own token and on earlier ones of its row, and on nothing else.

Every cut, 1 .. T - 1, is tried in one of the rows: the tokens behind it are replaced, and no logit before it may move.
Sampled cuts would miss a leak at a fixed place of a long row.

Rounding moves logits, too: in a mixture of experts, say, other tokens change the order of sums. The probe measures this
noise by repeating the input, and by changing only other rows. It tries a suspect again: a leak moves it every time,
chance does not.
"""

import numpy as np
import torch

# A movement is the largest change of a position's logits, in standard deviations of the logits of its row.
# A leak: other later tokens move logits by more than ROUNDING + MARGIN x noise, at first and in REPEATS more tries.
REPEATS = 4
ROUNDING = 1e-4
MARGIN = 3

# The model sees other rows, or is random, if the noise is over NOISE_LIMIT at more than NOISY_POSITIONS of positions
NOISE_LIMIT = 0.05
NOISY_POSITIONS = 0.01

LOWEST = -50.0  # of logits below the largest: a mask of -1e9 would inflate the deviation, and hide a leak


class Probe:
    """
    One probe of a model, on rows drawn at random: `Probe(predict, rows, batch_size, vocab_size).run()`.

    `predict(ids)` takes int64 [B, T] on the CPU and returns float32 logits [B, T, V] on any device; `rows` is uint16
    [R, T + 1]. run() raises RuntimeError, naming the first position, if the model sees later tokens or other rows, or
    if it gives two answers to one input.
    """

    def __init__(self, predict, rows, batch_size, vocab_size):
        self.predict = predict
        self.vocab_size = vocab_size
        self.generator = torch.Generator()  # of its own: train.py seeds torch's, and a model could know what comes
        self.generator.seed()

        # B rows of T tokens, and the cuts of each: int64 [passes, B]
        index = torch.randperm(len(rows), generator=self.generator).numpy()
        self.ids = torch.from_numpy(rows[np.resize(index, batch_size)][:, :-1].astype(np.int64))
        self.B, self.T = self.ids.shape
        self.cuts = self.draw_cuts()

        # a document starts just before each row's first cut, so that a look across its border is seen
        bos = int(self.ids[0, 0])
        self.ids[torch.arange(self.B), self.cuts[0] - 1] = bos

        # and one cut more, just behind the rarest token: ids grow with rarity, and the special ones come last
        rarest = self.ids.where(self.ids < bos, 0).argmax(dim=1)
        self.cuts = torch.cat([self.cuts, (rarest + 1).clamp(1, self.T - 1)[None]])

        # what the model says of the true rows, to which everything is compared
        self.before = list(self.relative_logits(self.ids))
        self.scale = [row.std() for row in self.before]
        self.noise = torch.zeros(self.B, self.T)  # how far logits have moved without a new future

    def run(self):
        self.measure_noise()
        for cuts in self.cuts:
            # each row keeps what is before its cut, and gets another future
            kept = torch.arange(self.T) < cuts[:, None]
            future = self.replace(kept)
            leaks = kept & self.moved(future)
            if leaks.any():
                self.confirm(kept, future, leaks)

    def draw_cuts(self):
        """Each of 1 .. T - 1 once, in any order, and more of them where the last pass has rows left."""
        every = 1 + torch.randperm(self.T - 1, generator=self.generator)
        missing = -len(every) % self.B
        more = self.draw(1, self.T, missing)
        return torch.cat([every, more]).view(-1, self.B)

    def measure_noise(self):
        """Repeat the true rows. Then change one half of the rows and watch the other."""
        self.noise = self.movement(self.ids)
        if (self.noise > NOISE_LIMIT).float().mean() > NOISY_POSITIONS:
            raise RuntimeError(
                "not scored: the model gives two answers to the same input: is dropout on, does it draw at random, or "
                "change from call to call?"
            )
        if self.B == 1:
            return

        # each half in turn stays as it is while the other one changes
        half = torch.randperm(self.B, generator=self.generator)[:, None] < self.B // 2
        for chosen in (half, ~half):
            self.control(chosen, self.replace_all())

    def control(self, chosen, others):
        """Add to the noise how far the chosen rows [B, 1] move when only the others change."""
        movement = self.movement(torch.where(chosen, self.ids, others))
        self.noise = torch.maximum(self.noise, movement.where(chosen, 0))
        moved = (self.noise > NOISE_LIMIT).nonzero()
        if len(moved) > NOISY_POSITIONS * self.noise.numel():
            raise RuntimeError(
                f"not scored: the model sees other rows: logits at position {int(moved[0, 1])} changed when only other "
                "rows of the batch changed; or it takes a scale over the whole batch (dynamic fp8): take it per row; "
                "or it changes from call to call"
            )

    def confirm(self, kept, future, leaks):
        """Try suspects again with the same future, among other rows each time. Returns if none is left."""
        for _ in range(REPEATS):
            # how far do they move without a new future, among these others?
            suspects = self.choose(leaks.any(dim=1))
            others = self.replace_all()
            self.control(suspects, others)

            # and with one? (In a batch of one there are no others: another future is all that can differ)
            if self.B == 1:
                future = self.replace(kept)
            leaks = leaks & suspects & self.moved(torch.where(suspects, future, others))
            if not leaks.any():
                return
        raise RuntimeError(
            f"not scored: the model sees the future: logits at position {int(leaks.nonzero()[0, 1])} changed when only "
            "later tokens changed"
        )

    def choose(self, candidates):
        """Some of the candidate rows, a mask [B, 1]: at most half of all rows, so that others are left, or one."""
        ranks = torch.rand(self.B, generator=self.generator) * candidates
        lowest = ranks.sort().values[-max(1, self.B // 2)]
        return ((ranks >= lowest) & candidates)[:, None]

    def replace(self, kept):
        """Another token wherever the mask [B, T] does not keep it."""
        others = (self.ids + self.draw(1, self.vocab_size, self.B, self.T)) % self.vocab_size
        return torch.where(kept, self.ids, others)

    def replace_all(self):
        return self.replace(torch.zeros(self.B, self.T, dtype=torch.bool))

    def moved(self, ids):
        """Where logits moved by more than rounding: bool [B, T]."""
        return self.movement(ids) > ROUNDING + MARGIN * self.noise

    def movement(self, ids):
        """How far logits are from those of the true rows, in standard deviations: [B, T]."""
        farthest = []
        for new, old, scale in zip(self.relative_logits(ids), self.before, self.scale, strict=True):
            farthest.append((new - old).abs().amax(dim=-1) / scale)
        return torch.stack(farthest).cpu()

    def relative_logits(self, ids):
        """Row by row, for the memory: logits [T, V] below the largest one of their position."""
        for row in self.predict(ids):
            yield (row - row.amax(dim=-1, keepdim=True)).clamp(min=LOWEST)

    def draw(self, low, high, *shape):
        return torch.randint(low, high, shape, generator=self.generator)
