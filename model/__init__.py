"""What all three commands share.

    front.py              a family is a class: texts to ids, pictures to pixels, features, positions
    template.py           a chat template is a program of others: it is tried within bounds first
    vlm.py                load, encode once, naive and packed forward, generate
    ask.py                put a question to a URL, a model folder, or a file of replies
    command.py            options from a dataclass, the resumable store, the lock, ranks under torchrun
    import_checkpoint.py  original LLaVA and Bunny folders into llava-hf folders: a command of its own
"""
