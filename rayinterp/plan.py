"""What a run will cost, before it starts: tokens, FLOPs, calls, pairs, seconds, GPU-hours, bytes and dollars per stage.

    config, sizes of its models -> plan_run -> a StagePlan per stage -> total

Arithmetic alone: it loads no model, starts no Ray and looks at no machine. What is not known is NaN on the way and
None in the end, never 0. Every constant is in `CONSTANTS`, with where it comes from; docs/plan.md says what is assumed.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from rayinterp.config import (
    PLANTED,
    FurtherScorerConfig,
    IntruderConfig,
    JudgeConfig,
    LateInteractionConfig,
    LexicalConfig,
    LLMConfig,
    LLMSimulatorConfig,
    OneShotConfig,
    PoolResources,
    RunConfig,
    SimulatorConfig,
    SurprisalConfig,
    TreeConfig,
    features_within_calls,
    looks_of,
    simulators_of,
)
from rayinterp.simulate.simulator import CONTROL_NULLS, NULL_EXPLANATIONS

UNKNOWN = math.nan


class Constant(NamedTuple):
    """A number that the plan rests on."""

    value: float
    unit: str
    source: str


CONSTANTS: dict[str, Constant] = {
    "cpu subject": Constant(60e9, "FLOP/s a core", "docs/harvest.md: 1,220 tokens/s through 15 layers, two cores"),
    "cpu encoder": Constant(30e9, "FLOP/s a core", "docs/simulators.md: token vectors, 73 sequences/s, two cores"),
    "cpu simulator": Constant(35e9, "FLOP/s a core", "docs/simulators.md: 2.6 pairs/s of 129 tokens, two cores"),
    "cpu llm": Constant(35e9, "FLOP/s a core", "taken to be that of the simulator"),
    "cpu writing": Constant(1.5e9, "parameters/s", "the demo: 14 tokens/s from 106 M parameters, whatever the cores"),
    "gpu subject": Constant(0.35, "of the peak", "assumed, not measured: batches of thousands of tokens"),
    "gpu encoder": Constant(0.2, "of the peak", "assumed, not measured: a small model"),
    "gpu simulator": Constant(0.25, "of the peak", "assumed, not measured: packed passes with a mask"),
    "gpu llm": Constant(0.25, "of the peak", "assumed, not measured"),
    "gpu writing": Constant(30, "tokens/s a replica", "assumed: transformers, one answer at a time"),
    "endpoint start": Constant(1.5, "s a call", "assumed"),
    "endpoint writing": Constant(60, "tokens/s a call", "assumed"),
    "corpus": Constant(25e3, "tokens kept/s an actor", "the demo: one window in eight kept, 776,000 tokens in 8 s"),
    "postings": Constant(3.7e6, "non-zeros/s an actor", "docs/harvest.md"),
    "nearest": Constant(6.7e9, "numbers/s a core", "docs/records.md: 341 features/s, 100k vectors of 384, two cores"),
    "nearest by index": Constant(6, "features/s", "docs/records.md, whatever the size"),
    "records": Constant(500, "records/s a core", "the demo: 2,080 in 4 s with the start"),
    "bootstrap": Constant(3.2e-7, "s a resample and record", "measured: 1,000 of 60 records in 19 ms, one core"),
    "l0": Constant(64, "active features a token and SAE", "assumed; published SAEs have 20 to 150"),
    "density": Constant(0.004, "of the tokens", "assumed where an SAE's width is unknown: 64 of 16,384"),
    "vector": Constant(768, "numbers", "assumed where the encoder is unknown or given by its parameters alone"),
    "bytes a non-zero": Constant(13.4, "bytes", "docs/harvest.md"),
    "bytes a token": Constant(6, "bytes", "the demo's tables sequences and records: id, text and activation"),
    "bytes a row": Constant(60, "bytes", "the demo: ids and columns besides tokens, compressed"),
    "bytes a candidate": Constant(1000, "bytes", "the demo: with thought and feedback"),
    "bytes an LLM token": Constant(5, "bytes", "the demo's llm_calls: request and answer"),
    "prompt": Constant(180, "tokens", "the demo: the task in words; a worked example is as long again"),
    "prompt a token shown": Constant(2.3, "tokens", "the demo: text, marks and the list of what fires"),
    "revision": Constant(160, "tokens", "the demo: request, score and errors, besides the record's text"),
    "words around a text": Constant(5, "tokens", "counted: its number and marks, in a further scorer's question"),
    "surprisal prefix": Constant(90, "tokens", "counted: worked examples and a description, once a text graded"),
    "rule": Constant(20, "tokens", "the demo: one rule of an answer"),
    "new rules": Constant(0.5, "of a revision's rules", "assumed: the others are remembered"),
    "pair tokens a token": Constant(4, "tokens", "docs/simulators.md: token, tab, rating, newline"),
}
"""Everything that the plan takes from measurement or assumes."""

START_SECONDS = {"corpus": 10, "harvest": 20, "index": 10, "records": 3, "holistic": 15, "explain": 25, "score": 25}
"""Workers started and models loaded: the demo's, on two cores."""


class ModelSize(NamedTuple):
    """What it takes to run a model."""

    num_params: float
    """That every token meets: of the layers that run, without embeddings and head."""
    d_model: float = UNKNOWN
    num_layers: float = UNKNOWN
    """That run."""
    head_params: float = 0
    """Of the head, which only an LLM that writes needs."""


class SaeSizes(NamedTuple):
    """The SAEs of a run, taken to be alike."""

    num_saes: float = UNKNOWN
    num_features: float = UNKNOWN
    """Requested, of all SAEs together."""
    d_sae: float = UNKNOWN
    num_params: float = UNKNOWN
    """Of the encoders' parts that every token meets, of all SAEs together."""


class Sizes(NamedTuple):
    """What a plan needs to know beside the config; NaN or absent is unknown."""

    num_cores: int
    """Of the machine or cluster, for the stages without GPUs."""
    saes: SaeSizes
    models: dict[str, ModelSize]
    """By the config's field: subject.model, index.embedder, simulators.<name>.model, ..."""
    notes: tuple[str, ...] = ()
    """What could not be found out, and what to do about it."""

    def model(self, field: str) -> ModelSize:
        return self.models.get(field, ModelSize(UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN))


class StagePlan(NamedTuple):
    """What one stage will take; None is unknown."""

    stage: str
    """As in `rayinterp run`; holistic is a part of records."""
    num_tokens: float | None = 0
    """Read by models that the run itself holds."""
    flops: float | None = 0
    """Of their forward passes."""
    num_pairs: float | None = 0
    """(rule, record) pairs given to simulators, null explanations included."""
    llm_calls: float | None = 0
    llm_tokens: float | None = 0
    """Read and written in those calls."""
    seconds: float | None = 0
    """On the clock."""
    gpu_hours: float | None = 0
    """GPUs held, busy or not."""
    num_bytes: float | None = 0
    """Left in the run directory."""
    usd: float | None = 0
    """Calls by their price, GPU-hours by `budget.usd_per_gpu_hour` where it is given."""


def plan_run(config: RunConfig, sizes: Sizes) -> list[StagePlan]:
    """The stages in order, for a run from nothing in which every feature is live and finds all of its records."""
    planned = [plan_corpus(config), plan_harvest(config, sizes), plan_index(config, sizes), plan_records(config, sizes)]
    if config.records.holistic != "none":
        planned.append(plan_holistic(config, sizes))
    planned += [plan_explain(config, sizes), plan_score(config, sizes)]
    return [_priced(stage, config) for stage in planned]


def total(plans: list[StagePlan], stage: str = "total") -> StagePlan:
    """The sum; a column with something unknown in it is unknown."""
    columns = zip(*(plan[1:] for plan in plans), strict=True)
    return StagePlan(stage, *(_known(sum(UNKNOWN if value is None else value for value in c)) for c in columns))


def by_stage(plans: list[StagePlan]) -> dict[str, StagePlan]:
    """The plan by stage of the run: holistic is done by records."""
    parts: dict[str, list[StagePlan]] = {}
    for plan in plans:
        parts.setdefault("records" if plan.stage == "holistic" else plan.stage, []).append(plan)
    return {stage: total(of_stage, stage) for stage, of_stage in parts.items()}


def _priced(plan: StagePlan, config: RunConfig) -> StagePlan:
    """With dollars for its GPU-hours, and unknown numbers as None."""
    assert plan.usd is not None and plan.gpu_hours is not None
    price = config.budget.usd_per_gpu_hour
    usd = plan.usd + price * plan.gpu_hours if price and plan.gpu_hours else plan.usd
    return StagePlan(plan.stage, *(_known(value) for value in plan._replace(usd=usd)[1:]))


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _value(constant: str) -> float:
    return CONSTANTS[constant].value


def _largest(*values: float) -> float:
    return UNKNOWN if any(map(math.isnan, values)) else max(values)


def _smallest(*values: float) -> float:
    return UNKNOWN if any(map(math.isnan, values)) else min(values)


def speed(kind: str, config: RunConfig, resources: PoolResources, sizes: Sizes) -> float:
    """FLOP/s of a stage: of its GPUs, or of all cores, however many actors share them."""
    if resources.num_gpus:
        peak = config.resources.gpu_tflops * 1e12
        return resources.most_actors * resources.num_gpus * peak * _value(f"gpu {kind}")
    return sizes.num_cores * _value(f"cpu {kind}")


def _gpu_hours(resources: PoolResources, seconds: float) -> float:
    held = resources.most_actors * resources.num_gpus
    return held * seconds / 3600 if held else 0


# corpus to records


def num_corpus_tokens(config: RunConfig) -> int:
    return config.corpus.num_sequences * config.corpus.sequence_length


def plan_corpus(config: RunConfig) -> StagePlan:
    tokens, actors = num_corpus_tokens(config), config.resources.corpus
    seconds = START_SECONDS["corpus"] + tokens / (_value("corpus") * actors.most_actors)
    return StagePlan(
        "corpus",
        seconds=seconds,
        gpu_hours=_gpu_hours(actors, seconds),
        num_bytes=tokens * _value("bytes a token"),
    )


def flops_per_token(config: RunConfig, sizes: Sizes) -> float:
    """Of the subject up to its deepest hook point, attention across the sequence included, and of its SAEs."""
    if config.subject.model in PLANTED:
        return 0
    model, saes = sizes.model("subject.model"), sizes.saes
    # Short sequences: 1 % at 32 tokens. Left out where only a number of parameters is known.
    attention = 4 * config.corpus.sequence_length * model.d_model * model.num_layers
    parts = [2 * model.num_params, attention, 2 * saes.num_params]
    return parts[0] + sum(part for part in parts[1:] if not math.isnan(part))


def num_non_zeros(config: RunConfig, sizes: Sizes) -> float:
    """Activations of the requested features above 0."""
    return num_corpus_tokens(config) * sizes.saes.num_features * density(config, sizes)


def density(config: RunConfig, sizes: Sizes) -> float:
    """Share of the tokens at which a feature is active."""
    usual = _value("density") if math.isnan(sizes.saes.d_sae) else _value("l0") / sizes.saes.d_sae
    return min(usual, config.harvest.max_density)


def vector_length(sizes: Sizes) -> float:
    """Numbers of a sentence embedding."""
    length = sizes.model("index.embedder").d_model
    return _value("vector") if math.isnan(length) else length


def plan_harvest(config: RunConfig, sizes: Sizes) -> StagePlan:
    actors = config.resources.harvest
    tokens = config.corpus.num_sequences * (config.corpus.sequence_length + 1)  # BOS
    flops = tokens * flops_per_token(config, sizes)
    writing = num_non_zeros(config, sizes) / (_value("postings") * actors.most_actors)
    # Written while the next shard is computed.
    seconds = START_SECONDS["harvest"] + _largest(flops / speed("subject", config, actors, sizes), writing)
    return StagePlan(
        "harvest",
        num_tokens=tokens,
        flops=flops,
        seconds=seconds,
        gpu_hours=_gpu_hours(actors, seconds),
        num_bytes=num_non_zeros(config, sizes) * _value("bytes a non-zero"),
    )


def plan_index(config: RunConfig, sizes: Sizes) -> StagePlan:
    model, actors = sizes.model("index.embedder"), config.resources.index
    tokens = config.corpus.num_sequences * (config.corpus.sequence_length + 2)  # its own tokens, about as many
    flops = 2 * model.num_params * tokens
    seconds = START_SECONDS["index"] + flops / speed("encoder", config, actors, sizes)
    width = 2 if config.index.dtype == "float16" else 4
    return StagePlan(
        "index",
        num_tokens=tokens,
        flops=flops,
        seconds=seconds,
        gpu_hours=_gpu_hours(actors, seconds),
        num_bytes=config.corpus.num_sequences * (vector_length(sizes) * width + 16),
    )


def records_per_feature(config: RunConfig, split: str) -> int:
    quota = getattr(config.records, split)
    return quota.positive + quota.complementary * len(config.records.complementary)


def plan_records(config: RunConfig, sizes: Sizes) -> StagePlan:
    features = sizes.saes.num_features
    count = features * sum(records_per_feature(config, split) for split in ("train", "valid", "test"))
    num_searches = features * sum("similar" in source for source in config.records.complementary)
    if not any("similar" in source for source in config.records.complementary):
        searching = 0
    elif config.index.uses_index(config.corpus.num_sequences):
        searching = num_searches / _value("nearest by index")
    else:
        numbers = num_searches * config.corpus.num_sequences * vector_length(sizes)
        searching = numbers / (_value("nearest") * sizes.num_cores)
    writing = count / (_value("records") * sizes.num_cores)
    row = config.corpus.sequence_length * _value("bytes a token") + _value("bytes a row")
    return StagePlan("records", seconds=START_SECONDS["records"] + searching + writing, num_bytes=count * row)


def plan_holistic(config: RunConfig, sizes: Sizes) -> StagePlan:
    """A pass over each recorded sequence, and over what follows each of its tokens once that is dropped."""
    length, actors = config.corpus.sequence_length, config.resources.harvest
    positive_alone = config.records.holistic == "positive"
    pairs = sizes.saes.num_features * sum(
        getattr(config.records, split).positive if positive_alone else records_per_feature(config, split)
        for split in config.records.holistic_splits
    )
    sequences = _smallest(pairs, config.corpus.num_sequences)
    tokens = sequences * (length + 1 + length * (length - 1) / 2)
    flops = tokens * flops_per_token(config, sizes)
    seconds = START_SECONDS["holistic"] + flops / speed("subject", config, actors, sizes)
    return StagePlan(
        "holistic",
        num_tokens=tokens,
        flops=flops,
        seconds=seconds,
        gpu_hours=_gpu_hours(actors, seconds),
        num_bytes=pairs * (4 * length + _value("bytes a row")),
    )


# explain


class Calls(NamedTuple):
    """LLM calls of one arm, for all features."""

    num_calls: float = 0
    prompt_tokens: float = 0
    completion_tokens: float = 0

    def plus(self, other: Calls) -> Calls:
        return Calls(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: float) -> Calls:
        return Calls(*(value * count for value in self))


def nodes_per_round(arm: LexicalConfig | OneShotConfig | TreeConfig) -> list[int]:
    """Candidates of one feature: the roots, then every round's, none of which ends the search."""
    if not isinstance(arm, TreeConfig):
        return [1]
    rounds = [arm.num_llm_roots + arm.lexical_root]
    for _ in range(arm.depth):
        rounds.append(min(arm.width, sum(rounds)) * arm.branching_factor)
    return rounds


def features_with_llm(config: RunConfig, num_features: float) -> float:
    """Features that the call budgets reach."""
    within = features_within_calls(config)
    return num_features if within is None else _smallest(num_features, within)


def completion_tokens(arm: OneShotConfig) -> float:
    return min(arm.max_tokens, _value("rule") * (arm.rule_cap if arm.structured else 1))


def root_prompt_tokens(config: RunConfig, arm: OneShotConfig) -> float:
    shown = arm.num_records_shown * config.corpus.sequence_length * _value("prompt a token shown")
    return _value("prompt") * (2 if arm.few_shots else 1) + shown


def calls_of_a_feature(config: RunConfig) -> dict[str, Calls]:
    """By LLM: what a feature's arms ask when every answer parses; a root that several arms ask for is paid for once."""
    calls = {name: Calls() for name in config.llms}
    roots_paid: Counter[tuple[object, ...]] = Counter()
    for arm in config.explainers.values():
        if not isinstance(arm, OneShotConfig):
            continue
        tree = arm if isinstance(arm, TreeConfig) else None
        opening = (arm.llm, arm.structured, arm.rule_cap, arm.few_shots, arm.num_records_shown, arm.temperature)
        opening = (*opening, arm.max_tokens, arm.holistic, arm.num_negatives_shown)
        num_roots = tree.num_llm_roots if tree else 1
        new_roots = max(num_roots - roots_paid[opening], 0)
        roots_paid[opening] += new_roots
        prompt, answer = root_prompt_tokens(config, arm), completion_tokens(arm)
        calls[arm.llm] = calls[arm.llm].plus(Calls(1, prompt, answer).times(new_roots))
        for depth, num_nodes in enumerate(nodes_per_round(arm)[1:] if tree else [], 1):
            turn = answer + _value("revision") + (tree.num_worst_records if tree else 0) * config.corpus.sequence_length
            calls[arm.llm] = calls[arm.llm].plus(Calls(1, prompt + depth * turn, answer).times(num_nodes))
    return calls


class Work(NamedTuple):
    """What one simulator is given by one stage."""

    num_pairs: float = 0
    num_sequences: float = 0
    """Distinct for each feature: all that late interaction pays for."""

    def plus(self, other: Work) -> Work:
        return Work(self.num_pairs + other.num_pairs, self.num_sequences + other.num_sequences)


def num_nulls(simulator: SimulatorConfig) -> int:
    """Null explanations that each record is also simulated with."""
    is_calibrated = isinstance(simulator, LLMSimulatorConfig) and simulator.calibration != "none"
    return len(NULL_EXPLANATIONS) if is_calibrated else 0


def search_work(config: RunConfig, num_features: float) -> dict[str, Work]:
    """By simulator: pairs that the searches ask for."""
    train, valid = (records_per_feature(config, split) for split in ("train", "valid"))
    pairs: dict[str, float] = dict.fromkeys(config.simulators, 0.0)
    reached: dict[str, float] = {}
    for arm in config.explainers.values():
        features = features_with_llm(config, num_features) if isinstance(arm, OneShotConfig) else num_features
        rules = arm.rule_cap if isinstance(arm, LexicalConfig) or arm.structured else 1
        looks = looks_of(arm)
        for round_, num_nodes in enumerate(nodes_per_round(arm)):
            new_rules = rules * (_value("new rules") if round_ and rules > 1 else 1)
            looked_at, kept = looked_at_and_kept(arm, num_nodes, train)
            if looks:
                pairs[looks[1]] += features * new_rules * looked_at
            pairs[arm.simulator] += features * kept * new_rules * (train + valid)
        pairs[arm.simulator] += features * rules * falsified(arm)
        for simulator in simulators_of(arm):
            reached[simulator] = _largest(reached.get(simulator, 0), features)
    work = {}
    for name, features in reached.items():
        nulls = num_nulls(config.simulators[name])
        sequences = features * (train + valid)
        work[name] = Work(pairs[name] + (nulls * sequences if nulls else 0), sequences)
    return work


def looked_at_and_kept(
    arm: LexicalConfig | OneShotConfig | TreeConfig, num_nodes: int, train: float
) -> tuple[float, float]:
    """Of one round: (candidate, record) pairs of its cheap looks, and candidates that are scored."""
    if not isinstance(arm, TreeConfig) or not looks_of(arm):
        return 0, num_nodes
    if arm.cascade:
        audit, keep = arm.cascade.audit, arm.cascade.keep
        return num_nodes * train, audit * num_nodes + (1 - audit) * min(num_nodes, keep)
    eta, looks = arm.halving.eta, range(arm.halving.num_looks)
    looked_at = sum(
        -(-num_nodes // eta**look) * _smallest(train, arm.halving.num_records * eta**look) for look in looks
    )
    return looked_at, -(-num_nodes // eta**arm.halving.num_looks)


def falsified(arm: LexicalConfig | OneShotConfig | TreeConfig) -> float:
    """(candidate, record) pairs of a whole search on what its falsifier draws."""
    if not isinstance(arm, TreeConfig) or not arm.falsifier:
        return 0
    falsifier, finalists = arm.falsifier, arm.falsifier.num_finalists
    tried = arm.depth * arm.width**2 * falsifier.num_drawn if falsifier.num_added else 0
    return tried + finalists**2 * falsifier.num_valid


class Simulated(NamedTuple):
    """What simulators take in one stage."""

    num_pairs: float = 0
    num_tokens: float = 0
    flops: float = 0
    seconds: float = 0
    num_bytes: float = 0

    def plus(self, other: Simulated) -> Simulated:
        return Simulated(*(a + b for a, b in zip(self, other, strict=True)))


def simulate(config: RunConfig, sizes: Sizes, work: dict[str, Work]) -> Simulated:
    """All simulators one after the other: on one machine they share what there is."""
    taken = Simulated()
    for name, given in work.items():
        arm, resources = config.simulators[name], config.resources.simulator
        length = config.corpus.sequence_length
        if isinstance(arm, LateInteractionConfig):
            tokens = given.num_sequences * (length + 2)
            flops = 2 * sizes.model(f"simulators.{name}.embedder").num_params * tokens
            without = resources.model_copy(update={"num_gpus": 0})
            seconds = flops / speed("encoder", config, without, sizes)
            taken = taken.plus(Simulated(given.num_pairs, tokens, flops, seconds))
        elif isinstance(arm, LLMSimulatorConfig):
            tokens = given.num_pairs * (length * _value("pair tokens a token") + 1)
            flops = 2 * sizes.model(f"simulators.{name}.model").num_params * tokens
            seconds = flops / speed("simulator", config, resources, sizes)
            num_bytes = given.num_pairs * (12 * length + _value("bytes a row"))
            taken = taken.plus(Simulated(given.num_pairs, tokens, flops, seconds, num_bytes))
        else:
            taken = taken.plus(Simulated(num_pairs=given.num_pairs))
    return taken


def llm_seconds(config: RunConfig, sizes: Sizes, name: str, calls: Calls, num_features: float) -> float:
    """Time that the calls of one LLM take."""
    arm, replicas = config.llms[name], config.resources.llm
    if arm.provider == "scripted" or not calls.num_calls:
        return 0
    if arm.provider == "openai":
        actors = config.resources.search.num_actors
        slots = max(arm.max_concurrency // actors, 1) * actors  # as the actors share them
        at_once = _smallest(num_features, actors * config.resources.searches_per_actor, slots)
        writing = calls.completion_tokens / _value("endpoint writing")
        answering = (calls.num_calls * _value("endpoint start") + writing) / _largest(at_once, 1)
        beginning = 60 * calls.num_calls / arm.requests_per_minute if arm.requests_per_minute else 0
        return _largest(answering, beginning)
    model = sizes.model(f"llms.{name}.model")
    reading = 2 * model.num_params * calls.prompt_tokens / speed("llm", config, replicas, sizes)
    if replicas.num_gpus:
        return reading + calls.completion_tokens / (_value("gpu writing") * replicas.most_actors)
    return reading + calls.completion_tokens * (model.num_params + model.head_params) / _value("cpu writing")


def usd_of(llm: LLMConfig, calls: Calls) -> float:
    """Dollars by the config's prices; our own replicas are paid for in GPU-hours."""
    if llm.provider != "openai" or not calls.num_calls:
        return 0
    prompt, completion = llm.usd_per_million_prompt_tokens, llm.usd_per_million_completion_tokens
    if prompt is None or completion is None:
        return UNKNOWN
    return (prompt * calls.prompt_tokens + completion * calls.completion_tokens) / 1e6


def service_gpu_hours(config: RunConfig, simulators: set[str], llms: set[str], seconds: float) -> float:
    """A service holds its GPUs for the whole of a stage, asked or not."""
    num_simulators = sum(isinstance(config.simulators[name], LLMSimulatorConfig) for name in simulators)
    num_llms = sum(config.llms[name].provider == "local" for name in llms)
    held = [(num_simulators, config.resources.simulator), (num_llms, config.resources.llm)]
    return sum(count * _gpu_hours(replicas, seconds) for count, replicas in held if count)


def _asked(config: RunConfig) -> tuple[set[str], set[str]]:
    """Simulators and LLMs that explainers ask."""
    arms = config.explainers.values()
    llms = {arm.llm for arm in arms if isinstance(arm, OneShotConfig)}
    return {name for arm in arms for name in simulators_of(arm)}, llms


def plan_explain(config: RunConfig, sizes: Sizes) -> StagePlan:
    features = sizes.saes.num_features
    reached = features_with_llm(config, features)
    simulators, llms = _asked(config)
    calls = {name: one.times(reached) for name, one in calls_of_a_feature(config).items() if name in llms}
    simulated = simulate(config, sizes, search_work(config, features))
    local = {name for name in llms if config.llms[name].provider == "local"}
    waited = {name: llm_seconds(config, sizes, name, calls[name], reached) for name in llms}
    # Answers of an endpoint are waited for while simulators work; a model of our own takes its turn on the machine.
    here = simulated.seconds + sum(waited[name] for name in local)
    seconds = START_SECONDS["explain"] + _largest(here, *(waited[name] for name in llms - local))
    all_calls = Calls()
    for of_llm in calls.values():
        all_calls = all_calls.plus(of_llm)
    llm_tokens = all_calls.prompt_tokens + all_calls.completion_tokens
    own_tokens = sum(calls[name].prompt_tokens + calls[name].completion_tokens for name in local)
    own_flops = sum(
        2 * sizes.model(f"llms.{name}.model").num_params * (calls[name].prompt_tokens + calls[name].completion_tokens)
        for name in local
    )
    nodes = sum(
        (reached if isinstance(arm, OneShotConfig) else features) * sum(nodes_per_round(arm))
        for arm in config.explainers.values()
    )
    return StagePlan(
        "explain",
        num_tokens=simulated.num_tokens + own_tokens,
        flops=simulated.flops + own_flops,
        num_pairs=simulated.num_pairs,
        llm_calls=all_calls.num_calls,
        llm_tokens=llm_tokens,
        seconds=seconds,
        gpu_hours=service_gpu_hours(config, simulators, llms, seconds),
        num_bytes=simulated.num_bytes + llm_tokens * _value("bytes an LLM token") + nodes * _value("bytes a candidate"),
        usd=sum(usd_of(config.llms[name], calls[name]) for name in llms),
    )


# score


class Graded(NamedTuple):
    """What one simulator grades."""

    work: Work
    num_features: float
    num_intervals: float
    """Bootstrap intervals of one feature."""
    num_records: int
    """Test records of one feature."""


def grading(config: RunConfig, sizes: Sizes, name: str) -> Graded:
    """Every explainer's explanation, its shuffled controls and null texts on each test record."""
    arm, arms = config.simulators[name], config.explainers
    features = sizes.saes.num_features
    if arm.num_features is not None:
        features = _smallest(features, arm.num_features * sizes.saes.num_saes)
    most = arm.max_records if isinstance(arm, LLMSimulatorConfig) and arm.max_records else math.inf
    quota, num_negatives = config.records.test, len(arms) * config.score.num_rule_negatives
    per_source = [quota.positive, *[quota.complementary] * len(config.records.complementary), num_negatives]
    records = sum(int(min(count, most)) for count in per_source)
    rules_each = [a.rule_cap if isinstance(a, LexicalConfig) or a.structured else 1 for a in arms.values()]
    rules = sum(rules_each) * (1 + config.score.num_shuffled) + len(CONTROL_NULLS) + num_nulls(arm)
    pairs = features * (rules * records + (sum(rules_each) + num_nulls(arm)) * _on_valid(config, most))
    if isinstance(arm, LLMSimulatorConfig) and arm.max_pairs is not None:
        pairs = _smallest(pairs, arm.max_pairs)
    num_sources = len(config.records.complementary) + bool(config.score.num_rule_negatives)
    return Graded(Work(pairs, features * records), features, num_sources * (len(arms) + 1), records)


class Scored(NamedTuple):
    """What the further scorers take in all."""

    calls: dict[str, Calls]
    """By LLM."""
    num_tokens: float = 0
    """Read by simulators' models, behind descriptions."""
    flops: float = 0
    num_rows: float = 0
    """Of `scores`."""


def records_asked_about(config: RunConfig, scorer: FurtherScorerConfig) -> int:
    """Test records of one feature, each source's no more than `max_records`; for intruders, those that are silent."""
    quota, most = config.records.test, scorer.max_records or math.inf
    silent = [quota.complementary] * len(config.records.complementary)
    silent.append(len(config.explainers) * config.score.num_rule_negatives)
    kinds = silent if isinstance(scorer, IntruderConfig) else [quota.positive, *silent]
    return int(sum(min(count, most) for count in kinds))


def texts_graded(config: RunConfig) -> int:
    """Texts that a further scorer grades on a feature: explanations, another feature's for each, and a null text."""
    return len(config.explainers) * (2 if config.score.num_shuffled else 1) + 1


def calls_of_a_judge(config: RunConfig, scorer: JudgeConfig) -> Calls:
    """LLM calls for one feature when every answer parses."""
    records, length = records_asked_about(config, scorer), config.corpus.sequence_length
    if isinstance(scorer, IntruderConfig):
        num_calls, shown, answer = records, scorer.num_shown, 3
    else:
        num_calls = -(-records // scorer.num_shown) * texts_graded(config)
        shown, answer = min(records / max(-(-records // scorer.num_shown), 1), scorer.num_shown), 3 * scorer.num_shown
    prompt = 2 * _value("prompt") + shown * (length + _value("words around a text"))
    return Calls(num_calls, num_calls * prompt, num_calls * min(answer, scorer.max_tokens))


def scoring(config: RunConfig, sizes: Sizes) -> Scored:
    """What the further scorers ask of LLMs and simulators' models."""
    calls = {name: Calls() for name in config.llms}
    tokens = flops = num_rows = 0.0
    for scorer in config.score.scorers.values():
        features = sizes.saes.num_features
        if scorer.num_features is not None:
            features = _smallest(features, scorer.num_features * sizes.saes.num_saes)
        num_texts = 1 if isinstance(scorer, IntruderConfig) else texts_graded(config)
        num_rows += features * num_texts * (len(config.records.complementary) + bool(config.score.num_rule_negatives))
        if isinstance(scorer, JudgeConfig):
            one, most = calls_of_a_judge(config, scorer), config.llms[scorer.llm].max_calls
            if most is not None:
                features = _smallest(features, most // max(one.num_calls * (1 + scorer.max_parse_retries), 1))
            calls[scorer.llm] = calls[scorer.llm].plus(one.times(features))
        elif isinstance(scorer, SurprisalConfig):
            records = records_asked_about(config, scorer)
            read = features * (num_texts + 1) * (records * config.corpus.sequence_length + _value("surprisal prefix"))
            model = sizes.model(f"simulators.{scorer.simulator}.model")
            tokens, flops = tokens + read, flops + 2 * (model.num_params + model.head_params) * read
    return Scored(calls, tokens, flops, num_rows)


def _on_valid(config: RunConfig, most: float) -> int:
    """Valid records of one feature, on which complexity is measured."""
    quota = config.records.valid
    counts = [quota.positive, *[quota.complementary] * len(config.records.complementary)]
    return sum(int(min(count, most)) for count in counts)


def plan_score(config: RunConfig, sizes: Sizes) -> StagePlan:
    graded = {name: grading(config, sizes, name) for name in dict.fromkeys(config.score.simulators)}
    simulated = simulate(config, sizes, {name: one.work for name, one in graded.items()})
    resampled = sum(g.num_features * g.num_intervals * g.num_records for g in graded.values())
    resampling = resampled * config.score.num_bootstrap * _value("bootstrap") / sizes.num_cores
    # Rule negatives of all features share passes over the vectors; the encoder of the index reads the rules.
    texts = sizes.saes.num_features * len(config.explainers)
    searching = 0.0
    if config.score.num_rule_negatives:
        numbers = texts * config.corpus.num_sequences * config.corpus.splits[2] * vector_length(sizes)
        searching = numbers / (_value("nearest") * sizes.num_cores)
    scored = scoring(config, sizes)
    judges = {name for name, calls in scored.calls.items() if calls.num_calls}
    # One scorer after another.
    judging = sum(llm_seconds(config, sizes, n, scored.calls[n], sizes.saes.num_features) for n in sorted(judges))
    reading = scored.flops / speed("simulator", config, config.resources.simulator, sizes) if scored.num_tokens else 0
    seconds = START_SECONDS["score"] + searching + simulated.seconds + resampling + judging + reading
    simulators, llms = _asked(config)
    readers = {s.simulator for s in config.score.scorers.values() if isinstance(s, SurprisalConfig)}
    all_calls = Calls()
    for of_llm in scored.calls.values():
        all_calls = all_calls.plus(of_llm)
    llm_tokens = all_calls.prompt_tokens + all_calls.completion_tokens
    own = {n: c.prompt_tokens + c.completion_tokens for n, c in scored.calls.items() if n in judges}
    own = {name: tokens for name, tokens in own.items() if config.llms[name].provider == "local"}
    own_flops = sum(2 * sizes.model(f"llms.{name}.model").num_params * tokens for name, tokens in own.items())
    length, token, row = config.corpus.sequence_length, _value("bytes a token"), _value("bytes a row")
    negatives = texts * config.score.num_rule_negatives if config.score.num_rule_negatives else 0
    predictions = sum(len(config.explainers) * g.work.num_sequences for g in graded.values())
    return StagePlan(
        "score",
        num_tokens=simulated.num_tokens + scored.num_tokens + sum(own.values()),
        flops=simulated.flops + scored.flops + own_flops,
        num_pairs=simulated.num_pairs,
        llm_calls=all_calls.num_calls,
        llm_tokens=llm_tokens,
        seconds=seconds,
        gpu_hours=service_gpu_hours(config, simulators | set(graded) | readers, llms | judges, seconds),
        num_bytes=simulated.num_bytes
        + negatives * (length * token + row)
        + predictions * (4 * length + row / 4)
        + llm_tokens * _value("bytes an LLM token")
        + scored.num_rows * row,
        usd=sum(usd_of(config.llms[name], scored.calls[name]) for name in judges),
    )


def assumptions(config: RunConfig, sizes: Sizes) -> list[str]:
    """What the plan takes for granted, a few words each; what is not known comes first."""
    said = [
        *sizes.notes,
        "every feature is live and finds all its records; every search makes all its rounds and every answer parses",
        f"without GPUs: {sizes.num_cores} cores, at the speeds measured on two (AVX2, fp32)",
    ]
    gpu_stages = [name for name in ("harvest", "index", "simulator", "llm") if getattr(config.resources, name).num_gpus]
    if gpu_stages:
        shares = ", ".join(f"{_value(f'gpu {kind}'):.0%} {kind}" for kind in ("subject", "encoder", "simulator", "llm"))
        said.append(
            f"GPU ({', '.join(gpu_stages)}): resources.gpu_tflops = {config.resources.gpu_tflops:g} at peak, of it "
            f"{shares}: assumed, not measured; a pool that may grow has grown"
        )
        if config.budget.usd_per_gpu_hour is None:
            said.append("dollars are the LLM's alone: budget.usd_per_gpu_hour is not set")
        if any(config.resources.simulator.num_gpus and isinstance(s, LLMSimulatorConfig) for s in _used(config)):
            said.append("a service holds its GPUs until the run ends, from the first stage that asks it")
    said.append(
        f"a feature is active at {density(config, sizes):.1%} of the tokens ({_value('l0'):g} features of an SAE at "
        f"each, max_density at most), {_value('bytes a non-zero')} bytes for each"
    )
    if math.isnan(sizes.model("index.embedder").d_model):
        said.append(f"sentence embeddings of {_value('vector'):g} numbers")
    asks = any(isinstance(arm, OneShotConfig) for arm in config.explainers.values())
    if asks or any(isinstance(scorer, JudgeConfig) for scorer in config.score.scorers.values()):
        said.append(
            f"LLM: {_value('prompt a token shown')} tokens for each token shown, {_value('rule'):g} for each rule "
            f"written; of an endpoint {_value('endpoint start')} s a call and {_value('endpoint writing'):g} tokens/s"
        )
    if any(isinstance(arm, TreeConfig) for arm in config.explainers.values()):
        said.append(f"a revision brings {_value('new rules'):.0%} new rules")
    starts = sum(START_SECONDS.values()) - (START_SECONDS["holistic"] if config.records.holistic == "none" else 0)
    said.append(f"starting workers and loading models: {starts} s in all, as in the demo; no download is counted")
    return said


def _used(config: RunConfig) -> list[SimulatorConfig]:
    names = _asked(config)[0] | set(config.score.simulators)
    names |= {scorer.simulator for scorer in config.score.scorers.values() if isinstance(scorer, SurprisalConfig)}
    return [config.simulators[name] for name in sorted(names)]
