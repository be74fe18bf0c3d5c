"""The command line of train.py: a YAML file, then typed overrides of any of its keys, such as `--optim.lr 5e-6`."""

from __future__ import annotations

import argparse
import sys
import typing
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Annotated

from grpo.config import CONFIGS, Config, flat, known_keys, load, nearest


@dataclass(frozen=True)
class RunOptions:
    """The options of train.py that are not part of the config."""

    config: str | None = None
    """YAML file to start from; the options below override it. None: configs/gsm8k.yaml with a CUDA device, configs/demo.yaml without."""
    run_dir: str | None = None
    """Run folder. None: runs/NAME-TIME with the name of the config; under torchrun runs/NAME-ID with its run id."""
    resume: str | None = None
    """Run folder to resume, from its last checkpoint and with its own config."""
    dry_run: bool = False
    """Print the resolved config, the effective batch and a memory estimate, then stop."""
    preset: str | None = None
    """Short for --objective.preset."""


@dataclass(frozen=True)
class Command:
    """What the command line of train.py asks for."""

    config: Config
    config_path: Path
    source: str  # one sentence: which config and why
    run_dir: str | None
    resume: str | None
    dry_run: bool


def parse_command(argv: list[str]) -> Command:
    """Parse train.py's command line; dashes and underscores are equivalent. A mistake prints one line, for an unknown
    option with the nearest known one, and exits with status 2."""
    try:
        path, source = _base_config(argv)
        before = load(path)
        options, config = _override(argv, before)
        if options.preset is not None:
            config = replace(config, objective=replace(config.objective, preset=options.preset))
        if options.resume and options.run_dir:
            raise ValueError(
                f"--run-dir {options.run_dir} with --resume: a run resumes in its own folder; leave --run-dir out"
            )
        if config.objective.preset != before.objective.preset and None not in asdict(before.objective).values():
            raise ValueError(
                f"objective.preset={config.objective.preset} changes nothing: {path} sets every other key of its "
                "objective; override the keys to change, or delete them in a copy of the file"
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return Command(config, path, source, options.run_dir, options.resume, options.dry_run)


def _base_config(argv: list[str]) -> tuple[Path, str]:
    """The YAML file to start from, and a line that says why it is this one."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--config", "--resume"):
        early.add_argument(name, nargs="?")  # a missing value is reported by the full parser
    chosen, _ = early.parse_known_args(argv)
    if chosen.config and chosen.resume:
        raise ValueError(f"--config {chosen.config} with --resume: the run has its own config; leave --config out")
    if chosen.resume:
        path = Path(chosen.resume) / "config.yaml"
        if not (path.is_file() and path.stat().st_size):
            raise ValueError(f"--resume {chosen.resume}: no config.yaml there; name a run folder such as runs/NAME")
        return path, f"config: {path}, of the run to resume"
    if chosen.config:
        return Path(chosen.config), f"config: {chosen.config}, given by --config"

    import torch  # for this one question

    has_cuda = torch.cuda.is_available()
    path = CONFIGS / ("gsm8k.yaml" if has_cuda else "demo.yaml")
    why = "a CUDA device" if has_cuda else "no CUDA device (with one the default is configs/gsm8k.yaml)"
    return path, f"config: configs/{path.name}, because there is {why} and no --config was given"


def _override(argv: list[str], config: Config) -> tuple[RunOptions, Config]:
    """Parse the command line with `config` as defaults; --help shows each field's docstring and its value there."""
    import tyro

    unprefixed = tyro.conf.arg(name="")
    parsed, unknown = tyro.cli(
        tuple[Annotated[RunOptions, unprefixed], Annotated[Config, unprefixed]],
        prog="train.py",
        description="Train a language model with GRPO. Every option below --preset is a key of the config.",
        default=(RunOptions(), config),
        args=_normalised(argv),
        return_unknown_args=True,
    )
    if unknown:
        option = next((argument for argument in unknown if argument.startswith("--")), unknown[0])
        known, name = [*typing.get_type_hints(RunOptions), *known_keys()], _key(option.partition("=")[0])
        as_option = lambda key: f"--{key.replace('_', '-')}"
        raise ValueError(f"unknown option {option}{nearest(name, known, as_option)}; --help shows them all")
    return parsed


def _key(option: str) -> str:
    """The key of an option: num_steps for --num-steps."""
    return option.lstrip("-").replace("-", "_")


def _normalised(argv: list[str]) -> list[str]:
    """The command line with boolean values as tyro wants them: `true` becomes True. ValueError for a value after a plain
    switch, or for none after one that may also be None."""
    kinds_of = typing.get_type_hints
    of_config = {name: kinds_of(kind) if is_dataclass(kind) else kind for name, kind in kinds_of(Config).items()}
    kinds = kinds_of(RunOptions) | flat(of_config)
    spelled = list(argv)
    for i, argument in enumerate(argv):
        option, equals, value = argument.partition("=")
        kind, value = kinds.get(_key(option)), value if equals else "".join(argv[i + 1 : i + 2])
        if kind is bool and value.capitalize() in ("True", "False"):
            section, dot, name = option.removeprefix("--").rpartition(".")
            off = f"--{section}{dot}no-{name}"
            raise ValueError(f"{option} takes no value, found {value!r}; use {option} or {off}")
        if kind == bool | None:
            if value.capitalize() not in ("True", "False", "None"):
                raise ValueError(f"{option} takes a value; use {option} True or False")
            value = value.capitalize()
            spelled[i : i + 2 - bool(equals)] = [f"{option}={value}"] if equals else [option, value]
    return spelled
