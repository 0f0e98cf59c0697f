"""What the steps of a run warn of. Part of train_dpo.py."""
if __name__ == "__main__":
    raise SystemExit(print("A part of train_dpo.py; run: python train_dpo.py --help"))

import re

STEPS = 40                                           # the last ones, which are looked at


def warning(lines, o):
    """A sentence with advice, from the log's last STEPS lines, about a margin that stays flat (past the
    warm-up) or chosen responses less likely than at the start; else ""."""
    margin = max(abs(line.get("rewards/margins", 1)) for line in lines)
    chosen = sum(line.get("rewards/chosen", 0) for line in lines)
    if margin < 1e-3 and sum(line["lr"] for line in lines) > o.lr * STEPS / 4:
        return f"rewards/margins is 0 for {STEPS} steps: the model does not learn; raise --lr ({o.lr:g})"
    if len(lines) == STEPS and chosen < -0.1 * STEPS:
        anchor = f" or add an anchor: --loss {o.loss}+ancpo"
        anchored = {"ancpo", "mdpo", "symmpo"} & {*re.split(r"\W", o.loss)}
        return (f"rewards/chosen falls: the chosen responses become less likely; lower --lr ({o.lr:g})"
                f"{'' if anchored else anchor}")
    return ""
