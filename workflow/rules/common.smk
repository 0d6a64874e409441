"""What all rules share: the runs of this call, composed once, and the frozen config of each stage.

Another workflow may use this one as a module (workflow/docs/install.md). Then `workflow.basedir` is
the other's, its `prefix:` lies before `results`, and its console and handlers are its own.
"""

import json
import os
import sys
import time
from pathlib import Path

from snakemake.cli import parse_config
from snakemake.common.tbdstring import TBDString

from theloom.config import locations, sharding
from theloom.config.compose import runs as composed_runs
from theloom.config.frozen import freeze
from theloom.devices import host
from theloom.errors import TheLoomError
from theloom.pipeline import bars, console, preflight, request, resources, retries, slurm
from theloom.planning import shard_groups
from theloom.pipeline.job import last_errors, add_to_job_path, of_system
from theloom.report import groups as report_groups

from snakemake.settings.types import DeploymentMethod

STARTED = time.time()
if workflow.is_main_process:
    os.environ[retries.CALL] = f"{STARTED}-{os.getpid()}"
IS_MODULE = not workflow.modifier.is_main_snakefile()
HOME = locations.home_of(
    Path(workflow.current_basedir.get_path_or_uri(secret_free=True)).parents[1]
)
# Of a path, since `replace_prefix: {"results/": …}` matches no bare "results".
RESULTS = Path(workflow.modifier.path_modifier.replace_prefix("results/_")).parent

SDM = workflow.deployment_settings.deployment_method
# Snakemake refuses an image whose path has a blank, even where jobs run without it.
CONTAINER = str(HOME / "envs/theloom.sif") if DeploymentMethod.APPTAINER in SDM else None
# Jobs in an environment of their own lack theloom. A checkout's jobs always import the checkout's.
if DeploymentMethod.CONDA in SDM or (HOME / "workflow/theloom").is_dir():
    add_to_job_path(locations.jobs_path(HOME, Path(".snakemake/theloom")))
host.reuse_freed_blocks()


wildcard_constraints:
    run="[^/]+",
    shard=r"\d+",
    shards=r"\d+",
    part=r"\d+",
    parts=r"\d+",


def compose():
    """The runs that `--config profiles=A,B set="key=value …"` requests, by name."""
    typed = workflow.config_settings.config_args or []
    if IS_MODULE:  # the other workflow decides which of them reach this one, and with which values
        typed = [word for word in typed if parse_config([word]).items() <= config.items()]
    elif workflow.is_main_process and sys.argv.count("--config") + sys.argv.count("-C") > 1:
        raise TheLoomError("--config: given twice; Snakemake takes the last one alone, so use one")
    requested = request.read(config, typed, IS_MODULE)
    if not IS_MODULE:
        workflow.config_settings.config_args = requested.arguments()
    runs = composed_runs(HOME / "config", requested.profiles, requested.assignments)
    for run in runs.values():
        preflight.check(run)
    return {name: PLANNER.plan(run) for name, run in runs.items()}


READABLE = workflow.storage_settings.default_storage_provider in (None, "fs")  # results, from here
PLANNER = resources.Planner(Path(workflow.storage_settings.default_storage_prefix or "", RESULTS))


BRIEF = console.shorten() if workflow.is_main_process and not IS_MODULE else None
BARS = bars.for_terminal(sys.stderr) if workflow.is_main_process and not IS_MODULE else None

if workflow.is_main_process or workflow.storage_settings.default_storage_provider is not None:
    try:
        RUNS = compose()
    except (TheLoomError, OSError) as error:
        line = of_system(error, Path.cwd()) if isinstance(error, OSError) else error
        print(f"error: {line}", file=sys.stderr)
        sys.exit(1)
    if workflow.is_main_process:
        print(resources.table(RUNS), file=sys.stderr)
        if warning := locations.version_warning(HOME):
            print(warning, file=sys.stderr)
else:
    slurm.wait_before_steps()
    # A job on a cluster parses this file again. It reads the frozen configs, not YAML edited since.
    # Without a shared file system it has the YAML of its submission.
    RUNS = {}


# A job on a cluster knows its group by the name of its rule.
SHARD_GROUPS = shard_groups.of_runs(RUNS) if RUNS else shard_groups.of_words(sys.argv)


def stage(run, name):
    """The frozen config of a stage, as plain data."""
    if RUNS:
        if run not in RUNS:
            raise WorkflowError(f"no run {run!r} in this call; it has {', '.join(RUNS)}")
        return RUNS[run].stage(name)
    file = RESULTS / run / "config" / f"{name}.json"
    if IS_MODULE and not file.exists():  # the other workflow did not call this module's onstart
        RUNS.update(compose())
        return stage(run, name)
    return json.loads(file.read_text(encoding="utf-8"))


def frozen(name):
    """Input function: the file with the frozen config of a stage."""
    return f"results/{{run}}/config/{name}.json"


def resource(name, times=lambda wildcards, attempt: 1):
    """Resource function: what the run's plan gives to jobs that hold the model; 0 and null request nothing.

    Where the profile has a default, its submit command names the resource, which then is there as 0 too.
    A figure that waits for estimate.h5 is <TBD>, until the job's inputs are there and Snakemake evaluates it again.
    """
    nothing = 0 if name in (workflow.resource_settings.default_resources or ()) else None

    def evaluate(wildcards, attempt):
        value = requested_resources(wildcards.run)[name]
        if isinstance(value, TBDString):
            return value
        return (value * times(wildcards, attempt) if value else nothing) or nothing

    return evaluate


def escalating(name):
    """Resource function: what the plan gives, and as much more for each retry."""
    return resource(name, lambda wildcards, attempt: attempt)


def all_shards(name):
    """Resource function: what the plan gives to each shard, for all of them together."""
    return resource(
        name,
        lambda wildcards, attempt: stage(wildcards.run, "merge")["config"]["extraction"]["shards"],
    )


def of_group(name, shards):
    """Resource function: what the plan gives to each shard, for so many."""
    return resource(name, lambda wildcards, attempt: shards)


def requested_resources(run):
    """What a run's plan gives, planned again once its estimate.h5 exists, which the model's trace has made."""
    if RUNS and (renewed := PLANNER.renewed(RUNS[run])):
        RUNS[run] = renewed
        if workflow.is_main_process and not workflow.dryrun:
            freeze_resources(renewed)
    planned = stage(run, "resources")["config"]["resources"]
    waits = workflow.dryrun or (RUNS and READABLE and PLANNER.waits(RUNS[run]))
    last_resort = {
        name: TBDString() if waits else value for name, value in resources.WITHOUT_ESTIMATE.items()
    }
    return {
        name: last_resort.get(name) if value is None else value for name, value in planned.items()
    }


def freeze_resources(run):
    """For jobs on a cluster, which parse this file again.

    freeze_config cannot write it, as their ancient() input: where such an input is made anew,
    Snakemake leaves out all jobs downstream, even those whose output is missing.
    """
    path = RESULTS / run.name / "config/resources.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    freeze(run.stage("resources"), path)


def unknown_model(wildcards):
    """Whether the profile lacks the model's dimensions, which then are read from the model."""
    return stage(wildcards.run, "estimate")["config"]["model"]["architecture"] is None


def shards(wildcards):
    """Input function: the shards of a run, by name."""
    return shards_of(wildcards.run)


def shards_of(run):
    count = stage(run, "merge")["config"]["extraction"]["shards"]
    return [f"results/{run}/shards/{n:05d}-of-{count:05d}.h5" for n in range(count)]


def local_shards(wildcards):
    """Input function: the shards of a run that keeps them. Others are there as long as the run is not pushed; where they
    were an input, Snakemake would extract them again.
    """
    return shards(wildcards) if keeps_shards(wildcards.run) else []


def keeps_shards(run):
    """Whether the shards of a run stay on the local disk."""
    return stage(run, "remove")["config"]["store"]["keep_local"]


def report_with_label(wildcards):
    """Input function: the report of a run with a label, which reads the rows."""
    run = wildcards.run
    return (
        [f"results/{run}/report.html"] if stage(run, "report")["config"]["report"]["label"] else []
    )


def pushed_shards(wildcards):
    """Input function: the records of the shards in the remote store."""
    return [f"results/{wildcards.run}/pushed/{Path(s).stem}.json" for s in shards(wildcards)]


def documents(wildcards):
    """Input function: the tokens that are extracted, of documents with their answers where the run has some."""
    answered = "answers" in stage(wildcards.run, "tokens")["config"]
    return f"results/{wildcards.run}/{'answers' if answered else 'tokens'}.h5"


def sampled_shards(wildcards):
    """Input function: the answers of the run's own model, by shard; none where a column has them."""
    if stage(wildcards.run, "tokens")["config"]["answers"]["source"] != "model":
        return []
    count = stage(wildcards.run, "merge")["config"]["extraction"]["shards"]
    return [f"results/{wildcards.run}/answers/{n:05d}-of-{count:05d}.h5" for n in range(count)]


def tokenized_parts(wildcards):
    """Input function: the parts of the corpus that jobs of their own tokenise; none where one job does it all."""
    run = wildcards.run
    count = stage(run, "resources")["config"]["resources"].get("tokenize_jobs") or 1
    parts = [f"results/{run}/tokens/{n:05d}-of-{count:05d}.h5" for n in range(count)]
    return parts if count > 1 else []


def verification_jobs(run):
    """How many jobs check rows of a run, and how many recompute documents."""
    return sharding.verification_jobs(
        stage(run, "resources")["config"]["verify"]["jobs"],
        stage(run, "merge")["config"]["extraction"]["shards"],
        stage(run, "verify")["config"]["verify"]["documents"],
    )


def verifies_alone(wildcards, attempt=1):
    """Whether one job verifies the run; the gather of several jobs holds no model."""
    return verification_jobs(wildcards.run) == (1, 1)


def parts_of(run, kind, count):
    return [f"results/{run}/verification/{kind}/{n:05d}-of-{count:05d}.h5" for n in range(count)]


def checked_rows(wildcards):
    """Input function: what the jobs found that check rows; none where one job verifies the run."""
    count, _ = verification_jobs(wildcards.run)
    return [] if verifies_alone(wildcards) else parts_of(wildcards.run, "rows", count)


def recomputed_documents(wildcards):
    """Input function: what the jobs found that recompute documents."""
    _, count = verification_jobs(wildcards.run)
    return [] if verifies_alone(wildcards) else parts_of(wildcards.run, "documents", count)


def delivered_shards(run):
    """The shards that a run's activations.h5 refers to: without them it cannot be read."""
    virtual = RUNS[run].config["store"]["merge"] == "virtual"
    return shards_of(run) if virtual and keeps_shards(run) else []


def pushes(run):
    """Whether a run goes to a remote store."""
    return RUNS[run].config["store"]["remote"] is not None


def labelled_reports():
    """The reports of runs with a label: their probe is what such a run is for."""
    return [
        f"results/{name}/report.html" for name, run in RUNS.items() if run.config["report"]["label"]
    ]


def drawn(group, category, folder="results/{run}/figures", subcategory="{run}"):
    """The outputs of a group of figures: each as a drawing, as a table, and as CSV."""
    outputs = {}
    for name, label in report_groups.GROUPS[group].items():
        shown = dict(caption=f"../report/{name}.rst", category=category, subcategory=subcategory)
        for view, suffix in (("drawing", "svg"), ("table", "html")):
            outputs[f"{name}_{view}"] = report(
                f"{folder}/{name}.{suffix}", labels={"figure": label, "shown as": view}, **shown
            )
        outputs[f"{name}_csv"] = f"{folder}/{name}.csv"
    return outputs


def figures_of(run):
    """All figures of a run: those of attention only where the run's hook points hold some, the
    probe only with a label, those of answers only where the run has some.
    """
    config = RUNS[run].config
    groups = report_groups.groups(
        config["memory"]["activation_cache_filter"], config["report"]["label"], RUNS[run].answered
    )
    return [
        f"results/{run}/figures/{name}.svg"
        for group in groups
        for name in report_groups.GROUPS[group]
    ]


onstart:
    if workflow.executor_plugin.name == "slurm":
        slurm.keep_to_squeue()
    for run in RUNS.values():
        freeze_resources(run)
    if BRIEF:
        BRIEF.retries = workflow.execution_settings.retries
    if BARS and workflow.local_exec:
        BARS.start()


onsuccess:
    if BARS:
        BARS.stop()
    for run in RUNS:
        if (RESULTS / run / "verification.h5").exists():  # not with --until
            print(console.summary(RESULTS / run), file=sys.stderr)
            if BRIEF:
                BRIEF.ended = True


onerror:
    if BARS:
        BARS.stop()
    logs = [file for run in RUNS for file in (RESULTS / run / "logs").rglob("*.log")]
    for line in last_errors(logs, STARTED):
        print(line, file=sys.stderr)
        if BRIEF:
            BRIEF.ended = True
