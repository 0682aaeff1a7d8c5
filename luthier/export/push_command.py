"""`luthier push`: from a run or a folder to a repository on the hub, or to an artifact of Weights & Biases."""

from __future__ import annotations

from typing import Annotated

import typer

from luthier.errors import ConfigError


def command(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_FOLDER", help="A run, an adapter, a model folder; data.")],
    repo: Annotated[
        str,
        typer.Argument(
            metavar="OWNER/NAME",
            help="The repository, created if it is not there; or wandb:entity/project/name, an artifact.",
        ),
    ],
    merged: Annotated[
        bool, typer.Option("--merged", help="The merged model in RUN/merged instead of the adapter.")
    ] = False,
    gguf: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="A GGUF file to add; may be repeated.")
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Add the run's report.html (it shows samples).")] = False,
    public: Annotated[
        bool, typer.Option("--public", help="A new repository is for everybody. Default: private.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch; created if it is not there. Default: main.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    alias: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Of an artifact's version, beside latest; may be repeated.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="The base on the hub, where the run used a local copy.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(metavar="NAME", help="For the card, by the hub's names: apache-2.0, llama3.2, ...")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be uploaded, and do nothing.")
    ] = False,
) -> None:
    """Upload an adapter or a model to the Hugging Face hub, with its card. The token is HF_TOKEN, or that of
    `hf auth login`. A push that was interrupted goes on when the same command is given again. With
    wandb:entity/project/name in place of the repository it becomes an artifact of Weights & Biases, and so may data."""
    if repo.startswith("wandb:"):
        for option, value in (("--public", public), ("--revision", revision)):
            if value:
                raise ConfigError(f"{option} is for the hub; an artifact is seen by those who see its project")
        from luthier.export import wandb_push

        name = wandb_push.push(
            source,
            repo,
            aliases=alias or [],
            merged=merged,
            gguf=gguf or [],
            report=report,
            base_model=base_model,
            license=license,
            message=message,
            dry_run=dry_run,
        )
        if not dry_run:
            print(name)
        return
    if alias:
        raise ConfigError("--alias is for artifacts (wandb:entity/project/name); a branch on the hub is --revision")
    # As late as this, so that --help does not wait for torch.
    from luthier.export.hub import push

    url = push(
        source,
        repo,
        merged=merged,
        private=not public,
        revision=revision,
        message=message,
        base_model=base_model,
        license=license,
        gguf=gguf or [],
        report=report,
        dry_run=dry_run,
    )
    if not dry_run:
        print(url)
