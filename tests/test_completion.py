"""Shell completion: the words are those of the real commands, and the shells that are here complete with them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from luthier import cli
from luthier.completion import EVERYWHERE, options_of
from luthier.config import Config


def script(shell: str, capfd: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["completion", shell]) == 0
    return capfd.readouterr().out


def in_bash(text: str, words: list[str], folder: Path) -> list[str]:
    """What bash would offer for the last of the words."""
    asked = f"""{text}
COMP_WORDS=({" ".join(f"'{word}'" for word in words)})
COMP_CWORD={len(words) - 1}
_luthier 2>/dev/null
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True, cwd=folder, timeout=60)
    return done.stdout.split()


@pytest.mark.parametrize("name", cli.VERBS)
def test_options_are_those_of_the_command_itself(name: str) -> None:
    """The reference is what typer makes of the function; keys of the config are added where overrides are taken."""
    verb = cli.VERBS[name]
    app = typer.Typer(add_completion=False)
    app.command()(cli._function(verb))
    parameters = typer.main.get_command(app).params
    options = [each for each in parameters if each.param_type_name == "option"]
    own = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    config = Config.from_flat({"base_model": "m", "datasets": [{"path": "p", "type": "alpaca"}]})
    keys = {f"--{key}" for key in config.flat()}
    found = options_of(verb)
    if verb.takes_overrides:
        assert keys <= set(found)
        assert set(found) - keys == (own | set(EVERYWHERE)) - keys
    else:
        assert set(found) == own | set(EVERYWHERE)


def test_it_is_printed_without_torch() -> None:
    code = (
        "import sys; from luthier.cli import main; main(['completion', 'fish']); "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_bash_completes(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = script("bash", capfd)
    (tmp_path / "cfg one.yml").touch()
    for name in ("cfg.yml", "cfg.yaml", "cfg.txt"):
        (tmp_path / name).touch()
    (tmp_path / "cfgs").mkdir()
    assert in_bash(text, ["luthier", "tr"], tmp_path) == ["train"]
    assert set(in_bash(text, ["luthier", ""], tmp_path)) >= set(cli.VERBS)
    assert in_bash(text, ["luthier", "train", "cfg.yml", "--lora_alph"], tmp_path) == ["--lora_alpha"]
    assert in_bash(text, ["luthier", "generate", "run", "--top"], tmp_path) == ["--top-p", "--top-k"]
    assert in_bash(text, ["luthier", "completion", "z"], tmp_path) == ["zsh"]
    assert in_bash(text, ["luthier", "--debug", "completion", "z"], tmp_path) == ["zsh"]
    assert in_bash(text, ["luthier", "--debug", "tr"], tmp_path) == ["train"]
    # Where to launch, and the config behind it.
    assert in_bash(text, ["luthier", "launch", "k"], tmp_path) == ["kubernetes"]
    assert "cfg.yml" in in_bash(text, ["luthier", "launch", "kubernetes", "cfg"], tmp_path)
    assert in_bash(text, ["luthier", "launch", "kubernetes", "cfg.yml", "--pri"], tmp_path) == ["--priority-class"]
    # A config first, or a folder with one, whatever its name; then, and for other verbs, bash's own files.
    offered = in_bash(text, ["luthier", "plan", "cfg"], tmp_path)
    assert sorted(offered) == ["cfg", "cfg.yaml", "cfg.yml", "cfgs", "one.yml"]
    assert in_bash(text, ["luthier", "generate", "cfg"], tmp_path) == []
    assert "-o default" in text.splitlines()[-1]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_take_their_scripts(shell: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = script(shell, capfd)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not here")
    (tmp_path / "script").write_text(text)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True, timeout=60)
    if shell == "fish":
        asked = f"source {tmp_path}/script; complete -C 'luthier generate run --top'"
        done = subprocess.run([shell, "-N", "-c", asked], capture_output=True, text=True, check=True, timeout=60)
        assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["--top-k", "--top-p"]


def test_another_shell_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "tcsh"]) == 2
    assert "bash, zsh, fish" in capfd.readouterr().err
