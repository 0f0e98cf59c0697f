"""What a model answers: greedy or drawn, batches of prompts of similar length.

    generate(m, [[image]], ["What is this?"])      texts, of a model of vlm.load
    complete(...)                                  the same, with whether each ended by itself
    continued(m, prompts, [[image]], 64)           token ids, of prompts in token ids
"""
if __name__ == "__main__":
    exit("A part of every command; run: python train_dpo.py --help")

from functools import cache, partial
from itertools import groupby
from typing import NamedTuple

import torch

import data

NEIGHBOURS = 64                # prompts that are padded to one length: padding may move an answer's last bits
LATE = 16                      # a batch ends when all answers have, or all but less than one in so many


class Completion(NamedTuple):
    """What a model said."""
    text: str
    finished: bool             # it ended by itself; else it was cut at max_new_tokens


def complete(m, images, questions, *arguments, **options):
    """A Completion for each question about images (a list of PIL images or Pictures each, possibly empty).

    The rest is as `continued` takes it.
    """
    prompts, prompt_ids = [], cache(m.front.prompt_ids)        # many pictures are asked the same question
    for question, shown in zip(questions, images, strict=True):
        prompts.append(prompt_ids(question, tuple(picture.size for picture in shown)))
    found = []
    for tokens in continued(m, prompts, images, *arguments, **options):
        text = m.front.tokenizer.decode(tokens, skip_special_tokens=True)
        found.append(Completion(text.strip(), tokens[-1] in ends_of(m)))
    return found


def ends_of(m):
    """The tokens that end an answer: what generation_config.json calls an end, and the tokenizer's."""
    own = m.model.generation_config.eos_token_id
    return {m.front.eos_id, *(own if isinstance(own, list) else [own])} - {None}


@torch.no_grad()
def continued(m, prompts, images, max_new_tokens=64, batch_size=64, sample_seed=None, temperature=1.0):
    """The tokens of an answer to each prompt (token ids), its end included if it ended by itself.

    An image's token is never among them, nor one without a name. Greedy; with sample_seed drawn at
    `temperature` (the same seed, inputs and batch size give the same draw) from the softmax that the forwards
    score. Prompts are left-padded, those of similar length together, and at most NEIGHBOURS of them to one
    length: an answer does not depend on how many such run at once. Only the few greedy ones that outlast all
    others of a batch (see LATE) go on as prompts of a later one, so that no batch waits for them: the cache
    that they begin with may differ in its last bits.
    """
    with m.seeing():
        ends = ends_of(m)
        few = partial(few_left, torch.tensor([*ends], device=m.device))
    rows = len(m.model.lm_head.weight)
    options = {"do_sample": False, "output_hidden_states": False, "stopping_criteria": [few],
               "suppress_tokens": [m.front.image_token_id, *range(m.words, rows)]}
    if sample_seed is not None:
        options |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0,
                    "stopping_criteria": None}
    found = [None] * len(prompts)
    # Eagerly: a compiled part would be compiled again for generate's shapes.
    gpus = [m.device] if m.device.type == "cuda" else []
    with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices=gpus):
        torch.manual_seed(sample_seed or 0)
        for batch, width in padded(prompts, batch_size):
            inputs = m.front.tokenizer.pad({"input_ids": [prompts[i] for i in batch]},
                                           padding="max_length", max_length=width,
                                           padding_side="left", return_tensors="pt").to(m.device)
            if prepared := [image for i in batch for image in m.front.prepared(images[i])]:
                inputs |= m.front.on_device(m.model, prepared)
                if m.front.token_types:
                    inputs[m.front.token_types] = (inputs.input_ids == m.front.image_token_id).long()
            with m.seeing():
                new = m.model.generate(**inputs,
                                       **options,
                                       max_new_tokens=max_new_tokens,
                                       eos_token_id=[*ends],
                                       pad_token_id=m.front.eos_id)
            for i, tokens in zip(batch, new[:, width:].tolist(), strict=True):              # (R, new)
                ended = [n for n, token in enumerate(tokens, 1) if token in ends]
                found[i] = tokens[:ended[0]] if ended else tokens
    late = [i for i, tokens in enumerate(found) if tokens[-1] not in ends and len(tokens) < max_new_tokens]
    if late:
        begun = [prompts[i] + found[i] for i in late]
        more = continued(m, begun, [images[i] for i in late], max_new_tokens, batch_size)
        for i, tokens in zip(late, more, strict=True):
            found[i] = (found[i] + tokens)[:max_new_tokens]
    return found


def few_left(ends, ids, scores):
    """A StoppingCriteria: whether few rows of ids (R, T) have not ended; an end is repeated to the last."""
    going = ~torch.isin(ids[:, -1], ends)
    return LATE * going.sum() < len(ids)


def padded(prompts, batch_size):
    """Batches of prompts' places, each with the length that its prompts are padded to."""
    order = range(len(prompts))
    if len(prompts) > batch_size:
        order = sorted(order, key=lambda i: len(prompts[i]))
    width = {}
    for some in data.chunks(order, min(batch_size, NEIGHBOURS)):
        width |= dict.fromkeys(some, max(len(prompts[i]) for i in some))
    for longest, alike in groupby(sorted(order, key=width.get), width.get):
        for batch in data.chunks([*alike], batch_size):
            yield batch, longest


def generate(*arguments, **options):
    """The texts of complete(), which takes the same arguments."""
    return [completion.text for completion in complete(*arguments, **options)]
