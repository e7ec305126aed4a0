"""`rayinterp`: arguments in, one call out. Draws progress; everything else is in the library."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Annotated, Any

import fsspec
import typer
import yaml
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

# Lance warns on each table that it creates. Read when lance is imported.
os.environ.setdefault("LANCE_LOG", "error")

from rayinterp.config import RunConfig, load_config
from rayinterp.errors import UserError
from rayinterp.tables import Tables

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console()

DAMAGE_SHOWN = 5
DEMO_CONFIG = "configs/demo.yaml"
TARGETS = "folder, s3://..., gs://..., hf://datasets/OWNER/NAME or wandb://ENTITY/PROJECT/NAME"

ConfigPath = Annotated[str, typer.Argument(help="YAML file, e.g. configs/demo.yaml", metavar="CONFIG")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value ...", metavar="[KEY=VALUE]...")]


def run_stages(config_path: str, overrides: list[str] | None, stages: tuple[str, ...]) -> None:
    """Runs stages in order under a progress display, then says where everything lies and what to type next."""
    config = load_config(config_path, overrides)
    start = time.monotonic()
    _run_stages(config, stages)
    _say_where(config, config_path, overrides, time.monotonic() - start)


def _run_stages(config: RunConfig, stages: tuple[str, ...]) -> Tables:
    """Runs stages in order under a progress display."""
    _quiet()
    # What it brings takes seconds to import: a bad config should not wait for it.
    from rayinterp.run import connected, open_run, run_stage

    with console.status("checking the config against this machine"):
        run = open_run(config, stages)
    with ExitStack() as stack:
        with console.status("starting Ray"):
            stack.enter_context(connected(config))
        display = stack.enter_context(_Bars()) if console.is_terminal else _Lines()
        for stage in stages:
            display.begin(stage)
            counts = run_stage(run, stage, display.advance_to)
            display.end("  ".join(f"{number:,} {name}" for name, number in counts.items() if number))
            if stage == "corpus":
                _warn_of_damage(run.tables)
    return run.tables


def _quiet() -> None:
    """Silences what libraries say on every start of every run."""
    warnings.filterwarnings("ignore", message="lance is not fork-safe")
    for name in ("ray.serve", "ray.data", "ray._private.authentication.authentication_token_setup"):
        logging.getLogger(name).setLevel(logging.ERROR)


class _Bars(Progress):
    """A terminal gets a bar for each stage."""

    def __init__(self) -> None:
        self._figures: dict[str, str] = {}
        super().__init__(
            TextColumn("{task.description:>8}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )

    def begin(self, stage: str) -> None:
        self._figures = {}
        self._bar = self.add_task(stage, total=None, note="")

    def advance_to(self, done: int, total: int, note: str | dict[str, str] = "") -> None:
        self._figures = note if isinstance(note, dict) else {}
        self.update(self._bar, completed=done, total=total, note="" if self._figures else note)

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bars, and below them a table of what the stage says of itself."""
        yield from super().get_renderables()
        if self._figures:
            table = Table.grid(padding=(0, 2))
            for name, figure in self._figures.items():
                table.add_row(f"[dim]{name:>11}[/dim]", figure)
            yield table

    def end(self, counts: str) -> None:
        self._figures = {}
        total = next(task.total for task in self.tasks if task.id == self._bar) or 1
        self.update(self._bar, total=total, completed=total, note=counts)


class _Lines:
    """A job's log gets a line at a stage's end, and one now and then on the way."""

    SECONDS_BETWEEN = 20

    def begin(self, stage: str) -> None:
        self._stage, self._begun, self._said = stage, time.monotonic(), time.monotonic()
        self._first: tuple[int, float] | None = None
        """Units that were done before, and when the stage said so: a resumed stage has not done them in no time."""

    def advance_to(self, done: int, total: int, note: str | dict[str, str] = "") -> None:
        elapsed = time.monotonic() - self._begun
        if self._first is None:
            self._first = done, elapsed
        if time.monotonic() - self._said > self.SECONDS_BETWEEN:
            self._said = time.monotonic()
            fresh = done - self._first[0]
            left = f"  {(elapsed - self._first[1]) / fresh * (total - done):,.0f} s left" if fresh else ""
            if isinstance(note, dict):
                note, left = "  ".join(f"{name} {figure}" for name, figure in note.items()), ""
            console.print(f"{self._stage:>8}  {done}/{total}  {note}{left}", highlight=False, soft_wrap=True)

    def end(self, counts: str) -> None:
        seconds = time.monotonic() - self._begun
        console.print(f"{self._stage:>8}  done in {seconds:.0f} s  {counts}", highlight=False, soft_wrap=True)


def _warn_of_damage(tables: Tables) -> None:
    """Names what could not be read: the run goes on without it."""
    from rayinterp.corpus import damaged

    places = damaged(tables)
    if places:
        more = [f"and {len(places) - DAMAGE_SHOWN} more"] if len(places) > DAMAGE_SHOWN else []
        listed = "".join(f"\n          {place}" for place in [*map(_printable, places[:DAMAGE_SHOWN]), *more])
        warning = f"[yellow] warning[/yellow]  left out, all of it is in the table corpus_files:{escape(listed)}"
        console.print(warning, highlight=False, soft_wrap=True)


def _printable(text: str) -> str:
    """A file's name as a terminal may be shown it: whoever named the file must not steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _say_where(config: RunConfig, config_path: str, overrides: list[str] | None, seconds: float) -> None:
    arguments = shlex.join([config_path, *(overrides or [])])
    command = "rayinterp" if shutil.which("rayinterp") else sys.argv[0]  # called by its path, as by `make`
    root = config.run_dir.rstrip("/")
    console.print(f"\nDone in {seconds:.0f} s. Tables, run.yaml and manifest.json are in [bold]{root}[/bold].")
    if Tables(root).exists("features"):
        keys = Tables(root).read("features", ["feature_key"], "status = 'live'")["feature_key"].to_pylist()
        if keys:
            console.print(
                f"One feature in the terminal:  {command} show {arguments} --feature {keys[0]}", soft_wrap=True
            )
    filesystem, path = fsspec.core.url_to_fs(f"{root}/report.html")
    if filesystem.exists(path):
        console.print(f"The report, for a browser:    [bold]{path}[/bold]", soft_wrap=True)
    else:
        console.print(f"The rest of the run:          {command} run {arguments}")


@app.command("run")
def run_command(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run every stage; what is finished is not done again."""
    from rayinterp.run import STAGES

    run_stages(config, overrides, STAGES)


@app.command()
def demo(overrides: Overrides = None) -> None:
    """Run configs/demo.yaml: a real model, SAEs and text from installed packages."""
    run_command(DEMO_CONFIG, overrides)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    params: Annotated[
        list[str] | None,
        typer.Option(help="parameters of a model that cannot be reached: 9.2e9, or simulators.qwen.model=4e9"),
    ] = None,
    cores: Annotated[
        int | None, typer.Option(min=1, help="CPU cores of the cluster; this machine's if left out")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the numbers alone, for programs")] = False,
) -> None:
    """Estimate what a run will cost, by stage: tokens, calls, time, GPU-hours, disk, dollars. Starts nothing."""
    _show_plan(load_config(config, overrides), params, cores, as_json)


def _show_plan(run_config: RunConfig, params: list[str] | None, cores: int | None, as_json: bool) -> None:
    _quiet()
    from rayinterp.plan import assumptions, plan_run
    from rayinterp.plan_table import plan_as_json, show_plan
    from rayinterp.sizes import measure, parse_params

    given = parse_params(params or [])
    with nullcontext() if as_json else console.status("looking up how large the models are"):
        sizes = measure(run_config, given, cores)
    planned, said = plan_run(run_config, sizes), assumptions(run_config, sizes)
    if as_json:
        typer.echo(plan_as_json(run_config, planned, said))
    else:
        show_plan(run_config, planned, said, console)


@app.command()
def show(
    config: ConfigPath,
    overrides: Overrides = None,
    feature: Annotated[str, typer.Option(help="sae/index, e.g. layer_9/1844")] = ...,  # type: ignore[assignment]
    records: Annotated[bool, typer.Option("--records", help="all of its records, by split and source")] = False,
) -> None:
    """Show one feature: explanations, scores, and its records shaded by activation."""
    from rayinterp.show import show_feature, show_records

    run_config = load_config(config, overrides)
    if records:
        show_records(Tables(run_config.run_dir), feature, console)
    else:
        show_feature(Tables(run_config.run_dir), run_config, feature, console)


@app.command()
def corpus(config: ConfigPath, overrides: Overrides = None) -> None:
    """Cut the corpus into token sequences."""
    run_stages(config, overrides, ("corpus",))


@app.command()
def harvest(config: ConfigPath, overrides: Overrides = None) -> None:
    """Harvest feature activations of every sequence."""
    run_stages(config, overrides, ("harvest",))


@app.command()
def index(config: ConfigPath, overrides: Overrides = None) -> None:
    """Embed every sequence."""
    run_stages(config, overrides, ("index",))


@app.command()
def records(
    config: ConfigPath,
    overrides: Overrides = None,
    why_not: Annotated[str | None, typer.Option(help="only say why this feature has no more records")] = None,
) -> None:
    """Choose each feature's records."""
    if why_not is None:
        run_stages(config, overrides, ("records",))
    else:
        from rayinterp.show import why_not as explain_counts

        explain_counts(Tables(load_config(config, overrides).run_dir), why_not, console)


@app.command()
def explain(config: ConfigPath, overrides: Overrides = None) -> None:
    """Propose and search explanations."""
    run_stages(config, overrides, ("explain",))


@app.command()
def score(config: ConfigPath, overrides: Overrides = None) -> None:
    """Grade explanations and their controls on test records."""
    run_stages(config, overrides, ("score",))


@app.command()
def report(config: ConfigPath, overrides: Overrides = None) -> None:
    """Write the HTML report."""
    run_stages(config, overrides, ("report",))


@app.command()
def experiment(
    name: Annotated[str, typer.Argument(help="complementary_sources, explainer_comparison, polysemanticity, ...")],
    config: ConfigPath,
    overrides: Overrides = None,
    plan_only: Annotated[bool, typer.Option("--plan", help="only estimate what it will cost, from nothing")] = False,
    params: Annotated[list[str] | None, typer.Option(help="with --plan, as for `rayinterp plan`")] = None,
) -> None:
    """Run one of the paper's experiments: its explainers through every stage, then table, figures and page."""
    run_config = load_config(config, overrides)
    _quiet()
    from rayinterp.experiments.design import config_for

    run_config = config_for(name, run_config)
    if plan_only:
        _show_plan(run_config, params, cores=None, as_json=False)
        return
    from rayinterp.run import STAGES

    tables = _run_stages(run_config, STAGES)
    from rayinterp.experiments.runner import write_experiment

    written = write_experiment(name, run_config, tables)
    console.print(f"\nFigures: {', '.join(written.figures)}", soft_wrap=True, highlight=False)
    console.print(f"The page, for a browser:      [bold]{written.page}[/bold]", soft_wrap=True)


@app.command()
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="job server of the cluster")
    ] = "http://127.0.0.1:8265",
    stage: Annotated[str, typer.Option(help="one stage, or run for all of them")] = "run",
    experiment: Annotated[str | None, typer.Option(help="an experiment of this name in place of a run")] = None,
    follow: Annotated[bool, typer.Option(help="show the job's log until it ends")] = True,
) -> None:
    """Run on a cluster, as a Ray job. Submitted again, it goes on where it stopped."""
    run_config = load_config(config, overrides)
    _quiet()
    from rayinterp import submit as jobs
    from rayinterp.run import STAGES

    if stage not in ("run", *STAGES):
        raise UserError(f"--stage {stage!r} is none of run, {', '.join(STAGES)}")
    script = "experiment" if experiment else stage
    arguments = [*([experiment] if experiment else []), config, *(overrides or [])]
    jobs.check_job(run_config, config, script)
    client = jobs.connect(address)
    job = jobs.submit(client, run_config, config, script, arguments)
    later = f"ray job logs --follow --address {address} {job}", f"ray job stop --address {address} {job}"
    console.print(f"Submitted [bold]{job}[/bold]. Its log: {later[0]}\nTo stop it: {later[1]}", soft_wrap=True)
    if not follow:
        return
    try:
        status = jobs.follow(client, job, _show_log)
    except KeyboardInterrupt:
        console.print(f"\nThe job goes on. To stop it: {later[1]}", soft_wrap=True)
        return
    if status != "SUCCEEDED":
        kept = "what is committed is kept: submit again with the same command"
        raise UserError(f"job {job} ended as {status.value}; {kept}")


def _show_log(text: str) -> None:
    """As it comes: its lines may be cut anywhere on the way, and must not be where they are shown."""
    console.print(text, end="", markup=False, highlight=False, soft_wrap=True)


@app.command()
def push(
    run: Annotated[str, typer.Argument(help="run directory", metavar="RUN")],
    target: Annotated[str, typer.Argument(help=TARGETS, metavar="TARGET")],
    only_records: Annotated[
        bool, typer.Option("--only-records", help="corpus to records alone: what searches start from")
    ] = False,
) -> None:
    """Bring a run directory to where others can pull it from; what is there already is not sent again."""
    from rayinterp.share.push import push as push_run

    with _one_bar("push") as advance_to:
        moved = push_run(run, target, only_records, advance_to)
    console.print(f"Pushed {_counted(moved)}. To get it elsewhere:  rayinterp pull {target} RUN", soft_wrap=True)


@app.command()
def pull(
    target: Annotated[str, typer.Argument(help=TARGETS, metavar="TARGET")],
    run: Annotated[str, typer.Argument(help="run directory, new or with a part of it", metavar="RUN")],
) -> None:
    """Bring a pushed run into a run directory, every file checked by its hash."""
    from rayinterp.share.pull import pull as pull_run

    with _one_bar("pull") as advance_to:
        moved = pull_run(target, run, advance_to)
    console.print(f"Pulled {_counted(moved)}. To go on from there:  rayinterp run CONFIG run_dir={run}", soft_wrap=True)


@contextmanager
def _one_bar(name: str) -> Iterator[Callable[..., None]]:
    with ExitStack() as stack:
        display = stack.enter_context(_Bars()) if console.is_terminal else _Lines()
        display.begin(name)
        yield display.advance_to


def _counted(moved: Any) -> str:
    skipped = f", {moved.num_skipped:,} were there" if moved.num_skipped else ""
    return f"{moved.num_files:,} files, {moved.num_bytes / 1e6:,.1f} MB{skipped}"


@app.command()
def tune(
    config: ConfigPath,
    overrides: Overrides = None,
    arm: Annotated[str, typer.Option(help="the tree explainer whose settings are tried")] = "tree",
    num_samples: Annotated[int, typer.Option(min=1, help="settings to try")] = 20,
    features: Annotated[int, typer.Option(min=1, help="features on which they are tried, none of the run's own")] = 8,
) -> None:
    """Try settings of a tree search on features that the run does not use."""
    run_config = load_config(config, overrides)
    _quiet()
    from rayinterp.run import connected
    from rayinterp.tune import tune_search

    with ExitStack() as stack:
        with console.status("starting Ray"):
            stack.enter_context(connected(run_config))
        display = stack.enter_context(_Bars()) if console.is_terminal else _Lines()
        display.begin("tune")
        tuned = tune_search(run_config, arm, num_samples, features, display.advance_to)
        display.end(f"{len(tuned.trials)} trials")
    _show_trials(tuned.metric, tuned.trials)
    console.print(f"\nThe best of them, to paste into {config}:\n")
    settings = yaml.safe_dump({"explainers": {arm: tuned.best["settings"]}}, sort_keys=False)
    console.print(settings, markup=False, highlight=False)
    console.print(f"All of it is in [bold]{run_config.run_dir.rstrip('/')}-tune/tune.json[/bold].", soft_wrap=True)


def _show_trials(metric: str, trials: list[dict[str, Any]]) -> None:
    table = Table(*trials[0]["settings"], "features", "valid score", "tokens", "cost", metric)
    for trial in trials:
        cost = "" if trial["usd"] is None else f"${trial['usd']:.4f}"
        done = str(trial["num_features"]) + ("" if trial["finished"] else ", stopped")
        figures = (done, f"{trial['valid_score']:.3f}", f"{trial['tokens']:,}", cost, f"{trial['objective']:.3g}")
        table.add_row(*map(str, trial["settings"].values()), *figures)
    console.print(table)


@contextmanager
def _readable_errors() -> Iterator[None]:
    """The user's own mistakes are one message; ours keep their traceback."""
    try:
        yield
    except UserError as error:
        stderr = Console(stderr=True)
        stderr.print("error: ", style="bold red", end="")
        stderr.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def main() -> None:
    """The `rayinterp` command."""
    with _readable_errors():
        app(standalone_mode=True)


def main_command(command: Callable[..., None]) -> None:
    """What a job with options of its own runs."""
    with _readable_errors():
        typer.run(command)


def main_job(stages: tuple[str, ...]) -> None:
    """What `jobs/*.py` run: config path and overrides from the command line."""
    with _readable_errors():
        if len(sys.argv) < 2:
            raise UserError(f"give a config: python {sys.argv[0]} configs/demo.yaml [key=value ...]")
        run_stages(sys.argv[1], sys.argv[2:], stages)
