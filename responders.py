"""Answers to questions about images from any vision-language model: a folder, or a server by URL.

A file of its own beside vlm.py, which holds the one class that is trained here (LLaVA-1.5's): synth.py's
responders may be any image-text-to-text model of transformers, LLaVA-1.6 first of all, and are only asked.

    answer = load("llava-v1.6-mistral-7b-hf", "cuda", torch.bfloat16, max_new_tokens=1000)
    answer(["dog.jpg"], ["What is this?"])      # -> [{"response": "A dog.", "finished": True}]

`finished` tells whether the model ended its answer by itself, None where that is not known; an answer that a
server failed to give is None. Decoding is greedy, batches are padded on the left, BOS comes once.
"""
import json
from pathlib import Path

import data
from data import UserError

# The published PDS-DPO prompts, as they are: no roles, no template.
RAW = ("{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<image> "
       "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}")


def load(source, device, dtype, max_new_tokens, official=False, saved=None, model_name=None):
    """-> f(image files, questions) -> rows. official: the raw prompt, the answer with the question before it
    and line breaks flattened, as the published pipeline keeps it. saved: file of a server's replies so far.
    Raises UserError for a source that cannot be asked.
    """
    if source.startswith(("http://", "https://")):
        answer = _server(source, max_new_tokens, saved, model_name)
    elif not (Path(source) / "config.json").exists():
        raise UserError(f"--responders {source}: no URL and no model folder; give one of these")
    elif json.loads((Path(source) / "config.json").read_text()).get("model_type") == "llava":
        answer = _llava(source, device, dtype, max_new_tokens, official)
    else:
        answer = _any(source, device, dtype, max_new_tokens, official)

    def echoing(files, questions):
        rows = answer(files, questions)
        return [r and r | {"response": f"{q} {r['response']}".replace("\n", " ")}
                for q, r in zip(questions, rows, strict=True)]
    return echoing if official else answer


def _server(url, max_new_tokens, saved, model_name):
    import chat

    def answer(files, questions):
        asked = [{"id": f"{Path(f).stem}/{data.hash64(q):016x}", "messages": [{"role": "user", "content": [
                     {"type": "image", "path": str(f)}, {"type": "text", "text": q}]}]}
                 for f, q in zip(files, questions, strict=True)]
        said = chat.replies(url, asked, saved, model=model_name or None, max_tokens=max_new_tokens,
                            description="respond")
        return [{"response": said[x["id"]], "finished": None} if x["id"] in said else None for x in asked]
    return answer


def _llava(folder, device, dtype, max_new_tokens, official):
    """LLaVA-1.5's class, as vlm.py loads it."""
    import vlm
    m = vlm.load(folder, dtype=dtype, device=device, template=RAW if official else None)

    def answer(files, questions):
        texts = vlm.generate(m, [[data.read_image(f)] for f in files], questions, max_new_tokens, len(files))
        return [{"response": t, "finished": len(m.front.tokenizer(t, add_special_tokens=False).input_ids)
                 < max_new_tokens} for t in texts]
    return answer


def _any(folder, device, dtype, max_new_tokens, official):
    """Any other model with a processor: LLaVA-1.6 and what came after it."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype=dtype)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} cannot be loaded as a vision-language model ({why}); copy it "
                        "again") from error
    model.requires_grad_(False).eval().to(device)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"                     # else the answer would follow the padding
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if getattr(processor, "patch_size", 0) is None:     # processors saved before it was a setting
        processor.patch_size = model.config.vision_config.patch_size
        processor.vision_feature_select_strategy = "default"
        processor.num_additional_image_tokens = 1
    template = RAW if official else processor.chat_template or tokenizer.chat_template
    if not template:
        raise UserError(f"{folder} has no chat template; copy chat_template.json from the published model")
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}

    @torch.no_grad()
    def answer(files, questions):
        turns = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q}]}]
                 for q in questions]
        texts = [processor.apply_chat_template(t, chat_template=template, add_generation_prompt=True)
                 for t in turns]
        bos = tokenizer.bos_token                       # a template may write it, then the tokenizer must not
        inputs = processor(images=[data.read_image(f) for f in files], text=texts, padding=True,
                           add_special_tokens=not (bos and texts[0].startswith(bos)), return_tensors="pt")
        inputs = {k: x.to(device, dtype) if x.is_floating_point() else x.to(device)
                  for k, x in inputs.items()}
        out = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens,
                             pad_token_id=tokenizer.pad_token_id)
        new = out[:, inputs["input_ids"].shape[1]:].tolist()                          # (R, new tokens)
        said = tokenizer.batch_decode(new, skip_special_tokens=True)
        return [{"response": text.strip(), "finished": bool(ends & set(ids))}
                for text, ids in zip(said, new, strict=True)]
    return answer
