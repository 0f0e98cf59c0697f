"""The frozen reference's log-probs, kept per pair under a hash of everything they depend on.

The key covers token ids (so texts and template) and pixels (so images, their preparation and the draw of the
rejected image); which base it was is checked when a run resumes. Part of train_dpo.py.
"""
if __name__ == "__main__":
    exit("A part of train_dpo.py; run: python train_dpo.py --help")

from contextlib import suppress
from pathlib import Path

import torch

import data
from model import command, vlm
from training import checkpoint

# What decides, besides the pairs, which of them are scored together: sums of other rows have other bits.
SAME = "seed batch micro_batch forward compile image_rejected".split()


def cache_file(o, base, needs, pairs, what):
    """The file that keeps a reference for other runs (or None), named by all that decides it. base: which
    model, and how it computes. needs: the fields. what: the pairs are for."""
    if o.reference_cache:
        about = base, what, pairs.tokens, sorted(needs), [getattr(o, name) for name in SAME]
        return Path(o.reference_cache, f"{command.fingerprint(repr(about).encode())}.safetensors")


class Reference:
    """reference(batch, features) -> losses.Logps of the model as it was before training.

    Log-probs are kept in `logps` (n, F), on the device, under `key` (n,): both are part of the checkpoint. A
    pair whose key has changed, as all do in each epoch with `--set redraw=true`, is scored again.
    """
    def __init__(self, n, model, forward, needs, ranks, together=False, file=None):
        """needs: the fields to compute; with none of them, nothing ever runs. together: all ranks run a
        forward, or none (--shard). file: that of cache_file, from which it begins; a torn one is made again.
        """
        self.fields = sum(data.grouped(needs).values(), [])
        exact = torch.promote_types(model.model.dtype, torch.float32)
        self.logps = torch.zeros(n, len(self.fields), dtype=exact, device=model.device)
        self.key = torch.zeros(n, dtype=torch.int64)
        self.model = model
        self.forward = forward
        self.needs = needs
        self.ranks = ranks
        self.together = together
        self.new = []                                       # places this rank added since the last sync
        self.file = file
        if file:
            with suppress(data.UserError):
                self.load(checkpoint.read(file)[0])

    def __call__(self, batch, features):
        keys = torch.tensor(batch.keys)
        places = command.send(torch.tensor(batch.places), self.logps.device)
        stale = self.fields and not torch.equal(self.key[batch.places], keys)
        if self.together:
            stale = any(self.ranks.gather(stale))
        if stale:
            self.logps[places] = self.score(batch, features)
            self.key[batch.places] = keys
            self.new += batch.places
        return vlm.as_logps(self.logps[places].T.flatten(), batch.pairs, self.needs)

    @torch.no_grad()
    def score(self, batch, features):
        """The log-probs of a batch (B, F). If something in front of the language model trains, the policy's
        features are not the base's."""
        behind = self.model.front.language, "lm_head"
        trained = [name for name, p in self.model.model.named_parameters() if p.requires_grad]
        with vlm.base_of(self.model) as base:
            if not all(name.startswith(behind) for name in trained):
                features = vlm.encode_images(base, batch)
            found = self.forward(base, batch.pairs, features, self.needs)
        logps = [getattr(found, field) for field in self.fields]
        return torch.stack(logps, 1)

    def sync(self):
        """Share new log-probs among the ranks: a pair is scored by one rank."""
        added = self.new, self.logps[self.new].cpu(), self.key[self.new]
        for places, logps, key in self.ranks.gather(added):
            self.logps[places] = logps.to(self.logps.device)
            self.key[places] = key
        self.new = []

    def state(self):
        """What a checkpoint holds of it."""
        return {"reference/logps": self.logps.cpu().double(), "reference/key": self.key}   # MPS: no float64

    def load(self, tensors):
        """Take up state()."""
        self.logps.copy_(tensors.pop("reference/logps"))
        self.key = tensors.pop("reference/key")

    def keep(self):
        """Write the file for other runs. Two that do so at once write the same log-probs."""
        if self.file:
            checkpoint.write(self.file, self.state(), {})
