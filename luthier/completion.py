"""`luthier completion bash|zsh|fish`: a script that completes verbs, their options, keys of the config and files.

All words are in the script, so that a shell completes without starting Python. They are read from the source of the
verbs, since importing it would load torch, and a script may be made anew by every shell that starts.
"""

from __future__ import annotations

import ast
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli import VERBS, Verb
from luthier.errors import ConfigError

SHELLS = ("bash", "zsh", "fish")
FIRST_WORDS = {"completion": SHELLS, "launch": ("kubernetes",), "prepare": ("logs",)}
"""Of verbs whose first argument is one of a few words; a config, where they take one, comes behind it."""
EVERYWHERE = {"--help": "Show the help of the verb.", "--debug": "Show the traceback of an error."}
OF_PROGRAM = {"--help": "Show the help.", "--version": "Show the version.", "--debug": EVERYWHERE["--debug"]}

Options = dict[str, str]  # a name with its dashes -> its help


def command(shell: Annotated[str, typer.Argument(metavar="bash|zsh|fish", help="The shell to complete in.")]) -> None:
    """Print a shell's completion script.

    In ~/.bashrc: eval "$(luthier completion bash)". In ~/.zshrc, behind compinit: eval "$(luthier completion zsh)". In
    config.fish: luthier completion fish | source.
    """
    scripts = {"bash": bash, "zsh": zsh, "fish": fish}
    if shell not in scripts:
        raise ConfigError(f"{shell}: there is completion for {', '.join(SHELLS)}")
    print(scripts[shell]({name: options_of(verb) for name, verb in VERBS.items()}), end="")


# --- the words -----------------------------------------------------------------------------------------------------


def options_of(verb: Verb) -> Options:
    """The options of a verb; where it takes overrides, the keys of the config too."""
    module, _, name = verb.target.partition(":")
    [function] = [node for node in _source(module).body if isinstance(node, ast.FunctionDef) and node.name == name]
    found: Options = {}
    for parameter in (*function.args.args, *function.args.kwonlyargs):
        found |= _options(parameter, module)
    keys = {f"--{key}": text for key, text in _keys().items()} if verb.takes_overrides else {}
    return keys | found | EVERYWHERE


@cache
def _keys() -> dict[str, str]:
    from luthier.config.reference import SECTIONS, summary

    return {key: summary(info) for section in SECTIONS.values() for key, info in section.model_fields.items()}


@cache
def _source(module: str) -> ast.Module:
    parts = module.split(".")
    root = Path(__file__).parents[1].joinpath(*parts)
    path = root / "__init__.py" if root.is_dir() else root.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _options(parameter: ast.arg, module: str) -> Options:
    """Those of a parameter whose annotation is `Annotated[TYPE, typer.Option(...)]`, by whatever name that goes."""
    annotation = _resolved(parameter.annotation, module)
    if not isinstance(annotation, ast.Subscript) or not isinstance(annotation.slice, ast.Tuple):
        return {}
    kind, *extra = annotation.slice.elts
    call = next((each for each in extra if isinstance(each, ast.Call)), None)
    if call is None or not isinstance(call.func, ast.Attribute) or call.func.attr != "Option":
        return {}
    names = [node.value for node in call.args if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    if not names:
        plain = parameter.arg.replace("_", "-")
        names = [f"--{plain}", f"--no-{plain}"] if "bool" in ast.unparse(kind) else [f"--{plain}"]
    text = next((_text(keyword.value) for keyword in call.keywords if keyword.arg == "help"), "")
    return {name: text for joined in names for name in joined.split("/")}


def _resolved(node: ast.expr | None, module: str) -> ast.expr | None:
    """What a name stands for, here or where it is imported from."""
    if not isinstance(node, ast.Name):
        return node
    for statement in _source(module).body:
        if isinstance(statement, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == node.id for target in statement.targets
        ):
            return _resolved(statement.value, module)
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("luthier."):
            for alias in statement.names:
                if (alias.asname or alias.name) == node.id:
                    return _resolved(ast.Name(alias.name), str(statement.module))
    return node


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    parts = node.values if isinstance(node, ast.JoinedStr) else []
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in parts)


# --- the scripts ---------------------------------------------------------------------------------------------------


def bash(verbs: dict[str, Options]) -> str:
    cases = "".join(
        f"        {name}) options={shlex.quote(' '.join(options))}; configs={_config_at(name)}; "
        f"first={shlex.quote(' '.join(FIRST_WORDS.get(name, ())))} ;;\n"
        for name, options in verbs.items()
    )
    return f"""\
# Completion of luthier in bash: eval "$(luthier completion bash)"
_luthier() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} options='' first='' configs=0 file at=1
    COMPREPLY=()
    if [[ ${{COMP_WORDS[1]}} == --debug ]] && ((COMP_CWORD > 1)); then at=2; fi
    if ((COMP_CWORD == at)); then
        COMPREPLY=($(compgen -W {shlex.quote(" ".join([*verbs, *OF_PROGRAM]))} -- "$cur"))
        return
    fi
    case ${{COMP_WORDS[at]}} in
{cases}    esac
    if [[ $cur == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$cur"))
    elif [[ $first ]] && ((COMP_CWORD == at + 1)); then
        COMPREPLY=($(compgen -W "$first" -- "$cur"))
    elif ((configs && COMP_CWORD == at + configs)); then
        while IFS= read -r file; do
            if [[ -d $file || $file == *.yml || $file == *.yaml ]]; then COMPREPLY+=("$file"); fi
        done < <(compgen -f -- "$cur")
    fi
}}
complete -o filenames -o bashdefault -o default -F _luthier luthier
"""


def zsh(verbs: dict[str, Options]) -> str:
    def described(words: dict[str, str]) -> str:
        return " ".join(_quoted(f"{word}:{text}") for word, text in words.items())

    cases = "".join(
        f"        {name}) options=({described(options)}); configs={_config_at(name)}; "
        f"first=({' '.join(FIRST_WORDS.get(name, ()))}) ;;\n"
        for name, options in verbs.items()
    )
    first = {**{name: verb.help for name, verb in VERBS.items()}, **OF_PROGRAM}
    return f"""\
#compdef luthier
# Completion of luthier in zsh: eval "$(luthier completion zsh)", behind compinit
_luthier() {{
    local -a words_here options first
    local configs=0
    if [[ $words[2] == --debug ]] && ((CURRENT > 2)); then shift words; ((CURRENT--)); fi
    if ((CURRENT == 2)); then
        words_here=({described(first)})
        _describe verb words_here
        return
    fi
    case $words[2] in
{cases}    esac
    if [[ $words[CURRENT] == -* ]]; then
        _describe -o option options
    elif (($#first && CURRENT == 3)); then
        compadd -a first
    elif ((configs && CURRENT == configs + 2)); then
        _files -g '*.(yml|yaml)'
    else
        _files
    fi
}}
if [[ $funcstack[1] == _luthier ]]; then
    _luthier "$@"
else
    compdef _luthier luthier
fi
"""


def fish(verbs: dict[str, Options]) -> str:
    return "\n".join(["# Completion of luthier in fish: luthier completion fish | source", *_fish_lines(verbs)]) + "\n"


def _fish_lines(verbs: dict[str, Options]) -> Iterator[str]:
    first = "complete -c luthier -n __fish_use_subcommand"
    for name, verb in VERBS.items():
        yield f"{first} -f -a {name} -d {_quoted(verb.help)}"
    for option, text in OF_PROGRAM.items():
        yield f"{first} -l {option.lstrip('-')} -d {_quoted(text)}"
    for name, options in verbs.items():
        there = f"complete -c luthier -n '__fish_seen_subcommand_from {name}'"
        for option, text in options.items():
            yield f"{there} {'-l' if option.startswith('--') else '-s'} {option.lstrip('-')} -d {_quoted(text)}"
        if VERBS[name].takes_overrides:
            yield f"{there} -k -f -a '(__fish_complete_suffix .yml .yaml)'"
    for name, words in FIRST_WORDS.items():
        yield f"complete -c luthier -n '__fish_seen_subcommand_from {name}' {_no_files(name)}-a '{' '.join(words)}'"


def _no_files(name: str) -> str:
    return "" if VERBS[name].takes_overrides else "-f "


def _config_at(name: str) -> int:
    """Which of a verb's arguments is a config, from 1; 0: none."""
    return int(VERBS[name].takes_overrides) and 1 + (name in FIRST_WORDS)


def _quoted(text: str) -> str:
    """In single quotes, in one line; both shells take a quote inside of them by the same way round."""
    line = " ".join(text.replace("\\", "").split())
    return "'" + line.replace("'", "'\\''") + "'"
