"""The parts of eval_hallu.py, which training uses, too.

    metrics.py      POPE, CHAIR, MMHal and the built-in world's measures
    amber.py        AMBER's measures
    stats.py        answers joined to questions, counts added up, intervals
    readers.py      what a text says: yes or no, a rating, a list
    words.py        the nouns of a caption, by rules
    objects.py      which objects a caption names and an image holds
    benchmarks.py   the benchmarks' published files
    answers.py      let a model answer: batched, resumed, over ranks
    compare.py      which of two models is better: paired differences
    dialogue.py     ask a model about a picture: in the terminal, or on a page
    judge.txt       what a judge is asked
    extraction.txt  what lists a caption's objects is asked
    page.py         the one look of all pages
"""
