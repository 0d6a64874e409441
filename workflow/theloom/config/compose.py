"""From YAML files and a command line to the runs that they describe, and to the frozen config of
each stage.

The only module that calls Hydra. The Snakefile composes once, when it is parsed; `freeze_config`
writes to a JSON file the subset of keys on which one stage depends, and each job reads only that
file. So an edit made while jobs wait in a queue cannot mix two configs, and a key reruns the stages
that depend on it and no other.
"""

import copy
import dataclasses
import itertools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from theloom.config import (
    auto,
    checks,
    frozen,
    names,
    overrides_file,
    schema,
    sharding,
    untrusted,
    values,
    words,
)
from theloom.config.frozen import (
    BESIDE_THE_RESULT,
    STAGES,
    decides_no_row,
    frozen_keys,
    without_unset,
)
from theloom.config.schema import Config, Modality
from theloom.config.values import Assignment
from theloom.errors import ConfigError
from theloom.rows.modality import CHAT, SENSED

log = logging.getLogger(__name__)

ConfigStore.instance().store(name="theloom", node=Config)

# Section, old name and new name of each key that was renamed.
_OLD_NAMES = [
    ("resources", f.name, f.metadata["renamed"])
    for f in dataclasses.fields(schema.ResourcesConfig)
    if "renamed" in f.metadata
]


@dataclass(frozen=True)
class Run:
    """One run: the name of its folder, its profile, its overrides, and its whole config as plain
    data.
    """

    name: str
    profile: str
    overrides: tuple[str, ...]
    config: dict[str, Any]
    shards_left_open: bool = False

    @property
    def answered(self) -> bool:
        """Whether the run has answers to its documents."""
        return self.config["answers"]["source"] is not None

    def stage(self, stage: str) -> dict[str, Any]:
        """The frozen config of a stage.

        Args:
            stage: Its name in `STAGES`.

        Returns:
            Plain data that JSON keeps: `run`, `stage`, `revision`, and `config` with the keys on
            which the stage depends.
        """
        config: dict[str, Any] = {}
        for key in frozen_keys(stage, self.answered):
            *sections, leaf = key.split(".")
            source, target = self.config, config
            for section in sections:
                source, target = source[section], target.setdefault(section, {})
            if key not in BESIDE_THE_RESULT or source[leaf] is not None:
                target[leaf] = source[leaf]
        return {
            "run": self.name,
            "stage": stage,
            "revision": STAGES[stage].revision,
            "config": without_unset(config),
        }


def runs(
    config_dir: Path,
    profiles: str | None = None,
    overrides: str | Sequence[Assignment] | None = None,
) -> dict[str, Run]:
    """All runs of a command line, by name: each profile with each combination of the swept
    overrides.

    Args:
        config_dir: The folder with default.yaml and the groups.
        profiles: A comma list; None: the profile of default.yaml.
        overrides: The text of `set`, or what a function of `words` read.

    Returns:
        The runs by name, in the order of the profiles and of the swept values.

    Raises:
        ConfigError: A key, a value or a profile is wrong.
    """
    profiles = _default_profile(config_dir) if profiles is None else profiles
    assignments = words.from_text(overrides) if isinstance(overrides, str) else overrides or []
    _check_keys(config_dir, assignments)
    swept = {a.key for a in assignments if len(a.values) > 1}
    named = [p.strip() for p in profiles.split(",") if p.strip()]
    for file in sorted(config_dir.rglob("*.yaml")):
        if file.parent.name != "profile" or file.stem in named:
            untrusted.check_file(file)
    found: dict[str, Run] = {}
    for profile, combination in itertools.product(
        named, itertools.product(*(a.values for a in assignments))
    ):
        chosen = {a.key: value for a, value in zip(assignments, combination, strict=True)}
        config, left_open = _compose(config_dir, profile, chosen)
        name = _name(config["name"], profile, len(named) > 1, chosen, swept)
        if name in found:
            raise ConfigError(
                f"two runs have the name {name!r}; a profile or a value is given twice"
            )
        texts = tuple(values.written(key, value) for key, value in chosen.items())
        found[name] = Run(name, profile, texts, config, left_open)
    if not found:
        raise ConfigError(
            f"profiles={profiles!r} names no profile; choose from "
            f"{', '.join(_options(config_dir, 'profile'))}"
        )
    return found


def _name(
    own: str | None, profile: str, several: bool, chosen: dict[str, values.Value], swept: set[str]
) -> str:
    """A run's name: the user's own, with what varies within this call; else profile, overrides.

    What decides no row is in it only where it varies: the same rows are kept in the same folder.
    """
    texts = {key: values.written(key, value) for key, value in chosen.items() if key != "name"}
    base = names.of_profile(profile)
    if own is None:
        shown = [t for key, t in texts.items() if key in swept or not decides_no_row(key)]
        return names.run_name(base, shown)
    names.check(own)
    varied = [text for key, text in texts.items() if key in swept]
    return names.run_name(f"{own}+{base}" if several else own, varied)


def _default_profile(config_dir: Path) -> str:
    defaults = OmegaConf.load(config_dir / "default.yaml").defaults
    return str(
        next(
            entry.profile for entry in defaults if OmegaConf.is_config(entry) and "profile" in entry
        )
    )


def _options(config_dir: Path, group: str) -> list[str]:
    return sorted(p.stem for p in (config_dir / group).glob("*.yaml"))


def _groups(config_dir: Path) -> set[str]:
    return {p.relative_to(config_dir).as_posix() for p in config_dir.rglob("*") if p.is_dir()}


def _check_keys(config_dir: Path, assignments: Sequence[Assignment]) -> None:
    """Check that each key is one of the schema, or a group that has the option."""
    groups, known = _groups(config_dir), schema.types()
    for a in assignments:
        if a.key in ("profile", "profiles"):
            texts = ",".join(map(str, a.values))
            raise ConfigError(
                f"{a.key}={texts}: choose profiles with profiles=A,B, next to set, or as the "
                "first word of theloom run"
            )
        if a.key in groups:
            options = _options(config_dir, a.key)
            for value in a.values:
                if value not in options:
                    raise ConfigError(
                        f"{a.key}={value}: there is no such {a.key}; choose from "
                        f"{', '.join(options)}"
                    )
        elif a.key not in known:
            raise ConfigError(values.unknown_key(a.key))


@lru_cache(maxsize=64)
def _of_files(config_dir: Path, choices: tuple[str, ...], state: object) -> DictConfig:
    """What the files say, in the schema, once for all runs of a sweep that choose the same; not to
    be changed.
    """
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        composed = compose("default", list(choices))
    plain = _listed(cast(dict[str, Any], OmegaConf.to_container(composed)))
    return cast(DictConfig, OmegaConf.merge(OmegaConf.structured(Config), plain))


def _state(config_dir: Path) -> tuple[tuple[str, int, int], ...]:
    """What tells that a file of the config has changed."""
    found = sorted((str(path), path.stat()) for path in config_dir.rglob("*.yaml"))
    return tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in found)


def _compose(
    config_dir: Path, profile: str, chosen: dict[str, values.Value]
) -> tuple[dict[str, Any], bool]:
    """The composed config as plain data, and whether it left the number of shards open."""
    profiles = _options(config_dir, "profile")
    if profile not in profiles:
        several = "; put commas between profiles" if " " in profile else ""
        choices = ", ".join(profiles)
        raise ConfigError(
            f"unknown profile {profile!r}{values.near(profile, profiles)}{several}; choose from "
            f"{choices}"
        )
    overrides_file.check_texts(config_dir / f"profile/{profile}.yaml", "")
    groups = _groups(config_dir)
    by_group = {k: str(v) for k, v in chosen.items() if k in groups} | {"profile": profile}
    try:
        picked = tuple(_choice(*option) for option in by_group.items())
        strict = copy.deepcopy(_of_files(config_dir.resolve(), picked, _state(config_dir)))
        for key, value in chosen.items():
            if key not in groups:
                OmegaConf.update(strict, key, frozen.literal(value))
        _take_old_names(strict)
        if (side := auto.side(strict.memory.activation_cache_filter)) and not strict.model.side:
            strict.model.side = side
        if stages := auto.stages(strict.memory.activation_cache_filter):
            strict.model.stages = stages
        if strict.corpus.kind.name in SENSED and strict.model.modality is None:
            strict.model.modality = Modality[strict.corpus.kind.name]
        if strict.corpus.images is not None and strict.model.modality is None:
            strict.model.modality = Modality[CHAT]
        if strict.corpus.kind.name in SENSED and "corpus.max_tokens" not in chosen:
            strict.corpus.max_tokens = None  # a profile's, which is for texts
        left_open = strict.extraction.shards is None
        if left_open:
            strict.extraction.shards = sharding.shards(cast(Config, strict))
        config = cast(
            dict[str, Any], OmegaConf.to_container(strict, enum_to_str=True, resolve=True)
        )
        untrusted.check_values(config)
        checks.check(cast(Config, strict))
        for section, old, _ in _OLD_NAMES:
            del config[section][old]
    except (yaml.YAMLError, OSError, ValueError, TypeError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else _one_line(error)
        raise ConfigError(f"profile={profile}: cannot be read: {why}") from None
    except MissingConfigException as error:
        options = ", ".join(error.options or [])
        group, _, requested = str(error.missing_cfg_file).rpartition("/")
        raise ConfigError(
            f"{group}={requested}: there is no such {group}; choose from {options}"
        ) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from None
    except (
        AttributeError,
        AssertionError,
    ):  # how OmegaConf fails where a value is set below a section that is null
        if not any(key.startswith("model.architecture.") for key in chosen):
            raise
        raise ConfigError(
            f"model.architecture: is null in {profile}; write a profile with all its numbers"
        ) from None
    return config, left_open


def _listed(plain: dict[str, Any]) -> dict[str, Any]:
    """One value, or null, of a key that takes one or more becomes a list."""
    for key in schema.ONE_OR_MORE:
        section, _, leaf = key.partition(".")
        value = plain.get(section, {}).get(leaf, [])
        if not isinstance(value, list):
            plain[section][leaf] = [] if value is None else [value]
    return plain


def _choice(group: str, option: str) -> str:
    """An option of a group as Hydra's grammar takes it, whatever its file is called."""
    escaped = re.sub(r"(\\*)('|$)", r"\1\1\2", option).replace("'", "\\'")
    return f"{group}='{escaped}'"


def _take_old_names(config: Any) -> None:
    """Give the value of a key's old name to the key, with a warning."""
    for section, old, new in _OLD_NAMES:
        if not OmegaConf.is_missing(config[section], old):
            log.warning("%s.%s is now called %s.%s; use the new name", section, old, section, new)
            config[section][new] = config[section][old]


def _explain(error: BaseException) -> str:
    """One line for an error of Hydra or OmegaConf: the full key, what is wrong, and the choices."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    inner = next((c for c in causes if getattr(c, "full_key", None)), causes[-1])
    full_key = str(getattr(inner, "full_key", "") or "")
    text = str(inner).split("\n")[0]
    if match := re.match(r"Key '(.*?)' (?:not in|is not in struct)", text):
        return values.unknown_key(full_key or match[1])
    if "is not a ListConfig" in text:
        return (
            f"{full_key}: one value where a list is wanted; put brackets round it: {full_key}=[…]"
        )
    return f"{full_key}: {text}" if full_key else _one_line(inner)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
