"""The parts of synth.py.

    prompts.py   prompts and questions: from files, a template or a chat model
    images.py    candidate images of a prompt, all guidance scales in one call
    rewards.py   ImageReward, ArmoRM, CLIP and BLIP as rewards
    pairing.py   from scored responses to pairs
    topics/      the shipped prompts, a file a topic
"""
