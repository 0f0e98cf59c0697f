"""tests/rehearse.py itself, at tiny sizes: a random checkpoint is written and trained on two pairs."""
import re
import sys
from types import SimpleNamespace

import pytest
import rehearse
from conftest import run_forked

import train_dpo


def in_process():
    """In a fork: the training that the rehearsal starts runs here, without the imports' seconds."""
    def run(words, check):
        sys.argv = [str(word) for word in words[1:]]
        train_dpo.main()
    rehearse.subprocess = SimpleNamespace(run=run)


@pytest.mark.parametrize("preset", rehearse.WRITTEN)
def test_it_is_written_and_trains_two_steps(tmp_path, preset):
    code, said = run_forked(rehearse.main, [preset, "--tiny", "--keep", str(tmp_path)], in_process)
    assert code == 0, said
    losses = re.findall(r"^step (\d): loss (\d\.\d+), \d+ tokens/s, \d+ s$", said, re.MULTILINE)
    assert [step for step, _ in losses] == ["1", "2"] and losses[0][1] == "2.0794"               # 3 ln 2
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert re.search(r"^at most \d+\.\d GiB; \d+ s of processor time in all", said, re.MULTILINE)
