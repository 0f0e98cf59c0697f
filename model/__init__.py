"""What all three commands share.

    front.py              a folder becomes its family: FAMILIES, tokenizer, template, image processor; a
                          template is a program of others: it is tried within bounds first
    family.py             what families share: texts to ids, pictures to pixels, features, positions
    llava.py              LLaVA-1.5, LLaVA-1.6, LLaVA-OneVision and imported Bunny, their templates
    qwen.py               Qwen2-VL, Qwen2.5-VL, Qwen3-VL
    tiles.py              Idefics3, SmolVLM, InternVL3, Gemma 3
    vlm.py                load, encode once, naive and packed forward
    generation.py         what a model answers
    ask.py                put a question to a URL, a model folder, or a file of replies
    command.py            options from a dataclass, the resumable store, the lock, ranks under torchrun
    import_checkpoint.py  original LLaVA and Bunny folders into llava-hf folders: a command of its own
"""
