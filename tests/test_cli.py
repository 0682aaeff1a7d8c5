"""The command line: quick help, lazy verbs, and one message per error."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest
import typer

import luthier
from luthier import cli
from luthier.config.arguments import ConfigArgument, OverridesArgument
from luthier.errors import DataError, LuthierError

CONFIG = "base_model: m\ndatasets:\n  - path: d.jsonl\n    type: alpaca\n"


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """verb(name, function): what the verb runs in this test."""

    def install(name: str, function: Callable[..., object]) -> None:
        module = types.ModuleType("verb_of_a_test")
        module.command = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "verb_of_a_test", module)
        overrides = cli.VERBS[name].takes_overrides
        monkeypatch.setitem(cli.VERBS, name, cli.Verb("verb_of_a_test:command", "Help.", overrides))

    return install


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "cfg.yml"
    path.write_text(CONFIG)
    return str(path)


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from luthier.cli import main; main(['--help']); "
        "print(sorted({'torch', 'pydantic', 'transformers', 'typer', 'rich', 'numpy'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):  # the best of three, since other tests run beside this one
        began = time.perf_counter()
        out = run_python(code)
        seconds.append(time.perf_counter() - began)
    assert out.splitlines()[-1] == "[]"
    assert all(f"  {name} " in out for name in cli.VERBS)
    assert min(seconds) < 0.4


def test_importing_the_package_sets_openmp_and_imports_no_torch():
    code = "import sys, luthier, os; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    assert run_python(code).split()[1] == "False"
    assert "Config" in dir(luthier)
    with pytest.raises(AttributeError, match="nothing"):
        _ = luthier.nothing


def test_every_verb_exists():
    for name, each in cli.VERBS.items():
        module = cli.__file__ and Path(cli.__file__).parents[1] / (
            each.target.split(":")[0].replace(".", "/") + ".py"
        )
        assert module.is_file(), name
        assert f"def {each.target.split(':')[1]}(" in module.read_text(), name


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "Usage"),
        (["--version"], 0, luthier.__version__),
        (["trian"], 2, "Did you mean train?"),
        (["cfg.yml"], 2, "luthier train cfg.yml"),
        (["--verbose"], 2, "no option --verbose"),
        (["train"], 2, "a config is missing"),
        (["train", "nope.yml"], 2, "nope.yml: there is no such file"),
        (["train", "--help"], 0, "micro_batch_size"),
        (["doctor", "--help"], 0, "--json"),
        (["doctor", "--nope"], 2, "--nope"),
    ],
)
def test_first_steps(arguments, status, words, capfd):
    assert cli.main(arguments) == status
    out, err = capfd.readouterr()
    assert words in (out if status == 0 or not arguments else err)
    assert "Traceback" not in err


def test_config_schema(capfd):
    assert cli.main(["config-schema"]) == 0
    assert "base_model" in json.loads(capfd.readouterr().out)["properties"]


def test_train_is_called_with_config_and_overrides(verb, config):
    calls = []

    def command(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
        calls.append((config, overrides))

    verb("train", command)
    assert cli.main(["train", config, "--seed", "3", "lora_r=4", "adapter=lora", "--debug"]) == 0
    assert calls == [(Path(config), ["--seed", "3", "lora_r=4", "adapter=lora"])]


def test_train_reports_what_is_wrong_before_it_imports_torch(config):
    code = (
        "import sys; from luthier.cli import main\n"
        "for wrong in ['lora_rr=3'], ['--nnodes', '2'], ['--num-processes', 'two']:\n"
        f"    print(main(['train', {config!r}, *wrong]))\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["2", "2", "2", "[]"]
    assert "error: command line: lora_rr is not a key of the config. Did you mean lora_r?\n" in done.stderr
    assert "--rdzv-endpoint HOST:PORT" in done.stderr and "Invalid value for '--num-processes'" in done.stderr


@pytest.mark.parametrize("written", [["--rows", "5"], ["--rows=5"], ["rows=5"]])
@pytest.mark.parametrize("name", ["max-rows", "max_rows"])
def test_an_option_may_be_written_as_a_key_is(verb, config, written, name):
    calls = []

    def command(
        config: ConfigArgument, overrides: OverridesArgument = None, max_rows: Annotated[int, typer.Option()] = 3
    ) -> None:
        calls.append((overrides, max_rows))

    verb("preview", command)
    arguments = [each.replace("rows", name) for each in written]
    assert cli.main(["preview", config, "max_steps=5", *arguments, "--seed", "1"]) == 0
    assert calls == [(["max_steps=5", "--seed", "1"], 5)]


def test_a_key_of_the_config_goes_before_an_option_of_its_name():
    assert cli.as_option("--lora_r", {"--lora-r"}) == "--lora_r"
    assert cli.as_option("num_rows=1", {"--num-rows"}) == "--num-rows=1"
    for other in ("num_rows", "-num_rows", "a num_rows=1", "--other"):
        assert cli.as_option(other, {"--num-rows"}) == other


def test_other_verbs_pass_overrides_through(verb, config):
    calls = []

    def command(
        config: ConfigArgument, overrides: OverridesArgument = None, rows: Annotated[int, typer.Option()] = 3
    ) -> None:
        calls.append((config, overrides, rows))

    verb("preview", command)
    assert cli.main(["preview", config, "--lora_r", "8", "--rows", "5", "seed=1", "--bf16=false"]) == 0
    assert calls == [(Path(config), ["--lora_r", "8", "seed=1", "--bf16=false"], 5)]


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (LuthierError("mend it"), 1, "error: mend it\n"),
        (DataError("d.jsonl:3: no output"), 1, "error: d.jsonl:3: no output\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(28, "No space left on device", "out/x"), 1, "error: out/x: No space left on device"),
        (ValueError("odd"), 1, "internal error: ValueError: odd"),
    ],
)
@pytest.mark.parametrize("name", ["train", "generate"])
def test_errors(verb, config, capfd, name, error, status, message, debug):
    def fails(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
        raise error

    verb(name, fails)
    assert cli.main([name, config, *(["--debug"] if debug else [])]) == status
    err = capfd.readouterr().err
    assert message in err
    assert ("Traceback" in err) == debug
    assert ("--debug" in err) == (isinstance(error, ValueError | OSError) and not debug)


@pytest.mark.parametrize(("rank", "message"), [("0", "error: mend it\n"), ("3", "error: rank 3: mend it\n")])
def test_of_several_processes_each_is_named_and_the_first_speaks_first(
    verb, config, capfd, monkeypatch, rank, message
):
    def fails(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
        raise LuthierError("mend it")

    waits = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    verb("train", fails)
    assert cli.main(["train", config]) == 1
    assert capfd.readouterr().err == message
    assert bool(waits) == (rank == "3")


def test_status_of_a_verb_is_the_status_of_the_process(verb, config):
    verb("generate", lambda: 3)
    assert cli.main(["generate"]) == 3


def test_messages_go_to_standard_error(verb, config, capfd):
    def logs(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
        logging.getLogger("luthier").info("20 steps")
        logging.getLogger("luthier.data").warning("3 rows dropped")
        logging.getLogger("other").info("not ours")

    verb("train", logs)
    assert cli.main(["train", config]) == 0
    assert capfd.readouterr() == ("", "20 steps\nwarning: 3 rows dropped\n")
    assert not logging.getLogger("luthier").handlers


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m luthier.cli config-schema | head -c 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith("{")
