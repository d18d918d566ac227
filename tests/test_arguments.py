"""Checks what all commands answer to a line that they do not understand: one line that names it, and an exit code."""

import shlex

import pytest

import ledger
import prepare
from swarm import hub, wave

JOIN = "join url --tag t --agent"
WRONG = {  # words of the answer: the lines
    prepare.parse_arguments: {
        "argument --dataset": ["--dataset wikipedia"],
        "argument --seq-len": ["--seq-len 0"],
        "argument --time-budget": ["--time-budget 0", "--time-budget nan"],
        "argument --vocab-size": ["--vocab-size 70000"],
        "argument --val-rows": ["--val-rows -1"],
        "--num-shards": ["--num-shards 9999", "--num-shards 3 --dataset local"],
        "--text": ["--text a.txt --dataset tinystories"],
        "--bogus": ["--bogus"],
    },
    ledger.main: {
        "required: tag, --until": ["start"],
        "required: --until": ["start x"],
        "--until soon: ": ["start x --until soon"],
        "swarm/hub.py join": ["start a/b --until 9"],
        "opem": ["opem"],
        "--status": ["--status"],
        "unrecognized arguments: x": ["keep x"],
        "required: when": ["until"],
    },
    hub.parse_arguments: {
        "invalid choice": ["push"],
        "required: --agent": ["join url --tag t"],
        "argument --tag: take letters": ["join url --tag a/b --agent a"],
        "argument --agent: take letters": [f"{JOIN} 'a b'", f"{JOIN} .."],
        "argument url: must be a url": ["join -- --upload-pack=x --tag t --agent a"],
        "7 digits or more": ["adopt abc123", "adopt HEAD"],
        "must be one line": ["say ' '", "say 'a\nb'", f"say {'a' * 501}", "say 'orders to a terminal: \x1b[2J'"],
    },
    wave.parse_arguments: {
        "required: name": ["new", "new -x", "commit"],
        "argument name": ["new a/b", "new .."],
        "required: message": ["commit deeper"],
        "argument --cpus": ["run --cpus 0", "run --gpus 1 --cpus 1"],
        "argument --wait": ["run --wait soon", "run --wait 0"],
        "unrecognized arguments: deeper": ["run deeper"],
        "invalid choice": ["submit"],
        "required: new | commit | run | clean": [""],
    },
}
LINES = [(parse, words, line) for parse, wrong in WRONG.items() for words, lines in wrong.items() for line in lines]


@pytest.mark.parametrize(("parse", "words", "line"), LINES, ids=[f"{item[0].__module__} {item[2]}" for item in LINES])
def test_a_wrong_line_is_answered_in_one(parse, words, line, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(shlex.split(line))
    said = capsys.readouterr().err
    if isinstance(stopped.value.code, str):  # which Python prints, and exits with 1
        said += f"{stopped.value.code}\n"
    assert stopped.value.code != 0 and said.count("\n") == 1 and words in said
