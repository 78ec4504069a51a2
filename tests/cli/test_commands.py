"""Command lines: verbs, scripts, help, and the rule from errors to exit codes."""

import os
import signal
import subprocess
import sys

import pytest
import tool
from paths import TOOLS

from megatron_owl2.cli.command import Command, UsageError
from megatron_owl2.cli.main import VERBS, main, module_of
from megatron_owl2.errors import ConfigError, StorageError
from megatron_owl2.utils.suggest import did_you_mean

SCRIPTS = [verb for verb in VERBS if verb != "train"]


def exit_code(call) -> int:
    """What a command returns, or exits with from its parser."""
    try:
        return call()
    except SystemExit as stop:
        return stop.code


def python(code: str) -> list[str]:
    """The words that a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_help_lists_every_verb_in_a_line(capsys):
    assert exit_code(lambda: main(["--help"])) == 0
    said = capsys.readouterr().out
    for verb in VERBS:
        (line,) = [line for line in said.splitlines() if line.startswith(f"  {verb} ")]
        assert 40 < len(line) <= 100 and line.endswith(".")
    assert f"owl2 {VERBS[0]}" not in said


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    assert exit_code(lambda: main([verb, "--help"])) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "usage: megatron_owl2.train" if verb == "train" else f"usage: owl2 {verb} "
    )
    assert "python tools/" not in said.partition("options:")[0]


@pytest.mark.parametrize("verb", SCRIPTS)
def test_every_script_is_its_verb(verb, monkeypatch, capsys):
    name = verb.replace("-", "_")
    script = tool.load(f"{name}.py")
    assert script.main == module_of(verb).main
    monkeypatch.setattr(sys, "argv", [str(TOOLS / f"{name}.py"), "--help"])
    assert exit_code(script.main) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: {name}.py ") and f"owl2 {verb}" not in said


def test_there_is_a_script_for_every_verb():
    assert {path.stem for path in TOOLS.glob("*.py")} == {s.replace("-", "_") for s in SCRIPTS}


def test_help_of_the_second_mode_names_it(capsys):
    assert exit_code(lambda: main(["evaluate", "score", "--help"])) == 0
    assert capsys.readouterr().out.startswith("usage: owl2 evaluate score ")


def test_an_unknown_verb_is_answered_with_the_nearest(capsys):
    assert exit_code(lambda: main(["genrate", "--checkpoint", "x"])) == 2
    assert "there is no verb 'genrate'; did you mean 'generate'?" in capsys.readouterr().err
    assert exit_code(lambda: main(["xyzzy"])) == 2
    assert f"known: {', '.join(VERBS)}" in capsys.readouterr().err
    assert exit_code(lambda: main([])) == 2
    assert did_you_mean("stpes", ["steps", "output"], "train.") == "did you mean 'train.steps'?"
    assert did_you_mean(7, ["steps", "output"]) == "known: steps, output"


def test_parsers_import_neither_torch_nor_megatron():
    code = (
        "import contextlib, io, sys\n"
        "from megatron_owl2.cli.main import VERBS, main\n"
        "for arguments in [['--help']] + [[v, '--help'] for v in VERBS]:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        main(arguments)\n"
        "print(*sys.modules)"
    )
    loaded = python(code)
    assert "megatron_owl2.cli.report" in loaded
    assert not {"torch", "megatron", "matplotlib", "PIL"} & set(loaded)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["plan", "--config", "no.yaml", "--gpus", "1", "--gpu-memory", "80"], 2, "no.yaml does"),
        (["generate", "--checkpoint", "no", "--prompt", "x"], 2, "no is not a directory"),
        (["generate", "--checkpoint", "no", "--prompt", "x", "--image", "i.jpg"], 2, "i.jpg"),
        (["evaluate", "score", "--task", "vqav2", "--predictions", "no", "--gold", "no"], 2, "no"),
        (["convert-from-hf", "--owl2", "no", "--output", "new"], 2, "no is not a directory"),
        (["convert-to-hf", "--checkpoint", "no", "--output", "new"], 2, "no does not exist"),
        (["convert-to-hf", "--checkpoint", "no", "--output", "."], 2, ". exists already"),
        (["verify-checkpoint", "--checkpoint", "no", "--against", "no"], 2, "no"),
        (["preprocess-data", "--input", "no", "--format", "coco", "--output", "o"], 1, "no does"),
        (["prepare-downloads", "--corpus", "laion", "--output", "o"], 1, "--input is missing"),
        (["build-mixture", "--recipe", "no.yaml", "--folder", "o"], 1, "no.yaml"),
        (["check-data", "no"], 2, "no"),
        (["index-data", "no"], 2, "no"),
        (["show-sample", "--data", "no", "--tokenizer", "no.model"], 2, "no.model"),
        (["show-sample", "--config", "no.yaml"], 2, "no.yaml does not exist"),
        (["plot-run", "no", "--output", "o.png"], 2, "no"),
        (["report", "--evaluation", "x=no", "--output", "o"], 2, "no"),
        (["train", "--config", "no.yaml"], 2, "config file no.yaml does not exist"),
    ],
)
def test_errors_are_one_line_and_a_code(arguments, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_code(lambda: main(arguments)) == code
    complaint = capsys.readouterr().err
    lines = [line for line in complaint.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert "Traceback" not in complaint and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert-from-hf", "--output", "x"], "give --owl2 or --owl1, or both"),
        (
            ["convert-to-hf", "--checkpoint", "c", "--output", "x", "--max-shard-gib", "0"],
            "positive",
        ),
        (["verify-checkpoint", "--checkpoint", "c"], "give either --against, or both"),
        (["plan", "--config", "c", "--gpus", "0", "--gpu-memory", "80"], "0 is not a positive"),
        (["check-data", "d", "--decode", "2"], "2 is not from 0 to 1"),
        (["show-sample"], "give --data, --config, or both"),
        (["show-sample", "--config", "c", "--key", "k"], "name it with --data"),
        (["show-sample", "--data", "d", "--row", "1"], "leave out --data"),
        (["show-sample", "--data", "d", "data.seed=1"], "section.key=value needs --config"),
        (["show-sample", "--data", "d"], "give --tokenizer"),
        (["preprocess-data", "--input", "i", "--format", "coco", "--out", "x"], "--output"),
    ],
)
def test_options_that_do_not_fit_show_the_usage(arguments, message, capsys):
    assert exit_code(lambda: main(arguments)) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith(f"usage: owl2 {arguments[0]} ") and message in complaint


def command(run, **options) -> Command:
    return Command(verb="x", help=None, add_arguments=lambda parser: None, run=run, **options)


def raising(error: BaseException):
    def run(options):
        raise error

    return run


def test_the_rule_from_errors_to_exit_codes(capsys):
    assert command(lambda options: 7).main([], "x") == 7
    for error in (ConfigError("bad"), StorageError("bad"), OSError("bad")):
        assert command(raising(error)).main([], "x") == 2
        assert command(raising(error), error_code=1).main([], "x") == 1
        assert capsys.readouterr().err == "error: bad\n" * 2
    with pytest.raises(RuntimeError, match="a bug"):
        command(raising(RuntimeError("a bug"))).main([], "x")
    assert exit_code(lambda: command(raising(UsageError("no"))).main([], "x")) == 2
    assert capsys.readouterr().err == "usage: x [-h]\nx: error: no\n"


def test_other_ranks_say_which_they_are(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    assert command(raising(ConfigError("bad"))).main([], "x") == 2
    assert capsys.readouterr().err == "error: rank 3: bad\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_end_with_the_sentence_of_the_command(number, capsys):
    def run(options):
        os.kill(os.getpid(), number)
        signal.pause()

    stopped = command(run, interrupted="interrupted; go on", sigterm_interrupts=True)
    assert stopped.main([], "x") == 130
    assert capsys.readouterr().err == "interrupted; go on\n"
    if number == signal.SIGINT:
        assert command(run).main([], "x") == 130
        assert capsys.readouterr().err == "interrupted\n"


def test_the_package_is_imported_without_torch_and_changes_nothing():
    code = (
        "import sys, warnings\n"
        "filters = list(warnings.filters)\n"
        "import megatron_owl2 as owl2\n"
        "assert warnings.filters == filters and set(owl2.__all__) <= set(dir(owl2))\n"
        "assert issubclass(owl2.Owl2Error, Exception)\n"
        "config = owl2.load_config('examples/7b/pretrain.yaml', ['train.steps=10'])\n"
        "assert config.train.steps == 10\n"
        "assert owl2.ShardedDataset.__getitem__\n"
        "print(*sys.modules)"
    )
    loaded = python(code)
    assert "megatron_owl2.data.shards.dataset" in loaded
    assert not {"torch", "megatron", "megatron_owl2.mcore"} & set(loaded)


def test_a_name_that_the_package_lacks_is_an_attribute_error():
    import megatron_owl2

    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        megatron_owl2.lode  # noqa: B018
