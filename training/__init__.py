"""The parts of train_dpo.py.

    options.py     the options, the keys of --set, the presets, the name of a run
    files.py       raw records out of JSON, parquet, arrow, gzip, or a folder of such
    records.py     pairs in every published format, and their check
    batches.py     which pairs a step takes, read ahead and made into tokens and pixels
    reference.py   the frozen reference's log-probs, kept per pair
    objectives.py  the losses of other papers than mDPO
    optimiser.py   ZeRO-2 by hand around any elementwise torch optimiser
    shard.py       --shard: splits a base that one GPU cannot hold over ranks
    checkpoint.py  save, resume, log, stop
    plan.py        steps, tokens, GiB per GPU, and what cannot fit
    look.py        does the model look? margins with its own and other images, KL
    report.py      one run, or several side by side, as one HTML page: a command of its own
"""
