"""The frozen reference's log-probs, kept per pair under a key of all that they were made from.

The key covers token ids (so texts and template) and pixels (so images, their preparation and the draw of the
rejected image); which base it was is checked when a run resumes. Part of train_dpo.py.
"""
import torch

import losses
import vlm


class Reference:
    """reference(batch, features) -> losses.Logps of the model as it was before training.

    What was scored is in `logps` (n, 3), under `key` (n,): both are part of the checkpoint. A pair whose key
    differs, as all do in each epoch with `--set redraw=true`, is scored anew.
    """
    FIELDS = ("chosen", "rejected", "image_rejected")

    def __init__(self, n, model, forward, needs, ranks, base_encodes=False, together=False):
        """needs: the fields to compute. base_encodes: something in front of the language model trains, so the
        policy's features are not the base's. together: all ranks run a forward, or none (--shard)."""
        self.logps = torch.zeros(n, len(self.FIELDS), dtype=torch.float64)
        self.key = torch.zeros(n, dtype=torch.int64)
        self.model, self.forward, self.needs, self.ranks = model, forward, needs, ranks
        self.base_encodes, self.together = base_encodes, together
        self.new = []                                       # places this rank added since the last sync

    def __call__(self, batch, features):
        keys = torch.tensor(batch.keys)
        stale = not torch.equal(self.key[batch.places], keys)
        if self.together:
            stale = any(self.ranks.gather(stale))
        if stale:
            self.score(batch, features)
            self.key[batch.places] = keys
            self.new += batch.places
        exact = torch.promote_types(self.model.model.dtype, torch.float32)
        kept = self.logps[batch.places].to(exact).to(self.model.device)                         # (B, 3)
        fields = {field: kept[:, i] for i, field in enumerate(self.FIELDS) if field in self.needs}
        return losses.Logps(**fields,
                            chosen_tokens=kept.new_tensor([len(pair.chosen) for pair in batch.pairs]),
                            rejected_tokens=kept.new_tensor([len(pair.rejected) for pair in batch.pairs]))

    @torch.no_grad()
    def score(self, batch, features):
        with vlm.base_of(self.model) as base:
            if self.base_encodes:
                features = vlm.encode_images(base, batch)
            found = self.forward(base, batch.pairs, features, self.needs)
        for i, field in enumerate(self.FIELDS):
            if field in self.needs:
                self.logps[batch.places, i] = getattr(found, field).cpu().double()

    def sync(self):
        """Give every rank what the others have added: a pair is scored by one rank."""
        added = (self.new, self.logps[self.new], self.key[self.new])
        for places, logps, key in self.ranks.gather(added):
            self.logps[places], self.key[places] = logps, key
        self.new = []


def before_language_model(name):
    """Whether a weight of this name is in the vision tower or the projector."""
    return not {"language_model", "lm_head"} & set(name.split("."))
